package http1

import (
	"bufio"
	"bytes"
	"errors"
	"net/http"
	"testing"
)

func seedAnswers(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
		"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"HTTP/1.0 404 Not Found\r\nConnection: keep-alive, x\r\n\r\n",
		"HTTP/1.1 204 \r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 304 x\r\nContent-Length: 9\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.1 200 OK\nA: b\n\n", "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", "HTTP/2.0 200 OK\r\n\r\n", "\r\n",
	} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
}

// FuzzAnswer: what is accepted here is accepted by net/http, which finds the same status,
// fields, framing and end of the connection in the same bytes; and it does not matter how
// the bytes were cut into reads.
func FuzzAnswer(f *testing.F) {
	seedAnswers(f)
	f.Fuzz(func(t *testing.T, b []byte, isHead bool) {
		method := "POST"
		if isHead {
			method = "HEAD"
		}
		var a, pieces Answer
		seen, cut := 0, 0
		n, err := a.Parse(b, &seen, method, Limits{})
		for m := range len(b) + 1 {
			pn, perr := pieces.Parse(b[:m], &cut, method, Limits{})
			if perr == ErrShort {
				continue
			}
			if perr == nil && (err != nil || pn != n) {
				t.Fatalf("whole: %d, %v; in pieces %d, %v", n, err, pn, perr)
			}
			if perr != nil && err == nil {
				t.Fatalf("accepted whole, %v in pieces", perr)
			}
			break
		}
		if err != nil {
			var refusal *Refusal
			if err != ErrShort && !errors.As(err, &refusal) {
				t.Fatalf("n %d, error %v", n, err)
			}
			return
		}
		rd := bufio.NewReaderSize(bytes.NewReader(b), len(b)+16)
		want, err := http.ReadResponse(rd, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("net/http refuses %q: %v", b[:n], err)
		}
		if a.Status() != want.StatusCode || a.Minor() != want.ProtoMinor {
			t.Fatalf("%d %d; net/http %d %d", a.Status(), a.Minor(), want.StatusCode, want.ProtoMinor)
		}
		if a.KeepAlive() && want.Close {
			t.Fatalf("kept, net/http closes after %q", b[:n])
		}
		length := a.Length()
		if length == Unframed {
			length = -1
		}
		if !isHead && bodyOf(want.StatusCode) && length != want.ContentLength {
			t.Fatalf("length %d, net/http %d in %q", length, want.ContentLength, b[:n])
		}
		if (a.Length() == -1) != (len(want.TransferEncoding) > 0) && !isHead && bodyOf(want.StatusCode) {
			t.Fatalf("chunked differs in %q: %v", b[:n], want.TransferEncoding)
		}
		fields := http.Header{}
		head := string(a.Head())
		for i := range a.Len() {
			fields.Add(a.FieldIn(head, i))
		}
		for name, values := range want.Header {
			if name != "Content-Length" && len(fields[name]) != len(values) {
				t.Fatalf("%s: %q, net/http %q", name, fields[name], values)
			}
		}
	})
}

func bodyOf(status int) bool { return status >= 200 && status != 204 && status != 304 }

func TestAnswerAllocates(t *testing.T) {
	b := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: now\r\nContent-Length: 2\r\n\r\n{}")
	var a Answer
	if n := testing.AllocsPerRun(100, func() {
		seen := 0
		if n, err := a.Parse(b, &seen, "POST", Limits{}); n != len(b)-2 || err != nil {
			t.Fatal(n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
