package control_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

func arms(weights ...uint32) []*pb.ExperimentArm {
	var out []*pb.ExperimentArm
	for i, w := range weights {
		out = append(out, &pb.ExperimentArm{Name: string(rune('a' + i)), Version: fmt.Sprint("v", i+1), Weight: w})
	}
	return out
}

func register(model, version string, addresses ...string) *pb.RegisterModelVersionRequest {
	r := &pb.RegisterModelVersionRequest{Model: model, Version: version}
	for _, a := range addresses {
		r.Endpoints = append(r.Endpoints, &pb.Endpoint{Address: a})
	}
	return r
}

// TestRefusals: every verb names the field, the value and what is allowed, and a refused
// verb leaves the log as it was. The world of each case: "chat" with champion v1, v2 and
// v3 registered and v4 retired; "busy" under rollout "r" from v1 to v2; "tested" under
// experiment "e" over v1 and v2.
func TestRefusals(t *testing.T) {
	p := newPlane(t)
	ctx, admin := t.Context(), p.srv.Admin()
	p.register("chat", "v1", "v2", "v3", "v4")
	p.register("busy", "v1", "v2", "v3")
	p.register("tested", "v1", "v2", "v3")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := admin.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "v4", State: "retired"})
	must(err)
	_, err = admin.StartRollout(ctx, &pb.StartRolloutRequest{Id: "r", Model: "busy", Candidate: "v2"})
	must(err)
	_, err = admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "e", Model: "tested", Arms: arms(5000, 5000), Start: true})
	must(err)

	state := func(m, v, s string) func() error {
		return func() error {
			_, err := admin.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: m, Version: v, State: s})
			return err
		}
	}
	reg := func(r *pb.RegisterModelVersionRequest) func() error {
		return func() error { _, err := admin.RegisterModelVersion(ctx, r); return err }
	}
	rollout := func(r *pb.StartRolloutRequest) func() error {
		return func() error { _, err := admin.StartRollout(ctx, r); return err }
	}
	experiment := func(r *pb.CreateExperimentRequest) func() error {
		return func() error { _, err := admin.CreateExperiment(ctx, r); return err }
	}
	alias := func(r *pb.MoveAliasRequest) func() error {
		return func() error { _, err := admin.MoveAlias(ctx, r); return err }
	}
	configure := func(r *pb.ConfigureModelRequest) func() error {
		return func() error { _, err := admin.ConfigureModel(ctx, r); return err }
	}
	weight := register("chat", "v9", "h:1")
	weight.Endpoints[0].Weight = 2_000_000
	cases := []struct {
		name string
		call func() error
		kind outrigger.Kind
		text string
	}{
		{"register: no model", reg(register("", "v1", "h:1")), outrigger.Invalid, "model is empty"},
		{"register: control character", reg(register("a\tb", "v1", "h:1")), outrigger.Invalid, `"a\tb"`},
		{"register: long name", reg(register(strings.Repeat("x", 201), "v1", "h:1")), outrigger.Invalid, "limit is 200"},
		{"register: no endpoint", reg(register("chat", "v9")), outrigger.Invalid, "endpoints has 0"},
		{"register: no port", reg(register("chat", "v9", "host")), outrigger.Invalid, "host:port"},
		{"register: port 0", reg(register("chat", "v9", "host:0")), outrigger.Invalid, "1..65535"},
		{"register: endpoint twice", reg(register("chat", "v9", "h:1", "h:1")), outrigger.Invalid, "endpoints[1] repeats h:1"},
		{"register: weight", reg(weight), outrigger.Invalid, "2000000"},
		{"register: version twice", reg(register("chat", "v1", "h:1")), outrigger.Exists, "immutable"},
		{"configure: unknown model", configure(&pb.ConfigureModelRequest{Model: "nope"}), outrigger.NotFound, `"nope" not found`},
		{"configure: unit", configure(&pb.ConfigureModelRequest{Model: "chat", Unit: "cookie"}), outrigger.Invalid, "user, session, request"},
		{"configure: attempts", configure(&pb.ConfigureModelRequest{Model: "chat", MaxAttempts: 99}), outrigger.Invalid, "max_attempts is 99"},
		{"configure: timeout", configure(&pb.ConfigureModelRequest{Model: "chat", TimeoutMs: 1 << 31}), outrigger.Invalid, "timeout_ms"},
		{"configure: unit under a test", configure(&pb.ConfigureModelRequest{Model: "tested", Unit: "user"}), outrigger.Locked, "experiment e"},
		{"state: unknown version", state("chat", "v9", "retired"), outrigger.NotFound, "registered are v1, v2, v3, v4"},
		{"state: word", state("chat", "v2", "beloved"), outrigger.Invalid, "registered, validated, shadow, candidate, production, retired, quarantined"},
		{"state: candidate by hand", state("chat", "v2", "candidate"), outrigger.Invalid, "starting a rollout"},
		{"state: retire the champion", state("chat", "v1", "retired"), outrigger.Locked, "move the alias champion"},
		{"state: validate the champion", state("chat", "v1", "validated"), outrigger.Locked, `"v1" of model "chat" is production and cannot become validated`},
		{"state: shadow of a retired one", state("chat", "v4", "shadow"), outrigger.Locked, "retired and cannot become shadow"},
		{"state: promote a retired one", state("chat", "v4", "production"), outrigger.Locked, "set it to registered first"},
		{"state: candidate of a rollout", state("busy", "v2", "registered"), outrigger.Locked, `rollout "r"`},
		{"state: last good of a rollout", state("busy", "v1", "quarantined"), outrigger.Locked, `rollout "r"`},
		{"state: promote under a rollout", state("busy", "v3", "production"), outrigger.Locked, "rollout r"},
		{"alias: word", alias(&pb.MoveAliasRequest{Model: "chat", Alias: "best", To: "v1"}), outrigger.Invalid, "champion, challenger, last_good"},
		{"alias: expectation", alias(&pb.MoveAliasRequest{Model: "chat", Alias: "champion", To: "v2", Expected: new("v3")}), outrigger.Conflict, `points at "v1", expected "v3"`},
		{"alias: to a retired version", alias(&pb.MoveAliasRequest{Model: "chat", Alias: "champion", To: "v4"}), outrigger.Locked, "retired"},
		{"alias: champion under a test", alias(&pb.MoveAliasRequest{Model: "tested", Alias: "champion", To: "v2"}), outrigger.Locked, "experiment e"},
		{"alias: last good under a rollout", alias(&pb.MoveAliasRequest{Model: "busy", Alias: "last_good", To: "v3"}), outrigger.Locked, `pinned to "v1"`},
		{"experiment: weights", experiment(&pb.CreateExperimentRequest{Name: "x", Model: "chat", Arms: arms(5000, 4999)}), outrigger.Invalid, "9999"},
		{"experiment: one arm", experiment(&pb.CreateExperimentRequest{Name: "x", Model: "chat", Arms: arms(10_000)}), outrigger.Invalid, "2.."},
		{"experiment: retired version", experiment(&pb.CreateExperimentRequest{Name: "x", Model: "chat", Arms: arms(1, 2, 3, 9994)}), outrigger.Locked, "retired"},
		{"experiment: unknown version", experiment(&pb.CreateExperimentRequest{Name: "x", Model: "tested", Arms: arms(1, 2, 3, 9994)}), outrigger.NotFound, `version "v4"`},
		{"experiment: name taken", experiment(&pb.CreateExperimentRequest{Name: "e", Model: "chat", Arms: arms(5000, 5000)}), outrigger.Exists, "exists already"},
		{"experiment: during a rollout", experiment(&pb.CreateExperimentRequest{Name: "x", Model: "busy", Arms: []*pb.ExperimentArm{{Name: "a", Version: "v1", Weight: 1}, {Name: "b", Version: "v3", Weight: 9999}}, Start: true}), outrigger.Locked, "rollout r"},
		{"rollout: during an experiment", rollout(&pb.StartRolloutRequest{Model: "tested", Candidate: "v2"}), outrigger.Locked, "experiment e"},
		{"rollout: second", rollout(&pb.StartRolloutRequest{Model: "busy", Candidate: "v3"}), outrigger.Locked, "rollout r"},
		{"rollout: champion", rollout(&pb.StartRolloutRequest{Model: "chat", Candidate: "v1"}), outrigger.Invalid, "serves already"},
		{"rollout: retired", rollout(&pb.StartRolloutRequest{Model: "chat", Candidate: "v4"}), outrigger.Locked, "retired"},
		{"rollout: id taken", rollout(&pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2"}), outrigger.Exists, `"r"`},
		{"rollout: alpha", rollout(&pb.StartRolloutRequest{Model: "chat", Candidate: "v2", Alpha: 0.5}), outrigger.Invalid, "alpha"},
		{"rollout: falling weights", rollout(&pb.StartRolloutRequest{Model: "chat", Candidate: "v2", Phases: []*pb.RolloutPhase{{Name: "a", Weight: 500}, {Name: "b", Weight: 400}}}), outrigger.Invalid, "never fall"},
		{"rollout: unknown", func() error { _, err := admin.AdvanceRollout(ctx, &pb.RolloutActionRequest{Id: "zz"}); return err }, outrigger.NotFound, `"zz"`},
		{"experiment state: unknown", func() error {
			_, err := admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "zz", State: "stopped"})
			return err
		}, outrigger.NotFound, `"zz"`},
		{"experiment state: word", func() error {
			_, err := admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "e", State: "won"})
			return err
		}, outrigger.Invalid, "concluded"},
		{"experiment state: jump", func() error {
			_, err := admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "e", State: "archived"})
			return err
		}, outrigger.Locked, "concluded"},
		{"actor", func() error {
			_, err := admin.ConfigureModel(ctx, &pb.ConfigureModelRequest{Model: "chat", Unit: "user", Actor: "a\nb"})
			return err
		}, outrigger.Invalid, "actor"},
		{"reason", func() error {
			_, err := admin.AbortRollout(ctx, &pb.RolloutActionRequest{Id: "r", Reason: strings.Repeat("x", 5000)})
			return err
		}, outrigger.Invalid, "reason is 5000 bytes"},
		{"list limit", func() error { _, err := admin.ListModels(ctx, &pb.ListRequestAll{Limit: 1001}); return err }, outrigger.Invalid, "1..1000"},
		{"audit kind", func() error { _, err := admin.Audit(ctx, &pb.AuditRequest{Kind: "won"}); return err }, outrigger.Invalid, "rollback_started"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			head := p.log.Head()
			err := c.call()
			wantKind(t, err, c.kind)
			if !strings.Contains(err.Error(), c.text) {
				t.Errorf("%q does not say %q", err, c.text)
			}
			if now := p.log.Head(); now != head {
				t.Errorf("a refused call moved the log from %d to %d", head, now)
			}
		})
	}
}

