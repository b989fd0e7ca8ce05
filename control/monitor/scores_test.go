package monitor

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

func rate(t *testing.T, m *Monitor, s Score) (repeated bool) {
	t.Helper()
	repeated, err := m.Score(s)
	if err != nil {
		t.Fatal(err)
	}
	return repeated
}

func subject(m *Monitor, version string) *Subject {
	for _, s := range m.Subjects() {
		if s.Version == version {
			return &s
		}
	}
	return nil
}

// A unit counts once however often it rates; an id counts once; a minute later nothing is
// known, and what happened more than a minute ago was never of the last minute.
func TestScoresOfTheLastMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newWorld(t).monitor()
		one := Score{Model: "m", Version: "v", Metric: deploy.MetricAccuracy, N: 1, Sum: 1}
		for i := range 300 {
			s := one
			s.Unit, s.At, s.ID = uint32(i%100), time.Now(), fmt.Sprint(i)
			if i%2 == 1 { // the same unit three times: 1, 1, 1 or 0, 0, 0
				s.Sum = 0
			}
			if rate(t, m, s) || !rate(t, m, s) {
				t.Fatalf("%d: not counted once", i)
			}
			if i%3 == 2 {
				time.Sleep(300 * time.Millisecond)
			}
		}
		got := subject(m, "v").Measure(deploy.MetricAccuracy)
		want, err := sequence(deploy.GateAlpha).Proportion(50, 100)
		if err != nil || got != (expr.Measure{Low: want.Low, High: want.High, Point: .5, N: 100, Known: true}) {
			t.Errorf("%v, want half of 100 units within %v", got, want)
		}
		old := one
		old.Version, old.At = "w", time.Now().Add(-Window)
		rate(t, m, old)
		if s := subject(m, "w"); s != nil {
			t.Errorf("a minute old: %v", s.Measure(deploy.MetricAccuracy))
		}
		time.Sleep(Window)
		if s := subject(m, "v"); s != nil {
			t.Errorf("a minute later: %v", s.Measure(deploy.MetricAccuracy))
		}
	})
}

// The mean of values between 0 and 1 is within the interval of a coin with that mean, at all
// looks together, also when the values are no coins.
func TestRatedHoldsAtEveryLook(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	wrong := 0
	for range 100 {
		var s scored
		for i := range 400 {
			x := r.Float64() * r.Float64() // mean 1/4
			s.means += x
			if err := s.units.Add(x, 1); err != nil {
				t.Fatal(err)
			}
			if i%20 != 0 {
				continue
			}
			if m := rated(s, deploy.GateAlpha); m.Low > .25 || m.High < .25 {
				wrong++
				break
			}
		}
	}
	if wrong > 5 {
		t.Errorf("%d of 100 sequences left the mean out; 5 %% may", wrong)
	}
}

// The order in which scores come, and whose bound they meet, changes nothing about the rest.
func TestScoresAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newWorld(t).monitor(func(o *Options) { o.MaxScores, o.MaxCells = 101, 2 })
		s := Score{Model: "m", Version: "v", Metric: deploy.MetricSatisfaction, N: 1, Sum: 1, At: time.Now()}
		full := 0
		for i := range 150 {
			s.Unit, s.At = uint32(i), time.Now()
			if _, err := m.Score(s); outrigger.IsKind(err, outrigger.Exhausted) {
				full++
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if n := subject(m, "v").Measure(s.Metric).N; n != 100 || full != 50 {
			t.Errorf("%d units, %d without room; want 100 and 50", n, full)
		}
		time.Sleep(Window)
		s.At = time.Now()
		rate(t, m, s) // old slots made room
		if n := subject(m, "v").Measure(s.Metric).N; n != 1 {
			t.Errorf("%d units after a minute", n)
		}
		s.Version = "w"
		rate(t, m, s)
		s.Version = "x"
		if _, err := m.Score(s); !outrigger.IsKind(err, outrigger.Exhausted) {
			t.Errorf("a third series: %v", err)
		}
		time.Sleep(cellIdle)
		s.At = time.Now()
		rate(t, m, s) // silent series made room
		m.scores.mu.Lock()
		defer m.scores.mu.Unlock()
		if held := m.scores.held; held != 1 || len(m.scores.series) != 1 {
			t.Errorf("holds %d entries of %d series, want 1 of 1", held, len(m.scores.series))
		}
	})
}

