// Package balance holds the decisions about load, as pure functions of numbers: what an
// endpoint costs (peak-sensitive moving average), which endpoints to leave out for now
// (outlier ejection), and how many requests a version takes at once (gradient limit).
// Nothing here keeps time or state; callers store what is returned and pass `now` in.
// All functions are safe for concurrent use and allocate at most their result.
package balance

import (
	"math"
	"time"
)

// PeakDecay is the time constant with which a peak is forgotten.
const PeakDecay = 10 * time.Second

// Peak is a peak-sensitive moving average of latency (Finagle's "peak EWMA"): it jumps to
// a slower observation at once and comes down with time, so that an endpoint that begins
// to stall loses traffic with its first slow answer. The zero Peak was never measured.
// It is 8 bytes, to be stored atomically.
type Peak uint64

// pack keeps seconds as float32 and the time in milliseconds, which wraps after 49 days:
// an endpoint idle for exactly that long is taken for one just measured, once.
func pack(seconds float64, at time.Time) Peak {
	return Peak(math.Float32bits(float32(max(seconds, 1e-9))))<<32 | Peak(uint32(at.UnixMilli()))
}

func (p Peak) seconds() float64 { return float64(math.Float32frombits(uint32(p >> 32))) }

func (p Peak) keep(now time.Time) float64 {
	gone := time.Duration(int32(uint32(now.UnixMilli())-uint32(p))) * time.Millisecond
	return math.Exp(-float64(max(gone, 0)) / float64(PeakDecay))
}

// Observe returns p after an answer that took d, at now.
func (p Peak) Observe(d time.Duration, now time.Time) Peak {
	s := d.Seconds()
	if p == 0 || s >= p.seconds() {
		return pack(s, now)
	}
	w := p.keep(now)
	return pack(p.seconds()*w+s*(1-w), now)
}

// Latency is the expected latency at now, 0 if never measured. An endpoint without
// observations becomes attractive again with time: that is how a former peak is tried.
func (p Peak) Latency(now time.Time) time.Duration {
	if p == 0 {
		return 0
	}
	return time.Duration(p.seconds() * p.keep(now) * float64(time.Second))
}

// Cost compares endpoints: expected wait with inFlight requests there already, in
// seconds. 0 for one that was never measured and is idle, so that it gets measured; while
// it is being measured for the first time it costs what no measured endpoint does, or
// everything would go there until its first answer.
func Cost(p Peak, inFlight int64, now time.Time) float64 {
	if p == 0 {
		if inFlight == 0 {
			return 0
		}
		return math.MaxFloat32 * float64(inFlight)
	}
	return max(p.Latency(now).Seconds(), 1e-9) * float64(inFlight+1)
}

// Outlier detection, after Envoy's success-rate ejection (its documentation, "Outlier
// detection"): the breaker sees endpoints that fail always, this sees those that fail more
// than their peers.
const (
	OutlierInterval = 10 * time.Second // of one window
	OutlierRequests = 20               // in it, for an endpoint to be judged
	OutlierHosts    = 3                // judged endpoints, for a comparison to mean anything
	OutlierFactor   = 1.9              // standard deviations below the mean
	OutlierMargin   = 0.05             // and at least this far below: noise is no outlier
	OutlierEject    = 30 * time.Second // times how often in a row, at most 10 times
	OutlierPercent  = 50               // of a version's endpoints ejected at one time, at most
)

// Window is what one endpoint did in one window.
type Window struct {
	OK, Failed uint64
	Ejected    bool // still, from before
}

// Outliers returns the indices of the endpoints to eject now, the worst first. Endpoints
// ejected already are not judged and count towards OutlierPercent.
func Outliers(ws []Window) []int {
	room := len(ws) * OutlierPercent / 100
	var judged []int
	mean := 0.0
	for i, w := range ws {
		if w.Ejected {
			room--
		} else if w.OK+w.Failed >= OutlierRequests {
			judged = append(judged, i)
			mean += rate(w)
		}
	}
	if len(judged) < OutlierHosts || room <= 0 {
		return nil
	}
	mean /= float64(len(judged))
	variance := 0.0
	for _, i := range judged {
		variance += (rate(ws[i]) - mean) * (rate(ws[i]) - mean)
	}
	// With few endpoints one outlier alone cannot be 1.9 deviations from a mean it drags
	// along (at most √(n−1)); the factor is bounded by what n endpoints can show.
	n := float64(len(judged))
	factor := min(OutlierFactor, 0.9*math.Sqrt(n-1))
	limit := min(mean-factor*math.Sqrt(variance/n), mean-OutlierMargin)
	var out []int
	for len(out) < room {
		worst := -1
		for _, i := range judged {
			if rate(ws[i]) < limit && (worst < 0 || rate(ws[i]) < rate(ws[worst])) && !contains(out, i) {
				worst = i
			}
		}
		if worst < 0 {
			break
		}
		out = append(out, worst)
	}
	return out
}

func contains(is []int, i int) bool {
	for _, k := range is {
		if k == i {
			return true
		}
	}
	return false
}

func rate(w Window) float64 { return float64(w.OK) / float64(w.OK+w.Failed) }

// Limits of a Limit.
const (
	MinLimit     = 4
	MaxLimit     = 4096
	InitialLimit = 32
	tolerance    = 1.5 // latency may be this much above its long-term mean
	backoff      = 0.9 // on a drop
	smoothing    = 0.2
	longWindow   = 600 // observations
)

// Limit is how many requests a version is given at once, adapted to what it can take
// (after Netflix concurrency-limits, Gradient2): it grows by the square root of itself
// while latency keeps to its long-term mean, shrinks in proportion when latency rises, and
// by a tenth when the model says it is overloaded. The zero Limit is a new one.
type Limit struct {
	Value float64 // requests in flight; 0 = InitialLimit
	Long  float64 // seconds, long-term mean latency
	N     uint64  // observations so far, up to longWindow
}

// Allows reports whether another request may start beside inFlight others.
func (l Limit) Allows(inFlight int64) bool { return float64(inFlight) < l.value() }

func (l Limit) value() float64 {
	if l.Value == 0 {
		return InitialLimit
	}
	return l.Value
}

// Observe returns the limit after a request that took d while inFlight were running, it
// included. dropped: the model refused it as too much, or did not answer in time.
func (l Limit) Observe(d time.Duration, inFlight int64, dropped bool) Limit {
	cur := l.value()
	if dropped {
		l.Value = max(MinLimit, cur*backoff)
		return l
	}
	s := max(d.Seconds(), 1e-9)
	l.N = min(l.N+1, longWindow)
	l.Long += (s - l.Long) / float64(l.N)
	if l.Long > 2*s {
		l.Long *= 0.95 // the load is gone: the mean must not stay what it was under it
	}
	if float64(inFlight) < cur/2 {
		l.Value = cur
		return l // not enough load to learn from
	}
	gradient := max(0.5, min(1, tolerance*l.Long/s))
	next := cur*gradient + math.Sqrt(cur)
	l.Value = max(MinLimit, min(MaxLimit, cur*(1-smoothing)+next*smoothing))
	return l
}