// TestFirstVersionServes: the first version is champion at once, later ones wait; who
// asked, and from where, is in the log.
func TestFirstVersionServes(t *testing.T) {
	p := newPlane(t)
	first := register("chat", "v1", "h:1")
	first.Actor, first.RequestId = "ann", "req-1"
	m, err := p.admin.RegisterModelVersion(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	if m.GetAliases()["champion"] != "v1" || m.GetVersions()[0].GetState() != "production" || len(m.GetArms()) != 1 {
		t.Fatalf("%v", m)
	}
	e := p.events("model/chat")[0]
	if e.GetActor() != "ann" || e.GetSource() != "admin" || e.GetRequestId() != "req-1" {
		t.Fatalf("%v", e)
	}
	// The same request again answers as the first time and writes nothing.
	head := p.log.Head()
	if again, err := p.admin.RegisterModelVersion(t.Context(), first); err != nil || len(again.GetVersions()) != 1 {
		t.Fatalf("%v, %v", again, err)
	}
	m, err = p.admin.RegisterModelVersion(t.Context(), register("chat", "v2", "h:2"))
	if err != nil || m.GetVersions()[1].GetState() != "registered" || m.GetAliases()["champion"] != "v1" {
		t.Fatalf("%v, %v", m, err)
	}
	if added := p.log.Head() - head; added != 1 {
		t.Fatalf("%d events for a retry and a second version, want 1", added)
	}
}

// TestExperimentLife: draft, running, concluded, archived, and what requests see.
func TestExperimentLife(t *testing.T) {
	p := newPlane(t)
	ctx, admin := t.Context(), p.srv.Admin()
	p.register("chat", "v1", "v2")
	split := func() string {
		s := ""
		for _, a := range p.model("chat").GetArms() {
			s += fmt.Sprintf("%s=%s:%d ", a.GetName(), a.GetVersion(), a.GetWeight())
		}
		return strings.TrimSpace(s)
	}
	e, err := admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "e", Model: "chat", Arms: arms(7000, 3000)})
	if err != nil || e.GetState() != "draft" || split() != "stable=v1:10000" {
		t.Fatalf("%v, %v, %s", e, err, split())
	}
	for _, s := range []struct{ state, split, challenger string }{
		{"running", "a=v1:7000 b=v2:3000", "v2"}, {"concluded", "stable=v1:10000", ""}, {"archived", "stable=v1:10000", ""},
	} {
		e, err := admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "e", State: s.state, Reason: "because", Actor: "ann"})
		if err != nil || e.GetState() != s.state || e.GetReason() != "because" || split() != s.split {
			t.Fatalf("%v, %v, %s", e, err, split())
		}
		if got := p.model("chat").GetAliases()["challenger"]; got != s.challenger {
			t.Fatalf("%s: challenger %q, want %q", s.state, got, s.challenger)
		}
	}
	// A version under test may be quarantined: that is the emergency stop of an arm.
	if _, err := admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "f", Model: "chat", Arms: arms(7000, 3000), Start: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "v2", State: "quarantined"}); err != nil {
		t.Fatal(err)
	}
	if got := split(); got != "a=v1:7000 fallback=v1:3000" {
		t.Fatalf("after quarantining the arm's version: %s", got)
	}
	if a := p.alert("policy/chat"); a == nil || !strings.Contains(a.GetSummary(), `arm "b"`) {
		t.Fatalf("alert %v", a)
	}
}

