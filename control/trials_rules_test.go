package control_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// seen is what sidecars report of one arm: every unit has one request, of every failing
// one fails (0 = none), each takes ms.
type seen struct {
	arm, version string
	units        int
	failing      int
	ms           float64
	first        int // the number of the first unit; units of different arms must not meet
}

// tell reports under the weight epoch.
func (p *plane) tell(reporter string, sequence, epoch uint64, of ...seen) {
	p.t.Helper()
	var out []*pb.OutcomeDelta
	for _, s := range of {
		o := &pb.OutcomeDelta{Model: "chat", Version: s.version, Arm: s.arm, Region: "eu", WeightEpoch: epoch, Requests: uint64(s.units)}
		for i := range s.units {
			row := &pb.UnitRow{Unit: uint32(s.first + i), N: 1, SumY: s.ms + float64(i%5)} // the spread is what tests divide by
			if s.failing > 0 && i%s.failing == 0 {
				row.SumX, o.Failures = 1, o.Failures+1
			}
			o.Units = append(o.Units, row)
		}
		out = append(out, o)
	}
	p.push(reporter, sequence, out...)
}

// batch is n units of each arm, numbered from i·n on.
func batch(i, n, controlFails, treatmentFails int) []seen {
	return []seen{{"control", "v1", n, controlFails, 20, i * n}, {"treatment", "v2", n, treatmentFails, 20, 1_000_000 + i*n}}
}

// rule is a plan over success_rate that may end between 5 and 60 minutes.
func rule(method string, edit func(*pb.ExperimentPlan)) *pb.ExperimentPlan {
	out := &pb.ExperimentPlan{Method: method, Metrics: []*pb.ExperimentMetric{{Name: "success_rate"}}, Baseline: .9, Mde: .03, UnitsPerArm: 3000,
		MinDuration: durationpb.New(5 * time.Minute), MaxDuration: durationpb.New(time.Hour)}
	if edit != nil {
		edit(out)
	}
	return out
}

// changes are the experiment's events as "state", with looks and outcomes.
func (p *plane) changes() (out []string) {
	p.t.Helper()
	for _, e := range p.events("experiment/ab") {
		c := e.GetExperimentChanged()
		s := c.GetState()
		if c.GetLook() > 0 {
			s = fmt.Sprintf("look %.2f", c.GetLook())
		}
		for _, more := range []string{c.GetOutcome(), c.GetServe(), c.GetCause()} {
			if more != "" {
				s += " " + more
			}
		}
		out = append(out, s)
	}
	return out
}

func (p *plane) wantChanges(want ...string) {
	p.t.Helper()
	if got := p.changes(); !slices.Equal(got, want) {
		p.t.Fatalf("events %q, want %q", got, want)
	}
}

// The O'Brien–Fleming plan looks when a fifth of the information has come, each time once,
// asks for much early and for little late, and ends at its horizon.
func TestGroupSequentialLooks(t *testing.T) {
	obf := rule("obf", func(p *pb.ExperimentPlan) { p.MinDuration, p.Mde = durationpb.New(time.Minute), .005 })
	t.Run("no difference", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPlane(t)
			epoch := p.planned(obf)
			for i := range 5 {
				p.tell("n1/a", uint64(i+1), epoch, batch(i, 600, 10, 10)...)
				time.Sleep(2 * time.Minute)
			}
			p.wantChanges("draft", "planned", "running", "look 0.20", "look 0.40", "look 0.60", "look 0.80", "look 1.00", "concluded inconclusive control")
			if p.champion() != "v1" {
				t.Fatalf("champion %s", p.champion())
			}
		})
	})
	t.Run("a difference that one look cannot show and three can", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPlane(t)
			epoch := p.planned(obf)
			p.tell("n1/a", 1, epoch, batch(0, 600, 10, 13)...)
			time.Sleep(6 * time.Minute)
			p.wantChanges("draft", "planned", "running", "look 0.20")
			time.Sleep(10 * time.Minute) // looking again at the same is no look
			p.wantChanges("draft", "planned", "running", "look 0.20")
			for i := 1; i < 5; i++ {
				p.tell("n1/a", uint64(i+1), epoch, batch(i, 600, 10, 13)...)
				time.Sleep(time.Minute)
			}
			got := p.changes()
			if got[len(got)-1] != "concluded ship treatment" || len(got) < 6 || p.champion() != "v2" {
				t.Fatalf("events %q, champion %s", got, p.champion())
			}
		})
	})
}

