package main

import (
	"strings"
	"testing"
)

func TestParseResponse(t *testing.T) {
	const fixed = "HTTP/1.1 200 OK\r\nServer: x\r\ncontent-LENGTH:  5 \r\nX: y\r\n\r\nhello"
	const chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\nA\r\n0123456789\r\n0\r\n\r\n"
	for _, c := range []struct {
		name, in     string
		status, size int
	}{
		{"fixed length", fixed, 200, len(fixed)},
		{"with the next one behind", fixed + fixed, 200, len(fixed)},
		{"chunked", chunked, 200, len(chunked)},
		{"empty", "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", 503, 38},
	} {
		status, body, size, err := parseResponse([]byte(c.in))
		if err != nil || status != c.status || size != c.size || !strings.HasSuffix(c.in[:body], "\r\n\r\n") {
			t.Errorf("%s: status %d, body at %d, size %d, %v", c.name, status, body, size, err)
		}
		// Every proper beginning of it is incomplete, never wrong.
		for i := range c.size {
			if _, _, size, err := parseResponse([]byte(c.in[:i])); size != 0 || err != nil {
				t.Errorf("%s cut to %d bytes: size %d, %v", c.name, i, size, err)
			}
		}
	}
	for _, bad := range []string{
		"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
		"HTTP/1.1 2x0 OK\r\nContent-Length: 1\r\n\r\nx",
		"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1z\r\n\r\n",
		"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"\r\n\r\n",
	} {
		if _, _, size, err := parseResponse([]byte(bad)); err == nil || size != 0 {
			t.Errorf("%q: size %d, %v", bad, size, err)
		}
	}
}

func FuzzParseResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		status, body, size, err := parseResponse(in)
		if err != nil || size == 0 {
			return
		}
		if size > len(in) || body > size {
			t.Fatalf("body at %d, size %d of %d bytes", body, size, len(in))
		}
		// What follows a response does not change what it is.
		s2, b2, z2, err := parseResponse(in[:size])
		if err != nil || s2 != status || b2 != body || z2 != size {
			t.Fatalf("alone it is %d %d %d %v, before %d %d %d", s2, b2, z2, err, status, body, size)
		}
	})
}