// TestConcurrentStartsExclude: two replicas over one log decide at the same moment to
// start a rollout and an experiment on the same model; exactly one gets through. The
// append of the first is held until the second has decided on the same facts.
func TestConcurrentStartsExclude(t *testing.T) {
	log := memory.New()
	one := start(t, log, nil)
	one.register("chat", "v1", "v2")
	var once bool
	racing := &failingLog{Log: log}
	two := start(t, racing, nil)
	racing.fail = func(writes []eventlog.Write) error {
		if !once && strings.HasPrefix(writes[0].Aggregate, "model/") {
			once = true
			_, err := one.srv.Admin().StartRollout(context.Background(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2"})
			return err
		}
		return nil
	}
	_, err := two.srv.Admin().CreateExperiment(t.Context(), &pb.CreateExperimentRequest{Name: "e", Model: "chat", Arms: arms(5000, 5000), Start: true})
	wantKind(t, err, outrigger.Locked) // it decided again and found the rollout
	if !once || !strings.Contains(err.Error(), "rollout r") {
		t.Fatalf("raced %v: %v", once, err)
	}
	if len(one.events("experiment/e")) != 0 {
		t.Fatal("the experiment was written")
	}
}

// TestConflictTwiceIsReported: a verb decides again once, not for ever.
func TestConflictTwiceIsReported(t *testing.T) {
	log := &failingLog{Log: memory.New()}
	p := start(t, log, nil)
	p.register("chat", "v1")
	tries := 0
	log.fail = func(writes []eventlog.Write) error {
		tries++
		return eventlog.ErrConflict(writes[0].Aggregate, 3, 4)
	}
	_, err := p.srv.Admin().ConfigureModel(t.Context(), &pb.ConfigureModelRequest{Model: "chat", Unit: "user"})
	wantKind(t, err, outrigger.Conflict)
	if tries != 2 {
		t.Fatalf("%d tries, want 2", tries)
	}
}

// TestReplicasAgree: two Servers over one log, each with a sidecar of its own. Whichever
// replica a verb went to, after every step both sidecars hold the same bytes.
func TestReplicasAgree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		one, two := start(t, log, nil), start(t, log, nil)
		defer one.stop()
		defer two.stop()
		first, second := one.join("n1"), two.join("n2")
		defer first.leave()
		defer second.leave()
		ctx := t.Context()
		steps := []func() error{
			func() error {
				_, err := one.admin.RegisterModelVersion(ctx, register("chat", "v1", "h:1", "h:2"))
				return err
			},
			func() error { _, err := two.admin.RegisterModelVersion(ctx, register("chat", "v2", "h:3")); return err },
			func() error { _, err := one.admin.RegisterModelVersion(ctx, register("code", "v1", "h:4")); return err },
			func() error { _, err := two.admin.RegisterModelVersion(ctx, register("code", "v2", "h:5")); return err },
			func() error {
				_, err := two.admin.StartRollout(ctx, &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2"})
				return err
			},
			func() error {
				_, err := one.admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "e", Model: "code", Arms: arms(1234, 8766), Start: true})
				return err
			},
			func() error { _, err := one.admin.AdvanceRollout(ctx, &pb.RolloutActionRequest{Id: "r"}); return err },
			func() error { _, err := two.admin.AbortRollout(ctx, &pb.RolloutActionRequest{Id: "r"}); return err },
		}
		seen := map[string]bool{}
		for i, step := range steps {
			if err := step(); err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
			time.Sleep(time.Second)
			a, b := held(t, first), held(t, second)
			if a != b {
				t.Fatalf("step %d: the sidecars hold different bytes\n%s\n%s", i, a, b)
			}
			seen[a] = true
		}
		if len(seen) != len(steps) {
			t.Fatalf("%d steps led to %d different policies", len(steps), len(seen))
		}
	})
}

