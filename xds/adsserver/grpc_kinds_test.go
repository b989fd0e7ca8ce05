package adsserver_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// command is n calls of model chat; the i-th carries bucket+i·step unless bucket < 0.
type command struct {
	N        int `json:"n"`
	Bucket   int `json:"bucket"`
	Step     int `json:"step"`
	Parallel int `json:"parallel"`
}

type outcome struct {
	OK     int    `json:"ok"`
	Failed int    `json:"failed"`
	Why    string `json:"why"`
}

// caller is a proxyless client of one implementation.
type caller func(command) outcome

func bootstrapFor(t *testing.T, ads, id string) []byte {
	t.Helper()
	raw, err := translate.Bootstrap(translate.KindGRPC, translate.BootstrapOptions{Control: ads, Node: outrigger.Node{ID: id, Region: "eu"}})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// goCaller is grpc-go, within this process.
func goCaller(t *testing.T, ads string) caller {
	t.Helper()
	res, err := xds.NewXDSResolverWithConfigForTesting(bootstrapFor(t, ads, "grpc-go"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///model/chat", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(res))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	client := grpc_health_v1.NewHealthClient(conn)
	return func(c command) outcome {
		var next, failed atomic.Int64
		var why atomic.Value
		var wg sync.WaitGroup
		for range c.Parallel {
			wg.Go(func() {
				for i := next.Add(1) - 1; i < int64(c.N); i = next.Add(1) - 1 {
					if err := check(client, c.Bucket+int(i)*c.Step); err != nil {
						failed.Add(1)
						why.Store(err.Error())
					}
				}
			})
		}
		wg.Wait()
		out := outcome{OK: c.N - int(failed.Load()), Failed: int(failed.Load())}
		out.Why, _ = why.Load().(string)
		return out
	}
}

func check(c grpc_health_v1.HealthClient, bucket int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if bucket >= 0 {
		ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderBucket, strconv.Itoa(bucket))
	}
	_, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

// processCaller drives a client program over its standard input and output.
func processCaller(t *testing.T, ads, id, program string, args ...string) caller {
	t.Helper()
	file := filepath.Join(t.TempDir(), "bootstrap.json")
	if err := os.WriteFile(file, bootstrapFor(t, ads, id), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "GRPC_XDS_BOOTSTRAP="+file)
	var said strings.Builder
	cmd.Stderr = &said
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close() // ends the program's loop, also when this process dies
		stop := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
		defer stop.Stop()
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("%s: %v\n%s", id, err, &said)
		}
	})
	lines := bufio.NewReader(stdout)
	return func(c command) outcome {
		raw, _ := json.Marshal(c) // four numbers
		if _, err := io.WriteString(in, string(raw)+"\n"); err != nil {
			t.Fatalf("%s: %v\n%s", id, err, &said)
		}
		var out outcome
		line, err := lines.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(line, &out)
		}
		if err != nil {
			t.Fatalf("%s said %q: %v\n%s", id, line, err, &said)
		}
		return out
	}
}

func pythonCaller(t *testing.T, ads string) caller {
	return processCaller(t, ads, "grpc-python", filepath.Join(environment(t), "bin", "python"), filepath.Join("testdata", "client.py"))
}

func nodeCaller(t *testing.T, ads string) caller {
	t.Helper()
	root := filepath.Join("..", "..")
	if out, err := exec.Command("bash", filepath.Join(root, ".ci", "node")).CombinedOutput(); err != nil {
		unavailable(t, strings.TrimSpace(string(out)))
	}
	return processCaller(t, ads, "grpc-js", "node", filepath.Join("testdata", "client.cjs"), filepath.Join(root, ".cache", "npm", "node_modules"))
}

// fleet is one control plane, its endpoints and one client.
type fleet struct {
	*testing.T
	srv      *adsserver.Server
	call     caller
	v1, v2   *backend
	position uint64
	// lax: the client counts calls and takes up faults late, see translate.Features.
	lax bool
}

func (f *fleet) put(p *policy.Policy) {
	f.Helper()
	f.position++
	p.Position = f.position
	publishAll(f.T, f.srv, p)
}

// until calls until the policy is seen in force: clients accept before they use it.
func (f *fleet) until(c command, what string, seen func(outcome) bool) {
	f.Helper()
	eventually(f.T, func() (string, bool) { o := f.call(c); return what + ": " + o.Why, seen(o) }, nil)
}

// ordinary waits until nothing is left in force of the policies before this one: each
// version alone answers its buckets, and every call.
func (f *fleet) ordinary() {
	f.Helper()
	const n = 40
	eventually(f.T, func() (string, bool) {
		f.reset()
		canary := f.call(command{N: n, Bucket: 5, Parallel: 1})
		b := f.v2.calls.Load()
		stable := f.call(command{N: n, Bucket: 5000, Parallel: 1})
		a := f.v1.calls.Load()
		return fmt.Sprintf("%+v, %d by v2; %+v, %d by v1; want %d each", canary, b, stable, a, n),
			canary.OK == n && stable.OK == n && a == n && b == n
	}, nil)
	f.reset()
}

