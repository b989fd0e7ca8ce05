package version

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
)

type vec = map[string]uint64

func TestCompareVectors(t *testing.T) {
	for _, c := range []struct {
		a, b vec
		want Order
	}{
		{nil, nil, Equal},
		{vec{"eu": 0}, nil, Equal},
		{vec{"eu": 1}, nil, After},
		{vec{"eu": 1}, vec{"eu": 2}, Before},
		{vec{"eu": 1}, vec{"eu": 1, "us": 1}, Before},
		{vec{"eu": 2, "us": 1}, vec{"eu": 1, "us": 1}, After},
		{vec{"eu": 1}, vec{"us": 1}, Concurrent},
		{vec{"eu": 2, "us": 1}, vec{"eu": 1, "us": 2}, Concurrent},
	} {
		if got := CompareVectors(c.a, c.b); got != c.want {
			t.Errorf("CompareVectors(%v, %v) = %v, want %v", c.a, c.b, got, c.want)
		}
	}
}

func genVector() *rapid.Generator[vec] {
	return rapid.MapOfN(rapid.SampledFrom([]string{"ap", "eu", "us", "sa"}), rapid.Uint64Range(0, 4), 0, 4)
}

// The vectors under Merge form a join semilattice whose order is CompareVectors.
func TestVectorLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := genVector().Draw(t, "a"), genVector().Draw(t, "b"), genVector().Draw(t, "c")
		before := [2]string{fmt.Sprint(a), fmt.Sprint(b)}
		eq := func(law string, x, y vec) {
			if CompareVectors(x, y) != Equal {
				t.Fatalf("%s: %v is not %v", law, x, y)
			}
		}
		eq("idempotent", Merge(a, a), a)
		eq("commutative", Merge(a, b), Merge(b, a))
		eq("associative", Merge(a, Merge(b, c)), Merge(Merge(a, b), c))
		if CompareVectors(a, b) != CompareVectors(b, a).Flip() {
			t.Fatalf("antisymmetry: %v against %v", a, b)
		}
		if m := Merge(a, b); !Covers(m, a) || !Covers(m, b) {
			t.Fatalf("merge %v does not cover %v and %v", m, a, b)
		}
		if Covers(a, b) != (CompareVectors(Merge(a, b), a) == Equal) {
			t.Fatalf("a ≥ b must mean a ∨ b = a: %v, %v", a, b)
		}
		if Covers(c, a) && Covers(c, b) && !Covers(c, Merge(a, b)) {
			t.Fatalf("merge is not the least upper bound of %v and %v", a, b)
		}
		if got := [2]string{fmt.Sprint(a), fmt.Sprint(b)}; got != before {
			t.Fatalf("an argument was changed: %v, was %v", got, before)
		}
	})
}

func ver(region string, pos, hlc uint64, ctx vec) outrigger.Version {
	c := maps.Clone(ctx)
	if c == nil {
		c = vec{}
	}
	c[region] = pos
	return outrigger.Version{Dot: outrigger.Dot{Region: region, Incarnation: 1, Position: pos}, HLC: hlc, Context: c}
}

func TestCompareVersions(t *testing.T) {
	first := ver("eu", 10, 1, nil)
	second := ver("eu", 17, 2, nil)
	elsewhere := ver("us", 4, 3, vec{"eu": 10})
	restored := ver("eu", 3, 9, nil)
	restored.Dot.Incarnation = 2
	for _, c := range []struct {
		name string
		a, b outrigger.Version
		want Order
	}{
		{"same write", first, first, Equal},
		{"later in one log", first, second, Before},
		{"seen across regions", elsewhere, first, After},
		{"not seen across regions", elsewhere, second, Concurrent},
		{"nothing precedes everything", outrigger.Version{}, first, Before},
		{"two incarnations are not comparable", restored, first, Concurrent},
	} {
		if got := Compare(c.a, c.b); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
		if got := Compare(c.b, c.a); got != c.want.Flip() {
			t.Errorf("%s, exchanged: got %v, want %v", c.name, got, c.want.Flip())
		}
	}
}

