package region

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

var (
	dublin   = Location{53.35, -6.26}
	virginia = Location{37.43, -78.66}
	tokyo    = Location{35.68, 139.77}
)

func names(cs []Candidate) []string {
	var out []string
	for _, c := range cs {
		out = append(out, c.Name)
	}
	return out
}

// Distances agree with published great-circle figures within 0.5 %.
func TestKm(t *testing.T) {
	f := func(a, b Location, want float64) {
		t.Helper()
		if got := a.Km(b); math.Abs(got-want) > want*0.005 {
			t.Errorf("%v-%v: %.0f km, want %.0f", a, b, got, want)
		}
	}
	f(Location{51.5074, -0.1278}, Location{40.7128, -74.0060}, 5570)   // London–New York
	f(Location{35.6762, 139.6503}, Location{37.7749, -122.4194}, 8280) // Tokyo–San Francisco
	if d := dublin.Km(dublin); d != 0 {
		t.Errorf("distance to itself is %v", d)
	}
}

// Each rule of the order in one line: local first by prior, measurement beats
// geography, health beats both, blind candidates come after known near ones.
func TestOrder(t *testing.T) {
	eu := Candidate{Name: "eu", Local: true, Healthy: true, Location: dublin}
	us := Candidate{Name: "us", Healthy: true, Location: virginia}
	ap := Candidate{Name: "ap", Healthy: true, Location: tokyo}
	blind := Candidate{Name: "blind", Healthy: true}
	fastAP, slowEU := ap, eu
	for range 5 {
		fastAP.RTT = fastAP.RTT.Observe(0.5)
		slowEU.RTT = slowEU.RTT.Observe(30)
	}
	deadEU := eu
	deadEU.Healthy = false
	f := func(in []Candidate, want ...string) {
		t.Helper()
		if got := names(Order(dublin, in)); !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	f([]Candidate{ap, us, eu}, "eu", "us", "ap")
	f([]Candidate{us, blind}, "us", "blind")
	f([]Candidate{slowEU, us, fastAP}, "ap", "eu", "us")
	f([]Candidate{deadEU, ap, us}, "us", "ap", "eu")
	f([]Candidate{deadEU}, "eu") // all dead: fail open
	f([]Candidate{us, us, ap}, "us", "ap")
	f(nil)
}

// Laws: Order is a permutation of the distinct inputs, healthy ones come first, and it
// does not depend on the order of the input.
func TestOrderLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cs := rapid.SliceOfNDistinct(rapid.Custom(func(t *rapid.T) Candidate {
			return Candidate{
				Name: rapid.StringMatching(`[a-h]`).Draw(t, "name"), Healthy: rapid.Bool().Draw(t, "up"),
				Location: Location{rapid.Float64Range(-90, 90).Draw(t, "lat"), rapid.Float64Range(-180, 180).Draw(t, "lon")},
				RTT:      Estimate{rapid.Float64Range(1, 400).Draw(t, "ms"), rapid.Uint32Range(0, 20).Draw(t, "n")},
			}
		}), 0, 8, func(c Candidate) string { return c.Name }).Draw(t, "cs")
		got := Order(dublin, cs)
		if len(got) != len(cs) {
			t.Fatalf("%d in, %d out", len(cs), len(got))
		}
		for i := 1; i < len(got); i++ {
			if got[i].Healthy && !got[i-1].Healthy {
				t.Fatal("an unhealthy candidate precedes a healthy one")
			}
		}
		back := slices.Clone(cs)
		slices.Reverse(back)
		if !slices.Equal(names(Order(dublin, back)), names(got)) {
			t.Fatal("the order depends on the input's order")
		}
	})
}

// The estimate averages early samples, forgets old ones, ignores nonsense.
func TestEstimate(t *testing.T) {
	var e Estimate
	e = e.Observe(10).Observe(20)
	if e.MeanMs != 15 || e.Samples != 2 {
		t.Fatalf("after two samples: %+v", e)
	}
	for _, bad := range []float64{0, -1, math.NaN(), math.Inf(1)} {
		if got := e.Observe(bad); got != e {
			t.Errorf("%v changed the estimate to %+v", bad, got)
		}
	}
	for range 100 {
		e = e.Observe(200)
	}
	if e.MeanMs < 199 {
		t.Errorf("still at %.1f ms after 100 samples of 200", e.MeanMs)
	}
}

// A challenger must win by the margin three times in a row; a lost round starts over;
// an unhealthy current region is left at once.
func TestChoice(t *testing.T) {
	at := func(name string, ms float64, up bool) Candidate {
		return Candidate{Name: name, Healthy: up, RTT: Estimate{ms, 100}}
	}
	near, far := at("a", 20, true), at("b", 40, true)
	c := Choice{}.Step(dublin, []Candidate{near, far})
	if c.Current != "a" {
		t.Fatalf("first choice %+v", c)
	}
	better := []Candidate{near, at("b", 10, true)}
	c = c.Step(dublin, better).Step(dublin, better)
	if c.Current != "a" || c.Wins != 2 {
		t.Fatalf("after two wins: %+v", c)
	}
	c = c.Step(dublin, []Candidate{near, far})
	if c.Wins != 0 {
		t.Fatalf("a lost round did not start over: %+v", c)
	}
	c = c.Step(dublin, better).Step(dublin, better).Step(dublin, better)
	if c.Current != "b" {
		t.Fatalf("after three wins: %+v", c)
	}
	if c = c.Step(dublin, []Candidate{near, at("b", 10, false)}); c.Current != "a" {
		t.Fatalf("stayed in a dead region: %+v", c)
	}
	if got := c.Step(dublin, nil); got != c {
		t.Fatalf("no candidates changed the choice: %+v", got)
	}
}

// Three misses in a row mean down, two passes mean up again, single losses nothing.
func TestHealth(t *testing.T) {
	run := func(probes string) bool {
		var h Health
		for _, p := range probes {
			h = h.Step(p == '+')
		}
		return h.Down
	}
	for probes, down := range map[string]bool{"": false, "--": false, "---": true, "-+--": false, "---+": true, "---++": false, "---+-+": true} {
		if got := run(probes); got != down {
			t.Errorf("%q: down=%v, want %v", probes, got, down)
		}
	}
}
