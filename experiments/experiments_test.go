package experiments

import (
	"encoding/binary"
	"flag"
	"fmt"
	"math"
	"math/bits"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twmb/murmur3"
	"gonum.org/v1/gonum/stat/distuv"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
)

var update = flag.Bool("update", false, "rewrite golden files")

// The published MurmurHash3_x86_32 vectors (Appleby's smhasher and the ones other
// implementations quote) pin the hash; the golden list pins our rule on top of it.
func TestPublishedMurmurVectors(t *testing.T) {
	for _, v := range []struct {
		seed uint32
		in   string
		want uint32
	}{
		{0, "", 0},
		{1, "", 0x514E28B7},
		{0xffffffff, "", 0x81F16F39},
		{0, "\xff\xff\xff\xff", 0x76293B50},
		{0, "\x21\x43\x65\x87", 0xF55B516B},
		{0x5082EDEE, "\x21\x43\x65\x87", 0x2362F9DE},
		{0, "\x21\x43\x65", 0x7E4A8634},
		{0, "\x21\x43", 0xA0F7B07A},
		{0, "\x21", 0x72661CF4},
		{0, "\x00\x00\x00\x00", 0x2362F9DE},
		{0, "\x00\x00\x00", 0x85F0B427},
		{0, "\x00\x00", 0x30F4C306},
		{0, "\x00", 0x514E28B7},
		{0, "hello", 0x248bfa47},
		{0, "hello, world", 0x149bbb7f},
		{0, "The quick brown fox jumps over the lazy dog", 0x2e4ff723},
		{0x9747b28c, "aaaa", 0x5A97808A},
		{0x9747b28c, "Hello, world!", 0x24884CBA},
	} {
		if got := murmur3.SeedSum32(v.seed, []byte(v.in)); got != v.want {
			t.Errorf("murmur3_32(seed %#x, %q) = %#x, published %#x", v.seed, v.in, got, v.want)
		}
		if got := reference(v.seed, []byte(v.in)); got != v.want {
			t.Errorf("reference(seed %#x, %q) = %#x, published %#x", v.seed, v.in, got, v.want)
		}
	}
}

// reference is MurmurHash3_x86_32 written from its description, as a second opinion.
func reference(h uint32, b []byte) uint32 {
	n := uint32(len(b))
	mix := func(k uint32) uint32 { return bits.RotateLeft32(k*0xcc9e2d51, 15) * 0x1b873593 }
	for ; len(b) >= 4; b = b[4:] {
		h = bits.RotateLeft32(h^mix(binary.LittleEndian.Uint32(b)), 13)*5 + 0xe6546b64
	}
	var tail [4]byte
	copy(tail[:], b)
	h ^= mix(binary.LittleEndian.Uint32(tail[:])) ^ n
	h = (h ^ h>>16) * 0x85ebca6b
	h = (h ^ h>>13) * 0xc2b2ae35
	return h ^ h>>16
}

func TestBucketFollowsTheRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		salt, unit := rapid.String().Draw(t, "salt"), rapid.String().Draw(t, "unit")
		buf := binary.LittleEndian.AppendUint32(nil, uint32(len(salt)))
		h := reference(0, append(append(buf, salt...), unit...))
		want := uint32(math.Floor(float64(h) / (1 << 32) * Buckets))
		if got := Bucket(salt, unit); got != want {
			t.Fatalf("Bucket(%q, %q) = %d, the rule gives %d", salt, unit, got, want)
		}
	})
}

// The golden list is what other languages' implementations of the rule (Envoy's Lua
// filter, SDKs) are tested against: it must never change.
func TestBucketGolden(t *testing.T) {
	var b strings.Builder
	b.WriteString("# salt\tunit\tbucket\n")
	for _, salt := range []string{"", "s", "summariser", "summariser/2", "Größe"} {
		for _, unit := range []string{"1", "23", "user-0001", "3f1c9a52-0d7e-4a61-9d0e-5b1f6a3c7e88", "名前", strings.Repeat("long", 40)} {
			fmt.Fprintf(&b, "%s\t%s\t%d\n", salt, unit, Bucket(salt, unit))
		}
	}
	const path = "testdata/buckets.tsv"
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("buckets differ from %s; every deployed client would re-randomise", path)
	}
}

func TestSaltAndUnitAreSeparated(t *testing.T) {
	if UnitHash("1", "23") == UnitHash("12", "3") {
		t.Error(`("1","23") and ("12","3") hash alike: the salt is not length-prefixed`)
	}
}

