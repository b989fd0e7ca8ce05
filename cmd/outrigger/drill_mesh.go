//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

const (
	drillGood      = "good"
	drillCandidate = "candidate-"
	drillPatience  = 2 * time.Minute // for anything that must happen in a drill
	envoyRPS       = 20              // of the client of all Envoys
)

// drillMesh is the processes of a drill, and what they say.
type drillMesh struct {
	dir  string
	d    *drillFlags
	g    *globals
	log  io.Writer // progress
	rnd  *rand.Rand
	port string // of the control plane, the same in all of its lives

	control *child
	hosts   []*child
	models  []*drillModel // good, bad
	fleet   *drillFleet
	envoys  *drillEnvoys // nil = none
	conn    *grpc.ClientConn
	admin   pb.AdminClient
}

func newDrillMesh(dir string, d *drillFlags, g *globals, log io.Writer) *drillMesh {
	return &drillMesh{dir: dir, d: d, g: g, log: log, rnd: rand.New(rand.NewPCG(d.seed, 0)), fleet: newDrillFleet(d.sidecars)}
}

// start brings everything up: models, control plane, hosts.
func (m *drillMesh) start(ctx context.Context) error {
	for range 2 {
		s, err := startDrillModel(m.d.errorRate, m.d.sidecars)
		if err != nil {
			return err
		}
		m.models = append(m.models, s)
	}
	var err error
	if m.d.envoys > 0 {
		m.envoys = &drillEnvoys{calls: &drillHost{rps: envoyRPS, candidate: drillCandidate}}
		if m.envoys.options, err = envoyAddresses(); err != nil {
			return err
		}
	}
	if err := m.firstControl(ctx); err != nil {
		return err
	}
	m.conn, err = grpc.NewClient(m.port, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quickBackoff, MinConnectTimeout: 2 * time.Second}))
	if err != nil {
		return err
	}
	m.admin = pb.NewAdminClient(m.conn)
	if err := m.register(ctx, drillGood, m.models[0]); err != nil {
		return err
	}
	first := 0
	for i := range m.d.processes {
		n := (m.d.sidecars - first) / (m.d.processes - i)
		c, err := startChild(ctx, m.dir, fmt.Sprintf("host-%d", i), true, m.fleet.line, "drill-host", "--control", m.port,
			"--first", strconv.Itoa(first), "--sidecars", strconv.Itoa(n), "--rps", fmt.Sprint(m.d.rps/float64(m.d.sidecars)),
			"--candidate", drillCandidate, "--log-level", "warn")
		if err != nil {
			return err
		}
		m.hosts = append(m.hosts, c)
		first += n
	}
	for _, c := range m.hosts {
		if err := m.ready(ctx, c); err != nil {
			return err
		}
	}
	if m.envoys != nil {
		return m.startEnvoys(ctx)
	}
	return nil
}

// firstControl starts the control plane on a port that is free and outside of the range
// connections take theirs from: it must be free again after every kill, and a connection
// to it must not become one to itself while nobody listens.
func (m *drillMesh) firstControl(ctx context.Context) error {
	var errs []error
	for range 20 {
		m.port = fmt.Sprintf("127.0.0.1:%d", 20_000+rand.IntN(12_000))
		l, err := net.Listen("tcp", m.port)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		l.Close()
		if err = m.startControl(ctx); err == nil {
			return nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// startControl starts the control plane, or starts it again over the same log.
func (m *drillMesh) startControl(ctx context.Context) (err error) {
	args := []string{"control", "--listen", m.port, "--http", "127.0.0.1:0", "--data", filepath.Join(m.dir, "data"),
		"--region", demoRegion, "--dead-man", m.d.deadMan.String(), "--log-level", m.g.logLevel}
	if m.envoys != nil {
		args = append(args, "--envoy-egress", m.envoys.options.Egress, "--envoy-capture", m.envoys.options.Capture)
	}
	m.control, err = startChild(ctx, m.dir, "control", true, nil, args...)
	if err != nil {
		return err
	}
	return m.ready(ctx, m.control)
}

func (m *drillMesh) ready(ctx context.Context, c *child) error {
	return m.until(ctx, c.name+" being ready", func() (bool, error) {
		select {
		case <-c.done:
			return false, fmt.Errorf("%w; %s", c.err, c.tail())
		default:
			return isReady(ctx, c.addresses["http"]), nil
		}
	})
}

// until polls what has no event of its own, for as long as the drill's patience lasts.
func (m *drillMesh) until(ctx context.Context, what string, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, drillPatience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := f(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		}
	}
}

func (m *drillMesh) register(ctx context.Context, version string, s *drillModel) error {
	_, err := m.admin.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: drillModelID, Version: version, Actor: "drill",
		Endpoints: []*pb.Endpoint{{Address: s.address, Region: demoRegion, Weight: 1}}}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("register %s: %w", version, err)
	}
	return nil
}

// dead returns why a process that must live has ended.
func (m *drillMesh) dead() error {
	for _, c := range append(slices.Clone(m.hosts), m.control) {
		select {
		case <-c.done:
			return fmt.Errorf("%w; %s", errors.Join(errors.New(c.name+" ended"), c.err), c.tail())
		default:
		}
	}
	if m.envoys != nil {
		return m.envoys.dead()
	}
	return nil
}

