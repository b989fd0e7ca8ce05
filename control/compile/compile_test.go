package compile_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// log builds facts the way a log does.
type log struct {
	f    *facts.Facts
	n    uint64
	next map[string]uint64
}

func newLog() *log { return &log{f: new(facts.Facts), next: map[string]uint64{}} }

func (l *log) add(aggregate string, payload any) *log {
	l.n++
	l.next[aggregate]++
	e := &pb.Event{Aggregate: aggregate, Position: l.n, Sequence: l.next[aggregate], At: timestamppb.New(time.Unix(int64(l.n), 0))}
	switch p := payload.(type) {
	case *pb.ModelVersionRegistered:
		e.Payload = &pb.Event_ModelVersionRegistered{ModelVersionRegistered: p}
	case *pb.ModelVersionState:
		e.Payload = &pb.Event_ModelVersionState{ModelVersionState: p}
	case *pb.AliasMoved:
		e.Payload = &pb.Event_AliasMoved{AliasMoved: p}
	case *pb.ModelConfigured:
		e.Payload = &pb.Event_ModelConfigured{ModelConfigured: p}
	case *pb.ExperimentChanged:
		e.Payload = &pb.Event_ExperimentChanged{ExperimentChanged: p}
	case *pb.RolloutStarted:
		e.Payload = &pb.Event_RolloutStarted{RolloutStarted: p}
	case *pb.RolloutAdvanced:
		e.Payload = &pb.Event_RolloutAdvanced{RolloutAdvanced: p}
	case *pb.RollbackStarted:
		e.Payload = &pb.Event_RollbackStarted{RollbackStarted: p}
	case *pb.RegionRegistered:
		e.Payload = &pb.Event_RegionRegistered{RegionRegistered: p}
	default:
		panic(fmt.Sprintf("payload %T", p))
	}
	l.f = facts.Apply(l.f, e)
	if s := l.f.Skipped(); s.Count > 0 {
		panic(s.Reason)
	}
	return l
}

func (l *log) version(model, v string, addresses ...string) *log {
	p := &pb.ModelVersionRegistered{Version: v, UpstreamModel: "upstream-" + v}
	for i, a := range addresses {
		p.Endpoints = append(p.Endpoints, &pb.Endpoint{Address: a, Region: []string{"us", "eu"}[i%2], Weight: uint32(i)})
	}
	return l.add("model/"+model, p)
}

func (l *log) state(model, v, s string) *log {
	return l.add("model/"+model, &pb.ModelVersionState{Version: v, State: s})
}

func (l *log) champion(model, v string) *log {
	return l.add("model/"+model, &pb.AliasMoved{Alias: facts.Champion, To: v}).state(model, v, facts.Production)
}

// base is model "chat" with champion v1 and v2 registered, in two regions.
func base() *log {
	return newLog().version("chat", "v1", "10.0.0.1:80", "10.0.1.1:80").champion("chat", "v1").version("chat", "v2", "10.0.0.2:80").
		add("region/us", &pb.RegionRegistered{Region: &pb.Region{Name: "us", Gateway: "us.example:7000", Latitude: 40, Longitude: -75, Health: "passing"}}).
		add("region/eu", &pb.RegionRegistered{Region: &pb.Region{Name: "eu", Gateway: "eu.example:7000", Health: "critical"}})
}

// Who is held at older facts is not held at versions that were taken out since.
func TestHeld(t *testing.T) {
	l := base().champion("chat", "v2")
	before := l.f
	if held, at := compile.Held(before, l.f); held != before || at != 0 {
		t.Fatalf("nothing happened, and others are held as of %d", at)
	}
	l.version("chat", "v3", "10.0.0.3:80").version("other", "v1", "10.0.0.9:80").champion("other", "v1")
	if held, at := compile.Held(before, l.f); held != before || at != 0 {
		t.Fatalf("nothing was taken out, and others are held as of %d", at)
	}
	l.champion("chat", "v1").state("chat", "v2", facts.Quarantined)
	out := l.f.Position()
	l.version("other", "v2", "10.0.0.8:80")
	held, at := compile.Held(before, l.f)
	if at != out || held.Model("other") != nil || held.Model("chat") != l.f.Model("chat") {
		t.Fatalf("held as of %d with %d models, want %d and chat alone as it is now", at, held.ModelCount(), out)
	}
	if before.Model("chat") == l.f.Model("chat") {
		t.Fatal("the older facts were written to")
	}
	p, err := compile.Compile(held, at)
	if err != nil {
		t.Fatal(err)
	}
	m := p.Model("chat")
	for i := range m.Arms {
		if got := m.Serving(&m.Arms[i]); got.Name != "v1" {
			t.Errorf("arm %s is served by %s, want v1", m.Arms[i].Name, got.Name)
		}
	}
}

func (l *log) rollout() *log {
	return l.add("rollout/r", &pb.RolloutStarted{Model: "chat", Candidate: "v2", LastGood: "v1", Phases: deploy.PhasesPB(deploy.DefaultPhases()), Alpha: 0.01})
}

