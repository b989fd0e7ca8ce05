package inference

import (
	"cmp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Bounds of taps: how many may be open, and how many calls one may be behind before it
// misses some.
const (
	MaxTaps   = 8
	tapBuffer = 256
)

// Tapped is one ended call as somebody looks on: where it went and what came of it, never
// what was said, which header fields it had, or who asked (Unit is a salted hash). A call
// that was moved to the last good version is told twice, once for either version.
type Tapped struct {
	At      time.Time `json:"at"` // the end
	API     string    `json:"api"`
	Model   string    `json:"model,omitempty"`
	Version string    `json:"version,omitempty"`
	Arm     string    `json:"arm,omitempty"`
	Region  string    `json:"region,omitempty"`
	Unit    uint32    `json:"unit,omitempty"` // experiments.UnitHash; 0 = the call has no unit
	Bucket  int32     `json:"bucket"`         // -1 = none
	// Outcome is ok, cancelled, failed or refused; Tag says how: a status, or a short word.
	Outcome  string `json:"outcome"`
	Tag      string `json:"tag,omitempty"`
	Cache    string `json:"cache,omitempty"` // hit, joined; empty: a model was asked
	Stream   bool   `json:"stream,omitempty"`
	Policy   string `json:"policy"` // live, last-good, none
	Attempts int    `json:"attempts"`

	LatencyMS float64 `json:"latency_ms"`
	TTFTMS    float64 `json:"ttft_ms,omitempty"`
	TokensIn  uint64  `json:"tokens_in,omitempty"`
	TokensOut uint64  `json:"tokens_out,omitempty"`
}

// Outcomes of Tapped.
const (
	OutcomeOK        = "ok"
	OutcomeFailed    = "failed"
	OutcomeCancelled = "cancelled"
	OutcomeRefused   = "refused"
)

// TapFilter says which calls are told of; zero fields mean any. User is compared by hash,
// with the model's own salt.
type TapFilter struct {
	Model, Version, Arm, Region, Outcome, User string
	AtLeast                                    time.Duration // latency
}

// taps are the open ones. Without any, a call pays one atomic load.
type taps struct {
	open atomic.Pointer[[]*TapStream] // nil = none
	mu   sync.Mutex                   // of writers
}

// TapStream is one open tap. Read Calls until Close; what finds the buffer full is counted
// and gone, no call ever waits.
type TapStream struct {
	taps    *taps
	filter  TapFilter
	calls   chan Tapped
	dropped atomic.Uint64
}

// Tap opens a tap. The error has kind Exhausted: MaxTaps are open.
func (h *Handler) Tap(f TapFilter) (*TapStream, error) {
	s := &TapStream{taps: &h.taps, filter: f, calls: make(chan Tapped, tapBuffer)}
	h.taps.mu.Lock()
	defer h.taps.mu.Unlock()
	var next []*TapStream
	if was := h.taps.open.Load(); was != nil {
		next = append(next, *was...)
	}
	if len(next) >= MaxTaps {
		return nil, outrigger.Errorf(outrigger.Exhausted, "%d taps are open, which is the limit; close one", MaxTaps)
	}
	next = append(next, s)
	h.taps.open.Store(&next)
	return s, nil
}

// Calls are the calls that end from now on; the channel is never closed.
func (s *TapStream) Calls() <-chan Tapped { return s.calls }

// Dropped returns how many calls found no room since the last Dropped.
func (s *TapStream) Dropped() uint64 { return s.dropped.Swap(0) }

// Close ends the tap. A second call does nothing.
func (s *TapStream) Close() {
	s.taps.mu.Lock()
	defer s.taps.mu.Unlock()
	was := s.taps.open.Load()
	if was == nil {
		return
	}
	var next []*TapStream
	for _, o := range *was {
		if o != s {
			next = append(next, o)
		}
	}
	if len(next) == 0 {
		s.taps.open.Store(nil)
		return
	}
	s.taps.open.Store(&next)
}

// wants judges a call by what the call knows itself.
func (f *TapFilter) wants(t *Tapped, c *call) bool {
	is := func(want, got string) bool { return want == "" || want == got }
	return is(f.Model, t.Model) && is(f.Version, t.Version) && is(f.Arm, t.Arm) && is(f.Region, t.Region) && is(f.Outcome, t.Outcome) &&
		t.LatencyMS >= float64(f.AtLeast)/float64(time.Millisecond) &&
		(f.User == "" || c.assign.HasUnit && c.assign.Unit == experiments.UnitHash(c.assign.Model.Salt, f.User))
}

// tell hands an ended call to whoever looks on. open is what the caller has found.
func (c *call) tell(open []*TapStream, outcome, tag, cache string, now time.Time) {
	a := &c.assign
	t := Tapped{At: now, Region: c.region, Outcome: outcome, Tag: tag, Cache: cache, Stream: c.streams, Policy: c.trust(), Attempts: c.attempts - c.charged,
		LatencyMS: float64(now.Sub(c.start)) / float64(time.Millisecond), TTFTMS: float64(c.ttft) / float64(time.Millisecond),
		TokensIn: c.usage.In, TokensOut: c.usage.Out, Bucket: -1, Arm: a.Arm}
	if c.api != nil {
		t.API = cmp.Or(c.api.Operation, c.api.Family.Provider())
	}
	if a.Model != nil {
		t.Model = a.Model.Name
	}
	if a.Version != nil {
		t.Version = a.Version.Name
	}
	if a.HasUnit {
		t.Unit, t.Bucket = a.Unit, int32(a.Bucket)
	}
	for _, s := range open {
		if !s.filter.wants(&t, c) {
			continue
		}
		select {
		case s.calls <- t:
		default:
			s.dropped.Add(1)
		}
	}
}

// tellEnd tells of a call that a version answered, or failed to.
func (c *call) tellEnd(open []*TapStream, end ending, now time.Time) {
	outcome := OutcomeOK
	switch {
	case end.cancelled:
		outcome = OutcomeCancelled
	case end.failed:
		outcome = OutcomeFailed
	}
	c.tell(open, outcome, end.tag, "", now)
}
