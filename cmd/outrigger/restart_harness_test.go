//go:build !dataplane

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// mortal is a control plane's process that can be killed and started again at the same
// address, with its disk or without.
type mortal struct {
	t                             *testing.T
	dir, address, egress, capture string
	data                          string   // its directory
	flags                         []string // beside those every one has
	control                       string   // what clients are given as its address
	cmd                           *exec.Cmd
	log                           bytes.Buffer // of the process that runs; read when it has ended
	stopped                       bool
	upstreams                     map[string]*counted // by "web/v1"
}

// quietPort is a loopback address nobody listens on, below the ports that systems give away
// and on a host of its own, so that nothing else takes it while nobody listens.
func quietPort(t *testing.T) string {
	t.Helper()
	address, err := quietAddress()
	must(t, err)
	return address
}

func quietAddress() (address string, err error) {
	for range 100 {
		var lis net.Listener
		host := net.IPv4(127, byte(1+rand.IntN(254)), byte(rand.IntN(256)), byte(1+rand.IntN(254)))
		lis, err = net.Listen("tcp", fmt.Sprintf("%s:%d", host, 10_000+rand.IntN(22_000)))
		if err == nil {
			defer lis.Close()
			return lis.Addr().String(), nil
		}
	}
	return "", err
}

func newMortal(t *testing.T) *mortal {
	t.Helper()
	p := unborn(t)
	t.Cleanup(p.kill)
	p.start()
	return p
}

// unborn is a mortal that has not been started.
func unborn(t *testing.T) *mortal {
	t.Helper()
	p := &mortal{t: t, dir: t.TempDir(), data: "data", address: quietPort(t), egress: quietPort(t), capture: quietPort(t), stopped: true, upstreams: map[string]*counted{}}
	p.control = p.address
	self, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(self, filepath.Join(p.dir, "outrigger")))
	for _, version := range []string{"v1", "v2"} {
		web := &counted{}
		s := httptest.NewServer(web)
		t.Cleanup(s.Close)
		web.address = s.Listener.Addr().String()
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		gs, chat := grpc.NewServer(), &counted{address: lis.Addr().String()}
		grpc_health_v1.RegisterHealthServer(gs, chat)
		done := make(chan struct{})
		go func() { defer close(done); _ = gs.Serve(lis) }() // ends with Stop
		t.Cleanup(func() { gs.Stop(); <-done })
		p.upstreams["web/"+version], p.upstreams["chat/"+version] = web, chat
	}
	return p
}

// counted is an endpoint, of HTTP or gRPC, that counts its calls.
type counted struct {
	grpc_health_v1.UnimplementedHealthServer
	address string
	calls   atomic.Int64
}

func (c *counted) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	c.calls.Add(1)
	_, _ = io.WriteString(w, "ok")
}

