//go:build !dataplane

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The control plane is killed under the load of every kind of client: a real Envoy, grpc-go,
// gRPC for Python (C-core) and for Node, and our sidecars; they are processes, and so is it.
// No call of any of them fails:
//
//  1. it is killed, and comes back with its disk: everybody is back in sync
//  2. while it is away a sidecar starts anew, and serves from what it has on disk
//  3. it is killed again and comes back without its disk: nobody is told that there is
//     nothing; an alert says who goes on with what
//  4. the same versions are registered again: everybody is in sync with it, still without a
//     failed call, and (after the load) follows it to another version
//
// OUTRIGGER_LONG=1 holds the third state for longer than any timer of a client, and kills it
// more often.
func TestControlDiesUnderEveryClient(t *testing.T) {
	root := realClients(t)
	kills, hold, calls := 1, time.Duration(0), int64(30)
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		kills, hold, calls = 3, 40*time.Second, 60
	}
	p := newMortal(t)
	p.register("v1")
	l := newLoad(t)
	clients := []*stream{p.envoy(), p.grpcGo(), p.python(root), p.node(root)}
	steady, _ := p.sidecar("steady")
	restarted, kill := p.sidecar("restarted")
	for _, s := range append(clients, steady) {
		l.add(s)
	}
	p.inSync(6)
	eventually(t, "the sidecar has its policy on disk", func() bool {
		files, _ := os.ReadDir(filepath.Join(p.dir, "restarted-state"))
		return len(files) > 0 && restarted.one() == nil
	})
	l.more(calls)

	for i := range kills {
		p.kill()
		if i == 0 {
			kill()
			restarted, _ = p.sidecar("restarted")
			l.add(restarted)
		}
		l.more(calls)
		p.start()
		p.inSync(6)
		l.more(calls)
	}

	p.kill()
	p.loseDisk()
	p.start()
	eventually(t, "all clients are back", func() bool {
		n := 0
		for _, one := range p.nodes() {
			if one.GetConnected() {
				n++
			}
		}
		return n == 6
	})
	eventually(t, "an alert says so", func() bool {
		out := p.verb("alert", "list")
		return strings.Contains(out, "unknown-configuration") && strings.Contains(out, "never had")
	})
	eventually(t, "xds status says who holds what, and what can be done", func() bool {
		out := p.verb("xds", "status")
		return strings.Contains(out, "6 clients hold what this control plane's log never had") && strings.Contains(out, "  steady: ") && strings.Contains(out, "--adopt-clients")
	})
	if _, err := p.try("xds", "status", "--check"); err == nil {
		t.Error("xds status --check finds nothing wrong")
	}
	for began := time.Now(); ; {
		l.more(calls)
		if time.Since(began) >= hold {
			break
		}
	}
	for _, one := range p.nodes() {
		if one.GetSentPosition() != 0 {
			t.Errorf("%s was sent position %d of an empty log", one.GetNode().GetId(), one.GetSentPosition())
		}
	}

	p.register("v1")
	p.inSync(6)
	l.more(calls)
	l.end()
	l.intact()
	p.register("v2")
	for _, model := range []string{"web", "chat"} {
		p.verb("model", "alias", model, "champion", "v2")
	}
	l.follow(p, "v2")
	for _, s := range l.streams {
		t.Logf("%s: %d calls", s.name, s.ok.Load())
	}
}
