//go:build !dataplane

package main

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// tally adds up what the demonstration's apps observed and what the control plane says.
type tally struct {
	mu sync.Mutex // guards everything below

	started, cued, ended time.Time
	calls, failed        int
	unexplained          []string // errors the script did not cause, the first few
	unexplainedCount     int
	reads, writes        int
	split                map[string]int // calls by model version
	hits                 map[string]int // variable reads by tier
	candidateStarts      []int64        // start times of answers by the candidate, Unix ns
	latency, readLatency *ddsketch.DDSketch

	trial     *trialSummary // of the script experiment
	decidedAt time.Time     // when the trial ended, zero before
	obeyedAt  time.Time     // when every sidecar was seen to have that, zero before

	mesh    *pb.StatusResponse // last good answer
	meshErr error              // of the last poll
	audit   []*pb.Event
}

// keepStarts bounds the candidate's answers that are remembered one by one.
const keepStarts = 1 << 20

func newTally() *tally {
	return &tally{split: map[string]int{}, hits: map[string]int{}, latency: newSketch(), readLatency: newSketch()}
}

// newSketch is a quantile sketch of milliseconds with 1 % relative accuracy.
func newSketch() *ddsketch.DDSketch {
	s, err := ddsketch.NewDefaultDDSketch(0.01)
	if err != nil {
		panic(err) // 0.01 is a valid accuracy
	}
	return s
}

func quantile(s *ddsketch.DDSketch, q float64) float64 {
	v, err := s.GetValueAtQuantile(q)
	if err != nil {
		return 0 // empty
	}
	return v
}

func (t *tally) begin(now time.Time) { t.mu.Lock(); t.started = now; t.mu.Unlock() }

func (t *tally) cue(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cued.IsZero() {
		t.cued = now
	}
}

func (t *tally) end(now time.Time, audit []*pb.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended, t.audit = now, audit
}

func (t *tally) status(s *pb.StatusResponse, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.meshErr = err; err == nil {
		t.mesh = s
	}
}

func (t *tally) add(r record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch r.Kind {
	case "read":
		t.reads++
		t.hits[r.Tier]++
		addTo(t.readLatency, r.Ms)
	case "write":
		t.writes++
	case "call":
		t.calls++
		t.split[r.Version]++
		addTo(t.latency, r.Ms)
		if r.Version == candidateName && len(t.candidateStarts) < keepStarts {
			t.candidateStarts = append(t.candidateStarts, r.At)
		}
		t.afterTrial(r)
	}
	if r.Err == "" {
		return
	}
	t.failed++
	// The script breaks calls of the candidate that end after the cue; nothing else.
	caused := r.Kind == "call" && r.Version == candidateName && !t.cued.IsZero() && r.At+int64(r.Ms*1e6) >= t.cued.UnixNano() ||
		t.trial != nil && strings.Contains(r.Err, "500 Internal Server Error")
	if !caused {
		t.unexplainedCount++
		if len(t.unexplained) < 10 {
			t.unexplained = append(t.unexplained, fmt.Sprintf("%s row %d version %q: %s", r.Kind, r.Row, r.Version, r.Err))
		}
	}
}

// addTo adds a positive value; the sketch refuses only values no latency can have.
func addTo(s *ddsketch.DDSketch, ms float64) {
	if err := s.Add(max(ms, 1e-6)); err != nil {
		return
	}
}

// picture is what the live view shows.
type picture struct {
	Elapsed       time.Duration
	Calls, Failed int
	Unexplained   int
	Reads, Writes int
	Split, Hits   map[string]int
	P50, P99      float64 // ms, model calls
	ReadP50       float64 // ms, variable reads
	ReadP99       float64
	Mesh          *pb.StatusResponse
	MeshErr       error
	Cued          bool
	Rollout       *pb.Rollout
	Trial         *trialSummary // a copy
}

func (t *tally) snapshot(now time.Time) picture {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := picture{Elapsed: now.Sub(t.started), Calls: t.calls, Failed: t.failed, Unexplained: t.unexplainedCount, Reads: t.reads,
		Writes: t.writes, Split: maps.Clone(t.split), Hits: maps.Clone(t.hits), P50: quantile(t.latency, .5), P99: quantile(t.latency, .99),
		ReadP50: quantile(t.readLatency, .5), ReadP99: quantile(t.readLatency, .99), Mesh: t.mesh, MeshErr: t.meshErr, Cued: !t.cued.IsZero()}
	if t.trial != nil {
		trial := *t.trial
		p.Trial = &trial
	}
	for _, r := range t.mesh.GetRollouts() {
		if r.Id == rolloutID {
			p.Rollout = r
		}
	}
	return p
}

