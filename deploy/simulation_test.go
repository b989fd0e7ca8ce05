package deploy

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"testing"

	"gonum.org/v1/gonum/stat/distuv"
)

// Traffic of a simulated stratum in one second, and how often requests fail.
type place struct {
	region             string
	candidate, base    float64 // requests per second
	pCandidate, pBasis func(second int) float64
}

func always(p float64) func(int) float64 { return func(int) float64 { return p } }

func from(second int, before, after float64) func(int) float64 {
	return func(s int) float64 {
		if s >= second {
			return after
		}
		return before
	}
}

// draws makes Poisson numbers by inverting a table of cumulative probabilities, made
// once per mean: exact, and fast enough for millions.
type draws struct {
	*rand.Rand
	tables map[float64][]float64
}

func (d draws) poisson(mean float64) uint64 {
	table := d.tables[mean]
	if table == nil {
		p := distuv.Poisson{Lambda: mean}
		for k, sum := 0.0, 0.0; sum < 1-1e-12; k++ {
			sum += p.Prob(k)
			table = append(table, sum)
		}
		d.tables[mean] = table
	}
	return uint64(sort.SearchFloat64s(table, d.Float64()))
}

// requests draws a second of requests and how many of them fail: the failing and the
// good ones of a Poisson stream are two independent Poisson streams.
func (d draws) requests(rate, p float64) (n, failures uint64) {
	failures = d.poisson(rate * p)
	return failures + d.poisson(rate*(1-p)), failures
}

// simulate runs one canary second by second and returns the number of candidate
// requests at rollback since second `since`, or ok = false.
func simulate(d draws, seconds, since int, places ...place) (requests uint64, ok bool) {
	det := NewDetector(Config{})
	samples := make([]Sample, len(places))
	var before uint64
	for s := range seconds {
		if s == since {
			before = det.CandidateRequests()
		}
		for i, p := range places {
			at := &samples[i]
			at.Stratum = Stratum{p.region, 1}
			at.CandidateRequests, at.CandidateFailures = d.requests(p.candidate, p.pCandidate(s))
			at.BaselineRequests, at.BaselineFailures = d.requests(p.base, p.pBasis(s))
		}
		det.Observe(samples)
		if det.tripped != "" {
			return det.CandidateRequests() - before, true
		}
	}
	return 0, false
}

type outcome struct {
	rolled, runs int
	median, p95  uint64
}

func (o outcome) String() string {
	return fmt.Sprintf("rolled back %d of %d, candidate requests median %d, p95 %d", o.rolled, o.runs, o.median, o.p95)
}

func repeat(runs, seconds, since int, places ...place) outcome {
	var took []uint64
	tables := map[float64][]float64{}
	for i := range runs {
		d := draws{rand.New(rand.NewPCG(uint64(i)+1, 7)), tables}
		if n, ok := simulate(d, seconds, since, places...); ok {
			took = append(took, n)
		}
	}
	o := outcome{rolled: len(took), runs: runs}
	if len(took) > 0 {
		slices.Sort(took)
		o.median, o.p95 = took[len(took)/2], took[len(took)*95/100]
	}
	return o
}

const halfHour = 1800

// The canary of every scenario: 1 % of 1 000 requests a second.
func canary(pCandidate, pBasis func(int) float64) place {
	return place{"eu", 10, 990, pCandidate, pBasis}
}

func TestDetectorNeverBlamesTheInnocent(t *testing.T) {
	if raceEnabled {
		t.Skip("millions of steps of code that starts no goroutine; the race detector has nothing to find")
	}
	incident := func(s int) float64 {
		if s >= 300 && s < 900 {
			return 0.05
		}
		return 0.01
	}
	outage := func(s int) float64 {
		if s >= 300 && s < 420 {
			return 0.9
		}
		return 0.01
	}
	for name, places := range map[string][]place{
		"healthy":                  {canary(always(.01), always(.01))},
		"healthy, rare failures":   {canary(always(.0005), always(.0005))},
		"healthy, 1 request/s":     {{"eu", 1, 99, always(.01), always(.01)}},
		"healthy, half and half":   {{"eu", 20, 20, always(.02), always(.02)}},
		"healthy, trickle":         {{"eu", .2, .8, always(.1), always(.1)}},
		"better than the baseline": {canary(always(.005), always(.02))},
		"global incident":          {canary(incident, incident)},
		"global outage":            {canary(outage, outage)},
		"canary in a worse region": {{"eu", 8, 92, always(.03), always(.03)}, {"us", 2, 898, always(.005), always(.005)}},
		"regional incident":        {{"eu", 9, 100, incident, incident}, {"us", 1, 890, always(.005), always(.005)}},
		"five regions": {{"a", 2, 198, always(.01), always(.01)}, {"b", 2, 198, always(.02), always(.02)},
			{"c", 2, 198, always(.01), always(.01)}, {"d", 2, 198, incident, incident}, {"e", 2, 198, always(.01), always(.01)}},
	} {
		o := repeat(100, halfHour, 0, places...)
		t.Logf("%s: %v", name, o)
		if o.rolled > 1 {
			t.Errorf("%s: %v; want at most 1 %%", name, o)
		}
	}
}

