//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// The story of the demonstration: version 2 gets a tenth of the users, and when its
// cue comes it fails this share of its calls.
const (
	canaryWeight  = 1000 // of 10 000
	badErrorRate  = 0.5
	demoRegion    = "local"
	stopGrace     = 10 * time.Second
	rolloutID     = "demo-rollout"
	candidateName = "v2"
	stableName    = "v1"
)

// mesh is the set of child processes and the connection to their control plane.
type mesh struct {
	dir   string
	u     *upFlags
	g     *globals
	stats *tally

	children []*child // in start order
	control  *child
	models   []*child // version 1, version 2
	sidecars []*child
	apps     []*child

	conn  *grpc.ClientConn
	admin pb.AdminClient
	vars  pb.VariablesClient
}

func newMesh(dir string, u *upFlags, g *globals) *mesh {
	return &mesh{dir: dir, u: u, g: g, stats: newTally()}
}

func (m *mesh) child(ctx context.Context, name string, args ...string) (*child, error) {
	c, err := startChild(ctx, m.dir, name, true, nil, append(args, "--log-level", m.g.logLevel)...)
	if err == nil {
		m.children = append(m.children, c)
	}
	return c, err
}

// start brings every process up in dependency order and registers the model.
func (m *mesh) start(ctx context.Context) error {
	var err error
	if m.control, err = m.child(ctx, "control", "control", "--listen", "127.0.0.1:0", "--http", m.httpAddress(),
		"--data", m.dir+"/log", "--region", demoRegion, "--region-latitude", "53.35", "--region-longitude", "-6.26"); err != nil {
		return err
	}
	m.conn, err = grpc.NewClient(m.control.addresses["listen"], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	m.admin, m.vars = pb.NewAdminClient(m.conn), pb.NewVariablesClient(m.conn)

	for _, v := range []string{stableName, candidateName} {
		c, err := m.child(ctx, "model-"+v, "demo-model", "--version", v,
			"--tokens-per-second", fmt.Sprint(60*m.u.speed), "--first-token-ms", fmt.Sprint(120/m.u.speed))
		if err != nil {
			return err
		}
		m.models = append(m.models, c)
	}
	// The control plane listens before it has applied its log, and refuses changes until then.
	if err := m.awaitReady(ctx); err != nil {
		return err
	}
	if err := m.register(ctx, m.models); err != nil {
		return err
	}
	if _, err := m.child(ctx, "node", "node", "--control", m.control.addresses["listen"], "--dir", m.dir+"/node",
		"--node-id", "node-a", "--region", demoRegion); err != nil {
		return err
	}
	for i := range 2 {
		name := fmt.Sprintf("sidecar-%d", i+1)
		c, err := m.child(ctx, name, "sidecar", "--listen", "127.0.0.1:0", "--control", m.control.addresses["listen"],
			"--agent-dir", m.dir+"/node", "--node-id", fmt.Sprintf("node-a/pod-%d", i+1), "--region", demoRegion, "--state-dir", m.dir+"/"+name,
			"--admin", "unix:"+m.dir+"/"+name+".sock")
		if err != nil {
			return err
		}
		m.sidecars = append(m.sidecars, c)
	}
	return m.awaitReady(ctx)
}

// httpAddress is the wanted status page address, or a free port when it is taken.
func (m *mesh) httpAddress() string {
	l, err := net.Listen("tcp", m.u.http)
	if err != nil {
		host, _, serr := net.SplitHostPort(m.u.http)
		if serr != nil {
			return m.u.http // the control plane will say what is wrong with it
		}
		return net.JoinHostPort(host, "0")
	}
	l.Close()
	return m.u.http
}

// statusPage is the address a person opens.
func (m *mesh) statusPage() string { return "http://" + m.control.addresses["http"] + "/" }

// register declares the model with both versions and the variables the apps read.
func (m *mesh) register(ctx context.Context, models []*child) error {
	for i, v := range []string{stableName, candidateName} {
		if _, err := m.admin.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{
			Model: demoModelID, Version: v, UpstreamModel: demoModelID + "-" + v, Actor: "demo",
			Endpoints: []*pb.Endpoint{{Address: models[i].addresses["listen"], Region: demoRegion, Weight: 1}}}); err != nil {
			return fmt.Errorf("register %s: %w", v, err)
		}
	}
	opts := &pb.WriteOptions{Actor: "demo", Source: "up", AutoCreateSession: true}
	for name, v := range map[string]*pb.Value{
		"temperature":   {Type: "float", Json: []byte("0.7")},
		"system_prompt": {Type: "string", Json: []byte(`"You are a helpful assistant of a web shop."`)},
	} {
		if _, err := m.vars.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Session: demoSession, Name: name}, Value: v, Options: opts}); err != nil {
			return fmt.Errorf("register variable %s: %w", name, err)
		}
	}
	return nil
}

// awaitReady waits until every process says /readyz.
func (m *mesh) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, c := range m.children {
		for !isReady(ctx, c.addresses["http"]) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s is not ready after %v; %s", c.name, startTimeout, c.tail())
			case <-c.done:
				return c.err
			case <-tick.C:
			}
		}
	}
	return nil
}