// genHistory draws an honest history of one variable: each write sees a random subset
// of the regions' states and stamps itself with the clock rule.
func genHistory(t *rapid.T) []outrigger.Version {
	regions := []string{"ap", "eu", "us"}
	known := map[string]vec{}
	position, clock := map[string]uint64{}, map[string]uint64{}
	var out []outrigger.Version
	for i := range rapid.IntRange(1, 8).Draw(t, "writes") {
		r := rapid.SampledFrom(regions).Draw(t, fmt.Sprintf("region%d", i))
		var observed uint64
		if len(out) > 0 && rapid.Bool().Draw(t, fmt.Sprintf("sees%d", i)) {
			seen := rapid.SampledFrom(out).Draw(t, fmt.Sprintf("saw%d", i))
			known[r], observed = Merge(known[r], seen.Context), seen.HLC
		}
		position[r] += rapid.Uint64Range(1, 3).Draw(t, fmt.Sprintf("step%d", i))
		clock[r], _ = Next(rapid.Int64Range(1000, 1004).Draw(t, fmt.Sprintf("now%d", i)), clock[r], observed)
		v := ver(r, position[r], clock[r], known[r])
		known[r] = v.Context
		out = append(out, v)
	}
	return out
}

func TestWinnerLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		vs := genHistory(t)
		w := vs[Winner(vs)]
		shuffled := rapid.Permutation(vs).Draw(t, "order")
		if got := shuffled[Winner(shuffled)]; got.Dot != w.Dot {
			t.Fatalf("winner depends on the order: %v or %v", w.Dot, got.Dot)
		}
		for _, v := range vs {
			if Compare(v, w) == After {
				t.Fatalf("winner %v lost to %v, which had seen it", w.Dot, v.Dot)
			}
			for _, u := range vs {
				if Compare(v, u) == After && v.HLC <= u.HLC {
					t.Fatalf("the clock runs against causality: %v then %v", u, v)
				}
			}
		}
		// Deciding in two halves, as replicas that hear of the writes in turn do.
		cut := rapid.IntRange(0, len(shuffled)).Draw(t, "cut")
		var half []outrigger.Version
		for _, part := range [][]outrigger.Version{shuffled[:cut], shuffled[cut:]} {
			if i := Winner(part); i >= 0 {
				half = append(half, part[i])
			}
		}
		if got := half[Winner(half)]; got.Dot != w.Dot {
			t.Fatalf("in halves %v wins, at once %v", got.Dot, w.Dot)
		}
	})
	if Winner(nil) != -1 {
		t.Error("no candidate must give -1")
	}
	// Contexts no honest writer makes: each has seen the next.
	a, b, c := ver("ap", 1, 5, vec{"eu": 1}), ver("eu", 1, 7, vec{"us": 1}), ver("us", 1, 6, vec{"ap": 1})
	for _, order := range [][]outrigger.Version{{a, b, c}, {c, a, b}, {b, c, a}} {
		if got := order[Winner(order)].Dot.Region; got != "eu" {
			t.Errorf("in a cycle the clock must decide (eu), got %s", got)
		}
	}
}

