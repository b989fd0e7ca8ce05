package main

import (
	"bytes"
	"errors"
	"strconv"
)

var errResponse = errors.New("not an HTTP/1.1 response this client understands")

// parseResponse looks at the start of b. size is the length of the whole response, head
// and body, once that is known and all of it is there; 0 means read on. body is where the
// body begins. It knows what the servers under test send: Content-Length and chunked
// bodies without trailers. A body that ends with the connection is an error, because the
// client measures kept-alive connections only.
func parseResponse(b []byte) (status, body, size int, err error) {
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 {
		return 0, 0, 0, nil
	}
	if end < 12 || !bytes.HasPrefix(b, []byte("HTTP/1.1 ")) {
		return 0, 0, 0, errResponse
	}
	if status, err = strconv.Atoi(string(b[9:12])); err != nil {
		return 0, 0, 0, errResponse
	}
	body = end + 4
	length, chunked, err := framing(b[:end+2])
	switch {
	case err != nil:
		return status, body, 0, err
	case chunked:
		n, err := chunksEnd(b[body:])
		if n == 0 || err != nil {
			return status, body, 0, err
		}
		return status, body, body + n, nil
	case length < 0:
		return status, body, 0, errResponse
	case len(b) < body+length:
		return status, body, 0, nil
	}
	return status, body, body + length, nil
}

// framing reads what the header says about the length of the body; -1 is nothing.
func framing(head []byte) (length int, chunked bool, err error) {
	length = -1
	for {
		i := bytes.Index(head, []byte("\r\n"))
		if i < 0 {
			return length, chunked, nil
		}
		line := head[:i]
		head = head[i+2:]
		switch {
		case len(line) > 15 && line[14] == ':' && bytes.EqualFold(line[:14], []byte("content-length")):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[15:]))); err != nil || length < 0 {
				return 0, false, errResponse
			}
		case len(line) > 18 && line[17] == ':' && bytes.EqualFold(line[:17], []byte("transfer-encoding")):
			chunked = bytes.EqualFold(bytes.TrimSpace(line[18:]), []byte("chunked"))
		}
	}
}

// chunksEnd returns the length of a complete chunked body, 0 while it is incomplete.
func chunksEnd(b []byte) (int, error) {
	at := 0
	for {
		i := bytes.Index(b[at:], []byte("\r\n"))
		if i < 0 {
			return 0, nil
		}
		n, err := strconv.ParseUint(string(b[at:at+i]), 16, 31)
		if err != nil {
			return 0, errResponse
		}
		at += i + 2 + int(n) + 2
		if at > len(b) {
			return 0, nil
		}
		if n == 0 {
			return at, nil
		}
	}
}
