package http2

import (
	"context"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What a client says while there is more to send than it takes is heard once it has taken
// that, and not only when it says more: credit it gives then may be all that it will ever say.
func TestHeardAfterPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total = 8 * maxOut
		more := make(chan struct{})
		s, err := New(Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for left, n := total, 16<<10; left > 0; left -= n {
				if _, err := w.Write(make([]byte, n)); err != nil {
					t.Error(err)
					return
				}
				w.(http.Flusher).Flush()
				<-more // the first is being sent by somebody else, while this goes on
			}
		})})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		c, accepted := net.Pipe() // it holds nothing: what is not read is not written
		ran := make(chan error, 1)
		go func() { ran <- s.Run(ctx, &single{conn: accepted, shut: ctx.Done()}) }()
		r := &raw{t: t, Conn: c, Framer: xhttp2.NewFramer(c, c)}
		r.enc = hpack.NewEncoder(&r.buf)
		go func() {
			r.hello(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: total / 2})
			r.must(r.WriteWindowUpdate(0, total))
			r.request(1, true, get...)
		}()
		r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameHeaders })
		synctest.Wait()
		close(more)
		synctest.Wait() // more waits to be sent than may
		r.must(r.WriteWindowUpdate(1, total/2))
		synctest.Wait() // read, and left for later
		begin, got := time.Now(), 0
		r.until(func(f xhttp2.Frame) bool {
			if d, ok := f.(*xhttp2.DataFrame); ok {
				got += len(d.Data())
				return d.StreamEnded()
			}
			return false
		})
		if took := time.Since(begin); got != total || took != 0 {
			t.Errorf("%d of %d bytes came, in %v; want all, at once", got, total, took)
		}
		c.Close()
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
}

// single is a listener that accepts one connection.
type single struct {
	conn net.Conn
	shut <-chan struct{}
}

func (s *single) Accept() (net.Conn, error) {
	if c := s.conn; c != nil {
		s.conn = nil
		return c, nil
	}
	<-s.shut
	return nil, net.ErrClosed
}

func (s *single) Close() error   { return nil }
func (s *single) Addr() net.Addr { return &net.TCPAddr{} }