func TestHLC(t *testing.T) {
	const ms = 1_700_000_000_000
	at := func(millis int64, logical uint64) uint64 { return uint64(millis)<<16 | logical }
	for _, c := range []struct {
		name           string
		now            int64
		prev, observed uint64
		want           uint64
		ok             bool
	}{
		{"clock moved", ms, at(ms-1, 9), 0, at(ms, 0), true},
		{"clock stands", ms, at(ms, 9), 0, at(ms, 10), true},
		{"clock ran back", ms - 5000, at(ms, 9), 0, at(ms, 10), true},
		{"peer ahead", ms, at(ms, 0), at(ms+MaxDrift, 3), at(ms+MaxDrift, 4), true},
		{"peer too far ahead", ms, at(ms, 0), at(ms+MaxDrift+1, 3), at(ms, 1), false},
		{"counter full", ms, at(ms, logicalMask), 0, at(ms+1, 0), true},
		{"negative clock", -1, 0, 0, 1, true},
		{"end of time", ms, math.MaxUint64, 0, math.MaxUint64, true},
	} {
		got, ok := Next(c.now, c.prev, c.observed)
		if got != c.want || ok != c.ok {
			t.Errorf("%s: got %d.%d %v, want %d.%d %v", c.name, Millis(got), Logical(got), ok, Millis(c.want), Logical(c.want), c.ok)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		now := rapid.Int64Range(0, maxMillis).Draw(t, "now")
		prev := rapid.Uint64Range(0, math.MaxUint64-1).Draw(t, "prev")
		obs := rapid.Uint64().Draw(t, "observed")
		s, ok := Next(now, prev, obs)
		if s <= prev || s < uint64(now)<<16 || ok && obs < math.MaxUint64 && s <= obs {
			t.Fatalf("Next(%d, %d, %d) = %d, %v does not advance", now, prev, obs, s, ok)
		}
	})
}

func TestEncodingGolden(t *testing.T) {
	got := AppendVector(nil, vec{"us": 1042, "eu": 77, "ap": 0})
	want := []byte("\x02\x02eu\x4d\x02us\x92\x08")
	if !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x: the encoding is persistent and must not change", got, want)
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, b := range map[string]string{
		"empty":            "",
		"cut":              "\x01\x02eu",
		"unsorted":         "\x02\x02us\x01\x02eu\x01",
		"duplicate":        "\x02\x02eu\x01\x02eu\x02",
		"zero position":    "\x01\x02eu\x00",
		"long varint":      "\x01\x02eu\x81\x00",
		"65-bit varint":    "\x01\x02eu\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",
		"too many regions": "\x81\x08",
		"region too long":  "\x01\x81\x02" + string(bytes.Repeat([]byte("a"), 257)) + "\x01",
	} {
		if v, _, err := DecodeVector([]byte(b)); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: got %v, %v, want kind Invalid", name, v, err)
		}
	}
}

func FuzzDecodeVersion(f *testing.F) {
	f.Add(AppendVersion(nil, ver("eu", 77, 1<<60, vec{"us": 1042})))
	f.Add(AppendVersion(nil, outrigger.Version{Counter: -1}))
	f.Add([]byte("\x01\x02eu\x01\x01\x01\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, rest, err := DecodeVersion(b)
		if err != nil {
			if !outrigger.IsKind(err, outrigger.Invalid) {
				t.Fatalf("error of kind %v", outrigger.KindOf(err))
			}
			return
		}
		// Canonical: what decodes is what encoding the result gives, byte for byte.
		used := b[:len(b)-len(rest)]
		if again := AppendVersion(nil, v); !bytes.Equal(again, used) {
			t.Fatalf("%x decodes to %+v, which encodes to %x", used, v, again)
		}
	})
}

// Identity: every version survives the trip, and trailing bytes are handed back.
func TestEncodeIdentity(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := ver(rapid.StringN(0, 20, 60).Draw(t, "region"), rapid.Uint64Min(1).Draw(t, "position"),
			rapid.Uint64().Draw(t, "hlc"), genVector().Draw(t, "context"))
		v.Counter = rapid.Int32().Draw(t, "counter")
		tail := []byte("tail")
		got, rest, err := DecodeVersion(append(AppendVersion(nil, v), tail...))
		if err != nil || !bytes.Equal(rest, tail) {
			t.Fatalf("%+v: rest %q, error %v", v, rest, err)
		}
		if got.Counter != v.Counter || got.Dot != v.Dot || got.HLC != v.HLC || CompareVectors(got.Context, v.Context) != Equal {
			t.Fatalf("got %+v, want %+v", got, v)
		}
		if slices.Contains(slices.Collect(maps.Values(got.Context)), 0) {
			t.Fatalf("zero entry in %v", got.Context)
		}
	})
}
