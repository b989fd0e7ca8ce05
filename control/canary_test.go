package control_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/facts"
)

// stage starts a canary on one node with a dwell of 10 s and a patience of 20 s.
func (p *plane) stage(node string) {
	p.t.Helper()
	_, err := p.srv.Delivery().XdsCanaryStart(context.Background(), &pb.XdsCanaryStartRequest{Nodes: []string{node},
		Dwell: durationpb.New(10 * time.Second), Patience: durationpb.New(20 * time.Second), Actor: "ann"})
	if err != nil {
		p.t.Fatal(err)
	}
	settle()
}

func (p *plane) canary() *pb.XdsCanaryResponse {
	p.t.Helper()
	out, err := p.srv.Delivery().XdsCanary(context.Background(), &pb.XdsCanaryRequest{})
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// obeys compares which models each sidecar knows with what is wanted: "a" or "ab".
func obeys(t *testing.T, when string, model, want string, all map[string]*sidecar) {
	t.Helper()
	got := ""
	for _, id := range []string{"a", "b", "c"} {
		if s := all[id]; s != nil && s.policy().Model(model) != nil {
			got += id
		}
	}
	if got != want {
		t.Fatalf("%s: %q is known to %q, want %q", when, model, got, want)
	}
}

// Nothing is staged by default. A staged change reaches the chosen client alone until all
// that are chosen have had it for the dwell; then everybody has it and the canary is over.
func TestCanaryIsWidened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		p.register("chat", "v1", "v2")
		all := map[string]*sidecar{"a": p.join("a"), "b": p.join("b")}
		for _, s := range all {
			defer s.leave()
		}
		settle()
		obeys(t, "without a canary", "chat", "ab", all)
		if c := p.canary(); c.State != "off" {
			t.Fatalf("canary %v", c)
		}

		p.stage("a")
		p.register("one", "v1")
		p.register("two", "v1")
		settle()
		obeys(t, "staged", "two", "a", all)
		all["c"] = p.join("c")
		defer all["c"].leave()
		settle()
		obeys(t, "a client that came later", "one", "a", all)
		obeys(t, "a client that came later", "chat", "abc", all)
		if c := p.canary(); c.State != "staging" || len(c.Chosen) != 1 || c.Chosen[0].AckedPosition != c.Policy || c.Base >= c.Policy {
			t.Fatalf("canary %v", c)
		}

		time.Sleep(12 * time.Second)
		settle()
		obeys(t, "after the dwell", "one", "abc", all)
		if c := p.canary(); c.State != "off" {
			t.Fatalf("canary %v", c)
		}
		p.register("three", "v1")
		settle()
		obeys(t, "after the canary", "three", "abc", all)
		if got := fmt.Sprint(kinds(p.events(facts.CanaryAggregate))); got != "[config_canary_started config_canary_ended]" {
			t.Errorf("events %s", got)
		}
	})
}

// A rejection by the chosen client rolls back for everybody, with its words in the event,
// over restarts, until a canary is started anew and accepted.
func TestCanaryRollsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		p := start(t, log, nil)
		defer p.stop()
		p.register("chat", "v1")
		all := map[string]*sidecar{"a": p.join("a"), "b": p.join("b")}
		for _, s := range all {
			defer s.leave()
		}
		p.stage("a")
		all["a"].refuse("bad", "no filter of that name")
		p.register("bad", "v1")
		settle()
		time.Sleep(2 * time.Second)
		settle()
		obeys(t, "rolled back", "bad", "", all)
		ended := p.events(facts.CanaryAggregate)[1].GetConfigCanaryEnded()
		if ended.GetWidened() || ended.GetNode() != "a" || !strings.Contains(ended.GetReason(), "no filter of that name") {
			t.Fatalf("event %v", ended)
		}
		alert := func() bool {
			out, err := p.srv.Admin().ListAlerts(context.Background(), &pb.ListRequestAll{})
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range out.GetAlerts() {
				if x.GetId() == "config-canary" && x.GetResolvedAt() == nil && strings.Contains(x.GetSummary(), "no filter of that name") {
					return true
				}
			}
			return false
		}
		if !alert() {
			t.Error("no alert says so")
		}
		// A restart, and another replica over the same log, keep everybody at the base.
		for _, s := range all {
			s.leave()
		}
		p.stop()
		p = start(t, log, nil)
		defer p.stop()
		all = map[string]*sidecar{"a": p.join("a"), "b": p.join("b")}
		for _, s := range all {
			defer s.leave()
		}
		p.register("later", "v1")
		settle()
		obeys(t, "after a restart", "chat", "ab", all)
		obeys(t, "after a restart", "bad", "", all)
		obeys(t, "after a restart", "later", "", all)
		if c := p.canary(); c.State != "rolled_back" || !strings.Contains(c.Reason, "no filter of that name") {
			t.Fatalf("canary %v", c)
		}

		p.stage("a") // the client understands it now
		time.Sleep(2 * time.Second)
		settle()
		obeys(t, "tried anew", "bad", "a", all)
		if alert() {
			t.Error("the alert still stands")
		}
		time.Sleep(10 * time.Second)
		settle()
		obeys(t, "widened", "bad", "ab", all)
		obeys(t, "widened", "later", "ab", all)
	})
}

