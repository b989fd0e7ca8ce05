package coarse

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// world is a clock and a counter that a test moves.
type world struct {
	ns     int64
	counts uint64
	looks  int
}

func (w *world) pass(d time.Duration, perNS float64) {
	w.ns += int64(d)
	w.counts += uint64(float64(d) * perNS)
}

func (w *world) start() *clock {
	return newClock(func() int64 { w.looks++; return w.ns }, func() uint64 { return w.counts })
}

// A reading is never before the clock and never more than Ahead after it, whatever time
// passes between readings: a process that was stopped for an hour reads the clock.
func TestReadingIsABound(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		rate := []float64{0.024, 1, 2.45, 5}[rnd.IntN(4)]
		w := &world{ns: 1, counts: rnd.Uint64()}
		k := w.start()
		for range 300 {
			d := time.Duration(rnd.Int64N(int64(100 * time.Microsecond)))
			if rnd.IntN(20) == 0 {
				d = time.Duration(rnd.Int64N(int64(time.Hour)))
			}
			w.pass(d, rate)
			if got := k.now(); got < w.ns || got > w.ns+int64(Ahead) {
				t.Fatalf("seed %d: the reading is %v past the clock", seed, time.Duration(got-w.ns))
			}
		}
	}
}

// Most readings do without the clock.
func TestClockIsAskedOncePerWindow(t *testing.T) {
	w := &world{ns: 1}
	k := w.start()
	for range 1_000_000 {
		w.pass(time.Microsecond, 2.45)
		k.now()
	}
	// The first window is measured by asking each time; then one look per window.
	if w.looks < 900 || w.looks > 2100 {
		t.Errorf("the clock was asked %d times in a second", w.looks)
	}
}

// A counter that changes its rate by up to twice between two readings, stops, goes back
// or jumps is found out before a reading falls behind the clock.
func TestBrokenCounter(t *testing.T) {
	warm := func() (*world, *clock) {
		w := &world{ns: 1, counts: 1 << 40}
		k := w.start()
		for range 5000 {
			w.pass(time.Microsecond, 2)
			k.now()
		}
		return w, k
	}
	check := func(t *testing.T, w *world, k *clock) {
		t.Helper()
		if got := k.now(); got < w.ns || got > w.ns+int64(Ahead) {
			t.Fatalf("the reading is %v past the clock", time.Duration(got-w.ns))
		}
	}
	t.Run("half the rate", func(t *testing.T) {
		w, k := warm()
		for range 5000 {
			w.pass(time.Microsecond, 1.05)
			check(t, w, k)
		}
	})
	t.Run("twice the rate", func(t *testing.T) {
		w, k := warm()
		for range 5000 {
			w.pass(time.Microsecond, 4)
			check(t, w, k)
		}
	})
	t.Run("back", func(t *testing.T) {
		w, k := warm()
		w.pass(time.Second, 0)
		w.counts -= 1 << 30
		check(t, w, k)
	})
	t.Run("jump", func(t *testing.T) {
		w, k := warm()
		w.counts += 1 << 50
		for range 5000 {
			check(t, w, k)
			w.pass(time.Microsecond, 2)
		}
	})
}

// A look that was interrupted between the counter and the clock does not spoil the rate.
func TestInterruptedLook(t *testing.T) {
	w := &world{ns: 1}
	interrupt := false
	k := newClock(func() int64 {
		if interrupt {
			w.pass(6*time.Millisecond, 2)
		}
		return w.ns
	}, func() uint64 { return w.counts })
	for i := range 20_000 {
		interrupt = i%1700 < 2
		w.pass(time.Microsecond, 2)
		if got := k.now(); got < w.ns || got > w.ns+int64(Ahead) {
			t.Fatalf("step %d: the reading is %v past the clock", i, time.Duration(got-w.ns))
		}
	}
	interrupt = true
	k = newClock(k.clock, k.count)
	interrupt = false
	for range 5000 {
		w.pass(time.Microsecond, 2)
		if got := k.now(); got < w.ns || got > w.ns+int64(Ahead) {
			t.Fatalf("the reading is %v past the clock", time.Duration(got-w.ns))
		}
	}
}

// The machine's own counter: readings from several goroutines against the real clock.
func TestRealCounter(t *testing.T) {
	base := time.Now()
	real := func() int64 { return int64(time.Since(base)) }
	now := New(real)
	if !steady() {
		t.Log("no counter here that the kernel keeps time by: this tests the clock itself")
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for before := real(); before < int64(100*time.Millisecond); {
				got := now()
				after := real()
				if got < before || got > after+int64(Ahead) {
					t.Errorf("the reading is %v past the clock before it, %v past the one after", time.Duration(got-before), time.Duration(got-after))
					return
				}
				before = after
			}
		})
	}
	all.Wait()
}

func BenchmarkNow(b *testing.B) {
	base := time.Now()
	real := func() int64 { return int64(time.Since(base)) }
	for name, f := range map[string]func() int64{"clock": real, "coarse": New(real)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f()
			}
		})
	}
}
