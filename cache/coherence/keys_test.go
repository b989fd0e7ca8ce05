package coherence

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// The keys behave like a map with two orders, whatever their names are and whichever of
// them go: what is found, the order of storing and the order within sessions.
func TestKeysModel(t *testing.T) {
	names := []string{"", "x", "12345678", "123456789", strings.Repeat("p", 16), strings.Repeat("p", 17),
		strings.Repeat("l", 254), strings.Repeat("l", 255), strings.Repeat("l", 256), strings.Repeat("l", 70_000)}
	for i := range 2000 {
		names = append(names, fmt.Sprint("n", strings.Repeat("0", i%30), i))
	}
	for seed := range uint64(2) {
		r := rand.New(rand.NewPCG(seed, 1))
		k := newKeys()
		var order, brief []outrigger.Key
		entries := map[outrigger.Key]*entry{}
		without := func(l []outrigger.Key, key outrigger.Key) []outrigger.Key {
			return slices.DeleteFunc(l, func(o outrigger.Key) bool { return o == key })
		}
		for i := range 12_000 {
			key := outrigger.Key{Tenant: []string{"a", "ab"}[r.IntN(2)], Session: []string{"bs", "s", "u"}[r.IntN(3)], Name: names[r.IntN(len(names))]}
			e := k.find(key)
			if e != entries[key] {
				t.Fatalf("seed %d, %d: found %p for %.40q, want %p", seed, i, e, key, entries[key])
			}
			switch {
			case e == nil:
				if i < 8000 || i%2 == 0 {
					entries[key] = k.add(key)
					order = append(order, key)
				}
			case i >= 8000 || r.IntN(3) == 0:
				k.remove(e)
				delete(entries, key)
				order, brief = without(order, key), without(brief, key)
			case r.IntN(2) == 0:
				k.toBack(&k.brief, e)
				order, brief = without(order, key), append(without(brief, key), key)
			default:
				k.toBack(&k.order, e)
				order, brief = append(without(order, key), key), without(brief, key)
			}
		}
		var got []outrigger.Key
		for e := range k.all() {
			got = append(got, k.key(e))
		}
		if want := append(slices.Clone(order), brief...); !slices.Equal(got, want) || k.count != len(want) {
			t.Fatalf("seed %d: %d keys in another order than the %d of the model", seed, len(got), len(want))
		}
		if want := (k.nBuckets - chunkSize) * perBucket; k.nBuckets <= chunkSize || want > 12_000 {
			t.Errorf("seed %d: %d buckets", seed, k.nBuckets)
		}
		checkSessions(t, &k, entries)
		for _, e := range entries {
			k.remove(e)
		}
		if k.count != 0 || k.order != (list{}) || k.brief != (list{}) || len(k.byName) != 0 || len(k.long) != 0 || k.pieces.used != uint32(len(k.pieces.free)) {
			t.Errorf("seed %d: something is left of keys that are gone: %d keys, %d sessions, %d long names", seed, k.count, len(k.byName), len(k.long))
		}
	}
}

func checkSessions(t *testing.T, k *keys, entries map[outrigger.Key]*entry) {
	t.Helper()
	seen := 0
	for name := range k.byName {
		last := map[*entry]bool{}
		for e := range k.of(name.tenant, name.id) {
			if key := k.key(e); entries[key] != e || key.Tenant != name.tenant || key.Session != name.id || last[e] {
				t.Fatalf("session %v has %.40q", name, key)
			}
			last[e] = true
			seen++
		}
	}
	if seen != len(entries) {
		t.Errorf("the sessions have %d keys of %d", seen, len(entries))
	}
}