// held is every resource a sidecar has, as bytes.
func held(t *testing.T, s *sidecar) string {
	t.Helper()
	settle()
	s.mu.Lock()
	defer s.mu.Unlock()
	var all strings.Builder
	for _, typeURL := range xds.Types() {
		for _, name := range s.held.Names(typeURL) {
			b, err := translate.Marshal(s.held.Get(typeURL, name))
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&all, "%s %s %x\n", typeURL, name, b)
		}
	}
	return all.String()
}

// TestBadPolicyKeepsTheLastGood: a fact no policy can be made of leaves the last good
// policy in force, raises one alert however often it is tried, and resolves it when the
// fact is gone.
func TestBadPolicyKeepsTheLastGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		p.register("chat", "v1", "v2")
		settle()
		good := p.status().GetPolicyPosition()
		region := func(latitude float64) {
			_, err := p.log.Append(t.Context(), "", eventlog.Write{Aggregate: "region/moon", Expect: eventlog.Any, Events: []*pb.Event{{
				Payload: &pb.Event_RegionRegistered{RegionRegistered: &pb.RegionRegistered{Region: &pb.Region{Name: "moon", Latitude: latitude}}}}}})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		region(500)
		region(501)
		if got := p.status().GetPolicyPosition(); got != good {
			t.Fatalf("policy went from %d to %d", good, got)
		}
		if got := kinds(p.events("alert/policy")); len(got) != 1 || got[0] != "alert_raised" {
			t.Fatalf("alerts %v", got)
		}
		region(45)
		if s := p.status(); s.GetPolicyPosition() <= good {
			t.Fatalf("policy is still at %d", s.GetPolicyPosition())
		}
		if got := kinds(p.events("alert/policy")); len(got) != 2 || got[1] != "alert_resolved" {
			t.Fatalf("alerts %v", got)
		}
	})
}

