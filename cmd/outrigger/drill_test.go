//go:build !dataplane

package main

import (
	"strings"
	"testing"
)

// The judge of a drill: by when a request began, not by when it arrived.
func TestJudgeArrivals(t *testing.T) {
	states := []drillState{{gone: 100}, {gone: 200}, {}}
	for _, c := range []struct {
		what            string
		a               drillArrival
		wrong, inFlight int
	}{
		{"before", drillArrival{sidecar: 0, begun: 90, at: 95}, 0, 0},
		{"under way", drillArrival{sidecar: 0, begun: 90, at: 1000_100}, 0, 1},
		{"began with the policy", drillArrival{sidecar: 0, begun: 100, at: 101}, 0, 1},
		{"after", drillArrival{sidecar: 0, begun: 101, at: 102}, 1, 0},
		{"another sidecar still may", drillArrival{sidecar: 1, begun: 150, at: 160}, 0, 0},
		{"an Envoy's", drillArrival{sidecar: 3, begun: 500, at: 501}, 0, 0},
		{"one that never dropped it", drillArrival{sidecar: 2, begun: 500, at: 501}, 0, 0},
	} {
		wrong, inFlight, worst := judgeArrivals([]drillArrival{c.a}, states)
		if wrong != c.wrong || inFlight != c.inFlight || (c.what == "under way") != (worst == 1) {
			t.Errorf("%s: wrong %d, in flight %d, worst %v", c.what, wrong, inFlight, worst)
		}
	}
}

// A report is good only if nothing was wrong in any run.
func TestDrillVerdict(t *testing.T) {
	good := func() *drillReport {
		return &drillReport{Sidecars: 2, Calls: drillClients{Requests: 9, Failed: 3}, Runs: []drillRun{{Acked: 2, BadAnswers: 3, DecidedMs: 1500}}, Kills: []drillKill{{}}}
	}
	r := good()
	if r.finish(); !r.OK || r.Stages["decided_ms"].Met || r.Stages["decided_ms"].Worst != 1500 {
		t.Errorf("%+v", r)
	}
	if err := r.verdict(true); err == nil || !strings.Contains(err.Error(), "the target is 1000 ms") {
		t.Errorf("a missed target: %v", err)
	}
	for want, spoil := range map[string]func(*drillReport){
		"after their sidecars had":   func(r *drillReport) { r.Runs[0].Wrong = 1 },
		"1 of 2 sidecars":            func(r *drillReport) { r.Runs[0].Acked = 1 },
		"2 of 2 sidecars":            func(r *drillReport) { r.Runs[0].LaggardSeen = 1 },
		"without a bad answer":       func(r *drillReport) { r.Runs[0].BadAnswers = 0 },
		"after the dead-man lease":   func(r *drillReport) { r.Kills[0].AfterLease = 1 },
		"1 requests reached":         func(r *drillReport) { r.Kills[0].Wrong = 1 },
		"no call was made":           func(r *drillReport) { r.Calls.Requests = 0 },
		"that no bad version explai": func(r *drillReport) { r.Calls.Unexplained = 1 },
	} {
		r := good()
		spoil(r)
		if r.finish(); r.OK || r.verdict(false) == nil || !strings.Contains(r.verdict(false).Error(), want) {
			t.Errorf("%s: %v", want, r.verdict(false))
		}
	}
}

// A sidecar's story as its lines tell it: weight, none, weight again after the control
// plane came back, none.
func TestDrillFleet(t *testing.T) {
	f := newDrillFleet(1)
	dropped := f.begin("candidate-1")
	for _, step := range []struct {
		line       string
		with, gone int
	}{
		{`{"sidecar":0,"at":1,"weights":{"good":10000}}`, 0, 0},
		{`{"sidecar":0,"at":2,"weights":{"good":9000,"candidate-1":1000}}`, 1, 0},
		{`{"sidecar":0,"clients":{"requests":7}}`, 1, 0},
		{`{"sidecar":0,"at":3,"weights":{"good":10000}}`, 0, 1},
		{`{"sidecar":0,"at":4,"weights":{"good":9000,"candidate-1":1000}}`, 1, 0},
		{`{"sidecar":0,"at":5,"weights":{"good":10000}}`, 0, 1},
	} {
		f.line([]byte(step.line))
		if with, gone, err := f.count(); with != step.with || gone != step.gone || err != nil {
			t.Errorf("%s: with %d, gone %d, %v", step.line, with, gone, err)
		}
	}
	select {
	case <-dropped:
	default:
		t.Error("nobody was told of the first drop")
	}
	if s := f.snapshot()[0]; s.since != 2 || s.gone != 5 || f.calls().Requests != 7 {
		t.Errorf("%+v, %+v", s, f.calls())
	}
	f.line([]byte(`{"sidecar":9}`))
	if _, _, err := f.count(); err == nil {
		t.Error("a line about a sidecar that does not exist")
	}
}
