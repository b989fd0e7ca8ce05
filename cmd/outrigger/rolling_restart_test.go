//go:build !dataplane

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Three replicas of a control plane are stopped and started again one after the other, the
// leader last, as a rolling update does it, under the load of every kind of client. No call
// fails, and nobody is given anew what they have:
//
//   - our sidecars, given all addresses, and an Envoy with all of them in its bootstrap, move on
//     to another replica, say what they hold and are sent no resource
//   - grpc-go and gRPC for Python have all of them as a list of servers; one that holds
//     everything waits for its own to come back (gRFC A71), and is then answered once for every
//     type it follows, which is what its protocol has
//   - gRPC for Node knows one server only: it has the address of something that passes
//     connections on to whoever takes them, as a Kubernetes Service does
//
// OUTRIGGER_LONG=1 goes round three times, and changes policy while a replica is away.
func TestRollingRestart(t *testing.T) {
	root := realClients(t)
	rounds, calls := 1, int64(10)
	long := os.Getenv("OUTRIGGER_LONG") == "1"
	if long {
		rounds, calls = 3, 60
	}
	set := newReplicas(t, 3)
	leader := set[0]
	leader.register("v1")
	l := newLoad(t)
	sidecars := make([]*stream, 2)
	for i := range sidecars {
		sidecars[i], _ = leader.sidecar(fmt.Sprintf("pod-%d", i))
	}
	streams := append(sidecars, leader.envoy(), leader.grpcGo(), leader.python(root))
	all := leader.control
	leader.control = set.service(t)
	streams = append(streams, leader.node(root))
	leader.control = all
	for _, s := range streams {
		l.add(s)
	}
	set.inSync(len(streams))

	var ended []streamEnd
	for range rounds {
		for i := range set {
			p := set[(i+1)%len(set)]
			ended = append(ended, p.stop()...)
			l.more(calls)
			p.start()
			set.inSync(len(streams))
			l.more(calls)
		}
	}
	if long {
		ended = append(ended, set[2].stop()...)
		leader.register("v2")
		l.more(calls)
		set[2].start()
		set.inSync(len(streams))
		l.more(calls)
	}
	l.end()
	l.intact()
	for i := range set { // the followers first
		ended = append(ended, set[(i+1)%len(set)].stop()...)
	}
	judge(t, ended, long)
	for _, s := range l.streams {
		t.Logf("%s: %d calls", s.name, s.ok.Load())
	}
}

// judge looks at what reconnecting cost every client. changed says that policy changed
// meanwhile.
func judge(t *testing.T, ended []streamEnd, changed bool) {
	began, resumed := map[string]int{}, map[string]int{}
	for _, s := range ended {
		t.Logf("%+v", s)
		if !s.Resumed {
			began[s.Node]++
			continue
		}
		resumed[s.Node]++
		if s.Resent != 0 {
			t.Errorf("%s came back and was sent %d resources that it had", s.Node, s.Resent)
		}
		switch {
		case changed:
		case s.Delta && s.Resources != 0:
			t.Errorf("%s came back with all there is and was sent %d resources", s.Node, s.Resources)
		case !s.Delta && (s.Responses > s.Types || s.Refreshed != s.Responses):
			t.Errorf("%s follows %d types, came back and was sent %d responses, %d of them what it had; want one of each", s.Node, s.Types, s.Responses, s.Refreshed)
		}
	}
	for _, node := range []string{"pod-0", "pod-1", "envoy", "grpc-go", "grpc-python", "grpc-node"} {
		if began[node] != 1 || resumed[node] == 0 {
			t.Errorf("%s began anew %d times and came back %d times; want once, and at least once", node, began[node], resumed[node])
		}
	}
}

// streamEnd is what a replica's log says when an xDS stream has ended.
type streamEnd struct {
	Msg, Node, Kind                                string
	Delta, Drained, Resumed                        bool
	Types, Responses, Resources, Resent, Refreshed int
}

// replicas are control planes over one log, the first of which owns it.
type replicaSet []*mortal

func newReplicas(t *testing.T, n int) (set replicaSet) {
	t.Helper()
	logged := []string{"--log-level", "debug", "--log-format", "json"}
	leader := unborn(t)
	leader.flags = logged
	set = append(set, leader)
	for i := 1; i < n; i++ {
		set = append(set, &mortal{t: t, dir: leader.dir, address: quietPort(t), egress: leader.egress, capture: leader.capture, stopped: true,
			data: fmt.Sprintf("copy-%d", i), flags: append(logged, "--leader", leader.address, "--replica", fmt.Sprintf("copy-%d", i))})
	}
	var addresses []string
	for _, p := range set {
		t.Cleanup(p.kill)
		addresses = append(addresses, p.address)
	}
	leader.control = strings.Join(addresses, ",")
	for _, p := range set {
		p.start()
	}
	return set
}

// inSync waits until that many clients have, each from one of the replicas, all that there is.
func (set replicaSet) inSync(clients int) {
	t := set[0].t
	t.Helper()
	eventually(t, fmt.Sprintf("%d clients have the policy", clients), func() bool {
		here := map[string]bool{}
		for _, p := range set {
			for _, one := range p.nodes() {
				if one.GetConnected() && one.GetBehindSeconds() == 0 && one.GetAckedPosition() > 0 {
					here[one.GetNode().GetId()] = true
				}
			}
		}
		return len(here) == clients
	})
}

// stop is SIGTERM. It returns what the process said of its streams.
func (p *mortal) stop() (ended []streamEnd) {
	p.t.Helper()
	p.stopped = true
	began := time.Now()
	must(p.t, p.cmd.Process.Signal(unix.SIGTERM))
	stuck := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
	defer stuck.Stop()
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatalf("stopped after %v: %v\n%s", time.Since(began), err, tail(p.log.Bytes(), 8000))
	}
	p.t.Logf("%s stopped within %v", p.data, time.Since(began))
	for line := range strings.Lines(p.log.String()) {
		var s streamEnd
		if json.Unmarshal([]byte(line), &s) == nil && s.Msg == "stream ended" {
			ended = append(ended, s)
		}
	}
	return ended
}

// service passes every connection on to the next replica that takes it.
func (set replicaSet) service(t *testing.T) (address string) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	ended := make(chan struct{})
	pass := func(n int, down net.Conn) {
		defer down.Close()
		var up net.Conn
		err := errors.New("no replica")
		for i := 0; i < len(set) && err != nil; i++ {
			up, err = net.Dial("tcp", set[(n+i)%len(set)].address)
		}
		if err != nil {
			return
		}
		defer up.Close()
		over := make(chan struct{}, 2)
		for _, way := range [][2]net.Conn{{up, down}, {down, up}} {
			wg.Go(func() {
				_, _ = io.Copy(way[0], way[1]) // an end of either is the end of both
				over <- struct{}{}
			})
		}
		select {
		case <-over:
		case <-ended:
		}
	}
	wg.Go(func() {
		for n := 0; ; n++ {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { pass(n, conn) })
		}
	})
	t.Cleanup(func() { lis.Close(); close(ended); wg.Wait() })
	return lis.Addr().String()
}
