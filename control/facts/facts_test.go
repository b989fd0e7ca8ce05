package facts

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// history numbers events as a log would: gapless per aggregate, one position each.
type history struct {
	events []*pb.Event
	next   map[string]uint64
}

func (h *history) add(aggregate string, e *pb.Event) {
	if h.next == nil {
		h.next = map[string]uint64{}
	}
	h.next[aggregate]++
	e.Aggregate, e.Sequence, e.Position = aggregate, h.next[aggregate], uint64(len(h.events)+1)
	e.At = timestamppb.New(time.Unix(1_700_000_000+int64(e.Position), 0))
	h.events = append(h.events, e)
}

func (h *history) facts() *Facts {
	f := new(Facts)
	for _, e := range h.events {
		f = Apply(f, e)
	}
	return f
}

func registered(v string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_ModelVersionRegistered{ModelVersionRegistered: &pb.ModelVersionRegistered{
		Version: v, Endpoints: []*pb.Endpoint{{Address: v + ".example:80"}}}}}
}

func state(v, s string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_ModelVersionState{ModelVersionState: &pb.ModelVersionState{Version: v, State: s}}}
}

func alias(a, to string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_AliasMoved{AliasMoved: &pb.AliasMoved{Alias: a, To: to}}}
}

func started(candidate, lastGood string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_RolloutStarted{RolloutStarted: &pb.RolloutStarted{Model: "m", Candidate: candidate,
		LastGood: lastGood, Phases: deploy.PhasesPB(deploy.DefaultPhases()), Alpha: 0.01}}}
}

func advanced(phase uint32) *pb.Event {
	return &pb.Event{Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: &pb.RolloutAdvanced{Phase: phase}}}
}

func rollback(reason string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_RollbackStarted{RollbackStarted: &pb.RollbackStarted{Reason: reason}}}
}

func rolledBack() *pb.Event {
	return &pb.Event{Payload: &pb.Event_RollbackCompleted{RollbackCompleted: &pb.RollbackCompleted{}}}
}

func ended(outcome deploy.State) *pb.Event {
	return &pb.Event{Payload: &pb.Event_RolloutEnded{RolloutEnded: &pb.RolloutEnded{Outcome: string(outcome)}}}
}

func experiment(state string, arms ...*pb.ExperimentArm) *pb.Event {
	return &pb.Event{Payload: &pb.Event_ExperimentChanged{ExperimentChanged: &pb.ExperimentChanged{State: state, Model: "m", Arms: arms}}}
}

func arm(name, version string, weight uint32) *pb.ExperimentArm {
	return &pb.ExperimentArm{Name: name, Version: version, Weight: weight}
}

// twoVersions is a model "m" with champion v1 and a registered v2.
func twoVersions() *history {
	h := new(history)
	h.add("model/m", registered("v1"))
	h.add("model/m", state("v1", Production))
	h.add("model/m", alias(Champion, "v1"))
	h.add("model/m", registered("v2"))
	return h
}

// split prints who serves: "v1:10000" or "v2:100 v1:9900", in arm order, with the epoch.
func split(m *Model) string {
	s := ""
	for _, a := range m.Split.Arms {
		s += fmt.Sprintf("%s=%s:%d ", a.Name, a.Version, a.Weight())
	}
	return fmt.Sprintf("%sepoch=%d", s, m.WeightEpoch)
}

