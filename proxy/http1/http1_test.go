package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestParseReadsARequest(t *testing.T) {
	const head = "GET /v1/variables/temperature?session=s&x=?1 HTTP/1.1\r\nHost: sidecar:80\r\nX-Session-Id:  s1 \r\n" +
		"Accept: a\r\naccept: b\r\nConnection: keep-alive, TE\r\nTE: trailers\r\n\r\n"
	var r Request
	seen := 0
	n, err := r.Parse([]byte(head+"GET "), &seen, Limits{})
	if err != nil || n != len(head) {
		t.Fatalf("n %d, err %v", n, err)
	}
	session, more := r.Get("x-session-id")
	_, moreAccept := r.Get("accept")
	absent, _ := r.Get("cookie")
	name, value := r.Field(2)
	got := fmt.Sprintf("%s %s %s %s %d %q %v %v %v %s=%s %d %v %v %q", r.Method(), r.Path(), r.Query(), r.Host(), r.Minor(), session, more,
		moreAccept, absent == nil, name, value, r.Len(), r.KeepAlive(), r.Simple(), r.Target())
	const want = `GET /v1/variables/temperature session=s&x=?1 sidecar:80 1 "s1" false true true Accept=a 6 true true "/v1/variables/temperature?session=s&x=?1"`
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	var c Request
	r.CopyTo(&c, []byte(head))
	if s, _ := c.Get("x-session-id"); string(s) != "s1" || string(c.Head()) != head {
		t.Errorf("the copy reads %q from %q", s, c.Head())
	}
}