func (f *fleet) reset() { f.v1.calls.Store(0); f.v2.calls.Store(0) }

func serving(bs ...*backend) (out []policy.Endpoint) {
	for _, b := range bs {
		out = append(out, policy.Endpoint{Address: b.addr, Region: "eu", Weight: 1})
	}
	return out
}

// Three independent implementations obey the published policy: every claim of the
// capability table for gRPC clients.
func TestProxylessClients(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	for _, c := range []struct {
		name  string
		start func(*testing.T, string) caller
		lax   bool
	}{{"go", goCaller, false}, {"python", pythonCaller, false}, {"node", nodeCaller, true}} {
		t.Run(c.name, func(t *testing.T) {
			srv := adsserver.New(adsserver.Options{})
			f := &fleet{T: t, srv: srv, v1: startBackend(t), v2: startBackend(t), lax: c.lax}
			f.put(arms(serving(f.v1), serving(f.v2)))
			f.call = c.start(t, listen(t, srv.Register))
			for _, s := range []struct {
				name string
				run  func(*fleet)
			}{
				{"split", grpcSplit}, {"kill", grpcKill}, {"breaker", grpcBreaker}, {"localities", grpcLocalities},
				{"priorities", grpcPriorities}, {"last good", grpcLastGood}, {"fault and shedding", grpcFault}, {"ejection", grpcEjection},
			} {
				t.Run(s.name, func(t *testing.T) {
					sub := *f
					sub.T = t
					s.run(&sub)
					sub.putTwice(arms(serving(f.v1), serving(f.v2)))
					f.position = sub.position
					sub.ordinary()
				})
			}
			for _, n := range srv.Ledger() {
				if n.Nack != nil || n.Node.Kind != string(translate.KindGRPC) {
					t.Errorf("%+v rejected %+v", n, n.Nack)
				}
			}
		})
	}
}

func grpcSplit(f *fleet) {
	if o := f.call(command{N: 1000, Bucket: 0, Step: 10, Parallel: 4}); o.Failed != 0 {
		f.Fatal(o)
	}
	if a, b := f.v1.calls.Load(), f.v2.calls.Load(); a != 900 || b != 100 {
		f.Errorf("by bucket: %d to v1 and %d to v2, want exactly 900 and 100", a, b)
	}
	f.reset()
	if o := f.call(command{N: 10_000, Bucket: -1, Parallel: 8}); o.Failed != 0 {
		f.Fatal(o)
	}
	near(f.T, "by weight", float64(f.v2.calls.Load())/10_000, 0.10, 0.015)
}

// The canary's buckets move with the route.
func grpcKill(f *fleet) {
	p := arms(serving(f.v1), serving(f.v2))
	p.Models[0].Versions[1].Quarantined = true
	f.put(p)
	canary := command{N: 10, Bucket: 5, Parallel: 1}
	f.until(canary, "the canary is still served", func(outcome) bool { b := f.v2.calls.Swap(0); return b == 0 })
	f.reset()
	if o := f.call(command{N: 500, Bucket: 0, Step: 2, Parallel: 4}); o.Failed != 0 || f.v2.calls.Load() != 0 || f.v1.calls.Load() != 500 {
		f.Errorf("%+v, %d to v1 and %d to v2; want all 500 to v1", o, f.v1.calls.Load(), f.v2.calls.Load())
	}
}

func grpcBreaker(f *fleet) {
	p := arms(serving(f.v1), serving(f.v2))
	p.Models[0].Versions[0].MaxRequests = 3
	f.put(p)
	if f.lax {
		f.laxBreaker()
		return
	}
	// Twelve calls at once: three are held, nine refused. Before the policy is in force
	// all twelve are held; the timer lets them go.
	eventually(f.T, func() (string, bool) {
		hold := make(chan struct{})
		f.v1.most.Store(0)
		f.v1.block.Store(&hold)
		timer := time.AfterFunc(300*time.Millisecond, func() { close(hold) })
		defer timer.Stop()
		o := f.call(command{N: 12, Bucket: 5000, Parallel: 12})
		f.v1.block.Store(nil)
		return fmt.Sprintf("%+v, %d at once; want 3 answered and 9 refused", o, f.v1.most.Load()),
			o.OK == 3 && o.Failed == 9 && f.v1.most.Load() == 3
	}, nil)
}