func (c *counted) Check(context.Context, *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	c.calls.Add(1)
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

func (p *mortal) start() {
	p.t.Helper()
	p.log.Reset()
	p.cmd, p.stopped = p.process(&p.log, append([]string{"control", "--listen", p.address, "--http", "127.0.0.1:0", "--data", p.data,
		"--envoy-egress", p.egress, "--envoy-capture", p.capture}, p.flags...)...), false
	eventually(p.t, "the control plane answers", func() bool { _, err := p.try("status"); return err == nil })
}

// process runs a command of this binary.
func (p *mortal) process(log *bytes.Buffer, args ...string) *exec.Cmd {
	p.t.Helper()
	cmd := exec.Command(filepath.Join(p.dir, "outrigger"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, log, log
	must(p.t, cmd.Start())
	return cmd
}

// kill is kill -9.
func (p *mortal) kill() {
	if p.stopped {
		return
	}
	p.stopped = true
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // the status is that of the kill
	if p.t.Failed() {
		p.t.Logf("the control plane said:\n%s", tail(p.log.Bytes(), 8000))
	}
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// loseDisk takes everything away that the control plane had written.
func (p *mortal) loseDisk() { must(p.t, os.RemoveAll(filepath.Join(p.dir, p.data))) }

// verb runs an operator's verb against the control plane and returns what it printed.
func (p *mortal) verb(args ...string) string {
	p.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.t.Fatalf("%q: %v", args, err)
	}
	return out
}

func (p *mortal) try(args ...string) (string, error) {
	var out, errs bytes.Buffer
	if code := (Main{Stdout: &out, Stderr: &errs}).Run(p.t.Context(), append(args, "--server", p.address)); code != 0 {
		return "", fmt.Errorf("exit code %d: %s", code, &errs)
	}
	return out.String(), nil
}

func (p *mortal) register(version string) {
	p.t.Helper()
	for _, model := range []string{"web", "chat"} {
		p.verb("model", "register", model, version, "--endpoint", p.upstreams[model+"/"+version].address+"@local", "--wait", "60s")
	}
}

// nodes is what the control plane knows of its clients; none while it is not up.
func (p *mortal) nodes() []*pb.XdsNode {
	p.t.Helper()
	out, err := p.try("xds", "status", "-o", "json")
	if err != nil {
		return nil
	}
	s := &pb.XdsStatusResponse{}
	if err := protojson.Unmarshal([]byte(out), s); err != nil {
		p.t.Fatalf("%v in %s", err, out)
	}
	for _, n := range s.GetNodes() {
		if n.GetNack() != nil {
			p.t.Errorf("%s rejected %v", n.GetNode().GetId(), n.GetNack())
		}
	}
	return s.GetNodes()
}

// inSync waits until that many clients are connected and have all that there is.
func (p *mortal) inSync(clients int) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("%d clients have the policy", clients), func() bool {
		n := 0
		for _, one := range p.nodes() {
			if one.GetConnected() && one.GetBehindSeconds() == 0 && one.GetAckedPosition() > 0 {
				n++
			}
		}
		return n == clients
	})
}

// stream is a client that calls again and again from when it is started until the test ends.
type stream struct {
	name       string
	one        func() error
	ok, failed atomic.Int64
	why        atomic.Value // string: of the last failure
}

// load is all clients.
type load struct {
	t       *testing.T
	streams []*stream
	stop    chan struct{}
	wg      sync.WaitGroup
}

func newLoad(t *testing.T) *load {
	l := &load{t: t, stop: make(chan struct{})}
	t.Cleanup(l.end)
	return l
}

// add starts a client's calls, once it has been answered.
func (l *load) add(s *stream) {
	l.t.Helper()
	eventually(l.t, s.name+" is answered", func() bool {
		return s.one() == nil
	})
	l.streams = append(l.streams, s)
	l.wg.Go(func() {
		pace := time.NewTicker(5 * time.Millisecond) // it is about who fails, not about how much they do
		defer pace.Stop()
		for {
			select {
			case <-l.stop:
				return
			case <-pace.C:
			}
			if err := s.one(); err != nil {
				s.why.Store(err.Error())
				s.failed.Add(1)
				continue
			}
			s.ok.Add(1)
		}
	})
}

func (l *load) end() {
	if l.stop != nil {
		close(l.stop)
		l.wg.Wait()
		l.stop = nil
	}
}

// more waits until every client has made n more calls.
func (l *load) more(n int64) {
	l.t.Helper()
	for _, s := range l.streams {
		from := s.ok.Load()
		eventually(l.t, fmt.Sprintf("%s makes %d calls", s.name, n), func() bool { return s.ok.Load()+s.failed.Load() >= from+n })
	}
	l.intact()
}

// intact fails if any call failed so far.
func (l *load) intact() {
	l.t.Helper()
	for _, s := range l.streams {
		if f := s.failed.Load(); f != 0 {
			l.t.Errorf("%s: %d calls failed of %d, the last: %v", s.name, f, f+s.ok.Load(), s.why.Load())
		}
	}
	if l.t.Failed() {
		l.t.FailNow()
	}
}

// follow waits until every client's call reaches a version. The load has ended.
func (l *load) follow(p *mortal, version string) {
	l.t.Helper()
	calls := func() int64 {
		return p.upstreams["web/"+version].calls.Load() + p.upstreams["chat/"+version].calls.Load()
	}
	for _, s := range l.streams {
		eventually(l.t, s.name+" calls "+version, func() bool {
			before := calls()
			return s.one() == nil && calls() > before
		})
	}
}

// overHTTP asks for model web at an address.
func overHTTP(t *testing.T, address string) func() error {
	client := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	t.Cleanup(client.CloseIdleConnections)
	return func() error {
		resp, err := client.Post("http://"+address+"/v1/chat/completions", "application/json", strings.NewReader(`{"model":"web","messages":[]}`))
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		raw, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, raw)
		}
		return err
	}
}

// realClients skips the test where they cannot be had, and returns where the repository is.
func realClients(t *testing.T) (root string) {
	t.Helper()
	root = filepath.Join("..", "..")
	nodeModules(t)
	envoyProgram(t) // skips where there is none
	return root
}