func TestParseVerdicts(t *testing.T) {
	h := "\r\nHost: a\r\n"
	f := func(head string, want error) {
		t.Helper()
		var r Request
		seen := 0
		if _, err := r.Parse([]byte(head), &seen, Limits{}); err != want {
			t.Errorf("%.80q: got %v, want %v", head, err, want)
		}
	}
	f("", ErrShort)
	f("GET / HTTP/1.1\r\nHost: a\r\n", ErrShort)
	f("\r\nGET / HTTP/1.1"+h+"\r\n", ErrRequestLine)
	f("GET  / HTTP/1.1"+h+"\r\n", ErrRequestLine)
	f("GET /  HTTP/1.1"+h+"\r\n", ErrRequestLine)
	f("GET / HTTP/1.1 "+h+"\r\n", ErrRequestLine)
	f("GET\t/ HTTP/1.1"+h+"\r\n", ErrRequestLine)
	f("GET / http/1.1"+h+"\r\n", ErrRequestLine)
	f("GET / HTTP/1.x"+h+"\r\n", ErrRequestLine)
	f("GET / HTTP/1.11"+h+"\r\n", ErrRequestLine)
	f("GET /"+h+"\r\n", ErrRequestLine)
	f("GET / HTTP/2.0"+h+"\r\n", ErrVersion)
	f("GET / HTTP/0.9"+h+"\r\n", ErrVersion)
	f("GET /a#b HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET /a%2 HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET /a%zz HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET /a?%zz HTTP/1.1"+h+"\r\n", nil)
	f("GET /caf\xc3\xa9 HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET a HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET * HTTP/1.1"+h+"\r\n", ErrTarget)
	f("OPTIONS * HTTP/1.1"+h+"\r\n", nil)
	f("GET ftp://a/ HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET http://u@a/ HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET http:///x HTTP/1.1"+h+"\r\n", ErrTarget)
	f("GET http://A?x HTTP/1.1"+h+"\r\n", nil)
	f("GET HTTP://a HTTP/1.1"+h+"\r\n", nil)
	f("CONNECT a:443 HTTP/1.1"+h+"\r\n", nil)
	f("CONNECT [::1]:443 HTTP/1.1"+h+"\r\n", nil)
	f("CONNECT a HTTP/1.1"+h+"\r\n", ErrTarget)
	f("CONNECT /a HTTP/1.1"+h+"\r\n", ErrTarget)
	f("CONNECT a:443 HTTP/1.1"+h+"Content-Length: 3\r\n\r\n", ErrConnectBody)
	f("GET / HTTP/1.1\r\nHost:\r\n\r\n", ErrHostMissing)
	f("GET / HTTP/1.0\r\nHost:\r\n\r\n", ErrHost)
	f("GET / HTTP/1.0\r\n\r\n", nil)
	f("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", ErrHost)
	f("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", ErrHost)
	f("GET / HTTP/1.1\r\nHost: a:8x\r\n\r\n", ErrHost)
	f("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", ErrHost)
	f("GET / HTTP/1.1\r\nHost: [::1]x\r\n\r\n", ErrHost)
	f("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", nil)
	f("GET / HTTP/1.1"+h+": x\r\n\r\n", ErrFieldName)
	f("GET / HTTP/1.1"+h+"x\r\n\r\n", ErrFieldName)
	f("GET / HTTP/1.1"+h+"x\x00y: 1\r\n\r\n", ErrFieldName)
	f("GET / HTTP/1.1"+h+"caf\xc3\xa9: 1\r\n\r\n", ErrFieldName)
	f("GET / HTTP/1.1"+h+"x: caf\xc3\xa9\r\n\r\n", nil)
	f("GET / HTTP/1.1"+h+"x: 1\r\n\t2\r\n\r\n", ErrFold)
	f("GET / HTTP/1.1"+h+"x: 1\n\r\n\r\n", ErrBareLF)
	f("GET / HTTP/1.1"+h+"x: \x7f\r\n\r\n", ErrFieldValue)
	f("GET / HTTP/1.1"+h+"\r\r\n", ErrFieldName)
	f(post+"Content-Length: 1234567890123456789\r\n\r\n", ErrLength)
	f(post+"Content-Length: 1 2\r\n\r\n", ErrLength)
	f(post+"Transfer-Encoding: Chunked\r\n\r\n", nil)
	f(post+"Transfer-Encoding: chunked,\r\n\r\n", ErrTECoding)
	f(post+"Transfer-Encoding:\r\n\r\n", ErrTECoding)
	f(post+"Transfer_Encoding: chunked\r\n\r\n", ErrAlias)
	f(post+"X_Outrigger_Token: t\r\n\r\n", ErrAlias)
	f(post+"my_field: 1\r\nMY_FIELD: 2\r\n\r\n", nil)
	f(post+"my_field: 1\r\nmy-field: 2\r\n\r\n", ErrAlias)
	f(post+"Connection: X-Forwarded-For\r\n\r\n", ErrConnection)
	f(post+"Connection: x y\r\n\r\n", ErrConnection)
	f(post+"Connection: ,close, \r\nConnection: TE\r\nTE: trailers\r\n\r\n", nil)
	f(post+"Connection: absent\r\n\r\n", nil)
	f(post+"Expect: 100-Continue\r\nContent-Length: 1\r\n\r\n", nil)
	f(post+"Expect: 100-continue\r\nExpect: 100-continue\r\n\r\n", ErrTwice)
	f(post+"Trailer: Content-Length\r\n\r\n", ErrTrailerField)
	f(post+"Trailer: X-Sum\r\n\r\n", nil)
}

func TestLimits(t *testing.T) {
	var r Request
	base := "GET / HTTP/1.1\r\nHost: a\r\n"
	fits := base + "X: " + strings.Repeat("y", 100-len(base)-len("X: \r\n\r\n")) + "\r\n\r\n"
	parse := func(s string, l Limits) error {
		seen := 0
		_, err := r.Parse([]byte(s), &seen, l)
		return err
	}
	if err := parse(fits, Limits{Head: 100}); err != nil {
		t.Errorf("100 bytes: %v", err)
	}
	if err := parse(fits, Limits{Head: 99}); err != ErrHeadSize {
		t.Errorf("100 bytes with limit 99: %v", err)
	}
	if err := parse(strings.Repeat("A", defaultHead), Limits{}); err != ErrHeadSize {
		t.Errorf("endless line: %v", err)
	}
	many := base + strings.Repeat("X: y\r\n", MaxFields-1)
	if err := parse(many+"\r\n", Limits{}); err != nil {
		t.Errorf("128 fields: %v", err)
	}
	if err := parse(many+"X: y\r\n\r\n", Limits{}); err != ErrFieldNumber {
		t.Errorf("129 fields: %v", err)
	}
	if err := parse(base+"X: y\r\n\r\n", Limits{Fields: 1}); err != ErrFieldNumber {
		t.Errorf("2 fields with limit 1: %v", err)
	}
}

