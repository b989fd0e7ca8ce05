package adsserver

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// randomModel is one of few that differ in everything a push may change.
func randomModel(r *rand.Rand, name string) *policy.Model {
	m := policy.Model{Name: name, Salt: "s", Unit: experiments.UnitSession, MaxAttempts: uint32(1 + r.IntN(3)),
		Arms: []policy.Arm{{Name: "only", Version: "v0", Ranges: []experiments.Range{{Start: 0, End: experiments.Buckets}}}}}
	for i := range 1 + r.IntN(3) {
		m.Versions = append(m.Versions, policy.Version{Name: fmt.Sprint("v", i),
			Endpoints: []policy.Endpoint{{Address: fmt.Sprintf("10.0.0.%d:80", 1+r.IntN(2)), Weight: 1}}})
	}
	m = m.Normalise()
	return &m
}

// TestIncrementalGenerations: a server that is given forks of what it has, and one that
// is given unrelated sets of the same content, serve the same: names, versions, bytes,
// order and differences, retained clusters included.
func TestIncrementalGenerations(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 2))
		enc := translate.NewEncoder(translate.KindSidecar, translate.Options{})
		forked, whole := New(Options{}), New(Options{})
		models := map[string]*policy.Model{}
		for position := uint64(1); position <= 40; position++ {
			change := translate.Change{Position: position}
			for range r.IntN(3) {
				name := fmt.Sprint("m", r.IntN(6))
				if r.IntN(4) == 0 && len(models) > 1 && models[name] != nil {
					delete(models, name)
					change.Models = slices.DeleteFunc(change.Models, func(c translate.ModelChange) bool { return c.Model.Name == name })
					change.Removed = append(change.Removed, name)
					continue
				}
				if slices.Contains(change.Removed, name) {
					continue
				}
				models[name] = randomModel(r, name)
				change.Models = append(change.Models, translate.ModelChange{Model: models[name]})
			}
			res, err := enc.Encode(change)
			if err != nil {
				t.Fatal(err)
			}
			if r.IntN(8) == 0 {
				continue // encoded and never published
			}
			force := r.IntN(4) == 0
			errs := [2]error{forked.publish("g", res, position, force), whole.publish("g", stranger(t, res), position, force)}
			if (errs[0] == nil) != (errs[1] == nil) {
				t.Fatalf("seed %d position %d: %v, but %v", seed, position, errs[0], errs[1])
			}
			if errs[0] != nil {
				continue
			}
			a, b := forked.group("g"), whole.group("g")
			sameState(t, fmt.Sprintf("seed %d position %d", seed, position), a.current.Load(), b.current.Load())
		}
	}
}

// stranger is the same content in other messages.
func stranger(t *testing.T, res *translate.Resources) *translate.Resources {
	out := new(translate.Resources)
	for _, typeURL := range xds.Pushed() {
		for _, name := range res.Names(typeURL) {
			out.Put(typeURL, name, proto.Clone(res.Get(typeURL, name)))
		}
	}
	if out.Len() != res.Len() {
		t.Fatal("a set holds types that are not pushed")
	}
	return out
}

func sameState(t *testing.T, label string, a, b *generation) {
	t.Helper()
	if a == nil || b == nil {
		if a != b {
			t.Fatalf("%s: only one server serves anything", label)
		}
		return
	}
	for _, typeURL := range xds.Pushed() {
		x, y := a.types[typeURL], b.types[typeURL]
		describe := func(s *typeState) string {
			out := fmt.Sprintf("%s %q\nall", s.version, s.names)
			for i, r := range s.all {
				out += fmt.Sprintf(" %s=%s/%x/%x", r.GetName(), r.GetVersion(), r.GetResource().GetValue(), s.anys[i].GetValue())
			}
			for _, r := range s.changed {
				out += " +" + r.GetName() + "=" + r.GetVersion()
			}
			return out + fmt.Sprintf(" -%q %q", s.removed, slices.Sorted(maps.Keys(s.entries)))
		}
		if got, want := describe(x), describe(y); got != want {
			t.Fatalf("%s: %s\n forked %s\n whole  %s", label, xds.ShortType(typeURL), got, want)
		}
	}
}

// TestUnchangedIsNotMarshalled: the entries of what did not change are the same pointers
// from push to push, and a type nothing happened to is the same state.
func TestUnchangedIsNotMarshalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 3))
		enc := translate.NewEncoder(translate.KindSidecar, translate.Options{})
		change := translate.Change{Position: 1}
		for i := range 100 {
			change.Models = append(change.Models, translate.ModelChange{Model: randomModel(r, fmt.Sprint("m", i))})
		}
		s := New(Options{})
		var before *generation
		for position := uint64(1); position < 4; position++ {
			change.Position = position
			res, err := enc.Encode(change)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Publish("g", res, position); err != nil {
				t.Fatal(err)
			}
			now := s.group("g").current.Load()
			if before != nil {
				mesh := now.types[xds.TypeMeshPolicy]
				if len(mesh.changed) != 1 || mesh == before.types[xds.TypeMeshPolicy] {
					t.Errorf("MeshPolicy did not change with the position")
				}
				routes := now.types[xds.TypeRoute]
				if len(routes.changed) != 1 || routes.changed[0].GetName() != "model/m7" {
					t.Errorf("changed routes: %v", routes.changed)
				}
				for name, e := range routes.entries {
					if same := e == before.types[xds.TypeRoute].entries[name]; same == (name == "model/m7") {
						t.Errorf("entry of %s: same is %t", name, same)
					}
				}
				if now.types[xds.TypeListener] != before.types[xds.TypeListener] {
					t.Error("listeners are another state though none changed")
				}
			}
			before = now
			m := *change.Models[min(7, len(change.Models)-1)].Model
			m.Timeout = time.Duration(position) * time.Second
			change.Models = []translate.ModelChange{{Model: &m}}
		}
	})
}

// TestSetSum: the sum of a set does not depend on the way to it.
func TestSetSum(t *testing.T) {
	var a, b, empty setSum
	a.add("x", "1")
	a.add("y", "2")
	b.add("y", "2")
	b.add("z", "3")
	b.add("x", "1")
	b.subtract("z", "3")
	if a != b || a.version("t") != b.version("t") || a.version("t") == a.version("u") {
		t.Errorf("sums %x and %x", a, b)
	}
	a.subtract("x", "1")
	a.subtract("y", "2")
	if a != empty {
		t.Errorf("nothing sums to %x", a)
	}
	var c, d setSum
	c.add("x", "12")
	d.add("x1", "2")
	if c == d {
		t.Error("name and version run together")
	}
}