// Chi-square over 100 groups of 100 buckets; p must not be absurdly small for any of
// several salts, and two salts must be independent.
func TestBucketIsUniform(t *testing.T) {
	const units, cells = 200_000, 100
	for _, salt := range []string{"a", "b", "checkout", "2026-01"} {
		var seen [cells]float64
		var joint [100]float64
		for i := range units {
			u := fmt.Sprintf("user-%d", i)
			bucket := Bucket(salt, u)
			seen[bucket/(Buckets/cells)]++
			joint[bucket/1000*10+Bucket(salt+"'", u)/1000]++
		}
		for name, counts := range map[string][]float64{"uniformity": seen[:], "independence of salts": joint[:]} {
			chi, want := 0.0, float64(units)/float64(len(counts))
			for _, n := range counts {
				chi += (n - want) * (n - want) / want
			}
			if p := (distuv.ChiSquared{K: float64(len(counts) - 1)}).Survival(chi); p < 1e-4 {
				t.Errorf("salt %q: %s rejected, chi² = %.0f, p = %.2g", salt, name, chi, p)
			}
		}
	}
}

func TestBucketDoesNotAllocate(t *testing.T) {
	if n := testing.AllocsPerRun(1000, func() { Bucket("summariser", "3f1c9a52-0d7e-4a61-9d0e-5b1f6a3c7e88") }); n != 0 {
		t.Errorf("Bucket allocates %v times per call, want 0", n)
	}
}

// The bound is on the best of many rounds, each of about a millisecond, so a busy machine
// does not fail it.
func TestBucketIsFast(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector slows every memory access")
	}
	const calls = 10_000
	best := time.Duration(math.MaxInt64)
	for round := 0; round < 5000 && (round < 50 || best > calls*100*time.Nanosecond); round++ {
		start := time.Now()
		for range calls {
			Bucket("summariser", "3f1c9a52-0d7e-4a61-9d0e-5b1f6a3c7e88")
		}
		best = min(best, time.Since(start))
	}
	if best > calls*100*time.Nanosecond {
		t.Errorf("Bucket takes %v per call, the limit is 100ns", best/calls)
	}
}

func BenchmarkBucket(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		Bucket("summariser", "3f1c9a52-0d7e-4a61-9d0e-5b1f6a3c7e88")
	}
}

func TestUnitOf(t *testing.T) {
	for _, c := range []struct {
		rule                   Unit
		user, session, request string
		want                   string
		ok                     bool
	}{
		{UnitUser, "u", "s", "r", "u", true},
		{UnitUser, "", "s", "r", "", false},
		{UnitSession, "u", "s", "r", "u", true},
		{UnitSession, "", "s", "r", "s", true},
		{UnitSession, "", "", "r", "", false},
		{UnitRequest, "u", "s", "r", "u", true},
		{UnitRequest, "", "", "r", "r", true},
		{UnitRequest, "", "", "", "", false},
		{"tenant", "u", "s", "r", "", false},
	} {
		unit, ok := UnitOf(c.rule, c.user, c.session, c.request)
		if unit != c.want || ok != c.ok {
			t.Errorf("UnitOf(%s, %q, %q, %q) = %q, %v; want %q, %v", c.rule, c.user, c.session, c.request, unit, ok, c.want, c.ok)
		}
	}
}

func TestAllocate(t *testing.T) {
	got, err := Allocate([]Weighted{{"control", 9900}, {"off", 0}, {"b", 100}})
	if err != nil {
		t.Fatal(err)
	}
	want := "[{control [{0 9900}]} {off []} {b [{9900 10000}]}]"
	if fmt.Sprint(got) != want {
		t.Errorf("Allocate = %v, want %s", got, want)
	}
	for name, arms := range map[string][]Weighted{
		"too little": {{"a", 9999}}, "too much": {{"a", 10_000}, {"b", 1}}, "none": nil,
		"duplicate": {{"a", 5000}, {"a", 5000}}, "unnamed": {{"", 10_000}},
		"overflow": {{"a", math.MaxUint32}, {"b", 10_001}},
	} {
		if _, err := Allocate(arms); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: error %v, want kind invalid", name, err)
		}
	}
}