// A fixed horizon says nothing before it, whatever it sees.
func TestFixedHorizonWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		epoch := p.planned(rule("fixed", nil))
		p.tell("n1/a", 1, epoch, batch(0, 1500, 2, 0)...) // half of the control's fail: no doubt, but too early
		time.Sleep(20 * time.Minute)
		p.wantChanges("draft", "planned", "running")
		if p.arm("primary", "success_rate", "significant") != false {
			t.Error("significant before the horizon")
		}
		p.tell("n1/a", 2, epoch, batch(1, 1500, 10, 25)...)
		time.Sleep(time.Minute)
		p.wantChanges("draft", "planned", "running", "concluded ship treatment")
	})
}

// What stops an experiment does so before its minimum duration, keeps the champion and
// frees the challenger's name.
func TestStops(t *testing.T) {
	guarded := rule("cs", func(p *pb.ExperimentPlan) {
		p.Guardrails = []*pb.ExperimentMetric{{Name: "response_time", Margin: .1}}
	})
	for _, c := range []struct {
		name string
		seen []seen
		want string // "" = goes on
		says string
	}{
		{"guardrail", []seen{{"control", "v1", 1000, 10, 20, 0}, {"treatment", "v2", 1000, 100, 40, 1_000_000}}, "stopped guardrail", "guardrail response_time: arm treatment"},
		{"within the margin", []seen{{"control", "v1", 1000, 10, 20, 0}, {"treatment", "v2", 1000, 10, 21, 1_000_000}}, "", ""},
		{"sample ratio", []seen{{"control", "v1", 3000, 10, 20, 0}, {"treatment", "v2", 2000, 10, 20, 1_000_000}}, "stopped srm", "sample ratio mismatch"},
		{"chance", []seen{{"control", "v1", 2540, 10, 20, 0}, {"treatment", "v2", 2460, 10, 20, 1_000_000}}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPlane(t)
				p.tell("n1/a", 1, p.planned(guarded), c.seen...)
				time.Sleep(3 * time.Second)
				r := p.results()
				if c.want == "" {
					if r.Experiment.State != "running" {
						t.Fatalf("%v", r.Experiment)
					}
					return
				}
				p.wantChanges("draft", "planned", "running", c.want)
				m, err := p.admin.GetModel(context.Background(), &pb.NameRequest{Name: "chat"})
				if err != nil || m.Aliases["champion"] != "v1" || m.Aliases["challenger"] != "" || !strings.Contains(r.Experiment.Reason, c.says) {
					t.Fatalf("aliases %v, reason %q, %v", m.GetAliases(), r.Experiment.Reason, err)
				}
				time.Sleep(2 * time.Hour) // and that is the end of it
				p.wantChanges("draft", "planned", "running", c.want)
			})
		})
	}
}

// Units seen under both arms are left out, and from one in a hundred on results say so.
func TestMultipleExposureIsShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		epoch := p.planned(rule("cs", nil))
		p.tell("n1/a", 1, epoch, batch(0, 1000, 10, 10)...)
		p.tell("n1/b", 1, epoch, seen{"treatment", "v2", 15, 1, 20, 0}) // 15 of the control's
		if w := p.results().Results.AsMap()["warnings"].([]any); len(w) != 0 {
			t.Errorf("15 of 2000: %v", w)
		}
		p.tell("n1/b", 2, epoch, seen{"treatment", "v2", 10, 1, 20, 15})
		warnings := fmt.Sprint(p.results().Results.AsMap()["warnings"])
		if !strings.Contains(warnings, "25 of 2000 units") {
			t.Errorf("25 of 2000: %s", warnings)
		}
		if u := p.arm("arms", "control", "units"); u != 975.0 {
			t.Errorf("control has %v units, want 975", u)
		}
		if v := p.arm("arms", "treatment", "value"); v != .9 {
			t.Errorf("treatment's rate %v, want 0.9: the failures were of units that count nowhere", v)
		}
	})
}

