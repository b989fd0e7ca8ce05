package http1

import (
	"io"
	"testing"
)

// post is the start of a request whose framing the cases vary.
const post = "POST /v1/x HTTP/1.1\r\nHost: a\r\n"

// TestDesyncCases is the policy for the 36 ways in which two receivers are known to
// disagree about a message, one line each: what is sent, and the refusal, or nil with how
// the message is then understood. Every refusal closes the connection.
func TestDesyncCases(t *testing.T) {
	type accepted func(t *testing.T, r *Request)
	framed := func(length int64) accepted {
		return func(t *testing.T, r *Request) {
			if r.ContentLength() != length || r.Simple() {
				t.Errorf("length %d, simple %v; want length %d and not simple", r.ContentLength(), r.Simple(), length)
			}
		}
	}
	cases := []struct {
		name, head string
		want       error
		then       accepted
		body       string // decoded as chunked when the head is accepted
		wantBody   error
	}{
		// Framing by Transfer-Encoding.
		{name: "1 TE unknown", head: post + "Transfer-Encoding: xchunked\r\n\r\n", want: ErrTECoding},
		{name: "2 TE list", head: post + "Transfer-Encoding: gzip, chunked\r\n\r\n", want: ErrTECoding},
		{name: "3 TE twice", head: post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", want: ErrTETwice},
		{name: "4 TE space before colon", head: post + "Transfer-Encoding : chunked\r\n\r\n", want: ErrColonSpace},
		{name: "5 TE after vertical tab", head: post + "Transfer-Encoding:\vchunked\r\n\r\n", want: ErrFieldValue},
		// Framing by Content-Length.
		{name: "6 CL differing", head: post + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", want: ErrLengthTwice},
		{name: "7 CL list", head: post + "Content-Length: 1, 1\r\n\r\n", want: ErrLength},
		{name: "8 CL plus", head: post + "Content-Length: +1\r\n\r\n", want: ErrLength},
		{name: "9 CL minus", head: post + "Content-Length: -1\r\n\r\n", want: ErrLength},
		{name: "10 CL hex", head: post + "Content-Length: 0x1\r\n\r\n", want: ErrLength},
		{name: "11 CL empty", head: post + "Content-Length:\r\n\r\n", want: ErrLength},
		// Bytes and lines.
		{name: "12 bare CR", head: post + "X: a\rContent-Length: 5\r\n\r\n", want: ErrFieldValue},
		{name: "13 NUL", head: post + "X: a\x00b\r\n\r\n", want: ErrFieldValue},
		{name: "14 leading-space header", head: "POST / HTTP/1.1\r\n Host: a\r\n\r\n", want: ErrFold},
		{name: "15 two Hosts", head: post + "Host: b\r\n\r\n", want: ErrHostTwice},
		{name: "16 no Host", head: "GET / HTTP/1.1\r\n\r\n", want: ErrHostMissing},
		{name: "17 method with space", head: "GE T / HTTP/1.1\r\nHost: a\r\n\r\n", want: ErrRequestLine},
		// Chunked bodies.
		{name: "18 trailer CL", head: post + "Transfer-Encoding: chunked\r\n\r\n", then: framed(-1), body: "0\r\nContent-Length: 5\r\n\r\n", wantBody: ErrTrailerField},
		{name: "19 chunk-ext LF", head: post + "Transfer-Encoding: chunked\r\n\r\n", then: framed(-1), body: "1;a\nb\r\nx\r\n0\r\n\r\n", wantBody: ErrChunkLine},
		{name: "20 chunk-size LF", head: post + "Transfer-Encoding: chunked\r\n\r\n", then: framed(-1), body: "1\nx\r\n0\r\n\r\n", wantBody: ErrChunkLine},
		{name: "21 size overflow", head: post + "Transfer-Encoding: chunked\r\n\r\n", then: framed(-1), body: "10000000000000001\r\nx\r\n0\r\n\r\n", wantBody: ErrChunkSize},
		{name: "22 size 0x", head: post + "Transfer-Encoding: chunked\r\n\r\n", then: framed(-1), body: "0x1\r\nx\r\n0\r\n\r\n", wantBody: ErrChunkSize},
		{name: "23 chunk without CRLF", head: post + "Transfer-Encoding: chunked\r\n\r\n", then: framed(-1), body: "1\r\nx0\r\n\r\n", wantBody: ErrChunkEnd},
		// What a lenient proxy normalises.
		{name: "24 CL with TE", head: post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", want: ErrLengthAndTE},
		// A tab is optional white space (RFC 9110 §5.6.3); the value is exactly chunked.
		{name: "25 TE after tab", head: post + "Transfer-Encoding:\tchunked\r\n\r\n", then: framed(-1), body: "1\r\nx\r\n0\r\n\r\n"},
		{name: "26 TE folded", head: post + "Transfer-Encoding:\r\n chunked\r\n\r\n", want: ErrTECoding},
		{name: "27 Connection names Content-Length", head: post + "Connection: Content-Length\r\nContent-Length: 5\r\n\r\n", want: ErrConnection},
		{name: "28 TE on HTTP/1.0", head: "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", want: ErrTEOld},
		{name: "29 CL twice, equal", head: post + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n", want: ErrLengthTwice},
		{name: "30 bare LF", head: "POST / HTTP/1.1\nHost: a\n\n", want: ErrBareLF},
		// Allowed by RFC 9110 §9.3.1 and used by search APIs. The framing is kept and the
		// request is never Simple, so no cached answer is given for it.
		{name: "31 GET with body", head: "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", then: framed(5)},
		{name: "32 absolute target against Host", head: "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", want: ErrHostMismatch},
		// What a lenient proxy forwards.
		// RFC 9110 §7.8: an upgrade may be ignored. UpgradeOther tells the server to drop it.
		{name: "33 Upgrade h2c", head: "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
			then: func(t *testing.T, r *Request) {
				if r.Upgrade() != UpgradeOther || r.Simple() {
					t.Errorf("upgrade %d, simple %v", r.Upgrade(), r.Simple())
				}
			}},
		{name: "34 Connection names X-Session", head: "GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Session\r\nX-Session: s\r\n\r\n", want: ErrConnection},
		{name: "35 X_Session beside X-Session", head: "GET / HTTP/1.1\r\nHost: a\r\nX-Session: s\r\nX_Session: t\r\n\r\n", want: ErrAlias},
		{name: "36 odd Expect", head: post + "Expect: 200-ok\r\nContent-Length: 1\r\n\r\n", want: ErrExpect},
	}
	if len(cases) != 36 {
		t.Fatalf("%d cases, want 36", len(cases))
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var r Request
			seen := 0
			n, err := r.Parse([]byte(c.head), &seen, Limits{})
			if err != c.want {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil {
				return
			}
			if n != len(c.head) {
				t.Fatalf("head of %d bytes, want %d", n, len(c.head))
			}
			c.then(t, &r)
			if c.body == "" {
				return
			}
			if _, err := decode([]byte(c.body)); err != c.wantBody {
				t.Errorf("body: got %v, want %v", err, c.wantBody)
			}
		})
	}
}

// decode runs the decoder over b; io.ErrUnexpectedEOF when the body does not end in b.
func decode(b []byte) ([]byte, error) {
	var d Chunked
	var out []byte
	for !d.Done() {
		data, n, err := d.Next(b)
		if err != nil {
			return out, err
		}
		out = append(out, data...)
		if n == 0 {
			return out, io.ErrUnexpectedEOF
		}
		b = b[n:]
	}
	return out, nil
}