// TestStory follows one model through its life; each step says what is appended and
// what every sidecar would do then.
func TestStory(t *testing.T) {
	h := new(history)
	steps := []struct {
		aggregate string
		event     *pb.Event
		split     string
		versions  string
		problem   bool
	}{
		{"model/m", registered("v1"), "epoch=1", "v1:registered", true}, // nobody said it may serve
		{"model/m", state("v1", Production), "stable=v1:10000 epoch=2", "v1:production", false},
		{"model/m", alias(Champion, "v1"), "stable=v1:10000 epoch=2", "v1:production", false},
		{"model/m", registered("v2"), "stable=v1:10000 epoch=2", "v1:production v2:registered", false},
		{"rollout/r1", started("v2", "v1"), "candidate=v2:100 stable=v1:9900 epoch=5", "v1:production v2:candidate", false},
		{"rollout/r1", advanced(1), "candidate=v2:1000 stable=v1:9000 epoch=6", "v1:production v2:candidate", false},
		{"rollout/r1", rollback("bad"), "stable=v1:10000 epoch=7", "v1:production v2:quarantined", false},
		{"rollout/r1", rolledBack(), "stable=v1:10000 epoch=7", "v1:production v2:quarantined", false},
		{"rollout/r1", ended(deploy.RolledBack), "stable=v1:10000 epoch=7", "v1:production v2:quarantined", false},
		{"model/m", state("v2", Registered), "stable=v1:10000 epoch=7", "v1:production v2:registered", false},
		{"rollout/r2", started("v2", "v1"), "candidate=v2:100 stable=v1:9900 epoch=11", "v1:production v2:candidate", false},
		{"rollout/r2", advanced(2), "candidate=v2:10000 epoch=12", "v1:production v2:candidate", false},
		{"rollout/r2", ended(deploy.Completed), "stable=v2:10000 epoch=12", "v1:registered v2:production", false},
		{"experiment/e", experiment(Running, arm("a", "v1", 2500), arm("b", "v2", 7500)), "a=v1:2500 b=v2:7500 epoch=14", "v1:registered v2:production", false},
		{"model/m", state("v1", Quarantined), "b=v2:7500 fallback=v2:2500 epoch=15", "v1:quarantined v2:production", true},
		{"experiment/e", &pb.Event{Payload: &pb.Event_ExperimentChanged{ExperimentChanged: &pb.ExperimentChanged{State: Stopped}}},
			"stable=v2:10000 epoch=16", "v1:quarantined v2:production", false},
		{"model/m", state("v2", Retired), "epoch=17", "v1:quarantined v2:retired", true},
	}
	f := new(Facts)
	for i, s := range steps {
		h.add(s.aggregate, s.event)
		f = Apply(f, h.events[i])
		m := f.Model("m")
		versions := ""
		for _, v := range m.Versions {
			versions += " " + v.Name + ":" + v.State
		}
		if got := split(m); got != s.split || versions != " "+s.versions || (m.Split.Problem != "") != s.problem {
			t.Fatalf("step %d: split %q, want %q; versions%s, want %s; problem %q, want %v", i+1, got, s.split, versions, s.versions, m.Split.Problem, s.problem)
		}
		if f.PolicyPosition() != uint64(i+1) || f.Skipped().Count != 0 {
			t.Fatalf("step %d: policy position %d, skipped %+v", i+1, f.PolicyPosition(), f.Skipped())
		}
	}
	m := f.Model("m")
	if m.Aliases[Champion] != "v2" || m.Aliases[LastGood] != "v1" || m.Rollout != "" || m.Experiment != "" {
		t.Fatalf("aliases %v, rollout %q, experiment %q", m.Aliases, m.Rollout, m.Experiment)
	}
	if r := f.Rollout("r1"); r.State != deploy.RolledBack || r.EndedAt != 9 {
		t.Fatalf("r1 is %s, ended at %d", r.State, r.EndedAt)
	}
}

// TestNonsenseIsSkipped: events that make no sense change nothing but the counter.
func TestNonsenseIsSkipped(t *testing.T) {
	cases := map[string]struct {
		aggregate string
		event     *pb.Event
	}{
		"alias of an unknown version":      {"model/m", alias(Champion, "v9")},
		"state of an unknown version":      {"model/m", state("v9", Retired)},
		"version registered twice":         {"model/m", registered("v1")},
		"model event elsewhere":            {"modem/m", registered("v3")},
		"rollout of an unknown candidate":  {"rollout/r", started("v9", "v1")},
		"rollback of an unknown rollout":   {"rollout/r", rollback("x")},
		"experiment without its weights":   {"experiment/e", experiment(Running, arm("a", "v1", 1), arm("b", "v2", 2))},
		"region under another name":        {"region/r", &pb.Event{Payload: &pb.Event_RegionRegistered{RegionRegistered: &pb.RegionRegistered{Region: &pb.Region{Name: "s"}}}}},
		"removal of a region nobody named": {"region/r", &pb.Event{Payload: &pb.Event_RegionRemoved{RegionRemoved: &pb.RegionRemoved{}}}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			h := twoVersions()
			before := h.facts()
			h.add(c.aggregate, c.event)
			after := Apply(before, h.events[len(h.events)-1])
			if after.Skipped().Count != 1 || after.Skipped().Reason == "" || after.PolicyPosition() != before.PolicyPosition() {
				t.Fatalf("skipped %+v, policy position %d", after.Skipped(), after.PolicyPosition())
			}
			if after.Sequence(c.aggregate) != before.Sequence(c.aggregate)+1 {
				t.Fatal("the sequence of the aggregate is not the log's")
			}
			after.skipped, after.position, after.sequences = before.skipped, before.position, before.sequences
			if !reflect.DeepEqual(before, after) {
				t.Fatalf("facts changed:\n%+v\n%+v", before, after)
			}
		})
	}
}