// TestBadPolicyCanBeRepairedAfterARestart: a server that starts over facts no policy can
// be made of becomes ready, raises no second alert, and publishes once it is repaired.
func TestBadPolicyCanBeRepairedAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		region := func(latitude float64) {
			_, err := log.Append(t.Context(), "", eventlog.Write{Aggregate: "region/moon", Expect: eventlog.Any, Events: []*pb.Event{{
				Payload: &pb.Event_RegionRegistered{RegionRegistered: &pb.RegionRegistered{Region: &pb.Region{Name: "moon", Latitude: latitude}}}}}})
			if err != nil {
				t.Fatal(err)
			}
			settle()
		}
		first := start(t, log, nil)
		region(500)
		first.stop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		srv, err := control.New(control.Options{Log: log, Region: &pb.Region{Name: "eu", Gateway: "eu.example:7000", Latitude: 50, Longitude: 8}})
		if err != nil {
			t.Fatal(err)
		}
		ran := make(chan error, 1)
		go func() { ran <- srv.Run(ctx) }()
		select {
		case <-srv.Ready():
		case err := <-ran:
			t.Fatalf("never ready: %v", err)
		}
		if _, err := srv.Admin().RegisterModelVersion(ctx, register("chat", "v1", "h:1")); err != nil {
			t.Fatalf("the admin API is closed: %v", err)
		}
		settle()
		if got := kinds(first.events("alert/policy")); len(got) != 1 {
			t.Fatalf("alerts %v, want the one from before the restart", got)
		}
		region(45)
		s, err := srv.Admin().Status(ctx, nil)
		if err != nil || s.GetPolicyPosition() == 0 {
			t.Fatalf("policy at %d, %v", s.GetPolicyPosition(), err)
		}
		if got := kinds(first.events("alert/policy")); len(got) != 2 || got[1] != "alert_resolved" {
			t.Fatalf("alerts %v", got)
		}
		cancel()
		if err := <-ran; err != nil {
			t.Fatal(err)
		}
	})
}