func scenarios() map[string]*log {
	return map[string]*log{
		"champion":        base(),
		"canary":          base().rollout(),
		"limited":         base().rollout().add("rollout/r", &pb.RolloutAdvanced{Phase: 1}),
		"rolled_back":     base().rollout().add("rollout/r", &pb.RollbackStarted{Reason: "bad"}),
		"experiment":      base().add("experiment/e", &pb.ExperimentChanged{State: facts.Running, Model: "chat", Arms: []*pb.ExperimentArm{{Name: "a", Version: "v1", Weight: 9000}, {Name: "b", Version: "v2", Weight: 1000}}}),
		"configured":      base().add("model/chat", &pb.ModelConfigured{Unit: "user", MaxAttempts: 3, Timeout: durationpb.New(30 * time.Second)}),
		"limits":          base().add("model/chat", &pb.ModelConfigured{Limits: &pb.Limits{MaxRequests: 9, MaxConnections: 7}}).add("model/chat", &pb.ModelConfigured{Limits: &pb.Limits{MaxConnections: 5, MaxPendingRequests: 3, MaxRetries: 2, ConsecutiveFailures: 8}}),
		"one_model_empty": base().version("empty", "v1", "10.9.9.9:80").state("empty", "v1", facts.Retired),
		"pins": newLog().add("model/chat", &pb.ModelVersionRegistered{Version: "v1", Endpoints: []*pb.Endpoint{{Address: "10.0.0.1:80"}},
			Pins: map[string]int32{"prompts/tone": 2, "prompts/system": 0}}).champion("chat", "v1"),
		"no_models": newLog(),
	}
}

// TestGolden: facts in, policy out. Read the files; they are what sidecars obey.
func TestGolden(t *testing.T) {
	for name, l := range scenarios() {
		t.Run(name, func(t *testing.T) {
			p, err := compile.Compile(l.f, l.f.PolicyPosition())
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			file := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != string(want) {
				t.Errorf("%s differs; run with -update and read the change\ngot:\n%s", file, got)
			}
		})
	}
}

// TestDeadMan: only a live candidate needs a way back without the control plane.
func TestDeadMan(t *testing.T) {
	for name, want := range map[string]time.Duration{
		"champion": 0, "canary": compile.DefaultDeadMan, "limited": compile.DefaultDeadMan, "rolled_back": 0, "experiment": 0,
	} {
		p, err := compile.Compile(scenarios()[name].f, 1)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Model("chat").DeadMan; got != want {
			t.Errorf("%s: dead-man lease %v, want %v", name, got, want)
		}
	}
	p, err := compile.CompileWith(scenarios()["canary"].f, 1, compile.Options{DeadMan: time.Second})
	if err != nil || p.Model("chat").DeadMan != time.Second {
		t.Fatalf("%v, %v", p, err)
	}
}

// TestGrowingNeverFlips: from canary to limited every bucket that had the candidate
// keeps it.
func TestGrowingNeverFlips(t *testing.T) {
	before, err := compile.Compile(scenarios()["canary"].f, 1)
	if err != nil {
		t.Fatal(err)
	}
	after, err := compile.Compile(scenarios()["limited"].f, 1)
	if err != nil {
		t.Fatal(err)
	}
	candidates := 0
	for b := range uint32(10_000) {
		if before.Model("chat").ArmOf(b).Version != "v2" {
			continue
		}
		candidates++
		if got := after.Model("chat").ArmOf(b).Version; got != "v2" {
			t.Fatalf("bucket %d went from v2 to %s", b, got)
		}
	}
	if candidates != 100 {
		t.Fatalf("%d buckets had the candidate, want 100", candidates)
	}
}

// TestOneBrokenModel: a model that cannot be compiled is named and hurts no other.
func TestOneBrokenModel(t *testing.T) {
	l := base().add("model/bad", &pb.ModelVersionRegistered{Version: "v1", Endpoints: []*pb.Endpoint{{Address: "no-port"}}}).champion("bad", "v1")
	l.version("gone", "v1", "10.0.0.9:80").state("gone", "v1", facts.Quarantined)
	p, err := compile.Compile(l.f, l.n)
	if err != nil || p.Model("chat") == nil || p.Model("bad") != nil || p.Model("gone") != nil {
		t.Fatalf("%+v, %v", p, err)
	}
	ps := compile.Problems(l.f, compile.Options{})
	if len(ps) != 2 || ps[0].Model != "bad" || !ps[0].Out || !strings.Contains(ps[0].Text, "no-port") || ps[1].Model != "gone" || !ps[1].Out {
		t.Fatalf("problems %+v", ps)
	}
}

// TestBrokenRegion: what all models share cannot be left out silently.
func TestBrokenRegion(t *testing.T) {
	l := base().add("region/x", &pb.RegionRegistered{Region: &pb.Region{Name: "x", Latitude: 500}})
	if p, err := compile.Compile(l.f, l.n); p != nil || !outrigger.IsKind(err, outrigger.Internal) {
		t.Fatalf("%v, %v", p, err)
	}
}

func BenchmarkCompile1000Models(b *testing.B) {
	l := newLog()
	for i := range 1000 {
		m := fmt.Sprintf("m%04d", i)
		l.version(m, "v1", "10.0.0.1:80", "10.0.1.1:80").champion(m, "v1").version(m, "v2", "10.0.0.2:80")
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := compile.Compile(l.f, l.n); err != nil {
			b.Fatal(err)
		}
	}
}
