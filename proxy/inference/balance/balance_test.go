package balance

import (
	"math"
	"slices"
	"testing"
	"time"
)

var t0 = time.Unix(1_700_000_000, 0)

func near(got, want time.Duration) bool {
	return math.Abs(float64(got-want)) <= 0.01*float64(want)+float64(time.Microsecond)
}

func TestPeak(t *testing.T) {
	var p Peak
	if p.Latency(t0) != 0 {
		t.Error("a new peak was measured")
	}
	p = p.Observe(100*time.Millisecond, t0)
	if got := p.Latency(t0); !near(got, 100*time.Millisecond) {
		t.Errorf("first observation: %v", got)
	}
	p = p.Observe(time.Second, t0)
	if got := p.Latency(t0); !near(got, time.Second) {
		t.Errorf("a peak counts at once: %v", got)
	}
	same := p.Observe(100*time.Millisecond, t0)
	if got := same.Latency(t0); !near(got, time.Second) {
		t.Errorf("a fast answer in the same moment does not erase it: %v", got)
	}
	later := t0.Add(PeakDecay)
	p = p.Observe(100*time.Millisecond, later)
	want := time.Duration((1*math.Exp(-1) + 0.1*(1-math.Exp(-1))) * float64(time.Second))
	if got := p.Latency(later); !near(got, want) {
		t.Errorf("after one time constant: %v, want %v", got, want)
	}
	if got := p.Latency(later.Add(10 * PeakDecay)); got > time.Millisecond {
		t.Errorf("an endpoint left alone stays expensive: %v", got)
	}
	if got := p.Latency(t0); got > want+time.Millisecond {
		t.Errorf("a clock that goes back: %v", got)
	}
}

func TestCostOrders(t *testing.T) {
	fast, slow := Peak(0).Observe(10*time.Millisecond, t0), Peak(0).Observe(100*time.Millisecond, t0)
	costs := []float64{Cost(0, 0, t0), Cost(fast, 0, t0), Cost(fast, 5, t0), Cost(slow, 0, t0), Cost(slow, 5, t0), Cost(0, 1, t0), Cost(0, 2, t0)}
	if !slices.IsSorted(costs) || costs[0] == costs[1] {
		t.Errorf("costs %v", costs)
	}
}

func TestOutliers(t *testing.T) {
	good, bad, worse := Window{OK: 98, Failed: 2}, Window{OK: 70, Failed: 30}, Window{OK: 10, Failed: 90}
	idle, out := Window{OK: 1}, Window{Ejected: true}
	tests := []struct {
		name string
		ws   []Window
		want []int
	}{
		{"one of three", []Window{good, good, bad}, []int{2}},
		{"one of two is no majority", []Window{good, bad}, nil},
		{"all alike bad", []Window{bad, bad, bad, bad}, nil},
		{"noise", []Window{{OK: 100}, {OK: 99, Failed: 1}, {OK: 97, Failed: 3}}, nil},
		{"idle ones are not judged", []Window{good, good, idle, idle, worse}, []int{4}},
		{"too few judged", []Window{good, worse, idle, idle, idle}, nil},
		{"at most half", []Window{good, good, worse, out}, []int{2}},
		{"half are out already", []Window{good, good, good, worse, out, out, out, out}, nil},
		{"the worst first", append(slices.Repeat([]Window{good}, 12), Window{OK: 30, Failed: 70}, worse), []int{13, 12}},
		{"none", nil, nil},
	}
	for _, tt := range tests {
		if got := Outliers(tt.ws); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// serverOf answers in base while at most room requests run, and in proportion longer
// beyond that: what a queue does.
func serverOf(base time.Duration, room float64) func(inFlight int64) time.Duration {
	return func(n int64) time.Duration {
		return time.Duration(float64(base) * max(1, float64(n)/room))
	}
}

// Under demand without end the limit settles near what the server can take, from below
// and from above, and follows when that changes.
func TestLimitSettles(t *testing.T) {
	run := func(l Limit, room float64, rounds int) Limit {
		serve := serverOf(50*time.Millisecond, room)
		for range rounds {
			n := int64(l.value())
			l = l.Observe(serve(n), n, false)
		}
		return l
	}
	l := run(Limit{}, 100, 300)
	if l.Value < 60 || l.Value > 400 {
		t.Errorf("settled at %.0f, the server takes 100", l.Value)
	}
	high := run(Limit{Value: 2000, Long: 0.05, N: longWindow}, 100, 200)
	if high.Value > 600 {
		t.Errorf("from 2000 down to %.0f only", high.Value)
	}
}

func TestLimitBounds(t *testing.T) {
	l := Limit{}
	for range 200 {
		l = l.Observe(time.Second, 50, true)
	}
	if l.Value != MinLimit || !l.Allows(MinLimit-1) || l.Allows(MinLimit) {
		t.Errorf("after drops %v", l)
	}
	for range 100_000 {
		l = l.Observe(time.Millisecond, MaxLimit, false)
	}
	if l.Value != MaxLimit {
		t.Errorf("after good answers %v", l)
	}
	quiet := Limit{}
	for range 1000 {
		quiet = quiet.Observe(time.Millisecond, 1, false)
	}
	if quiet.value() != InitialLimit {
		t.Errorf("without load the limit moved to %v", quiet.Value)
	}
	if z := (Limit{}); !z.Allows(InitialLimit-1) || z.Allows(InitialLimit) {
		t.Error("a new limit is not InitialLimit")
	}
}