// stop ends every process and server.
func (m *drillMesh) stop() {
	m.envoys.stop()
	for _, c := range m.hosts {
		c.stop(stopGrace)
	}
	if m.control != nil {
		m.control.stop(stopGrace)
	}
	for _, s := range m.models {
		s.server.Close()
	}
	if m.conn != nil {
		_ = m.conn.Close() // fails only if it is closed already
	}
}

// kill ends the process at once, as a crash of its machine would.
func (c *child) kill() {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	_ = c.cmd.Process.Kill() // an error means that it has just ended
	<-c.done
}

// drillModel is the server of one version. It remembers who reached it.
type drillModel struct {
	address string
	server  *http.Server
	rate    int64 // failures per million when bad
	bad     atomic.Bool

	others atomic.Int64 // requests that came through no sidecar, but an Envoy
	first  int64        // of the numbers that are no sidecars'

	mu       sync.Mutex
	arrivals []drillArrival // guarded by mu; since the last take
}

// drillArrival is one request at a version's server; times are Unix ns.
type drillArrival struct {
	sidecar   int
	begun, at int64
	failed    bool
}

func startDrillModel(errorRate float64, sidecars int) (*drillModel, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &drillModel{address: l.Addr().String(), rate: int64(errorRate * 1e6), first: int64(sidecars)}
	s.server = &http.Server{Handler: s, ReadHeaderTimeout: headerTimeout}
	go func() {
		// It ends with Close; a failure before that shows as failed calls.
		_ = s.server.Serve(l)
	}()
	return s, nil
}

// ServeHTTP answers as an OpenAI-compatible server does, or fails.
func (s *drillModel) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := drillArrival{at: time.Now().UnixNano()}
	var err, aerr error
	a.sidecar, err = strconv.Atoi(r.Header.Get(hdrDrillFrom))
	a.begun, aerr = strconv.ParseInt(r.Header.Get(hdrDrillAt), 10, 64)
	if err != nil || aerr != nil {
		openAIError(w, http.StatusBadRequest, "invalid_request_error", "not a request of the drill")
		return
	}
	if int64(a.sidecar) >= s.first {
		s.others.Add(1)
	}
	a.failed = s.bad.Load() && rand.Int64N(1e6) < s.rate
	s.mu.Lock()
	s.arrivals = append(s.arrivals, a)
	s.mu.Unlock()
	if a.failed {
		openAIError(w, http.StatusInternalServerError, "server_error", "this version is broken")
		return
	}
	w.Header().Set("content-type", "application/json")
	// A failed write means the client left; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(map[string]any{"id": "chatcmpl-drill", "object": "chat.completion", "model": drillModelID,
		"choices": []any{map[string]any{"index": 0, "finish_reason": "stop", "message": map[string]any{"role": "assistant", "content": "hello"}}},
		"usage":   usage(1, 1)})
}

// take returns the arrivals since the last take.
func (s *drillModel) take() []drillArrival {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.arrivals
	s.arrivals = nil
	return out
}

// drillFleet is what the hosts said about their sidecars.
type drillFleet struct {
	mu      sync.Mutex // guards everything below
	follow  string     // the candidate of this run
	states  []drillState
	clients map[int]drillClients // by host
	broken  error                // a line nobody understands

	first chan struct{} // closed when the first sidecar has dropped the candidate
}

// drillState is one sidecar's view of the candidate followed.
type drillState struct {
	weight uint32
	since  int64 // the first policy that gave it weight, Unix ns; 0 = none yet
	gone   int64 // the policy that took the weight away again; 0 = none yet
}

func newDrillFleet(n int) *drillFleet {
	return &drillFleet{states: make([]drillState, n), clients: map[int]drillClients{}, first: make(chan struct{})}
}

// line takes one line of a host.
func (f *drillFleet) line(raw []byte) {
	var l drillLine
	err := json.Unmarshal(raw, &l)
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err != nil || l.Sidecar < 0 || l.Sidecar >= len(f.states):
		f.broken = fmt.Errorf("a host said %q: %w", raw, errors.Join(errors.New("not a line of the drill"), err))
	case l.Clients != nil:
		f.clients[l.Sidecar] = *l.Clients
	default:
		s := &f.states[l.Sidecar]
		switch w := l.Weights[f.follow]; {
		case w > 0 && s.since == 0:
			s.since = l.At
			s.weight = w
		case w > 0:
			s.weight, s.gone = w, 0 // back, after a control plane's return
		case s.weight > 0:
			s.weight, s.gone = 0, l.At
			select {
			case <-f.first:
			default:
				close(f.first)
			}
		}
	}
}

// begin follows another candidate; dropped closes when the first sidecar takes its weight
// away.
func (f *drillFleet) begin(candidate string) (dropped <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.follow, f.first = candidate, make(chan struct{})
	clear(f.states)
	return f.first
}

// count returns how many sidecars give the candidate weight, and how many have taken it away.
func (f *drillFleet) count() (with, gone int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.states {
		if s.weight > 0 {
			with++
		}
		if s.gone > 0 {
			gone++
		}
	}
	return with, gone, f.broken
}

func (f *drillFleet) snapshot() []drillState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.states)
}

func (f *drillFleet) calls() (sum drillClients) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.clients {
		sum.add(c)
	}
	return sum
}

// add sums counts; the first unexplained failure stays.
func (c *drillClients) add(o drillClients) {
	c.Requests += o.Requests
	c.Failed += o.Failed
	c.Unexplained += o.Unexplained
	if c.First == "" {
		c.First = o.First
	}
}
