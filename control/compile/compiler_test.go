package compile_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// step appends one random event; many make no sense and are skipped by the fold, as in a log.
func step(l *log, r *rand.Rand) {
	pick := func(words ...string) string { return words[r.IntN(len(words))] }
	name := pick("a", "b", "org/c", "d", "*", "e")
	v, w := pick("v1", "v2", "v3", "v4"), pick("v1", "v2", "v3", "v4")
	model := "model/" + name
	id := "rollout/" + pick("r1", "r2", "r3", "r4", "r5")
	switch r.IntN(12) {
	case 0, 1, 2:
		p := &pb.ModelVersionRegistered{Version: v, UpstreamModel: pick("", "up")}
		for i := range r.IntN(4) {
			p.Endpoints = append(p.Endpoints, &pb.Endpoint{Address: pick("10.0.0.", "host") + fmt.Sprint(i) + ":80", Region: pick("eu", "us", ""), Weight: uint32(r.IntN(3))})
		}
		l.try(model, p)
	case 3:
		l.try(model, &pb.ModelVersionState{Version: v, State: pick(facts.Production, facts.Quarantined, facts.Retired, facts.Registered)})
	case 4, 5:
		l.try(model, &pb.AliasMoved{Alias: pick(facts.Champion, facts.LastGood, "other"), To: pick(v, "")})
	case 6:
		l.try(model, &pb.ModelConfigured{Unit: pick("user", "session", ""), MaxAttempts: uint32(r.IntN(20)), Timeout: durationpb.New(time.Duration(r.IntN(3)) * time.Minute)})
	case 7:
		l.try("experiment/"+pick("x", "y"), &pb.ExperimentChanged{State: pick(facts.Running, facts.Stopped), Model: name,
			Arms: []*pb.ExperimentArm{{Name: "a", Version: v, Weight: 9000}, {Name: "b", Version: w, Weight: 1000}}})
	case 8:
		l.try(id, &pb.RolloutStarted{Model: name, Candidate: v, LastGood: w, Phases: deploy.PhasesPB(deploy.DefaultPhases()), Alpha: 0.01})
	case 9:
		l.try(id, &pb.RolloutAdvanced{Phase: uint32(r.IntN(3))})
	case 10:
		l.try(id, &pb.RollbackStarted{Reason: "bad"})
	default:
		region := pick("eu", "us")
		l.try("region/"+region, &pb.RegionRegistered{Region: &pb.Region{Name: region, Gateway: pick("g:1", "h:2"), Latitude: float64(r.IntN(90)), Health: pick("passing", "critical")}})
	}
}

// TestIncrementalIsFull: whatever happened before, what the Compiler returns is what a
// compilation from nothing returns, for every kind of client and byte for byte; and the
// set knows at least what changed in it.
func TestIncrementalIsFull(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		l, c, linter := newLog(), compile.NewCompiler(translate.Options{}), translate.NewLinter()
		before := map[translate.Kind]*translate.Resources{}
		var o compile.Options
		for turn := range 60 {
			for range r.IntN(3) {
				step(l, r)
			}
			switch r.IntN(15) {
			case 0:
				o.Kills = nil
			case 1:
				o.Kills = append(o.Kills, compile.Kill{Model: []string{"a", "b", "d"}[r.IntN(3)], Version: []string{"v1", "v2"}[r.IntN(2)]})
			case 2:
				o.DeadMan = time.Duration(r.IntN(3)) * time.Minute
			}
			got, err := c.Compile(l.f, l.n, o)
			if err != nil {
				t.Fatalf("seed %d turn %d: %v", seed, turn, err)
			}
			want, err := compile.CompileWith(l.f, l.n, o)
			if err != nil {
				t.Fatal(err)
			}
			if got.Models != len(want.Models) {
				t.Fatalf("seed %d turn %d: %d models, want %d", seed, turn, got.Models, len(want.Models))
			}
			changedAt := map[string]uint64{}
			for _, m := range l.f.Models() {
				changedAt[m.Name] = m.ChangedAt
			}
			for _, kind := range translate.Kinds() {
				full, err := translate.EncodeFor(kind, want, translate.Options{ChangedAt: changedAt})
				if err != nil {
					t.Fatal(err)
				}
				label := fmt.Sprintf("seed %d turn %d %s", seed, turn, kind)
				equalSets(t, label, got.ByKind[kind], full)
				knows(t, label, got.ByKind[kind], before[kind])
				before[kind] = got.ByKind[kind]
			}
			relint(t, linter, got, want)
		}
	}
}