// isReady asks /readyz; a process without an admin address counts as ready.
func isReady(ctx context.Context, addr string) bool {
	if addr == "" {
		return true
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// play runs the traffic and the story until the end, and returns what was observed.
func (m *mesh) play(ctx context.Context, v *view) (*tally, error) {
	st := m.stats
	if err := m.startApps(ctx); err != nil {
		return nil, err
	}
	st.begin(time.Now())
	begin := m.startRollout
	if m.u.script == scriptExperiment {
		begin = m.startTrial
	}
	if err := begin(ctx); err != nil {
		return nil, err
	}
	cue := make(chan os.Signal, 1)
	signal.Notify(cue, syscall.SIGUSR1)
	defer signal.Stop(cue)
	var scripted <-chan time.Time
	if m.u.script == scriptDemo {
		t := time.NewTimer(m.u.cue)
		defer t.Stop()
		scripted = t.C
	}
	end := time.NewTimer(m.u.duration)
	defer end.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	appsDone := m.appsDone()
	for {
		select {
		case <-ctx.Done():
			return m.finish(v)
		case <-v.quit:
			return m.finish(v)
		case <-scripted:
			if err := m.turnBad(ctx); err != nil {
				return nil, err
			}
		case <-cue:
			if err := m.turnBad(ctx); err != nil {
				return nil, err
			}
		case <-v.cue:
			if err := m.turnBad(ctx); err != nil {
				return nil, err
			}
		case err := <-appsDone:
			if err != nil {
				return nil, err
			}
			if m.u.script == scriptDemo {
				m.awaitRollback(ctx)
			}
			return m.finish(v)
		case <-tick.C:
			if err := m.dead(); err != nil {
				return nil, err
			}
			m.poll(ctx)
			v.update(st.snapshot(time.Now()))
			if st.settled(time.Now()) {
				return m.finish(v)
			}
		}
	}
}

// startRollout gives the candidate its canary.
func (m *mesh) startRollout(ctx context.Context) error {
	if _, err := m.admin.StartRollout(ctx, &pb.StartRolloutRequest{
		Id: rolloutID, Model: demoModelID, Candidate: candidateName, Actor: "demo", Reason: "demonstration",
		Phases: []*pb.RolloutPhase{
			{Name: "canary", Weight: canaryWeight, MinDuration: durationPB(time.Hour)},
			{Name: "full", Weight: 10_000},
		}}); err != nil {
		return fmt.Errorf("start the rollout: %w", err)
	}
	return nil
}

func (m *mesh) startApps(ctx context.Context) error {
	for i, s := range m.sidecars {
		protocol := []string{"bridge", "rest"}[i%2]
		c, err := startChild(ctx, m.dir, fmt.Sprintf("app-%d", i+1), false, m.stats.line, "demo-app", "--sidecar", s.addresses["listen"],
			"--variables", protocol, "--speed", fmt.Sprint(m.u.speed), "--duration", m.u.duration.String(),
			"--index", fmt.Sprint(i), "--of", fmt.Sprint(len(m.sidecars)))
		if err != nil {
			return err
		}
		m.apps = append(m.apps, c)
	}
	return nil
}

// appsDone reports once, when every app has ended or one has failed.
func (m *mesh) appsDone() <-chan error {
	out := make(chan error, 1)
	apps := slices.Clone(m.apps)
	go func() {
		for _, a := range apps {
			<-a.done
			if a.err != nil && !errors.Is(a.err, errInterrupted) {
				out <- fmt.Errorf("%w; %s", a.err, a.tail())
				return
			}
		}
		out <- nil
	}()
	return out
}

// dead returns the error of a server process that ended by itself.
func (m *mesh) dead() error {
	for _, c := range m.children {
		select {
		case <-c.done:
			return fmt.Errorf("%w; %s", errors.Join(errors.New(c.name+" ended"), c.err), c.tail())
		default:
		}
	}
	return nil
}

// turnBad makes the candidate fail and notes when.
func (m *mesh) turnBad(ctx context.Context) error {
	m.stats.cue(time.Now())
	return m.fault(ctx, m.models[1], fmt.Sprintf(`{"error_rate": %v}`, badErrorRate))
}

// fault tells a model server how to fail.
func (m *mesh) fault(ctx context.Context, c *child, body string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+c.addresses["listen"]+"/demo/fault", strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("set the faults of %s: %w", c.name, err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("set the faults of %s: %s", c.name, resp.Status)
	}
	return nil
}

// poll takes the control plane's own view; a missed poll is shown, not fatal.
func (m *mesh) poll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s, err := m.admin.Status(ctx, &pb.ListRequestAll{})
	m.stats.status(s, err)
	if m.u.script == scriptExperiment {
		m.pollTrial(ctx)
	}
}

// ackTimeout is how long a rollback may take that has not ended with the traffic.
const ackTimeout = 30 * time.Second

// awaitRollback gives the sidecars of a busy machine the time to acknowledge.
func (m *mesh) awaitRollback(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if r, err := m.admin.GetRollout(ctx, &pb.NameRequest{Name: rolloutID}); err == nil && r.RollbackCompleted != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// finish stops the apps, lets the last reports arrive, and takes the audit trail.
func (m *mesh) finish(v *view) (*tally, error) {
	for _, a := range m.apps {
		a.stop(stopGrace)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	m.poll(ctx)
	audit, err := m.admin.Audit(ctx, &pb.AuditRequest{Limit: 1000, NewestFirst: true})
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	slices.Reverse(audit.Events)
	m.stats.end(time.Now(), audit.Events)
	v.update(m.stats.snapshot(time.Now()))
	return m.stats, nil
}

// stop ends every child, last started first.
func (m *mesh) stop() {
	for _, c := range slices.Backward(append(slices.Clone(m.children), m.apps...)) {
		c.stop(stopGrace)
	}
	if m.conn != nil {
		// Closing a connection whose peers are gone can only fail in ways nobody can act on.
		_ = m.conn.Close()
	}
}

// line takes one record an app printed.
func (t *tally) line(raw []byte) {
	var r record
	if err := json.Unmarshal(raw, &r); err != nil {
		t.add(record{Kind: "call", Err: "unreadable record: " + string(raw)})
		return
	}
	t.add(r)
}
