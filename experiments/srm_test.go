package experiments

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
)

// The closed form must equal the product of one-step predictions of a Pólya urn.
func TestSampleRatioIsThePolyaUrn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := rapid.Uint32Range(1, Buckets-1).Draw(t, "weight")
		arms := []Exposed{{"a", w, 0}, {"b", Buckets - w, 0}, {"off", 0, 0}}
		log := 0.0
		for n, second := range rapid.SliceOf(rapid.Bool()).Draw(t, "units") {
			a := &arms[0]
			if second {
				a = &arms[1]
			}
			share := float64(a.Weight) / Buckets
			log += math.Log((srmConcentration*share + float64(a.Units)) / (srmConcentration + float64(n)) / share)
			a.Units++
		}
		got, err := CheckSampleRatio(arms, .01)
		if err != nil {
			t.Fatal(err)
		}
		if math.Abs(math.Log(got.BayesFactor)-log) > 1e-8 {
			t.Fatalf("Bayes factor %v, urn %v", got.BayesFactor, math.Exp(log))
		}
	})
}

// watchRatio assigns units at the true share and looks after every 50; it returns the
// number of units at the first mismatch, 0 if there is none.
func watchRatio(seed uint64, share float64, units int) int {
	r := rand.New(rand.NewPCG(seed, 1))
	arms := []Exposed{{"a", 5000, 0}, {"b", 5000, 0}}
	for n := 1; n <= units; n++ {
		if r.Float64() < share {
			arms[0].Units++
		} else {
			arms[1].Units++
		}
		if n%50 != 0 {
			continue
		}
		if s, err := CheckSampleRatio(arms, .01); err != nil || s.Mismatch {
			return n
		}
	}
	return 0
}

func TestSampleRatioMayBeWatched(t *testing.T) {
	const runs = 200
	alarms := 0
	var found []int
	for i := range uint64(runs) {
		if watchRatio(i, .5, 20_000) > 0 {
			alarms++
		}
		if n := watchRatio(i, .52, 60_000); n > 0 {
			found = append(found, n)
		}
	}
	slices.Sort(found)
	if alarms > 5 {
		t.Errorf("%d false alarms in %d correct experiments watched throughout, α is 1 %%", alarms, runs)
	}
	if len(found) < runs*99/100 {
		t.Fatalf("52/48 found in %d of %d", len(found), runs)
	}
	if found[len(found)/2] > 13_000 {
		t.Errorf("52/48 found after a median of %d units, want ≤ 13 000", found[len(found)/2])
	}
	t.Logf("false alarms %d of %d; 52/48 found after a median of %d units", alarms, runs, found[len(found)/2])
}

func TestSampleRatioLeaksAndInput(t *testing.T) {
	s, err := CheckSampleRatio([]Exposed{{"a", 5000, 50_000}, {"b", 5000, 50_000}, {"five", 0, 5}, {"twelve", 0, 12}}, .01)
	if err != nil || s.Mismatch || !slices.Equal(s.Leaks, []string{"twelve"}) {
		t.Errorf("%+v, %v; want one leak: twelve", s, err)
	}
	s, err = CheckSampleRatio([]Exposed{{"a", 5000, 1 << 40}, {"b", 5000, 0}}, .01)
	if err != nil || !s.Mismatch || s.BayesFactor != 1e300 {
		t.Errorf("%+v, %v; want a certain mismatch", s, err)
	}
	for name, arms := range map[string][]Exposed{"sum": {{"a", 1, 1}}, "names": {{"a", 5000, 1}, {"a", 5000, 1}}} {
		if _, err := CheckSampleRatio(arms, .01); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want kind invalid", name, err)
		}
	}
	if _, err := CheckSampleRatio([]Exposed{{"a", Buckets, 1}}, 1); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("alpha 1: %v, want kind invalid", err)
	}
}
