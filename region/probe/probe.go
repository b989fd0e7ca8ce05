// Package probe measures round-trip time and health of the other regions' gateways.
//
// One probe is one unary health check (grpc.health.v1) on a kept connection: one round
// trip plus the peer's own work. Probes of different regions run side by side; at most
// one is in flight per region; each is limited to the interval or two seconds,
// whichever is shorter. Results feed region.Estimate and region.Health; readers see an
// immutable snapshot.
package probe

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/outrigger-mesh/outrigger/region"
)

// MaxTargets bounds how many regions are probed; the rest are logged and left
// unmeasured.
const MaxTargets = 256

// Target is one gateway to measure.
type Target struct {
	Region  string
	Gateway string // host:port
}

// Result is what is known about one region now.
type Result struct {
	RTT    region.Estimate
	Health region.Health
	At     time.Time // of the last probe that ended; zero = none yet
	Err    string    // of the last probe; "" = it succeeded
}

// Options configure a Prober.
type Options struct {
	Targets  func() []Target // asked before each round
	Interval time.Duration   // default 1 s
	// Credentials are for the gateways; nil = plaintext.
	Credentials credentials.TransportCredentials
	// Check performs one probe; nil = gRPC health check.
	Check  func(ctx context.Context, gateway string) error
	Logger *slog.Logger
}

// Prober keeps measuring while Run runs. All methods may be called concurrently.
type Prober struct {
	opts Options

	mu      sync.Mutex
	results map[string]Result
	busy    map[string]bool
	conns   map[string]*grpc.ClientConn
}

// New returns a prober that has measured nothing.
func New(o Options) *Prober {
	if o.Interval <= 0 {
		o.Interval = time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Prober{opts: o, results: map[string]Result{}, busy: map[string]bool{}, conns: map[string]*grpc.ClientConn{}}
	if p.opts.Check == nil {
		p.opts.Check = p.healthCheck
	}
	return p
}

// Result returns what is known about a region; ok is false before its first probe ended.
func (p *Prober) Result(name string) (r Result, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok = p.results[name]
	return r, ok
}

// Run probes every target each interval (jittered by 10 %) until ctx ends, then waits
// for the probes in flight.
func (p *Prober) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer p.closeAll()
	defer wg.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		for _, t := range p.due() {
			wg.Go(func() { p.probe(ctx, t) })
		}
		jitter := time.Duration(rand.Int64N(int64(p.opts.Interval)/5 + 1))
		timer.Reset(p.opts.Interval*9/10 + jitter)
	}
}

// due returns the targets without a probe in flight and marks them busy; what is no
// longer a target is forgotten.
func (p *Prober) due() []Target {
	targets := p.opts.Targets()
	if len(targets) > MaxTargets {
		p.opts.Logger.Warn("too many regions to probe", "regions", len(targets), "limit", MaxTargets)
		targets = targets[:MaxTargets]
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	keep := make(map[string]bool, len(targets))
	var out []Target
	for _, t := range targets {
		keep[t.Region] = true
		if !p.busy[t.Region] {
			p.busy[t.Region] = true
			out = append(out, t)
		}
	}
	for name := range p.results {
		if !keep[name] {
			delete(p.results, name)
		}
	}
	return out
}

func (p *Prober) probe(ctx context.Context, t Target) {
	ctx, cancel := context.WithTimeout(ctx, min(p.opts.Interval, 2*time.Second))
	defer cancel()
	start := time.Now()
	err := p.opts.Check(ctx, t.Gateway)
	end := time.Now()

	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.busy, t.Region)
	r := p.results[t.Region]
	was := r.Health.Down
	r.At, r.Err, r.Health = end, "", r.Health.Step(err == nil)
	if err != nil {
		r.Err = err.Error()
	} else {
		r.RTT = r.RTT.Observe(float64(end.Sub(start)) / float64(time.Millisecond))
	}
	p.results[t.Region] = r
	if was != r.Health.Down {
		p.opts.Logger.Info("region health changed", "region", t.Region, "down", r.Health.Down, "error", r.Err)
	}
}

// healthCheck is one grpc.health.v1 call on a kept connection.
func (p *Prober) healthCheck(ctx context.Context, gateway string) error {
	conn, err := p.conn(gateway)
	if err != nil {
		return err
	}
	r, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	if r.Status != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("gateway %s reports %s", gateway, r.Status)
	}
	return nil
}

func (p *Prober) conn(gateway string) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[gateway]; c != nil {
		return c, nil
	}
	creds := p.opts.Credentials
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	c, err := grpc.NewClient(gateway, grpc.WithTransportCredentials(creds))
	if err != nil {
		return nil, err
	}
	p.conns[gateway] = c
	return c, nil
}

func (p *Prober) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g, c := range p.conns {
		if err := c.Close(); err != nil {
			p.opts.Logger.Debug("close probe connection", "gateway", g, "error", err)
		}
		delete(p.conns, g)
	}
}