// TestLastModelMayGo: an operator may retire what serves; the ADS server's guard against
// losing every model is for bugs.
func TestLastModelMayGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		p.register("chat", "v1")
		car := p.join("n")
		defer car.leave()
		if _, err := p.admin.SetModelVersionState(t.Context(), &pb.SetModelVersionStateRequest{Model: "chat", Version: "v1", State: "retired"}); err != nil {
			t.Fatal(err)
		}
		if got := car.policy(); got.Model("chat") != nil {
			t.Fatalf("the sidecar still has %+v", got.Model("chat"))
		}
		if a := p.alert("policy/chat"); a.GetSeverity() != "high" {
			t.Fatalf("alert %v", a)
		}
	})
}

// TestReadOnlyLog: a log that takes no writes is no reason not to serve what is known.
func TestReadOnlyLog(t *testing.T) {
	log := &failingLog{Log: memory.New()}
	log.fail = func([]eventlog.Write) error { return outrigger.Wrap(outrigger.Unavailable, errDisk, "append") }
	p := start(t, log, nil)
	_, err := p.srv.Admin().RegisterModelVersion(t.Context(), register("chat", "v1", "h:1"))
	wantKind(t, err, outrigger.Unavailable)
	if !errors.Is(err, errDisk) {
		t.Fatalf("the cause is lost: %v", err)
	}
	if s := p.status(); s.GetRegion() != "eu" {
		t.Fatalf("%v", s)
	}
}