// TestSkippedEventDoesNotDeafen: after an event that made no sense a rollout still hears
// the rollback that follows, and writers are told the log's sequence.
func TestSkippedEventDoesNotDeafen(t *testing.T) {
	h := twoVersions()
	h.add("rollout/r", started("v2", "v1"))
	h.add("rollout/r", advanced(9)) // there is no phase 9
	h.add("rollout/r", rollback("bad"))
	f := h.facts()
	if f.Skipped().Count != 1 || f.Rollout("r").State != deploy.RollingBack || f.Model("m").Split.CandidateLive {
		t.Fatalf("skipped %+v, rollout %s, split %s", f.Skipped(), f.Rollout("r").State, split(f.Model("m")))
	}
	if got := f.RunningRollouts(); len(got) != 1 || got[0].Sequence != 3 || f.Sequence("rollout/r") != 3 {
		t.Fatalf("writers expect %+v and %d, the log is at 3", got, f.Sequence("rollout/r"))
	}
}

func TestVariableEventsAreNotOurs(t *testing.T) {
	f := twoVersions().facts()
	e := &pb.Event{Aggregate: "var/default/s/x", Position: 99, Payload: &pb.Event_VariableSet{VariableSet: &pb.VariableSet{}}}
	if Apply(f, e) != f {
		t.Fatal("a variable event made new facts")
	}
	p := NewProjection(memory.New())
	if n := testing.AllocsPerRun(100, func() { p.apply(e) }); n != 0 {
		t.Fatalf("passing over a variable event allocates %v times", n)
	}
}

func BenchmarkPassOver(b *testing.B) {
	p := NewProjection(memory.New())
	e := &pb.Event{Aggregate: "var/default/s/x", Position: 99, Payload: &pb.Event_VariableSet{VariableSet: &pb.VariableSet{}}}
	for b.Loop() {
		p.apply(e)
	}
}

// BenchmarkReplay folds the story of one model under repeated rollouts.
func BenchmarkReplay(b *testing.B) {
	h := twoVersions()
	for i := range 1000 {
		id := fmt.Sprint("rollout/r", i)
		h.add(id, started("v2", "v1"))
		h.add(id, rollback("bad"))
		h.add(id, rolledBack())
		h.add(id, ended(deploy.RolledBack))
		h.add("model/m", state("v2", Registered))
	}
	for b.Loop() {
		if s := h.facts().Skipped(); s.Count != 0 {
			b.Fatal(s.Reason)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(h.events)), "ns/event")
}

func TestAlertsAreBounded(t *testing.T) {
	h := new(history)
	raise := func(id string) {
		h.add(AlertPrefix+id, &pb.Event{Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{Severity: "high", Summary: id}}})
	}
	raise("first")
	raise("resolved")
	h.add(AlertPrefix+"resolved", &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{}}})
	for i := range MaxAlerts - 1 {
		raise(fmt.Sprint("a", i))
	}
	f := h.facts()
	if n := len(f.Alerts()); n != MaxAlerts || f.Alert("first") == nil || f.Alert("resolved") != nil {
		t.Fatalf("%d alerts; first kept %v, resolved kept %v", n, f.Alert("first") != nil, f.Alert("resolved") != nil)
	}
	if got := f.Alerts()[0].ID; got != fmt.Sprint("a", MaxAlerts-2) {
		t.Fatalf("the newest alert is %s", got)
	}
	if f.PolicyPosition() != 0 {
		t.Fatal("an alert moved the policy position")
	}
}