// crashing is a log that lets a number of appends through and then is gone, snapshots too.
type crashing struct {
	eventlog.Log
	left atomic.Int64
}

func (l *crashing) Append(ctx context.Context, id string, writes ...eventlog.Write) (eventlog.Appended, error) {
	if l.left.Add(-1) < 0 {
		return eventlog.Appended{}, outrigger.Errorf(outrigger.Unavailable, "the process is dead")
	}
	return l.Log.Append(ctx, id, writes...)
}

func (l *crashing) SaveSnapshot(ctx context.Context, name string, position uint64, state []byte) error {
	if l.left.Load() <= 0 {
		return outrigger.Errorf(outrigger.Unavailable, "the process is dead")
	}
	return l.Log.SaveSnapshot(ctx, name, position, state)
}

// A crash at any event of an experiment's life: what is in the log is taken up, what was
// reported since the last snapshot is reported anew by other units, and it concludes once,
// for the right arm, with looks that only ever grow.
func TestCrashAtEveryEvent(t *testing.T) {
	looks := rule("obf", func(p *pb.ExperimentPlan) { p.MinDuration = durationpb.New(time.Minute) })
	life := func(t *testing.T, allowed int64) (crashed bool) {
		synctest.Test(t, func(t *testing.T) {
			log := memory.New()
			dying := &crashing{Log: log}
			dying.left.Store(1 << 40)
			p := start(t, dying, nil)
			epoch := p.planned(looks)
			dying.left.Store(allowed)
			for i := range 12 {
				// One unit in ten fails, one in thirteen under the treatment: a later look shows it.
				p.tell("n1/a", uint64(i+1), epoch, batch(i, 600, 10, 13)...)
				time.Sleep(45 * time.Second)
				if !crashed && dying.left.Load() < 0 {
					crashed = true
					p.stop()
					p = start(t, log, nil)
				}
			}
			time.Sleep(5 * time.Minute)
			got := p.changes()
			if n := len(got); got[n-1] != "concluded ship treatment" || p.champion() != "v2" {
				t.Fatalf("events %q, champion %s", got, p.champion())
			}
			last := 0.0
			for _, e := range p.events("experiment/ab") {
				if l := e.GetExperimentChanged().GetLook(); l > 0 {
					if l <= last {
						t.Errorf("look at %v after one at %v", l, last)
					}
					last = l
				}
			}
			moved := 0
			for _, e := range p.events("model/chat") {
				if a := e.GetAliasMoved(); a.GetAlias() == "champion" && a.GetTo() == "v2" {
					moved++
				}
			}
			if moved != 1 {
				t.Errorf("the champion moved %d times: %q", moved, got)
			}
		})
		return crashed
	}
	for allowed := int64(0); allowed < 20; allowed++ {
		if !life(t, allowed) {
			if allowed < 3 {
				t.Errorf("a whole life has %d appends; three looks were expected", allowed)
			}
			return
		}
	}
	t.Error("no life was long enough to end without a crash")
}

