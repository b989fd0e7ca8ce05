package http2

import (
	"bytes"
	"net"
	"net/http"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// raw is a client that sends what it is told, right or wrong.
type raw struct {
	t testing.TB
	net.Conn
	*xhttp2.Framer
	enc *hpack.Encoder
	buf bytes.Buffer
}

func dialRaw(t testing.TB, address string) *raw {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	r := &raw{t: t, Conn: c, Framer: xhttp2.NewFramer(c, c)}
	r.Framer.AllowIllegalWrites, r.Framer.AllowIllegalReads = true, true
	r.enc = hpack.NewEncoder(&r.buf)
	return r
}

// hello begins the connection.
func (r *raw) hello(settings ...xhttp2.Setting) *raw {
	r.t.Helper()
	_, err := r.Conn.Write([]byte(preface))
	r.must(err)
	r.must(r.WriteSettings(settings...))
	return r
}

func (r *raw) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// block encodes name, value, name, value…
func (r *raw) block(fields ...string) []byte {
	r.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		r.must(r.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return append([]byte(nil), r.buf.Bytes()...)
}

var get = []string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "x"}

// request opens a stream with the given fields, all of it in one frame.
func (r *raw) request(id uint32, end bool, fields ...string) {
	r.t.Helper()
	r.must(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(fields...), EndHeaders: true, EndStream: end}))
}

// until reads frames until want says so and returns that frame; nil when the connection
// has ended.
func (r *raw) until(want func(f xhttp2.Frame) bool) xhttp2.Frame {
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return nil
		}
		if want(f) {
			return f
		}
	}
}

// goAway returns the code the connection is ended with, and fails if it is not.
func (r *raw) goAway() xhttp2.ErrCode {
	r.t.Helper()
	f := r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameGoAway })
	if f == nil {
		r.t.Fatal("the connection ended without GOAWAY")
	}
	return f.(*xhttp2.GoAwayFrame).ErrCode
}

// alive checks that the connection still serves.
func (r *raw) alive(id uint32) {
	r.t.Helper()
	r.request(id, true, get...)
	if f := r.until(func(f xhttp2.Frame) bool { return f.Header().StreamID == id }); f == nil || f.Header().Type != xhttp2.FrameHeaders {
		r.t.Fatalf("the connection does not serve any more: %v", f)
	}
}

// Frames that move no call forward are survived in the numbers programs use, and end the
// connection when there is no end to them.
func TestFloods(t *testing.T) {
	block := make(chan struct{})
	s, address, _ := serve(t, Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			select {
			case <-block:
			case <-r.Context().Done():
			}
		}
	})})
	defer close(block)
	opened := func(r *raw) {
		r.request(1, false, ":method", "POST", ":scheme", "http", ":path", "/wait", ":authority", "x")
	}
	for _, c := range []struct {
		name  string
		begin func(r *raw)
		send  func(r *raw, i int) error
	}{
		{"rapid reset", nil, func(r *raw, i int) error {
			id := uint32(2*i + 1)
			if err := r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(append(get[:4:4], ":path", "/wait")...), EndHeaders: true, EndStream: true}); err != nil {
				return err
			}
			return r.WriteRSTStream(id, xhttp2.ErrCodeCancel)
		}},
		{"refused streams", nil, func(r *raw, i int) error {
			return r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: r.block(append(get[:4:4], ":path", "/wait")...), EndHeaders: true, EndStream: true})
		}},
		{"malformed streams", nil, func(r *raw, i int) error {
			return r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: r.block(":method", "GET"), EndHeaders: true, EndStream: true})
		}},
		{"PING", nil, func(r *raw, i int) error { return r.WritePing(false, [8]byte{byte(i)}) }},
		{"PING answers", nil, func(r *raw, i int) error { return r.WritePing(true, [8]byte{byte(i)}) }},
		{"SETTINGS", nil, func(r *raw, _ int) error { return r.WriteSettings() }},
		{"PRIORITY", nil, func(r *raw, i int) error {
			return r.WritePriority(uint32(2*i+1), xhttp2.PriorityParam{Weight: 1})
		}},
		{"empty DATA", opened, func(r *raw, _ int) error { return r.WriteData(1, false, nil) }},
		{"padding", opened, func(r *raw, _ int) error { return r.WriteDataPadded(1, false, nil, make([]byte, 100)) }},
		{"WINDOW_UPDATE", opened, func(r *raw, _ int) error { return r.WriteWindowUpdate(1, 1) }},
		{"unknown frames", nil, func(r *raw, _ int) error { return r.WriteRawFrame(0xbe, 0, 0, nil) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := s.Counts().Abused
			r := dialRaw(t, address).hello()
			if c.begin != nil {
				c.begin(r)
			}
			sent := make(chan int)
			go func() {
				i := 0
				for ; i < 2_000_000 && c.send(r, i) == nil; i++ {
				}
				sent <- i
			}()
			if code := r.goAway(); code != xhttp2.ErrCodeEnhanceYourCalm {
				t.Errorf("ended with %v", code)
			}
			r.Close()
			if n := <-sent; n < 1000 {
				t.Errorf("ended after %d frames only", n)
			}
			if got := s.Counts().Abused; got != before+1 {
				t.Errorf("%d connections are counted as abusive, not one", got-before)
			}
		})
	}
}