// randomEvent draws an event about a small world, sensible or not.
func randomEvent(t *rapid.T, h *history) {
	v := rapid.SampledFrom([]string{"v1", "v2", "v3"})
	switch rapid.IntRange(0, 12).Draw(t, "kind") {
	case 0, 1:
		h.add("model/m", registered(v.Draw(t, "version")))
	case 2:
		h.add("model/m", state(v.Draw(t, "version"), rapid.SampledFrom([]string{Registered, Production, Quarantined, Retired}).Draw(t, "state")))
	case 3:
		h.add("model/m", alias(rapid.SampledFrom([]string{Champion, LastGood}).Draw(t, "alias"), v.Draw(t, "version")))
	case 4, 5:
		h.add("rollout/"+rapid.SampledFrom([]string{"r1", "r2", "r3", "r4"}).Draw(t, "id"), started(v.Draw(t, "candidate"), v.Draw(t, "good")))
	case 6:
		h.add("rollout/"+rapid.SampledFrom([]string{"r1", "r2", "r3", "r4"}).Draw(t, "id"), advanced(uint32(rapid.IntRange(0, 3).Draw(t, "phase"))))
	case 7:
		h.add("rollout/"+rapid.SampledFrom([]string{"r1", "r2", "r3", "r4"}).Draw(t, "id"), rollback("x"))
	case 8:
		h.add("rollout/"+rapid.SampledFrom([]string{"r1", "r2", "r3", "r4"}).Draw(t, "id"), ended(rapid.SampledFrom([]deploy.State{deploy.Completed, deploy.Aborted, deploy.RolledBack}).Draw(t, "outcome")))
	case 9, 10:
		w := uint32(rapid.IntRange(0, experiments.Buckets).Draw(t, "weight"))
		h.add("experiment/e", experiment(rapid.SampledFrom([]string{Running, Stopped}).Draw(t, "state"),
			arm("a", v.Draw(t, "a"), w), arm("b", v.Draw(t, "b"), experiments.Buckets-w)))
	case 11:
		h.add("alert/x", &pb.Event{Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{Summary: "x"}}})
	case 12:
		h.add("alert/x", &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{}}})
	}
}

// TestLaws: over random histories, replaying gives the same state; the snapshot of any
// prefix continues to the same state; earlier values never change; and the arms of every
// split cover all buckets exactly once and name servable versions only.
func TestLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := new(history)
		f, k := new(Facts), new(kept)
		cut := rapid.IntRange(0, 40).Draw(t, "cut")
		var atCut []byte
		var frozen *Facts
		for i := range 40 {
			if i == cut {
				frozen = f
				var err error
				if atCut, err = k.encode(f); err != nil {
					t.Fatal(err)
				}
			}
			randomEvent(t, h)
			e := h.events[i]
			if next := Apply(f, e); next != f {
				k.add(e)
				f = next
			}
			checkSplit(t, f)
		}
		if again := h.facts(); !reflect.DeepEqual(again, f) {
			t.Fatalf("replay differs:\n%+v\n%+v", again, f)
		}
		if frozen == nil {
			return
		}
		prefix := &history{events: h.events[:cut]}
		if !reflect.DeepEqual(prefix.facts(), frozen) {
			t.Fatal("an earlier value was modified")
		}
		g, _, err := decode(atCut)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range h.events[cut:] {
			g = Apply(g, e)
		}
		if dump(t, g) != dump(t, f) {
			t.Fatalf("continuing from a snapshot differs:\n%s\n%s", dump(t, g), dump(t, f))
		}
	})
}