// Keys of a session come in the order they were added, also after some of them went.
func TestSessionOrder(t *testing.T) {
	k := newKeys()
	add := func(name string) { k.add(outrigger.Key{Tenant: "t", Session: "s", Name: name}) }
	for _, name := range []string{"a", "b", "c", "d"} {
		add(name)
	}
	for _, name := range []string{"a", "c"} {
		k.remove(k.find(outrigger.Key{Tenant: "t", Session: "s", Name: name}))
	}
	add("a")
	var got []string
	for e := range k.of("t", "s") {
		got = append(got, k.key(e).Name)
	}
	if want := []string{"b", "d", "a"}; !slices.Equal(got, want) {
		t.Errorf("the session has %v, want %v", got, want)
	}
}

// Anything that looks like a pointer in an entry would have the collector read all of
// them, and a word more is eight bytes a key.
func TestEntryIsPlain(t *testing.T) {
	if size := reflect.TypeFor[entry]().Size(); size != 64 {
		t.Errorf("an entry has %d bytes, want 64", size)
	}
	for _, typ := range []reflect.Type{reflect.TypeFor[entry](), reflect.TypeFor[piece]()} {
		for i := range typ.NumField() {
			f := typ.Field(i).Type
			if f.Kind() == reflect.Array {
				f = f.Elem()
			}
			if f.Kind() < reflect.Bool || f.Kind() > reflect.Complex128 {
				t.Errorf("%v.%s is a %v", typ, typ.Field(i).Name, f.Kind())
			}
		}
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what the first one only found to be garbage
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// fill stores n keys by reads and the answers to them.
func fill(t testing.TB, s *State, n int, key func(i int) outrigger.Key) {
	v := &pb.Variable{Version: &pb.Version{Dot: &pb.Dot{Region: "eu", Incarnation: inc, Position: 1}}}
	s.Step(Connected{Stream: 1}, 1)
	s.Step(Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: inc, Region: "eu", Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: 1, Through: 1}}}}, 1)
	for i := range n {
		k := key(i)
		out := s.Step(Read{Key: k, Waiter: 1}, 1)
		f, ok := out[0].(Fetch)
		if !ok {
			t.Fatalf("key %d: %s", i, show(out))
		}
		s.Step(Filled{Key: k, Flight: f.Flight, Result: &pb.ReadResult{Variable: v, SessionExists: true}, AsOf: 1, Incarnation: inc, Region: "eu"}, 1)
	}
	if st := s.Stats(); st.Keys != n || st.Evicted != 0 {
		t.Fatalf("%d keys with a floor, %d evicted; want all %d", st.Keys, st.Evicted, n)
	}
}

// What a key costs is what decides how many a node can hold. The bounds leave a fifth.
func TestBytesPerKey(t *testing.T) {
	const n = 100_000
	for _, c := range []struct {
		what  string
		bound uint64
		key   func(i int) outrigger.Key
	}{
		{"hundred short names a session", 84, func(i int) outrigger.Key {
			return outrigger.Key{Tenant: "default", Session: fmt.Sprintf("session-%05d", i/100), Name: fmt.Sprintf("name-%02d", i%100)}
		}},
		{"hundred names of 20 bytes a session", 122, func(i int) outrigger.Key {
			return outrigger.Key{Tenant: "default", Session: fmt.Sprintf("session-%05d", i/100), Name: fmt.Sprintf("variable-of-no-%05d", i%100)}
		}},
		{"a session each", 320, func(i int) outrigger.Key {
			return outrigger.Key{Tenant: "default", Session: fmt.Sprintf("session-%05d", i), Name: "temperature"}
		}},
	} {
		before := heap()
		s := New(Options{Region: "eu", MaxKeys: n + 2048})
		fixed := heap()
		fill(t, s, n, c.key)
		s.Step(Tick{}, 1000*ms) // the answers prove nothing by themselves any more
		after := heap()
		per := (after - fixed) / n
		t.Logf("%s: %d bytes a key, and %d KiB in any case", c.what, per, (fixed-before)>>10)
		if per > c.bound {
			t.Errorf("%s: %d bytes a key, the bound is %d", c.what, per, c.bound)
		}
		s.Step(SessionChanged{Tenant: "default", Session: "session-00001"}, 2)
		for _, o := range s.Step(Connected{Stream: 2}, 2) {
			if sub, ok := o.(Subscribe); !ok || sub.Incarnation != inc || sub.From != 1 {
				t.Errorf("connecting caused %s", showOne(o))
			}
		}
		s.Step(Frame{Stream: 2, Frame: &pb.FeedFrame{Incarnation: inc, Region: "eu", Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: 9}}}}, 2)
		if left := heap() - before; left > fixed-before+64<<10 {
			t.Errorf("%s: %d KiB are kept after a flush", c.what, left>>10)
		}
		runtime.KeepAlive(s)
	}
}

