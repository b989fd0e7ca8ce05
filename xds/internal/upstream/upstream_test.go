package upstream

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
)

type closing struct {
	err    error
	closed int
}

func (c *closing) Close() error { c.closed++; return c.err }

// Why following ended is said by whoever knows: the dialler, the clock of the first sync, the
// caller's context, or the stream.
func TestFollow(t *testing.T) {
	errDial, errRun, errClose := errors.New("dial"), errors.New("run"), errors.New("close")
	untilEnd := func(ctx context.Context, _ func()) error { <-ctx.Done(); return ctx.Err() }
	for _, tt := range []struct {
		name  string
		dial  error
		close error
		run   func(ctx context.Context, inSync func()) error
		want  []error // each of which the result is, by errors.Is
		after time.Duration
	}{
		{name: "no connection", dial: errDial, want: []error{errDial}},
		{name: "no first sync", run: untilEnd, want: []error{errSync}, after: SyncTimeout},
		{name: "in sync, then cut", run: func(ctx context.Context, inSync func()) error {
			inSync()
			return untilEnd(ctx, inSync)
		}, want: []error{context.DeadlineExceeded}, after: time.Hour},
		{name: "ended", run: func(context.Context, func()) error { return errRun }, want: []error{errRun}},
		{name: "ended, and not closed", close: errClose, run: func(context.Context, func()) error { return errRun }, want: []error{errRun, errClose}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				c := &closing{err: tt.close}
				start := time.Now()
				err := Follow(ctx, func(context.Context) (grpc.ClientConnInterface, io.Closer, error) { return nil, c, tt.dial },
					func(ctx context.Context, _ grpc.ClientConnInterface, inSync func()) error { return tt.run(ctx, inSync) })
				for _, want := range tt.want {
					if !errors.Is(err, want) {
						t.Errorf("%v, want %v", err, want)
					}
				}
				if elapsed := time.Since(start); elapsed != tt.after {
					t.Errorf("after %v, want %v", elapsed, tt.after)
				}
				if closed := c.closed == 1; closed != (tt.dial == nil) {
					t.Errorf("closed %d times", c.closed)
				}
			})
		})
	}
	if !outrigger.IsKind(errSync, outrigger.Timeout) {
		t.Errorf("kind of %v", errSync)
	}
}

type talking struct {
	Stream
	left int
}

func (s *talking) Recv() (*discovery.DeltaDiscoveryResponse, error) {
	if s.left == 0 {
		return nil, io.EOF
	}
	s.left--
	return &discovery.DeltaDiscoveryResponse{}, nil
}

// Receive ends with the stream, and with the context even if nobody takes what came.
func TestReceive(t *testing.T) {
	in := make(chan *discovery.DeltaDiscoveryResponse, 2)
	if err := Receive(t.Context(), &talking{left: 2}, in); err != io.EOF || len(in) != 2 {
		t.Errorf("%v with %d responses, want EOF with 2", err, len(in))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Receive(ctx, &talking{left: 1}, nil); err != context.Canceled {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

// Pauses grow to ten seconds, and begin anew after Reset.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b Backoff
		wait := func() time.Duration {
			start := time.Now()
			if !b.Wait(t.Context()) {
				t.Fatal("the context goes on")
			}
			return time.Since(start)
		}
		within := func(d, of time.Duration) {
			t.Helper()
			if d < of*8/10 || d > of*12/10 {
				t.Errorf("waited %v, want %v more or less a fifth", d, of)
			}
		}
		within(wait(), backoffFirst)
		within(wait(), backoffFirst*8/5)
		for range 20 {
			wait()
		}
		within(wait(), backoffMost)
		b.Reset()
		within(wait(), backoffFirst)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if b.Wait(ctx) {
			t.Error("the context has ended")
		}
	})
}