// dump shows all of f as text: protobuf messages keep private caches that DeepEqual
// would compare.
func dump(t interface{ Fatal(...any) }, f *Facts) string {
	b, err := json.Marshal(map[string]any{"position": f.position, "policy": f.policyPosition, "models": f.models,
		"experiments": f.experiments, "rollouts": f.rollouts, "regions": f.Regions(), "alerts": f.Alerts(),
		"sequences": f.sequences, "pushed": f.pushed, "skipped": f.skipped})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func checkSplit(t *rapid.T, f *Facts) {
	m := f.Model("m")
	if m == nil || len(m.Split.Arms) == 0 {
		if m != nil && m.Split.Problem == "" {
			t.Fatalf("no arms and no problem: %+v", m)
		}
		return
	}
	var all []experiments.Allocation
	for _, a := range m.Split.Arms {
		all = append(all, experiments.Allocation{Name: a.Name, Ranges: a.Ranges})
		if !m.Version(a.Version).Servable() {
			t.Fatalf("arm %s serves %s, which is %+v", a.Name, a.Version, m.Version(a.Version))
		}
	}
	if err := experiments.Covers(all); err != nil {
		t.Fatal(err)
	}
	if !m.Version(m.Split.LastGood).Servable() {
		t.Fatalf("last good %q is not servable", m.Split.LastGood)
	}
}

func FuzzDecodeSnapshot(f *testing.F) {
	h := twoVersions()
	k := new(kept)
	for _, e := range h.events {
		k.add(e)
	}
	good, err := k.encode(h.facts())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{snapshotFormat, 1, 200, 1})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		facts, _, err := decode(b)
		if (err == nil) == (facts == nil) {
			t.Fatalf("facts %v, error %v", facts, err)
		}
		if err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
			t.Fatal(err)
		}
	})
}

// TestProjection: what is appended before and after Run shows up; Wait wakes at the
// right position and no earlier, and gives up with its context.
func TestProjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		for _, e := range twoVersions().events {
			mustAppend(t, log, e)
		}
		p := NewProjection(log)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		select {
		case <-p.Ready():
			t.Fatal("ready before Run")
		default:
		}
		go func() { done <- p.Run(ctx) }()
		<-p.Ready()
		if p.Applied() != 4 || p.Facts().Model("m") == nil {
			t.Fatalf("ready with %d applied", p.Applied())
		}
		woken := make(chan *Facts, 1)
		go func() {
			f, err := p.Wait(t.Context(), 6)
			if err != nil {
				t.Error(err)
			}
			woken <- f
		}()
		mustAppend(t, log, &pb.Event{Aggregate: "model/m", Payload: registered("v3").Payload})
		synctest.Wait()
		if len(woken) != 0 {
			t.Fatal("woken at position 5, asked for 6")
		}
		mustAppend(t, log, &pb.Event{Aggregate: "var/a/b/c", Payload: &pb.Event_VariableSet{VariableSet: &pb.VariableSet{}}})
		if f := <-woken; f.Model("m").Version("v3") == nil || f.Position() != 5 {
			t.Fatalf("position %d", f.Position())
		}
		short, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		if _, err := p.Wait(short, 100); !outrigger.IsKind(err, outrigger.Timeout) {
			t.Fatalf("got %v, want a timeout", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

// TestProjectionStartsFromSnapshot: after a save, a new projection reads only the tail.
func TestProjectionStartsFromSnapshot(t *testing.T) {
	log := memory.New()
	first := NewProjection(log)
	for _, e := range twoVersions().events {
		mustAppend(t, log, e)
	}
	for e, err := range log.ReadAll(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		first.apply(e)
	}
	first.save(t.Context())
	second := NewProjection(log)
	from, err := second.load(t.Context())
	if err != nil || from != 4 {
		t.Fatalf("continues after %d, %v", from, err)
	}
	if dump(t, second.Facts()) != dump(t, first.Facts()) {
		t.Fatalf("%s\n%s", dump(t, second.Facts()), dump(t, first.Facts()))
	}
	// The past is there, too.
	was, err := first.ServedAt("m", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if is, err := second.ServedAt("m", time.Now().Add(time.Hour)); err != nil || is.Position != was.Position || is.Model.WeightEpoch != was.Model.WeightEpoch || is.Model.WeightEpoch == 0 || !is.Since.Equal(was.Since) {
		t.Fatalf("served %+v, %v; before the restart %+v", is, err, was)
	}
	// A damaged snapshot costs a replay, not the start.
	if err := log.SaveSnapshot(t.Context(), SnapshotName, 4, []byte{9, 9}); err != nil {
		t.Fatal(err)
	}
	third := NewProjection(log)
	if from, err := third.load(t.Context()); err != nil || from != 0 {
		t.Fatalf("continues after %d, %v", from, err)
	}
}

func mustAppend(t *testing.T, log eventlog.Appender, e *pb.Event) {
	t.Helper()
	_, err := log.Append(t.Context(), "", eventlog.Write{Aggregate: e.GetAggregate(), Expect: eventlog.Any, Events: []*pb.Event{e}})
	if err != nil {
		t.Fatal(err)
	}
}