func TestConnectionSemantics(t *testing.T) {
	cases := []struct {
		head      string
		keepAlive bool
		expect    bool
		upgrade   Upgrade
		simple    bool
	}{
		{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", true, false, UpgradeNone, true},
		{"GET / HTTP/1.1\r\nHost: a\r\nConnection: CLOSE\r\n\r\n", false, false, UpgradeNone, true},
		{"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, close\r\n\r\n", false, false, UpgradeNone, true},
		{"GET / HTTP/1.0\r\n\r\n", false, false, UpgradeNone, false},
		{"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true, false, UpgradeNone, false},
		{"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n", true, true, UpgradeNone, false},
		{"PUT / HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n", false, false, UpgradeNone, false},
		{"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n\r\n", true, false, UpgradeWebSocket, false},
		{"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n", true, false, UpgradeOther, false},
		{"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket, h2c\r\n\r\n", true, false, UpgradeOther, false},
		{"POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", true, false, UpgradeOther, false},
		{"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", true, false, UpgradeNone, false},
	}
	for _, c := range cases {
		var r Request
		seen := 0
		if _, err := r.Parse([]byte(c.head), &seen, Limits{}); err != nil {
			t.Errorf("%q: %v", c.head, err)
			continue
		}
		if r.KeepAlive() != c.keepAlive || r.ExpectContinue() != c.expect || r.Upgrade() != c.upgrade || r.Simple() != c.simple {
			t.Errorf("%q: keep-alive %v expect %v upgrade %d simple %v", c.head, r.KeepAlive(), r.ExpectContinue(), r.Upgrade(), r.Simple())
		}
	}
}

func TestChunkedVerdicts(t *testing.T) {
	f := func(in, want string, wantErr error) {
		t.Helper()
		got, err := decode([]byte(in))
		if string(got) != want || err != wantErr {
			t.Errorf("%.60q: got %q, %v; want %q, %v", in, got, err, want, wantErr)
		}
	}
	f("5\r\nhello\r\n0\r\n\r\n", "hello", nil)
	f("5\r\nhello\r\n1;x=\"y\"\r\n!\r\n0;z\r\n\r\nGET", "hello!", nil)
	f("00a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n", "01234567890123456789", nil)
	f("5\r\nhel", "hel", io.ErrUnexpectedEOF)
	f("0\r\n", "", io.ErrUnexpectedEOF)
	f("\r\n", "", ErrChunkSize)
	f(" 1\r\nx\r\n0\r\n\r\n", "", ErrChunkSize)
	f("1 \r\nx\r\n0\r\n\r\n", "", ErrChunkSize)
	f("-1\r\n", "", ErrChunkSize)
	f("+1\r\n", "", ErrChunkSize)
	f("4000000000000000\r\n", "", ErrChunkSize)
	f("00000000000000001\r\n", "", ErrChunkSize)
	f("1;\x00\r\n", "", ErrChunkLine)
	f("1\r\rx", "", ErrChunkLine)
	f("1;"+strings.Repeat("a", maxExtensions)+"\r\nx", "", ErrChunkExt)
	f(strings.Repeat("1;"+strings.Repeat("a", 1023)+"\r\nx\r\n", 5), "xxxx", ErrChunkExt)
	f("1\r\nx\nx", "x", ErrChunkEnd)
	f("1\r\nx\r\r", "x", ErrChunkEnd)
	f("0\r\nX: 1\n\r\n", "", ErrBareLF)
	f("0\r\n\n", "", ErrBareLF)
	f("0\r\n X: 1\r\n\r\n", "", ErrFold)
	f("0\r\nX : 1\r\n\r\n", "", ErrColonSpace)
	f("0\r\nX_Y: 1\r\n\r\n", "", ErrTrailerField)
	f("0\r\nAuthorization: 1\r\n\r\n", "", ErrTrailerField)
	f("0\r\nX: "+strings.Repeat("a", maxTrailer), "", ErrTrailerSize)
	f("0\r\n"+strings.Repeat("X: a\r\n", maxTrailerFields+1), "", ErrTrailerSize)

	var d Chunked
	for range 2 { // the second time over used memory
		d.Reset()
		if _, n, err := d.Next([]byte("0\r\nA: 1\r\nX-Sum:  2 \r\n\r\nrest")); err != nil || n != 23 || !d.Done() || d.Trailers() != 2 {
			t.Fatalf("n %d, err %v, done %v, %d trailers", n, err, d.Done(), d.Trailers())
		}
		if name, value := d.Trailer(1); string(name) != "X-Sum" || string(value) != "2" {
			t.Errorf("trailer %q=%q", name, value)
		}
	}
}

func TestResponseWriters(t *testing.T) {
	var dates DateCache
	now := time.Date(2025, 3, 1, 12, 0, 0, 5, time.FixedZone("", 3600))
	b := AppendHead(nil, 200, "text/plain", 2, dates.At(now))
	b = append(b, "hi"...)
	b = AppendRefusal(b, ErrBareLF, dates.At(now.Add(time.Second)))
	rd := bufio.NewReader(bytes.NewReader(b))
	first, err := http.ReadResponse(rd, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(first.Body)
	if string(body) != "hi" || first.Header.Get("Date") != "Sat, 01 Mar 2025 11:00:00 GMT" || first.Header.Get("Content-Type") != "text/plain" {
		t.Errorf("%v %q", first.Header, body)
	}
	second, err := http.ReadResponse(rd, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ = io.ReadAll(second.Body)
	if second.StatusCode != 400 || !second.Close || !strings.Contains(string(body), `"bare_lf"`) || second.Header.Get("Date") != "Sat, 01 Mar 2025 11:00:01 GMT" {
		t.Errorf("%v %s", second, body)
	}
	got := string(AppendField(AppendField(AppendField(nil, "A", "b\r\nC: d\x00"), "bad name", "x"), "", "y"))
	if got != "A: b  C: d \r\n" {
		t.Errorf("fields %q", got)
	}
	if got := string(AppendStatus(AppendStatus(nil, 7), 299)); got != "HTTP/1.1 500 Internal Server Error\r\nHTTP/1.1 299 \r\n" {
		t.Errorf("status lines %q", got)
	}
	if got := string(AppendChunkSize(nil, 4097)); got != "1001\r\n" {
		t.Errorf("chunk size %q", got)
	}
}

func TestRefusalsAreDistinct(t *testing.T) {
	words := map[string]bool{}
	for _, r := range Refusals() {
		if words[r.Word] || r.Word == "" || r.Status < 400 || strings.ContainsAny(r.Text+r.Word, "\"\\\n") {
			t.Errorf("refusal %+v", r)
		}
		words[r.Word] = true
		answer, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(AppendRefusal(nil, r, nil))), nil)
		if err != nil || answer.StatusCode != r.Status {
			t.Errorf("%s: %v, %v", r.Word, answer, err)
		}
	}
	if got := string(AppendRefusal(nil, errors.New("secret"), nil)); strings.Contains(got, "secret") {
		t.Error("an unknown error is quoted to the client")
	}
}

// wrkRequest is what common load generators and clients send.
const wrkRequest = "GET /v1/variables/temperature?session=s1 HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\nX-Session-Id: s1\r\n\r\n"

func TestNoAllocations(t *testing.T) {
	var r Request
	var d Chunked
	var dates DateCache
	b, out := []byte(wrkRequest), make([]byte, 0, 4096)
	body := []byte("5;x\r\nhello\r\n0\r\n\r\n")
	now := time.Unix(1e9, 0)
	if n := testing.AllocsPerRun(200, func() {
		seen := 0
		if _, err := r.Parse(b[:20], &seen, Limits{}); err != ErrShort {
			t.Fatal(err)
		}
		if _, err := r.Parse(b, &seen, Limits{}); err != nil {
			t.Fatal(err)
		}
		r.Get("x-session-id")
		d.Reset()
		d.Next(body)
		now = now.Add(time.Second)
		out = AppendRefusal(AppendHead(out[:0], 404, "text/plain", 5, dates.At(now)), ErrHost, nil)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkParse(b *testing.B) {
	var r Request
	in := []byte(wrkRequest)
	b.ReportAllocs()
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		seen := 0
		if _, err := r.Parse(in, &seen, Limits{}); err != nil {
			b.Fatal(err)
		}
	}
}