// A burst of keys that reach their last age together is forgotten over several ticks.
func TestExpiryIsBounded(t *testing.T) {
	const n = 3 * maxExpired / 2
	s := New(Options{Region: "eu", MaxKeys: n + 2048, TTL: 1000 * ms})
	fill(t, s, n, func(i int) outrigger.Key { return key(fmt.Sprint(i)) })
	s.Step(Tick{}, 999*ms)
	if st := s.Stats(); st.Evicted != 0 {
		t.Fatalf("%d keys were forgotten before their time", st.Evicted)
	}
	for i, want := range []int{maxExpired, n, n} {
		s.Step(Tick{}, 1001*ms)
		if st := s.Stats(); int(st.Evicted) != want {
			t.Errorf("tick %d: %d keys are forgotten, want %d", i, st.Evicted, want)
		}
	}
}

// A cap that was lowered is reached step by step.
func TestResize(t *testing.T) {
	const n = 3000
	s := New(Options{Region: "eu", MaxKeys: n, MaxFlights: 8})
	fill(t, s, n, func(i int) outrigger.Key { return key(fmt.Sprint(i)) })
	s.Resize(n - 20)
	for i := range 3 {
		out := s.Step(Read{Key: key(fmt.Sprint("more", i)), Waiter: 1}, 2)
		if got, want := len(out)-1, []int{16, 6, 1}[i]; got != want {
			t.Errorf("step %d took %d keys out, want %d", i, got, want)
		}
	}
	if st := s.Stats(); st.Keys != n-20 {
		t.Errorf("%d keys, want %d", st.Keys, n-20)
	}
}

func BenchmarkRead(b *testing.B) {
	const n = 1 << 18
	s := New(Options{Region: "eu", MaxKeys: n + 2048, Lease: 1 << 60})
	names := make([]outrigger.Key, n)
	for i := range names {
		names[i] = outrigger.Key{Tenant: "default", Session: fmt.Sprintf("session-%05d", i/100), Name: fmt.Sprintf("name-%02d", i%100)}
	}
	fill(b, s, n, func(i int) outrigger.Key { return names[i] })
	s.lease = 1 << 60
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.Step(Read{Key: names[i*7919%n], Waiter: 1}, 2)
	}
}

func BenchmarkChange(b *testing.B) {
	const n = 1 << 18
	s := New(Options{Region: "eu", MaxKeys: n + 2048})
	changes := make([]*pb.Change, n)
	for i := range changes {
		k := &pb.Key{Tenant: "default", Session: fmt.Sprintf("session-%05d", i/100), Name: fmt.Sprintf("name-%02d", i%100)}
		changes[i] = &pb.Change{Key: k, Variable: &pb.Variable{Key: k, Version: versionIn("eu", inc, 2)}, Version: versionIn("eu", inc, 2)}
	}
	fill(b, s, n, func(i int) outrigger.Key { return keyOf(changes[i].Key) })
	s.Step(Connected{Stream: 2}, 2)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c := changes[i*7919%n]
		c.Position = uint64(i + 2)
		s.Step(Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: inc, Region: "eu", Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: s.applied, Through: c.Position, Changes: []*pb.Change{c}}}}}, 3)
	}
}
