package monitor

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// burst is a simulated half hour of a healthy canary, 1 % of 1 000 requests a second. Of
// both versions one session in 500 breaks, and repeats its failing request once a second
// for five seconds. In second 300 one session of the candidate begins to fail five times a
// second and goes on for two minutes: a sixth of the canary's requests fail in that time,
// and not one of its other sessions does.
type burst struct {
	*rand.Rand
	counts *counts
	units  bool // failures carry the session they happened to
	failed map[string][]pendingFailures
}

type pendingFailures struct {
	unit uint32
	left int
}

func (b *burst) poisson(mean float64) (n uint64) {
	for p, limit := b.Float64(), math.Exp(-mean); p > limit; p *= b.Float64() {
		n++
	}
	return n
}

// second counts what one version did in a second.
func (b *burst) second(version string, rate float64, s int, now time.Time) error {
	for range b.poisson(rate / 500) {
		b.failed[version] = append(b.failed[version], pendingFailures{b.Uint32(), 5})
	}
	d := &pb.OutcomeDelta{Requests: uint64(rate)} // how many exactly does not matter, and costs most of the time
	fail := func(unit uint32, times uint64) {
		d.Failures += times
		if b.units {
			d.FailedUnits = append(d.FailedUnits, unit)
		}
	}
	kept := b.failed[version][:0]
	for _, f := range b.failed[version] {
		fail(f.unit, 1)
		if f.left--; f.left > 0 {
			kept = append(kept, f)
		}
	}
	b.failed[version] = kept
	if version == "v2" && s >= 300 && s < 420 {
		d.Requests += 5
		fail(7, 5)
	}
	d.Requests = max(d.Requests, d.Failures)
	_, err := b.counts.add(&pb.Delta{Reporter: version, Sequence: uint64(s) + 1},
		parsed{outcomes: []outcome{{key: cellKey{model: "chat", version: version, region: "eu", epoch: 1, assigned: true}, delta: d}}}, now)
	return err
}

// condemned runs the half hour and reports whether the detector wants a rollback.
func condemned(t *testing.T, seed uint64, units bool) bool {
	t.Helper()
	c, err := newCounts(Options{MaxReporters: 10, MaxCells: 10, MaxUnits: 65_536})
	if err != nil {
		t.Fatal(err)
	}
	b := &burst{Rand: rand.New(rand.NewPCG(seed, 11)), counts: c, units: units, failed: map[string][]pendingFailures{}}
	r := &deploy.Rollout{ID: "r", Model: "chat", Candidate: "v2", LastGood: "v1", WeightEpoch: 1}
	w, det := newWatch("r"), deploy.NewDetector(deploy.Config{WeightEpoch: 1})
	start := time.Unix(1_700_000_000, 0)
	for s := range 1800 {
		now := start.Add(time.Duration(s) * time.Second)
		for _, x := range []struct {
			version string
			rate    float64
		}{{"v1", 990}, {"v2", 10}} {
			if err := b.second(x.version, x.rate, s, now); err != nil {
				t.Fatal(err)
			}
		}
		det.Observe(c.collect(r, w))
		if det.Verdict().Roll {
			return true
		}
	}
	return false
}

// TestBurstsOfOneSession: failures count by session, so that a session which repeats its
// failing request does not condemn a healthy version.
func TestBurstsOfOneSession(t *testing.T) {
	if raceEnabled {
		t.Skip("millions of steps of code that starts no goroutine; the race detector has nothing to find")
	}
	t.Parallel()
	const runs = 100
	rolled := 0
	for i := range runs {
		if condemned(t, uint64(i), true) {
			rolled++
		}
	}
	t.Logf("rolled back %d of %d", rolled, runs)
	if rolled > runs/100 {
		t.Errorf("rolled back %d of %d healthy canaries; want at most 1 %%", rolled, runs)
	}
}

// The same traffic counted by request condemns it nearly every time: if this stopped being
// so, the test above would prove nothing about sessions.
func TestBurstsCountedByRequest(t *testing.T) {
	const runs = 10
	rolled := 0
	for i := range runs {
		if condemned(t, uint64(i), false) {
			rolled++
		}
	}
	if rolled < runs-1 {
		t.Errorf("rolled back %d of %d; expected nearly all", rolled, runs)
	}
}
