package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/internal/config"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/telemetry"
)

// configure applies file and environment to a command's flags.
func (g *globals) configure(cmd *cobra.Command, section string) error {
	src := config.Source{Path: g.config, Environ: g.environ, Sections: sections}
	if err := src.Apply(cmd.LocalFlags(), section); err != nil {
		return configError{err}
	}
	return nil
}

// process is what every long-running command has: telemetry, a health page and one
// group of goroutines that end together.
type process struct {
	name string
	cmd  *cobra.Command
	tel  *telemetry.Telemetry
	log  *slog.Logger

	group *errgroup.Group
	ctx   context.Context // ends when the process must stop
	end   context.CancelFunc
	// drainDelay is how long the process serves on, not ready, once it was asked to stop.
	drainDelay time.Duration
	// handOver is what is done after that and before anything ends, within a limit of its own;
	// nil = nothing.
	handOver  func()
	inherited *inherited // what the process before this one handed over; nil = nothing
	ready     atomic.Bool
	bound     map[string]string // listener name → address

	// control are the credentials for control planes; nil = plaintext.
	control *identity.Credentials

	// dialTCP opens connections to the mesh; nil = grpc's own way.
	dialTCP func(ctx context.Context, address string) (net.Conn, error)
}

func (g *globals) start(cmd *cobra.Command, name, node, region string) (*process, error) {
	tel, err := telemetry.New(cmd.Context(), telemetry.Options{
		Service: name, Version: buildVersion(), Node: node, Region: region,
		LogLevel: g.logLevel, LogFormat: g.logFormat, LogTo: cmd.ErrOrStderr(),
		OTLPEndpoint: lookupEnv(g.environ, "OTEL_EXPORTER_OTLP_ENDPOINT"), TraceRatio: 0.01,
	})
	if err != nil {
		return nil, configError{err}
	}
	// A signal does not end the parts at once: stopping decides when.
	base, end := context.WithCancel(context.WithoutCancel(cmd.Context()))
	group, ctx := errgroup.WithContext(base)
	return &process{name: name, cmd: cmd, tel: tel, log: tel.Logger, group: group, ctx: ctx, end: end, bound: map[string]string{}}, nil
}

// stopping turns a signal into the end: not ready, then drainDelay of ordinary service for
// those who have not heard of it yet, then the drain.
func (p *process) stopping() error {
	defer p.end()
	select {
	case <-p.cmd.Context().Done():
	case <-p.ctx.Done():
		return nil
	}
	p.ready.Store(false)
	if p.drainDelay > 0 {
		p.log.Info("stopping: not ready any more, serving on", "drain-delay", p.drainDelay)
		t := time.NewTimer(p.drainDelay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-p.ctx.Done():
		}
	}
	if p.handOver != nil && p.ctx.Err() == nil {
		p.handOver()
	}
	return nil
}

func lookupEnv(environ []string, key string) string {
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			return v
		}
	}
	return ""
}

// listen binds "host:port" or "unix:path". A taken port is an error that says what to
// change. A stale socket file of a dead process is replaced.
func (p *process) listen(name, address string) (net.Listener, error) {
	if l, err := p.inherited.take(name, address); l != nil || err != nil {
		if l != nil {
			p.bound[name] = shownAddress(l, address)
		}
		return l, err
	}
	network, addr := "tcp", address
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, addr = "unix", path
		if err := removeStaleSocket(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen(network, addr)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %s is taken by another process; choose another with --%s, or port 0 for a free one", p.name, address, name)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: listen on %s: %w", p.name, address, err)
	}
	p.bound[name] = shownAddress(l, address)
	return l, nil
}

// shownAddress is where l listens, as people and --flags write it.
func shownAddress(l net.Listener, asked string) string {
	if l.Addr().Network() == "unix" {
		return asked
	}
	return l.Addr().String()
}

func removeStaleSocket(path string) error {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s is served by another process", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s is in the way: %w", path, err)
	}
	return os.Remove(path)
}

// announce tells whoever started the process where it listens: one JSON line on
// standard output, and the log.
func (p *process) announce() error {
	p.log.Info("listening", "addresses", p.bound)
	return json.NewEncoder(p.cmd.OutOrStdout()).Encode(map[string]any{"listening": p.bound, "service": p.name, "pid": os.Getpid()})
}

// readLimits are what every HTTP server of ours enforces.
const (
	headerTimeout = 5 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10
)

// serveHTTP serves until the process stops, then drains within grace.
func (p *process) serveHTTP(l net.Listener, h http.Handler, grace time.Duration) {
	s := &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug)}
	p.group.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	p.group.Go(func() error {
		<-p.ctx.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), grace)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			s.Close() // grace is over: cut what is left, streams included
		}
		return nil
	})
}

// serveGRPC serves until the process stops, then drains within grace.
func (p *process) serveGRPC(l net.Listener, s *grpc.Server, grace time.Duration) {
	p.group.Go(func() error { return s.Serve(l) })
	p.group.Go(func() error {
		<-p.ctx.Done()
		t := time.AfterFunc(grace, s.Stop)
		defer t.Stop()
		s.GracefulStop()
		return nil
	})
}

// health is /healthz, /readyz and /metrics; extra adds more.
func (p *process) health(extra map[string]http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	for _, path := range []string{"GET /ready", "GET /readyz"} {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			if !p.ready.Load() {
				http.Error(w, "not ready", http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ready")
		})
	}
	mux.Handle("GET /metrics", p.tel.Handler())
	for pattern, h := range extra {
		mux.Handle(pattern, h)
	}
	return mux
}

// run adds a component to the group; its end with an error ends the process.
func (p *process) run(name string, f func(context.Context) error) {
	p.group.Go(func() error {
		err := f(p.ctx)
		if err != nil && p.ctx.Err() == nil {
			return fmt.Errorf("%s: %s: %w", p.name, name, err)
		}
		return nil
	})
}

// until is run for what others use while they drain: its context ends when the process
// stops and last has closed too.
func (p *process) until(last <-chan struct{}, name string, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(p.ctx))
	context.AfterFunc(p.ctx, func() {
		<-last
		cancel()
	})
	p.group.Go(func() error {
		if err := f(ctx); err != nil && ctx.Err() == nil {
			return fmt.Errorf("%s: %s: %w", p.name, name, err)
		}
		return nil
	})
}

// becomeReady marks the process ready when the channel closes.
func (p *process) becomeReady(ready <-chan struct{}) {
	p.group.Go(func() error {
		select {
		case <-ready:
			p.ready.Store(true)
			p.log.Info("ready")
		case <-p.ctx.Done():
		}
		return nil
	})
}

// wait blocks until everything has ended.
func (p *process) wait() error {
	p.group.Go(p.stopping)
	err := p.group.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), 5*time.Second)
	defer cancel()
	if serr := p.tel.Shutdown(ctx); serr != nil {
		p.log.Warn("telemetry shutdown", "error", serr)
	}
	p.log.Info("stopped", "error", err)
	return err
}

// buildVersion is the module version or VCS revision the binary was built from.
func buildVersion() string {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	rev := bi.Main.Version
	for _, s := range bi.Settings {
		if s.Key == "vcs.revision" {
			rev = s.Value
		}
	}
	if rev == "" {
		return "devel"
	}
	return rev
}
