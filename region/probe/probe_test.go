package probe

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// One region answers in 30 ms, one never: the first is measured at exactly 30 ms and up,
// the second is down after three probes, and a probe that hangs does not pile up. A probe
// that hangs ends with its interval, so the round after it may find it in flight still:
// three of them take at most six rounds of 1.1 s and an interval.
func TestProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hanging, worst atomic.Int32
		p := New(Options{
			Targets: func() []Target { return []Target{{"us", "us:1"}, {"ap", "ap:1"}} },
			Check: func(ctx context.Context, gateway string) error {
				if gateway == "us:1" {
					select {
					case <-time.After(30 * time.Millisecond):
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				}
				worst.Store(max(worst.Load(), hanging.Add(1)))
				defer hanging.Add(-1)
				<-ctx.Done()
				return ctx.Err()
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		time.Sleep(8 * time.Second)
		synctest.Wait()
		us, _ := p.Result("us")
		ap, _ := p.Result("ap")
		if us.Health.Down || us.RTT.MeanMs != 30 || us.RTT.Samples < 4 {
			t.Errorf("us: %+v", us)
		}
		if !ap.Health.Down || ap.Err == "" || ap.RTT.Samples != 0 {
			t.Errorf("ap: %+v", ap)
		}
		if worst.Load() != 1 {
			t.Errorf("%d probes of one region were in flight together", worst.Load())
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

// A region that leaves the target list is forgotten.
func TestForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var gone atomic.Bool
		p := New(Options{
			Targets: func() []Target {
				if gone.Load() {
					return nil
				}
				return []Target{{"us", "us:1"}}
			},
			Check: func(context.Context, string) error { return errors.New("down") },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		if _, ok := p.Result("us"); !ok {
			t.Error("us was not probed")
		}
		gone.Store(true)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if _, ok := p.Result("us"); ok {
			t.Error("us is still remembered")
		}
		cancel()
		<-done
	})
}

// The default check against a real gRPC health server on loopback: serving passes,
// not serving and a closed port fail.
func TestRealHealthServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	hs := health.NewServer()
	healthpb.RegisterHealthServer(s, hs)
	go s.Serve(l)
	defer s.Stop()

	p := New(Options{Targets: func() []Target { return nil }})
	defer p.closeAll()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.healthCheck(ctx, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	hs.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	if err := p.healthCheck(ctx, l.Addr().String()); err == nil {
		t.Fatal("a gateway that does not serve passed")
	}
	s.Stop()
	if err := p.healthCheck(ctx, l.Addr().String()); err == nil {
		t.Fatal("a stopped gateway passed")
	}
}