// laxBreaker: twelve calls begun at once all go through, those after them are refused.
func (f *fleet) laxBreaker() {
	eventually(f.T, func() (string, bool) {
		hold := make(chan struct{})
		f.v1.block.Store(&hold)
		timer := time.AfterFunc(300*time.Millisecond, func() { close(hold) })
		defer timer.Stop()
		o := f.call(command{N: 200, Bucket: 5000, Parallel: 16})
		f.v1.block.Store(nil)
		return fmt.Sprintf("%+v; want calls over the limit refused", o), o.Failed > 50 && strings.Contains(o.Why, "dropped")
	}, nil)
}

func grpcLocalities(f *fleet) {
	es := serving(f.v1, f.v2)
	es[0].Weight, es[1].Region = 3, "us"
	f.put(arms(es, nil))
	f.until(command{N: 20, Bucket: 5000, Parallel: 1}, "the far region is never asked", func(outcome) bool { return f.v2.calls.Load() > 0 })
	f.reset()
	f.call(command{N: 4000, Bucket: 5000, Parallel: 8})
	near(f.T, "near region", float64(f.v1.calls.Load())/4000, 0.75, 0.035)
}

func grpcPriorities(f *fleet) {
	es := append([]policy.Endpoint{{Address: freePort(f.T), Region: "eu", Weight: 1}}, serving(f.v1)...)
	es[1].Priority, es[1].Region = 1, "us"
	f.put(arms(es, nil))
	f.until(command{N: 5, Bucket: 5, Parallel: 1}, "v2 is still served", func(o outcome) bool { return f.v2.calls.Swap(0) == 0 && o.Failed == 0 })
	f.reset()
	if o := f.call(command{N: 300, Bucket: 5000, Parallel: 4}); o.Failed != 0 || f.v1.calls.Load() != 300 {
		f.Errorf("%+v, %d by the second priority; want all 300", o, f.v1.calls.Load())
	}
}

func grpcLastGood(f *fleet) {
	f.put(arms(serving(f.v1), []policy.Endpoint{{Address: freePort(f.T), Region: "eu", Weight: 1}}))
	f.until(command{N: 5, Bucket: 5, Parallel: 1}, "the canary is still served", func(o outcome) bool { return f.v2.calls.Swap(0) == 0 && o.Failed == 0 })
	f.reset()
	if o := f.call(command{N: 300, Bucket: 5, Parallel: 4}); o.Failed != 0 || f.v1.calls.Load() != 300 {
		f.Errorf("%+v, %d by the last good version; want all 300", o, f.v1.calls.Load())
	}
}

// putTwice pushes p, and to a lax client a second time with a change of routes.
func (f *fleet) putTwice(p *policy.Policy) {
	f.put(p)
	if f.lax {
		f.until(command{N: 1, Bucket: 5000, Parallel: 1}, "no call ended", func(outcome) bool { return f.accepted() })
		p.Models[0].Timeout = time.Minute
		f.put(p)
	}
}

// accepted: every client in the ledger has accepted the newest position.
func (f *fleet) accepted() bool {
	for _, n := range f.srv.Ledger() {
		if n.Connected && n.Acked < f.position {
			return false
		}
	}
	return true
}

func grpcFault(f *fleet) {
	p := arms(serving(f.v1), serving(f.v2))
	p.Models[0].Fault = policy.Fault{AbortShare: 3000, AbortStatus: 503}
	f.putTwice(p)
	burst := command{N: 20, Bucket: 5000, Parallel: 4}
	f.until(burst, "no fault", func(o outcome) bool { return o.Failed > 0 })
	near(f.T, "aborted", float64(f.call(command{N: 4000, Bucket: 5000, Parallel: 8}).Failed)/4000, 0.30, 0.035)

	p = arms(serving(f.v1), serving(f.v2))
	p.Models[0].Versions[0].Shed = 4000
	f.putTwice(p)
	// The fault is gone only when a share of another size is seen.
	f.until(command{N: 500, Bucket: 5000, Parallel: 8}, "not shed", func(o outcome) bool { return o.Failed > 175 && strings.Contains(strings.ToLower(o.Why), "drop") })
	near(f.T, "shed", float64(f.call(command{N: 4000, Bucket: 5000, Parallel: 8}).Failed)/4000, 0.40, 0.035)
}

func grpcEjection(f *fleet) {
	bad := startBackend(f.T)
	bad.fail.Store(true)
	p := arms(serving(f.v1, bad), serving(f.v2))
	p.Models[0].Versions[0].ConsecutiveFailures, p.Models[0].Versions[0].OpenFor = 5, time.Minute
	f.put(p)
	f.until(command{N: 50, Bucket: 5000, Parallel: 2}, "the bad endpoint is never asked", func(outcome) bool { return bad.calls.Load() >= 5 })
	f.until(command{N: 100, Bucket: 5000, Parallel: 2}, "the bad endpoint is still asked", func(o outcome) bool { return o.Failed == 0 })
	if o := f.call(command{N: 300, Bucket: 5000, Parallel: 2}); o.Failed != 0 {
		f.Errorf("after the ejection: %+v", o)
	}
}