// A canary that ramps 1 % → 10 % → 0 → 1 % touches the same units each time.
func TestRampTranscript(t *testing.T) {
	var prev []Allocation
	for _, c := range []struct {
		canary uint32
		want   string
	}{
		{0, "[{stable [{0 10000}]} {canary []}]"},
		{100, "[{stable [{0 9900}]} {canary [{9900 10000}]}]"},
		{1000, "[{stable [{0 9000}]} {canary [{9000 10000}]}]"},
		{100, "[{stable [{0 9000} {9100 10000}]} {canary [{9000 9100}]}]"},
		{0, "[{stable [{0 10000}]} {canary []}]"},
		{10000, "[{stable []} {canary [{0 10000}]}]"},
	} {
		next, err := Reallocate(prev, []Weighted{{"stable", Buckets - c.canary}, {"canary", c.canary}})
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(next) != c.want {
			t.Errorf("canary %d: %v, want %s", c.canary, next, c.want)
		}
		prev = next
	}
}

func TestCovers(t *testing.T) {
	for want, arms := range map[string][]Allocation{
		"[0,5) belong to no arm":         {{"a", []Range{{5, Buckets}}}},
		"[5,7) belong to no arm":         {{"a", []Range{{0, 5}}}, {"b", []Range{{7, Buckets}}}},
		"[9999,10000) belong to no arm":  {{"a", []Range{{0, 9999}}}},
		`bucket 4 belongs to "a" and to`: {{"a", []Range{{0, 5}}}, {"b", []Range{{4, Buckets}}}},
		"[3,3)":                          {{"a", []Range{{3, 3}, {0, Buckets}}}},
		"[0,10001)":                      {{"a", []Range{{0, Buckets + 1}}}},
		"used twice":                     {{"a", []Range{{0, 1}}}, {"a", []Range{{1, Buckets}}}},
	} {
		if err := Covers(arms); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Covers(%v) = %v, want it to say %q", arms, err, want)
		}
		if _, err := Reallocate(arms, []Weighted{{"a", Buckets}}); err == nil {
			t.Errorf("Reallocate accepted the broken split %v", arms)
		}
	}
}

// Laws of Reallocate over random histories of weights: full cover, exact weights,
// growing arms keep every unit, shrinking arms gain none, least movement, order of
// arms kept, and inputs untouched.
func TestReallocateLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var prev []Allocation
		for step := range rapid.IntRange(1, 6).Draw(t, "steps") {
			arms := drawWeights(t)
			before := fmt.Sprint(prev)
			next, err := Reallocate(prev, arms)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(prev) != before {
				t.Fatal("Reallocate modified its input")
			}
			if err := Covers(next); err != nil {
				t.Fatal(err)
			}
			for i, a := range arms {
				if next[i].Name != a.Name || next[i].Weight() != a.Weight {
					t.Fatalf("arm %d is %s with %d, want %s with %d", i, next[i].Name, next[i].Weight(), a.Name, a.Weight)
				}
			}
			if step > 0 {
				checkMovement(t, prev, next)
			}
			prev = next
		}
	})
}

func drawWeights(t *rapid.T) []Weighted {
	cuts := rapid.SliceOfN(rapid.Uint32Range(0, Buckets), 0, 4).Draw(t, "cuts")
	slices.Sort(cuts)
	var out []Weighted
	last := uint32(0)
	for i, c := range append(cuts, Buckets) {
		out = append(out, Weighted{string(rune('a' + i)), c - last})
		last = c
	}
	return rapid.Permutation(out).Draw(t, "order")
}

func checkMovement(t *rapid.T, prev, next []Allocation) {
	was, is := owners(prev), owners(next)
	weight := map[string]int{}
	for b := range was {
		weight[was[b]]--
		weight[is[b]]++
	}
	moved, falls := 0, 0
	for b := range was {
		if was[b] == is[b] {
			continue
		}
		moved++
		if weight[was[b]] >= 0 {
			t.Fatalf("bucket %d left %s, whose weight did not fall", b, was[b])
		}
		if weight[is[b]] <= 0 {
			t.Fatalf("bucket %d joined %s, whose weight did not rise", b, is[b])
		}
	}
	for _, d := range weight {
		falls += max(0, -d)
	}
	if moved != falls {
		t.Fatalf("%d buckets moved, %d had to", moved, falls)
	}
}

func owners(arms []Allocation) (out [Buckets]string) {
	for _, a := range arms {
		for _, r := range a.Ranges {
			for b := r.Start; b < r.End; b++ {
				out[b] = a.Name
			}
		}
	}
	return out
}