// What a request costs: the formula over all counts, and an interval that holds the true
// price, made of what varies from report to report. The same reports in any order and cut
// over any regions give the same, and too few give nothing.
func TestCostPerRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const formula = "tokens_in * 1.0e-6 + tokens_out * 2.0e-6 + 0.001 * attempts"
		r := rand.New(rand.NewPCG(3, 4))
		var deltas []*pb.OutcomeDelta
		var total, requests float64
		for i := range 55 {
			n := uint64(5 + r.IntN(20))
			o := &pb.OutcomeDelta{Model: "m", Version: "v", Arm: "v", Region: []string{"eu", "us"}[i%2], WeightEpoch: 1, Requests: n, Attempts: n + 1,
				TokensIn: n * 400, TokensOut: n * uint64(900+r.IntN(201))}
			deltas = append(deltas, o)
			total += float64(o.TokensIn)*1e-6 + float64(o.TokensOut)*2e-6 + .001*float64(o.Attempts)
			requests += float64(n)
		}
		var got []expr.Measure
		for _, backwards := range []bool{false, true} {
			m := newWorld(t).monitor(func(o *Options) { o.Cost = func(string) string { return formula } })
			for i := range deltas {
				o := deltas[i]
				if backwards {
					o = deltas[len(deltas)-1-i]
				}
				if i == minReports-1 {
					if c := subject(m, "v").Measure(deploy.MetricCost); c.Known {
						t.Errorf("%d reports are enough for %v", i, c)
					}
				}
				ingest(t, m, &pb.Delta{Reporter: "pod", Sequence: uint64(i + 1), Outcomes: []*pb.OutcomeDelta{o}})
			}
			got = append(got, subject(m, "v").Measure(deploy.MetricCost))
			if c, ok := m.Cost(formula, m.VersionStats("m", "v").Window); !ok || math.Abs(c-total) > 1e-9 {
				t.Errorf("total %v, %v; want %v", c, ok, total)
			}
		}
		a, b := got[0], got[1]
		if !a.Known || math.Abs(a.Point-total/requests) > 1e-12 || a.N != uint64(requests) {
			t.Fatalf("%v, want %v of %v requests", a, total/requests, requests)
		}
		// 0.0004 + 0.002 and an attempt and a bit; the spread of tokens_out is about 6 %.
		if width := a.High - a.Low; !(a.Low < a.Point && a.Point < a.High && width > 1e-6 && width < a.Point/5) {
			t.Errorf("interval %v", a)
		}
		if math.Abs(a.Low-b.Low) > 1e-9 || math.Abs(a.High-b.High) > 1e-9 {
			t.Errorf("%v, and in the other order %v", a, b)
		}
	})
}

// Without a formula costs are what applications tell, per value; formulas that cannot be
// used are none.
func TestToldCosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, formula := range []string{"", "tokens_of_the_future * 2.0"} {
			m := newWorld(t).monitor(func(o *Options) { o.Cost = func(string) string { return formula } })
			s := Score{Model: "m", Version: "v", Metric: deploy.MetricCost, N: 2}
			for i := range 50 {
				s.Unit, s.Sum, s.At = uint32(i), 2*(.01+.002*float64(i%3-1)), time.Now()
				rate(t, m, s)
			}
			c := subject(m, "v").Measure(deploy.MetricCost)
			if !c.Known || math.Abs(c.Point-.01) > 1e-4 || c.N != 50 || c.Low < .008 || c.High > .012 || c.Low >= c.Point {
				t.Errorf("%q: %v", formula, c)
			}
			if _, ok := m.Cost(formula, Totals{Requests: 1}); ok {
				t.Errorf("%q has a price", formula)
			}
		}
	})
}