// nodeModules returns where the packages of .ci/npm are, which are installed if need be, or
// skips the test.
func nodeModules(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("bash", filepath.Join(root, ".ci", "node")).CombinedOutput(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s", out)
		}
		t.Skipf("skipped: %s", out)
	}
	return filepath.Join(root, ".cache", "npm")
}

// python and node are the client programs of package adsserver's tests.
func (p *mortal) python(root string) *stream {
	return p.grpcProgram("grpc-python", filepath.Join(root, ".cache", "venv", "bin", "python"), filepath.Join(root, "xds", "adsserver", "testdata", "client.py"))
}

func (p *mortal) node(root string) *stream {
	return p.grpcProgram("grpc-node", "node", filepath.Join(root, "xds", "adsserver", "testdata", "client.cjs"), filepath.Join(root, ".cache", "npm", "node_modules"))
}

// envoy is the real one, of the Python wheel.
func (p *mortal) envoy() *stream {
	t := p.t
	program := envoyProgram(t)
	file := filepath.Join(p.dir, "envoy.json")
	raw, err := translate.Bootstrap(translate.KindEnvoy, translate.BootstrapOptions{Control: p.control, Node: outrigger.Node{ID: "envoy", Region: "local"}})
	must(t, err)
	must(t, os.WriteFile(file, raw, 0o600))
	// The shell kills it when its input closes, however this process ends.
	const guard = `"$@" & child=$!; cat >/dev/null; kill -9 $child; wait $child`
	cmd := exec.Command("sh", "-c", guard, "sh", program, "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "warning")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	input, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		input.Close()
		_ = cmd.Wait() // the status is that of the kill
		if t.Failed() {
			t.Logf("Envoy said:\n%s", tail(log.Bytes(), 4000))
		}
	})
	return &stream{name: "Envoy", one: overHTTP(t, p.egress)}
}

func (p *mortal) bootstrap(id string) []byte {
	raw, err := translate.Bootstrap(translate.KindGRPC, translate.BootstrapOptions{Control: p.control, Node: outrigger.Node{ID: id, Region: "local"}})
	must(p.t, err)
	return raw
}

// grpcGo is grpc-go, in this process.
func (p *mortal) grpcGo() *stream {
	t := p.t
	res, err := xds.NewXDSResolverWithConfigForTesting(p.bootstrap("grpc-go"))
	must(t, err)
	conn, err := grpc.NewClient("xds:///model/chat", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(res))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	client := grpc_health_v1.NewHealthClient(conn)
	return &stream{name: "grpc-go", one: func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderBucket, "5")
		_, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	}}
}

// grpcProgram is one of the client programs of the tests of package adsserver.
func (p *mortal) grpcProgram(id, program string, args ...string) *stream {
	t := p.t
	file := filepath.Join(p.dir, id+".json")
	must(t, os.WriteFile(file, p.bootstrap(id), 0o600))
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "GRPC_XDS_BOOTSTRAP="+file)
	var said bytes.Buffer
	cmd.Stderr = &said
	in, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		in.Close() // ends the program's loop, also when this process dies
		stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer stop.Stop()
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("%s: %v\n%s", id, err, &said)
		}
	})
	lines := bufio.NewReader(stdout)
	return &stream{name: id, one: func() error {
		if _, err := io.WriteString(in, `{"n":1,"bucket":5,"step":0,"parallel":1}`+"\n"); err != nil {
			return err
		}
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return err
		}
		var o struct {
			Failed int
			Why    string
		}
		if err := json.Unmarshal(line, &o); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		if o.Failed != 0 {
			return fmt.Errorf("%s", o.Why)
		}
		return nil
	}}
}

// sidecar is ours, with its last known good policy under a directory of its own.
func (p *mortal) sidecar(id string) (s *stream, kill func()) {
	t := p.t
	address := quietPort(t)
	var log bytes.Buffer
	cmd := p.process(&log, "sidecar", "--listen", address, "--http", "127.0.0.1:0", "--control", p.control, "--node-id", id, "--state-dir", id+"-state")
	ended := false
	kill = func() {
		if ended {
			return
		}
		ended = true
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // the status is that of the kill
		if t.Failed() {
			t.Logf("sidecar %s said:\n%s", id, tail(log.Bytes(), 4000))
		}
	}
	t.Cleanup(kill)
	return &stream{name: "sidecar " + id, one: overHTTP(t, address)}, kill
}
