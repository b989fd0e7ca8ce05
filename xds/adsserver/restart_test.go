package adsserver_test

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// plane is a control plane's ADS server that can be killed and started again at the
// same address.
type plane struct {
	t    *testing.T
	addr string
	srv  *adsserver.Server
	gs   *grpc.Server
	done chan struct{}
}

func (p *plane) start() {
	p.t.Helper()
	lis, err := net.Listen("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.srv, p.gs, p.done = adsserver.New(adsserver.Options{}), grpc.NewServer(), make(chan struct{})
	p.srv.Register(p.gs)
	gs, done := p.gs, p.done
	go func() { defer close(done); _ = gs.Serve(lis) }() // ends with Stop
}

func (p *plane) kill() {
	p.gs.Stop()
	<-p.done
}

func (p *plane) nodes(of *policy.Policy) (behind string, ok bool) {
	seen := map[translate.Kind]bool{}
	for _, n := range p.srv.Ledger() {
		if n.Nack != nil {
			p.t.Errorf("%s rejected %+v", n.Node.ID, n.Nack)
		}
		if n.Connected && n.Acked == of.Position {
			seen[translate.Kind(n.Node.Kind)] = true
		}
	}
	return fmt.Sprintf("only %v accepted position %d", seen, of.Position), seen[translate.KindEnvoy] && seen[translate.KindGRPC]
}

// The control plane dies under an Envoy and a proxyless client with load on them, comes
// back with nothing in memory, and later with its policy: no request fails, neither
// client is given an empty configuration, and the new policy is obeyed.
func TestRestartUnderLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := &plane{t: t, addr: freePort(t)}
	p.start()
	t.Cleanup(func() { p.kill() })

	// One policy for both: HTTP endpoints for the Envoy's model, gRPC ones for chat.
	web1, web2 := startUpstream(t, "v1"), startUpstream(t, "v2")
	rpc1, rpc2 := startBackend(t), startBackend(t)
	both := func(position uint64) *policy.Policy {
		rpc, web := arms(serving(rpc1), serving(rpc2)), arms(at(web1), at(web2))
		web.Models[0].Name = "web"
		rpc.Position, rpc.Models = position, append(rpc.Models, web.Models...)
		return rpc
	}
	first := both(1)
	e := startEnvoy(t, p.srv, p.addr, first)
	call := goCaller(t, p.addr)
	ask := func() answer { return e.askBody(`{"model":"web"}`, outrigger.HeaderBucket, "5") }
	eventually(t, func() (string, bool) { a := ask(); return fmt.Sprintf("%+v", a), a.status == 200 }, nil)
	eventually(t, func() (string, bool) { o := call(command{N: 1, Bucket: 5, Parallel: 1}); return o.Why, o.OK == 1 }, nil)
	eventually(t, func() (string, bool) { return p.nodes(first) }, p.srv.Changed)

	stop := make(chan struct{})
	var wg sync.WaitGroup
	var requests, failed atomic.Int64
	var why atomic.Value
	load := func(one func() string) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				requests.Add(1)
				if err := one(); err != "" {
					failed.Add(1)
					why.Store(err)
				}
			}
		})
	}
	load(func() string {
		if a := ask(); a.status != 200 {
			return fmt.Sprintf("Envoy: %+v", a)
		}
		return ""
	})
	load(func() string { return call(command{N: 1, Bucket: 5, Parallel: 1}).Why })
	more := func(n int64) {
		t.Helper()
		from := requests.Load()
		eventually(t, func() (string, bool) { return "no load", requests.Load() >= from+n }, nil)
	}

	more(200)
	p.kill()
	more(500) // nobody to ask
	p.start() // as after the loss of its disk: nothing published yet
	eventually(t, func() (string, bool) { n := len(p.srv.Ledger()); return fmt.Sprintf("%d clients are back", n), n == 2 }, p.srv.Changed)
	more(500)
	for _, n := range p.srv.Ledger() {
		if n.Sent != 0 {
			t.Errorf("%s was sent position %d before there was one", n.Node.ID, n.Sent)
		}
	}
	publishWith(t, p.srv, first, e.opt)
	eventually(t, func() (string, bool) { return p.nodes(first) }, p.srv.Changed)
	more(200)
	if f := failed.Load(); f != 0 {
		t.Errorf("%d of %d requests failed, the last: %v", f, requests.Load(), why.Load())
	}

	// And it is the one they follow: a quarantine reaches both, under load.
	second := both(2)
	for i := range second.Models {
		second.Models[i].Versions[1].Quarantined = true
	}
	publishWith(t, p.srv, second, e.opt)
	eventually(t, func() (string, bool) { return p.nodes(second) }, p.srv.Changed)
	eventually(t, func() (string, bool) {
		before := rpc2.calls.Load()
		o := call(command{N: 20, Bucket: 5, Parallel: 1})
		return "the canary is still served", ask().served == "v1" && o.Failed == 0 && rpc2.calls.Load() == before
	}, nil)
	more(200)
	close(stop)
	wg.Wait()
	if f := failed.Load(); f != 0 {
		t.Errorf("%d of %d requests failed, the last: %v", f, requests.Load(), why.Load())
	}
	t.Logf("%d requests", requests.Load())
}