// A header block without an end is refused, in large pieces and in empty ones.
func TestContinuationFlood(t *testing.T) {
	_, address, _ := serve(t, Options{})
	for name, piece := range map[string][]byte{"large": bytes.Repeat([]byte{0x80 | 2}, 16<<10), "empty": nil} {
		t.Run(name, func(t *testing.T) {
			r := dialRaw(t, address).hello()
			r.must(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(get...)}))
			go func() {
				for range 10_000 {
					if r.WriteContinuation(1, false, piece) != nil {
						return
					}
				}
			}()
			if code := r.goAway(); code != xhttp2.ErrCodeEnhanceYourCalm {
				t.Errorf("ended with %v", code)
			}
		})
	}
}

// static answers every call of one path from memory.
type static struct{ body []byte }

func (static) Class(h *Head) int {
	if h.Path == "/hit" {
		return 1
	}
	return 0
}

func (s static) Answer(_ int, body []byte, a *Answer) bool {
	if string(body) != "question" {
		return false
	}
	a.Block = AppendField(AppendStatus(a.Block, 200), "content-type", "text/plain")
	a.Body = s.body
	a.Trailer = trailer
	return true
}

var trailer = AppendField(nil, "sum", "7")

// nowhere takes what is written.
type nowhere struct {
	net.Conn
	n int
}

func (w *nowhere) Write(p []byte) (int, error)    { w.n += len(p); return len(p), nil }
func (*nowhere) Close() error                     { return nil }
func (*nowhere) SetWriteDeadline(time.Time) error { return nil }
func (*nowhere) SetReadDeadline(time.Time) error  { return nil }
func (*nowhere) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*nowhere) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

// A call answered from memory allocates nothing once its head is known, and all answers
// to what was read together leave together.
func TestInlineAllocatesNothing(t *testing.T) {
	s, err := New(Options{Handler: http.HandlerFunc(echo), Inline: static{body: make([]byte, 200)}})
	if err != nil {
		t.Fatal(err)
	}
	out := &nowhere{}
	c := newConn(&run{s: s, base: t.Context()}, out)
	c.buf = make([]byte, maxBuffer)
	feed := func(b []byte) {
		c.start, c.end = 0, copy(c.buf, b)
		if !c.work() {
			t.Fatal("the connection ended")
		}
	}
	r := &raw{t: t}
	r.enc = hpack.NewEncoder(&r.buf)
	hit := []string{":method", "POST", ":scheme", "http", ":path", "/hit", ":authority", "x"}
	r.block(hit...)
	first := append([]byte(nil), r.buf.Bytes()...)
	again := r.block(hit...)
	const streams = 16
	frames := make([]byte, 0, 4096)
	id := uint32(1)
	batch := func(n int, block []byte) []byte {
		frames = frames[:0]
		for range n {
			frames = appendFields(frames, id, 0, block, maxFrame)
			frames = append(appendHead(frames, 8, frameData, flagEndStream, id), "question"...)
			id += 2
		}
		return appendWindow(frames, 0, n*200)
	}
	feed(append([]byte(preface), appendHead(nil, 0, frameSettings, 0, 0)...))
	feed(batch(1, first))
	feed(batch(streams, again))
	before := out.n
	if got := testing.AllocsPerRun(500, func() { feed(batch(streams, again)) }); got != 0 {
		t.Errorf("%v allocations for %d calls", got, streams)
	}
	if want := int64(1 + streams*502); s.Counts().Inline != want {
		t.Errorf("%d answered inline, want %d", s.Counts().Inline, want)
	}
	if out.n-before < 501*streams*200 {
		t.Errorf("%d bytes sent", out.n-before)
	}
}
