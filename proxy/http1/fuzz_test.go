package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"slices"
	"testing"
)

func seedHeads(f *testing.F, add func(b []byte)) {
	for _, s := range []string{wrkRequest, post + "\r\n", post + "Content-Length: 3\r\n\r\nabc", post + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
		"GET http://a:1/x?y HTTP/1.1\r\nHost: A:1\r\n\r\n", "CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n\r\n", "OPTIONS * HTTP/1.0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\nX_Y: 1\r\nCookie: a\r\nCookie: b\r\n\r\n",
		"GET / HTTP/1.1\nHost: a\n\n", "\r\n", post + " x\r\n\r\n", post + "a b: c\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		add([]byte(s))
	}
}

// FuzzAgainstNetHTTP: what is accepted here is accepted by net/http, and both read the
// same request from the same bytes.
func FuzzAgainstNetHTTP(f *testing.F) {
	seedHeads(f, func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Request
		seen := 0
		n, err := r.Parse(b, &seen, Limits{})
		if err != nil {
			var refusal *Refusal
			if n != 0 || err != ErrShort && !errors.As(err, &refusal) {
				t.Fatalf("n %d, error %v", n, err)
			}
			return
		}
		if n == 0 || n > len(b) || !bytes.HasSuffix(b[:n], []byte("\r\n\r\n")) {
			t.Fatalf("head of %d bytes in %q", n, b)
		}
		// net/http stands the connection preface apart; it cannot be accepted here.
		rd := bufio.NewReaderSize(bytes.NewReader(b), len(b)+16)
		want, err := http.ReadRequest(rd)
		if err != nil {
			t.Fatalf("net/http refuses %q: %v", b[:n], err)
		}
		if got := rd.Buffered(); got != len(b)-n {
			t.Fatalf("head of %d bytes, net/http used %d", n, len(b)-got)
		}
		host := string(r.Host())
		if r.Form() == Authority {
			host = string(r.Target()) // net/http prefers the target
		}
		if r.Form() == Absolute {
			host = want.Host // the same but for case, which judgeHost checked
		}
		if string(r.Method()) != want.Method || string(r.Target()) != want.RequestURI || r.Minor() != want.ProtoMinor || host != want.Host {
			t.Fatalf("%q %q %q %d; net/http: %q %q %q %d", r.Method(), r.Target(), host, r.Minor(), want.Method, want.RequestURI, want.Host, want.ProtoMinor)
		}
		if r.ContentLength() != want.ContentLength {
			t.Fatalf("length %d, net/http %d in %q", r.ContentLength(), want.ContentLength, b[:n])
		}
		if r.KeepAlive() == want.Close {
			t.Fatalf("keep-alive %v, net/http close %v in %q", r.KeepAlive(), want.Close, b[:n])
		}
		fields := http.Header{}
		for i := range r.Len() {
			name, value := r.Field(i)
			fields.Add(string(name), string(value))
		}
		for _, moved := range []string{"Host", "Transfer-Encoding", "Trailer", "Content-Length"} { // net/http takes some out
			fields.Del(moved)
			want.Header.Del(moved)
		}
		delete(want.Header, "Cache-Control") // Pragma: no-cache adds one
		delete(fields, "Cache-Control")
		if len(fields) != len(want.Header) {
			t.Fatalf("fields %v, net/http %v", fields, want.Header)
		}
		for k, v := range fields {
			if !slices.Equal(v, want.Header[k]) {
				t.Fatalf("field %q is %q, net/http %q", k, v, want.Header[k])
			}
		}
	})
}

// FuzzSplit: cutting the bytes into two reads, or into single bytes, changes nothing.
func FuzzSplit(f *testing.F) {
	seedHeads(f, func(b []byte) { f.Add(b, uint16(len(b)/2)) })
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		lim := Limits{Head: 300, Fields: 8} // small, so that limits are hit
		whole := func(b []byte) (int, error) {
			var r Request
			seen := 0
			return r.Parse(b, &seen, lim)
		}
		n, err := whole(b)
		pieces := func(step func(at int) int) (int, error) {
			var r Request
			seen := 0
			for at := 0; ; {
				at = min(step(at), len(b))
				n, err := r.Parse(b[:at], &seen, lim)
				if err != ErrShort || at == len(b) {
					return n, err
				}
			}
		}
		check := func(how string, gotN int, got error) {
			if got == err && gotN == n {
				return
			}
			// A head that is not complete may be refused later; the same refusal must
			// then come as soon as a decision is forced.
			if got == ErrShort {
				seen := len(b)
				var r Request
				if _, forced := r.Parse(append(slices.Clip(b), '\n', '\n'), &seen, lim); forced == err {
					return
				}
			}
			t.Fatalf("%s: %d, %v; at once %d, %v for %q", how, gotN, got, n, err, b)
		}
		first := true
		gotN, got := pieces(func(at int) int {
			if first {
				first = false
				return int(cut)
			}
			return len(b)
		})
		check("two pieces", gotN, got)
		gotN, got = pieces(func(at int) int { return at + 1 })
		check("single bytes", gotN, got)
	})
}

// FuzzChunked: what is decoded here net/http decodes to the same body and rest, and the
// result does not depend on the pieces.
func FuzzChunked(f *testing.F) {
	for _, s := range []string{"3\r\nabc\r\n0\r\n\r\nGET", "1;a=b\r\nx\r\n00\r\nX: 1\r\nY:2\r\n\r\n", "fffffffffffffffff\r\n", "1\nx", "0\r\nHost: a\r\n\r\n"} {
		f.Add([]byte(s), uint8(1))
	}
	f.Fuzz(func(t *testing.T, b []byte, step uint8) {
		run := func(step int) (body []byte, used, trailers int, err error) {
			var d Chunked
			for at := 0; !d.Done(); {
				if at = min(at+step, len(b)); used == len(b) {
					return body, used, 0, ErrShort
				}
				for used < at && !d.Done() {
					data, n, err := d.Next(b[used:at])
					body = append(body, data...)
					used += n
					if err != nil {
						return body, used, 0, err
					}
				}
			}
			for i := range d.Trailers() {
				name, value := d.Trailer(i)
				trailers += len(name) + len(value)
			}
			return body, used, trailers, nil
		}
		body, used, trailers, err := run(max(len(b), 1))
		body2, used2, trailers2, err2 := run(int(step) + 1)
		if !bytes.Equal(body, body2) || used != used2 || err != err2 || trailers != trailers2 {
			t.Fatalf("pieces of %d: %q %d %v %d; at once %q %d %v %d", int(step)+1, body2, used2, err2, trailers2, body, used, err, trailers)
		}
		if err != nil {
			return
		}
		head := []byte(post + "Transfer-Encoding: chunked\r\n\r\n")
		rd := bufio.NewReaderSize(bytes.NewReader(append(head, b...)), len(head)+len(b)+16)
		req, rerr := http.ReadRequest(rd)
		if rerr != nil {
			t.Fatal(rerr)
		}
		want, rerr := io.ReadAll(req.Body)
		if rerr != nil || !bytes.Equal(want, body) {
			t.Fatalf("%q: body %q, net/http %q, %v", b, body, want, rerr)
		}
		if rest := rd.Buffered(); rest != len(b)-used {
			t.Fatalf("%q: %d bytes left, net/http %d", b, len(b)-used, rest)
		}
	})
}
