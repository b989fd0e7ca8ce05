package http2

import (
	"errors"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
)

// A client that stops in the middle of a frame, of a header block, or altogether is let go.
func TestSilence(t *testing.T) {
	// Long enough for a client on a busy machine to get as far as it wants.
	s, address, _ := serve(t, Options{HeaderTimeout: time.Second, IdleTimeout: 1500 * time.Millisecond})
	t.Run("cases", func(t *testing.T) { silences(t, address) })
	if n := s.Counts().Abused; n != 0 {
		t.Errorf("%d connections are counted as abusive", n)
	}
}

func silences(t *testing.T, address string) {
	for name, begin := range map[string]func(r *raw){
		"preface":  func(r *raw) { _, _ = r.Conn.Write([]byte(preface[:10])) },
		"settings": func(r *raw) { _, _ = r.Conn.Write([]byte(preface)) },
		"frame":    func(r *raw) { _, _ = r.hello().Conn.Write([]byte{0, 0, 9, 0}) },
		"block": func(r *raw) {
			r.must(r.hello().WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(get...)}))
		},
		"idle": func(r *raw) { r.hello() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := dialRaw(t, address)
			begin(r)
			if code := r.goAway(); code != xhttp2.ErrCodeNo {
				t.Errorf("ended with %v", code)
			}
			if _, err := io.Copy(io.Discard, r.Conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection stays open")
			}
		})
	}
}

// A body that stops coming fails its handler's read; an answer nobody takes loses its
// stream; both leave the connection alone. Calls of gRPC have neither limit.
func TestStalls(t *testing.T) {
	got := make(chan error, 1)
	_, address, _ := serve(t, Options{BodyTimeout: 30 * time.Millisecond, WriteTimeout: 30 * time.Millisecond,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/body":
				_, err := io.ReadAll(r.Body)
				got <- err
			case "/answer":
				_, err := w.Write(make([]byte, 100<<10))
				got <- err
			}
		})})
	r := dialRaw(t, address).hello(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 10})
	r.request(1, false, ":method", "POST", ":scheme", "http", ":path", "/body", ":authority", "x")
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stalled body gave %v", err)
	}
	r.request(3, true, ":method", "GET", ":scheme", "http", ":path", "/answer", ":authority", "x")
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stalled answer gave %v", err)
	}
	if f := r.until(func(f xhttp2.Frame) bool { return f.Header().StreamID == 3 && f.Header().Type == xhttp2.FrameRSTStream }); f == nil {
		t.Fatal("the stream was not reset")
	}
	r.request(5, false, ":method", "POST", ":scheme", "http", ":path", "/body", ":authority", "x", "content-type", "application/grpc")
	r.alive(7)
	select {
	case err := <-got:
		t.Errorf("a silent call ended with %v", err)
	default:
	}
	r.must(r.WriteData(5, true, nil))
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// More than the window of a stream or of the connection is refused; what nobody reads is
// no more than the windows.
func TestWindows(t *testing.T) {
	hold := make(chan struct{})
	_, address, _ := serve(t, Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			<-hold
		}
	})})
	defer close(hold)
	post := []string{":method", "POST", ":scheme", "http", ":path", "/", ":authority", "x"}
	chunk := make([]byte, maxFrame)
	r := dialRaw(t, address).hello()
	r.request(1, false, post...)
	for range streamWindow/maxFrame + 1 {
		r.must(r.WriteData(1, false, chunk))
	}
	f := r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameRSTStream })
	if f == nil || f.(*xhttp2.RSTStreamFrame).ErrCode != xhttp2.ErrCodeFlowControl {
		t.Fatalf("beyond the stream's window: %v", f)
	}
	r.alive(3)
	r = dialRaw(t, address).hello()
	go func() {
		for id := uint32(1); ; id += 2 {
			if r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(post...), EndHeaders: true}) != nil {
				return
			}
			for range streamWindow / maxFrame {
				if r.WriteData(id, false, chunk) != nil {
					return
				}
			}
		}
	}()
	if code := r.goAway(); code != xhttp2.ErrCodeFlowControl {
		t.Errorf("beyond the connection's window: %v", code)
	}
}

// Fields beyond the limit are answered, and the connection's table stays right.
func TestTooManyFields(t *testing.T) {
	_, address, _ := serve(t, Options{})
	r := dialRaw(t, address).hello()
	fields := append([]string(nil), get...)
	for len(fields) < 4000 {
		fields = append(fields, "x-again", "always the same value, so that the block is short")
	}
	block := r.block(fields...)
	r.must(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true, EndStream: true}))
	f := r.until(func(f xhttp2.Frame) bool { return f.Header().StreamID == 1 })
	h, ok := f.(*xhttp2.HeadersFrame)
	if !ok || string(h.HeaderBlockFragment()[2:5]) != "431" {
		t.Fatalf("%v", f)
	}
	r.alive(3)
}