// Every refusal of the experiment verbs names field, value and what is allowed, and leaves
// log and policy as they were.
func TestExperimentVerbsRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		ctx, admin := context.Background(), p.srv.Admin()
		p.planned(rule("cs", nil))
		if _, err := admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "next", Model: "chat", Arms: arms(5000, 5000)}); err != nil {
			t.Fatal(err)
		}
		s := p.join("s1")
		before := s.policy()
		create := func(arms []*pb.ExperimentArm) func() error {
			return func() error {
				_, err := admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "x", Model: "chat", Arms: arms})
				return err
			}
		}
		plan := func(name string, edit func(*pb.ExperimentPlan)) func() error {
			return func() error {
				_, err := admin.PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: name, Plan: rule("cs", edit)})
				return err
			}
		}
		state := func(name, to string) func() error {
			return func() error {
				_, err := admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: name, State: to})
				return err
			}
		}
		cases := []struct {
			name string
			call func() error
			kind outrigger.Kind
			says []string
		}{
			{"weight 0", create(arms(5000, 0, 5000)), outrigger.Invalid, []string{"weight 0", "1..9999"}},
			{"weights' sum", create(arms(5000, 6000)), outrigger.Invalid, []string{"11000", "10000"}},
			{"arm twice", create([]*pb.ExperimentArm{{Name: "a", Version: "v1", Weight: 5000}, {Name: "a", Version: "v2", Weight: 5000}}), outrigger.Invalid, []string{`"a"`, "distinct"}},
			{"reserved arm", create([]*pb.ExperimentArm{{Name: "unassigned", Version: "v1", Weight: 5000}, {Name: "a", Version: "v2", Weight: 5000}}), outrigger.Invalid, []string{`"unassigned"`, "reserved"}},
			{"unknown metric", plan("next", func(p *pb.ExperimentPlan) { p.Metrics[0].Name = "happiness" }), outrigger.Invalid, []string{`metrics[0] is "happiness"`, "success_rate"}},
			{"kind of a metric", plan("next", func(p *pb.ExperimentPlan) { p.Metrics[0] = &pb.ExperimentMetric{Name: "x", Kind: "median"} }), outrigger.Invalid, []string{`"median"`, "ratio, mean or proportion"}},
			{"guardrail's margin", plan("next", func(p *pb.ExperimentPlan) {
				p.Guardrails = []*pb.ExperimentMetric{{Name: "error_rate", Margin: 2}}
			}), outrigger.Invalid, []string{"margin 2", "[0, 1)"}},
			{"alpha", plan("next", func(p *pb.ExperimentPlan) { p.Alpha = 1.5 }), outrigger.Invalid, []string{"alpha", "1.5", "[1e-12, 1)"}},
			{"baseline", plan("next", func(p *pb.ExperimentPlan) { p.Baseline = 1 }), outrigger.Invalid, []string{"baseline is 1", "(0, 1)"}},
			{"no gain sought", plan("next", func(p *pb.ExperimentPlan) { p.Mde = 0 }), outrigger.Invalid, []string{"0"}},
			{"durations", plan("next", func(p *pb.ExperimentPlan) { p.MaxDuration = durationpb.New(time.Minute) }), outrigger.Invalid, []string{"5m0s to 1m0s"}},
			{"method", plan("next", func(p *pb.ExperimentPlan) { p.Method = "gut" }), outrigger.Invalid, []string{`"gut"`, "cs", "obf", "fixed"}},
			{"control", plan("next", func(p *pb.ExperimentPlan) { p.Control = "z" }), outrigger.Invalid, []string{`control is "z"`, "a, b"}},
			{"frozen plan", plan("ab", func(p *pb.ExperimentPlan) { p.Alpha = .2 }), outrigger.Locked, []string{"is running", "frozen", "draft or planned"}},
			{"second experiment", state("next", "running"), outrigger.Locked, []string{`"chat"`, "experiment ab"}},
			{"conclude by hand", state("ab", "concluded"), outrigger.Locked, []string{"its rule decides", `"ship"`}},
			{"back to draft", state("ab", "draft"), outrigger.Locked, []string{"is running", "draft", "[concluded stopped]"}},
			{"archive while it runs", state("ab", "archived"), outrigger.Locked, []string{"[concluded stopped]"}},
			{"digest", func() error {
				_, err := admin.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: "chat", Version: "v3",
					Endpoints: []*pb.Endpoint{{Address: "10.0.0.9:80"}}, Digest: "sha256:" + strings.Repeat("0", 64)})
				return err
			}, outrigger.Conflict, []string{"digest", "sha256:" + strings.Repeat("0", 64)}},
			{"version's state", func() error {
				_, err := admin.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "v2", State: "loved"})
				return err
			}, outrigger.Invalid, []string{`"loved"`, "registered, validated"}},
		}
		for _, c := range cases {
			head := p.log.Head()
			err := c.call()
			if !outrigger.IsKind(err, c.kind) {
				t.Errorf("%s: %v, want kind %v", c.name, err, c.kind)
				continue
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %q does not say %q", c.name, err, want)
				}
			}
			if now := p.log.Head(); now != head {
				t.Errorf("%s: the log moved from %d to %d", c.name, head, now)
			}
		}
		if after := s.policy(); after.Position != before.Position {
			t.Errorf("policy moved from %d to %d", before.Position, after.Position)
		}
	})
}
