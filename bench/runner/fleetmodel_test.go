package main

import (
	"bytes"
	"context"
	"math"
	"os"
	"strings"
	"testing"
)

// A fleet with one of everything that is counted: 80 sidecars and 20 gRPC clients, of which
// two read nothing and five are replaced.
func TestFleetModelAddsUp(t *testing.T) {
	c := serverCost{BaseUS: 1000,
		Delta: streamCost{ConnectUS: 300, PushUS: 50, StormUS: 500, ChurnUS: 400, MemoryKiB: 64, ResidentKiB: 100, ConnectBytes: 70_000, PushBytes: 1500, StormBytes: 10_000, ClientUS: 30},
		State: streamCost{ConnectUS: 200, PushUS: 40, StormUS: 250, ChurnUS: 300, MemoryKiB: 32, ResidentKiB: 60, ConnectBytes: 4_000, PushBytes: 1600, StormBytes: 4_500, ClientUS: 20}}
	got := c.predict(fleetShape{Delta: 80, State: 20, SlowOf: 50, Churn: 0.05}, 2)
	push := 0.98 * (80*50 + 20*40)
	want := fleetFigures{
		ConnectS: (80*300 + 20*200) / 1e6, StormS: (80*500 + 20*250) / 1e6, MemoryMiB: (80*64 + 20*32) / 1024.0, ResidentMiB: (80*100 + 20*60) / 1024.0,
		PushS:     (1000 + push + 0.05*(80*400+20*300)) / 1e6,
		ConnectMB: (80*70_000 + 20*4_000) / 1e6, StormMB: (80*10_000 + 20*4_500) / 1e6,
		PushMB:     (0.98*(80*1500+20*1600) + 0.05*(80*70_000+20*4_000)) / 1e6,
		ConvergeMS: (1000 + push + 0.98*(80*30+20*20)) / 1e3 / 2,
	}
	for _, f := range fleetFigureList() {
		if g, w := f.of(got), f.of(want); math.Abs(g-w) > 1e-9*w {
			t.Errorf("%s is %v, want %v", f.key, g, w)
		}
	}
	if g := c.predict(fleetShape{}, 2); g.PushS != 0.001 || g.MemoryMiB != 0 {
		t.Errorf("a push to nobody costs %v s and %v MiB, want what it costs to compile, and no memory", g.PushS, g.MemoryMiB)
	}
	if g := off(2, 2.5); g != 25 {
		t.Errorf("2.5 instead of 2 is %v %% off", g)
	}
}

func TestPlan(t *testing.T) {
	for text, want := range map[string]fleetShape{"100000": {Delta: 100_000}, "10,5": {Delta: 10, State: 5}, "0,5": {State: 5}} {
		if got, err := parsePlan(text); err != nil || got != want {
			t.Errorf("%q is %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "x", "1,", "-1", "0", "0,0", "1,2,3"} {
		if got, err := parsePlan(text); err == nil {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
	var out bytes.Buffer
	c := serverCost{Machine: "a machine", Delta: streamCost{MemoryKiB: 64, PushUS: 60}}
	if err := printPlan(&out, c, fleetShape{Delta: 100_000}); err != nil {
		t.Fatal(err)
	}
	// 100,000 × twice 64 KiB and × 60 us on one server, a quarter of it on each of four.
	text := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{" 1 100000 12.21 6.00 ", " 4 25000 3.05 1.50 ", " a machine "} {
		if !strings.Contains(text, want) {
			t.Errorf("the plan lacks %q:\n%s", want, &out)
		}
	}
}

// The clients of a fleet against a real server, each in a process of its own: both kinds are
// answered, rejecters and slow readers are counted as they should be, and replaced and cut
// off clients come back.
func TestFleetClients(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	e := &env{self: self} // TestMain makes this program the children
	shape := fleetShape{Delta: 40, State: 20, SlowOf: 20, Churn: 0.05}
	p, _, connected, err := e.startFleet(ctx, shape)
	if err != nil {
		t.Fatal(err)
	}
	defer p.end()
	for _, line := range []string{"conduct 10 20", "slow"} {
		if _, err := p.clients.ask(line); err != nil {
			t.Fatal(err)
		}
	}
	slow := shape.slow()
	if slow != 3 {
		t.Fatalf("%d of 60 clients read slowly, want 3", slow)
	}
	each, err := p.pushAll(ctx, 2, shape.count()-slow)
	if err != nil {
		t.Fatal(err)
	}
	if each.bytes <= 0 || connected <= each.bytes {
		t.Errorf("a push took %v bytes and connecting %v, which is not more", each.bytes, connected)
	}
	if _, err := p.clients.ask("read"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.push(shape.count()); err != nil {
		t.Errorf("after the slow readers read again: %v", err)
	}
	if _, _, err := p.storm(ctx); err != nil {
		t.Errorf("after all were cut off: %v", err)
	}
	if _, _, err := p.push(shape.count()); err != nil {
		t.Errorf("after the storm: %v", err)
	}
	if _, err := p.clients.ask("dance"); err == nil {
		t.Error("a command that does not exist is obeyed")
	}
}