// A day of a healthy canary, 864 000 requests of it, a hundred times.
func TestHealthyDays(t *testing.T) {
	if raceEnabled {
		t.Skip("millions of steps of code that starts no goroutine; the race detector has nothing to find")
	}
	t.Parallel()
	o := repeat(100, 86_400, 0, canary(always(.01), always(.01)))
	t.Logf("%v", o)
	if o.rolled > 1 {
		t.Errorf("%v; want at most 1 %%", o)
	}
}

func TestDetectorFindsRegressions(t *testing.T) {
	if raceEnabled {
		t.Skip("millions of steps of code that starts no goroutine; the race detector has nothing to find")
	}
	for _, c := range []struct {
		name   string
		median uint64
		since  int
		places []place
	}{
		{"1 to 5 % from the start", 250, 0, []place{canary(always(.05), always(.01))}},
		{"1 to 5 % after 10 minutes", 500, 600, []place{canary(from(600, .01, .05), always(.01))}},
		{"1 to 2 % from the start", 2500, 0, []place{canary(always(.02), always(.01))}},
		{"0.1 to 5 % from the start", 120, 0, []place{canary(always(.05), always(.001))}},
		{"total outage from the start", 15, 0, []place{canary(always(1), always(.01))}},
		{"total outage after 10 minutes", 30, 600, []place{canary(from(600, .01, 1), always(.01))}},
		{"1 to 5 % in three regions", 250, 0, []place{{"a", 3, 330, always(.05), always(.01)},
			{"b", 4, 330, always(.05), always(.01)}, {"c", 3, 330, always(.05), always(.01)}}},
		{"outage in one region of three", 60, 0, []place{{"a", 3, 330, always(1), always(.01)},
			{"b", 4, 330, always(.01), always(.01)}, {"c", 3, 330, always(.01), always(.01)}}},
		{"1 to 5 % during a global incident", 250, 0, []place{canary(always(.2), always(.04))}},
	} {
		o := repeat(100, 3600, c.since, c.places...)
		t.Logf("%s: %v", c.name, o)
		if o.rolled < o.runs*95/100 || o.median > c.median {
			t.Errorf("%s: %v; want nearly all, median ≤ %d", c.name, o, c.median)
		}
	}
}

// Pooling is what stratification protects from: the same traffic without strata blames
// the candidate nearly every time. If this stopped failing, the regional scenarios
// above would prove nothing.
func TestPoolingWouldBlameTheInnocent(t *testing.T) {
	pooled := 0
	for i := range 50 {
		r := draws{rand.New(rand.NewPCG(uint64(i)+1, 9)), map[float64][]float64{}}
		d := NewDetector(Config{})
		for range halfHour {
			d.Observe([]Sample{{Stratum: Stratum{"world", 1}, CandidateRequests: 10, BaselineRequests: 990,
				CandidateFailures: r.poisson(8*.03 + 2*.005), BaselineFailures: r.poisson(92*.03 + 898*.005)}})
		}
		if d.tripped != "" {
			pooled++
		}
	}
	if pooled < 45 {
		t.Errorf("pooled detector rolled back %d of 50, expected nearly all", pooled)
	}
}

// E has mean at most 1 under the null whatever the batch boundary, as long as it does
// not depend on which version failed: here every batch ends with its first failure, as
// deltas that are flushed on failure do.
func TestBatchesThatEndWithAFailureAreFair(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, w := range []float64{.01, .1, .5} {
		d := NewDetector(Config{Margin: 1, MinBatch: 1})
		const rounds = 200_000
		var mean [len(risks)]float64
		for range rounds {
			var a arms
			for failed := false; !failed; {
				failed = r.Float64() < .1
				if r.Float64() < w {
					a.nc++
					if failed {
						a.ec++
					}
				} else {
					a.nt++
					if failed {
						a.et++
					}
				}
			}
			for k, x := range d.increments(a) {
				mean[k] += math.Exp(x) / rounds
			}
		}
		for k, m := range mean {
			if m > 1.02 {
				t.Errorf("w = %v, k = %v: mean likelihood ratio %.3f, want ≤ 1", w, risks[k], m)
			}
		}
	}
}