// A chosen client that is cut off after it was sent the policy rolls it back when its
// dead-man lease has run out.
func TestCanaryRollsBackWhenTheClientIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), func(o *control.Options) { o.DeadMan = 5 * time.Second })
		defer p.stop()
		p.register("chat", "v1")
		all := map[string]*sidecar{"a": p.join("a"), "b": p.join("b")}
		for _, s := range all {
			defer s.leave()
		}
		p.stage("a")
		p.register("one", "v1")
		settle()
		all["a"].leave()
		time.Sleep(4 * time.Second)
		settle()
		if c := p.canary(); c.State != "staging" || !strings.Contains(c.Reason, "cut off") {
			t.Fatalf("canary %v", c)
		}
		time.Sleep(3 * time.Second)
		settle()
		if c := p.canary(); c.State != "rolled_back" || !strings.Contains(c.Reason, "a was sent the policy and has been cut off") {
			t.Fatalf("canary %v", c)
		}
		delete(all, "a")
		obeys(t, "rolled back", "one", "", all)
		if _, err := p.srv.Delivery().XdsCanaryEnd(context.Background(), &pb.XdsCanaryEndRequest{Widen: true, Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		settle()
		obeys(t, "widened by hand", "one", "b", all)
	})
}

func TestCanaryRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		d, ctx := p.srv.Delivery(), context.Background()
		many := make([]string, 101)
		for i := range many {
			many[i] = fmt.Sprint("n", i)
		}
		for name, r := range map[string]*pb.XdsCanaryStartRequest{
			"nobody": {}, "more than all": {Share: 10_001}, "too many names": {Nodes: many}, "an empty name": {Nodes: []string{""}},
			"unknown kind": {Share: 1, Kinds: []string{"toaster"}}, "dwell below zero": {Share: 1, Dwell: durationpb.New(-1)},
			"patience of days": {Share: 1, Patience: durationpb.New(48 * time.Hour)},
		} {
			if _, err := d.XdsCanaryStart(ctx, r); !outrigger.IsKind(err, outrigger.Invalid) {
				t.Errorf("%s: %v, want kind invalid", name, err)
			}
		}
		_, err := d.XdsCanaryEnd(ctx, &pb.XdsCanaryEndRequest{Widen: true})
		wantKind(t, err, outrigger.NotFound)
		p.stage("a")
		if c := p.canary(); c.State != "staging" || c.Reason != "no policy change yet" {
			t.Fatalf("canary %v", c)
		}
		_, err = d.XdsCanaryStart(ctx, &pb.XdsCanaryStartRequest{Share: 1})
		wantKind(t, err, outrigger.Locked)
		if _, err := d.XdsCanaryEnd(ctx, &pb.XdsCanaryEndRequest{}); err != nil {
			t.Fatal(err)
		}
		_, err = d.XdsCanaryEnd(ctx, &pb.XdsCanaryEndRequest{})
		wantKind(t, err, outrigger.Locked)
	})
}