// summary is the result of a run; the JSON form is part of the product's contract.
type summary struct {
	Requests     int                `json:"requests"`
	Errors       int                `json:"errors"` // not caused by the script
	ScriptErrors int                `json:"script_errors"`
	Reads        int                `json:"reads"`
	Writes       int                `json:"writes"`
	Split        map[string]int     `json:"split"`
	Hits         map[string]int     `json:"hits"`
	LatencyMs    map[string]float64 `json:"latency_ms"`
	ReadMs       map[string]float64 `json:"read_ms"`
	Invalidation map[string]float64 `json:"invalidation_ms"`
	Rollback     *rollbackSummary   `json:"rollback"`
	Experiment   *trialSummary      `json:"experiment,omitempty"`
	Events       uint64             `json:"events"`
	TraceSeconds float64            `json:"trace_seconds"`
	Unexplained  []string           `json:"unexplained_errors,omitempty"`

	scripted bool
	audit    []*pb.Event
}

// rollbackSummary says how long each stage took.
type rollbackSummary struct {
	FirstBadMs    float64  `json:"first_bad_ms"`    // from the cue to the first bad answer
	DecidedMs     float64  `json:"decided_ms"`      // from the first bad answer to the decision
	AckedMs       float64  `json:"acked_ms"`        // from the decision to the last sidecar's acknowledgement
	WrongAfterAck int      `json:"wrong_after_ack"` // calls that started after it and were still answered by the bad version
	Acked         uint32   `json:"acked"`
	Laggards      []string `json:"laggards,omitempty"`
	Reason        string   `json:"reason"`
}

func (t *tally) summary() summary {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := summary{Requests: t.calls, Errors: t.unexplainedCount, ScriptErrors: t.failed - t.unexplainedCount, Reads: t.reads, Writes: t.writes,
		Split: maps.Clone(t.split), Hits: map[string]int{"process": t.hits["process"], "node": t.hits["node"], "origin": t.hits["origin"]},
		LatencyMs:    map[string]float64{"p50": quantile(t.latency, .5), "p99": quantile(t.latency, .99)},
		ReadMs:       map[string]float64{"p50": quantile(t.readLatency, .5), "p99": quantile(t.readLatency, .99)},
		Invalidation: map[string]float64{"p50": t.mesh.GetCache().GetInvalidationLagP50Ms(), "p99": t.mesh.GetCache().GetInvalidationLagP99Ms()},
		Events:       t.mesh.GetHead(), Unexplained: t.unexplained, scripted: !t.cued.IsZero(), audit: t.audit}
	s.Rollback, s.Experiment = t.rollback(), t.trial
	return s
}

func (t *tally) rollback() *rollbackSummary {
	var started *pb.RollbackStarted
	var completed *pb.RollbackCompleted
	for _, e := range t.audit {
		if p := e.GetRollbackStarted(); p != nil {
			started = p
		}
		if p := e.GetRollbackCompleted(); p != nil {
			completed = p
		}
	}
	if started == nil || t.cued.IsZero() {
		return nil
	}
	ms := func(a, b time.Time) float64 { return float64(b.Sub(a)) / float64(time.Millisecond) }
	bad, decided := started.FirstBadAt.AsTime(), started.DecidedAt.AsTime()
	r := &rollbackSummary{FirstBadMs: ms(t.cued, bad), DecidedMs: ms(bad, decided), Reason: started.Reason}
	if completed == nil {
		return r
	}
	acked := completed.AckedAt.AsTime()
	r.AckedMs, r.Acked, r.Laggards = ms(decided, acked), completed.Acked, completed.Laggards
	for _, at := range t.candidateStarts {
		if at > acked.UnixNano() {
			r.WrongAfterAck++
		}
	}
	return r
}

// verdict is what the script demands of a run; nil means everything held.
func (s summary) verdict() error {
	errs := []error{s.served()}
	switch r := s.Rollback; {
	case r == nil:
		errs = append(errs, errors.New("the bad version was not rolled back"))
	case r.Acked == 0:
		errs = append(errs, errors.New("the rollback was decided but not acknowledged"))
	case len(r.Laggards) > 0:
		errs = append(errs, fmt.Errorf("sidecars %v did not acknowledge the rollback", r.Laggards))
	case r.WrongAfterAck > 0:
		errs = append(errs, fmt.Errorf("%d calls reached the bad version after every sidecar had acknowledged", r.WrongAfterAck))
	}
	return errors.Join(errs...)
}

// served is what every script demands: traffic, and no error that the script did not cause.
func (s summary) served() error {
	switch {
	case s.Requests == 0:
		return errors.New("no request was served")
	case s.Errors > 0:
		return fmt.Errorf("%d errors the script did not cause; the first: %s", s.Errors, s.Unexplained[0])
	}
	return nil
}