func (l *log) try(aggregate string, payload any) {
	f, n, next := l.f, l.n, l.next[aggregate]
	defer func() {
		if recover() != nil { // skipped: as if it had not been appended
			l.f, l.n, l.next[aggregate] = f, n, next
		}
	}()
	l.add(aggregate, payload)
}

func equalSets(t *testing.T, label string, got, want *translate.Resources) {
	t.Helper()
	for _, typeURL := range xds.Pushed() {
		if g, w := got.Names(typeURL), want.Names(typeURL); !slices.Equal(g, w) {
			t.Fatalf("%s: %s\n got %q\nwant %q", label, xds.ShortType(typeURL), g, w)
		}
		for _, name := range got.Names(typeURL) {
			if g, w := marshal(t, got, typeURL, name), marshal(t, want, typeURL, name); !bytes.Equal(g, w) {
				t.Fatalf("%s: %s %s differs from the full compilation", label, xds.ShortType(typeURL), name)
			}
		}
	}
	if len(got.Missing()) != 0 || got.Len() != want.Len() {
		t.Fatalf("%s: %d resources, want %d; missing %v", label, got.Len(), want.Len(), got.Missing())
	}
}

// knows: every difference between a set and the one before is among what it says it touched.
func knows(t *testing.T, label string, now, before *translate.Resources) {
	t.Helper()
	touched, ok := now.Since(before)
	if !ok {
		return // the compiler started afresh
	}
	for _, typeURL := range xds.Pushed() {
		for _, name := range append(now.Names(typeURL), before.Names(typeURL)...) {
			if now.Get(typeURL, name) != before.Get(typeURL, name) && !slices.Contains(touched, translate.Key{TypeURL: typeURL, Name: name}) {
				t.Fatalf("%s: %s %s changed unnoticed", label, xds.ShortType(typeURL), name)
			}
		}
	}
}

func marshal(t *testing.T, res *translate.Resources, typeURL, name string) []byte {
	t.Helper()
	raw, err := translate.Marshal(res.Get(typeURL, name))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func relint(t *testing.T, l *translate.Linter, s *compile.Sets, p *policy.Policy) {
	t.Helper()
	if s.Whole {
		*l = *translate.NewLinter()
	}
	for _, m := range s.Changed {
		l.Set(m)
	}
	for _, name := range s.Removed {
		l.Remove(name)
	}
	for _, kind := range translate.Kinds() {
		if got, want := fmt.Sprint(l.Problems(kind)), fmt.Sprint(translate.Lint(p, kind)); got != want {
			t.Fatalf("linter\n got %s\nwant %s", got, want)
		}
	}
}

// many is n models of two versions each.
func many(n int) *log {
	l := newLog()
	for i := range n {
		name := fmt.Sprintf("m%04d", i)
		l.version(name, "v1", "10.0.0.1:80").champion(name, "v1").version(name, "v2", "10.0.0.2:80")
	}
	return l
}

// TestCompilerTouchesWhatChanged: one event about one model is one model compiled and its
// resources put, whatever the number of others; and no more allocations per other model
// than the copies of the maps it appears in.
func TestCompilerTouchesWhatChanged(t *testing.T) {
	allocs := func(models int) float64 {
		l, c := many(models), compile.NewCompiler(translate.Options{})
		if _, err := c.Compile(l.f, l.n, compile.Options{}); err != nil {
			t.Fatal(err)
		}
		before := c
		attempts := uint32(0)
		return testing.AllocsPerRun(20, func() {
			attempts++
			l.add("model/m0003", &pb.ModelConfigured{MaxAttempts: attempts%5 + 1})
			out, err := before.Compile(l.f, l.n, compile.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if len(out.Changed) != 1 || out.Changed[0].Name != "m0003" || len(out.Removed) != 0 || out.Whole {
				t.Fatalf("changed %d, removed %d, whole %t", len(out.Changed), len(out.Removed), out.Whole)
			}
		})
	}
	// Maps are copied in pieces; compiling a model takes over a hundred.
	if few, lots := allocs(10), allocs(300); lots-few > 3*290 {
		t.Errorf("%.0f allocations for one change among 10 models, %.0f among 300", few, lots)
	}
}

// BenchmarkCompileOne is one event about one of n models compiled for all kinds.
func BenchmarkCompileOne(b *testing.B) {
	for _, n := range []int{25, 250, 1000, 4000} {
		b.Run(fmt.Sprint("models=", n), func(b *testing.B) {
			l, c := many(n), compile.NewCompiler(translate.Options{})
			if _, err := c.Compile(l.f, l.n, compile.Options{}); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				l.add("model/m0003", &pb.ModelConfigured{MaxAttempts: uint32(i%5 + 1)})
				b.StartTimer()
				if _, err := c.Compile(l.f, l.n, compile.Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