// TestRunReportsALostLog: when the log is closed under a running server, Run says so and
// every goroutine ends.
func TestRunReportsALostLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		srv, err := control.New(control.Options{Log: log, Region: &pb.Region{Name: "eu"}})
		if err != nil {
			t.Fatal(err)
		}
		ran := make(chan error, 1)
		go func() { ran <- srv.Run(t.Context()) }()
		<-srv.Ready()
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		wantKind(t, <-ran, outrigger.Unavailable)
	})
}

func TestNewRefuses(t *testing.T) {
	good := control.Options{Log: memory.New(), Region: &pb.Region{Name: "eu"}}
	for name, edit := range map[string]func(*control.Options){
		"Log":         func(o *control.Options) { o.Log = nil },
		"Region.Name": func(o *control.Options) { o.Region = nil },
		"admin token": func(o *control.Options) { o.AdminToken = "short" },
	} {
		o := good
		edit(&o)
		if _, err := control.New(o); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAudit: filters, both directions, and pages that together are the whole.
func TestAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		admin := p.srv.Admin()
		var half time.Time
		for i := range 25 {
			if i == 12 {
				time.Sleep(time.Hour)
				half = time.Now()
			}
			r := register(fmt.Sprintf("m%02d", i), "v1", "h:1")
			r.Actor = []string{"ann", "bob"}[i%2]
			if _, err := admin.RegisterModelVersion(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
		audit := func(r *pb.AuditRequest) (positions []uint64, pages int) {
			for {
				out, err := admin.Audit(t.Context(), clone(r))
				if err != nil {
					t.Fatal(err)
				}
				pages++
				for _, e := range out.GetEvents() {
					positions = append(positions, e.GetPosition())
				}
				if out.GetNext() == 0 {
					return positions, pages
				}
				r.From = out.GetNext()
			}
		}
		kind := "model_version_registered"
		cases := []struct {
			name  string
			req   *pb.AuditRequest
			count int
			pages int
		}{
			{"everything", &pb.AuditRequest{Limit: 1000}, int(p.log.Head()), 1},
			{"by kind, in pages", &pb.AuditRequest{Kind: kind, Limit: 10}, 25, 3},
			{"newest first, in pages", &pb.AuditRequest{Kind: kind, Limit: 10, NewestFirst: true}, 25, 3},
			{"by actor", &pb.AuditRequest{Kind: kind, Actor: "bob"}, 12, 1},
			{"by prefix", &pb.AuditRequest{AggregatePrefix: "model/m1"}, 30, 1},
			{"one aggregate", &pb.AuditRequest{AggregatePrefix: "model/m07", Kind: kind}, 1, 1},
			{"since", &pb.AuditRequest{Kind: kind, Since: timestamppb.New(half)}, 13, 1},
			{"until", &pb.AuditRequest{Kind: kind, Until: timestamppb.New(half)}, 12, 1},
			{"since, newest first", &pb.AuditRequest{Kind: kind, Since: timestamppb.New(half), NewestFirst: true, Limit: 5}, 13, 3},
			{"an empty span", &pb.AuditRequest{Since: timestamppb.New(half.Add(time.Hour))}, 0, 1},
			{"an empty span, newest first", &pb.AuditRequest{Since: timestamppb.New(half.Add(time.Hour)), NewestFirst: true}, 0, 1},
			{"before everything", &pb.AuditRequest{Until: timestamppb.New(half.Add(-2 * time.Hour))}, 0, 1},
		}
		for _, c := range cases {
			got, pages := audit(c.req)
			if len(got) != c.count || pages != c.pages {
				t.Errorf("%s: %d events on %d pages, want %d on %d", c.name, len(got), pages, c.count, c.pages)
			}
			for i := 1; i < len(got); i++ {
				if (got[i] > got[i-1]) == c.req.GetNewestFirst() {
					t.Errorf("%s: positions %v are out of order", c.name, got)
					break
				}
			}
		}
	})
}
