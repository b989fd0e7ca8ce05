package inference

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Explanation is where a request would go now, and why. Nothing was sent, counted or
// changed for it; the next request may find other breakers and other loads.
type Explanation struct {
	API     string `json:"api,omitempty"`
	Model   string `json:"model,omitempty"`
	Version string `json:"version,omitempty"`
	// Upstream is the name the version's servers know the model under.
	Upstream string `json:"upstream,omitempty"`
	Arm      string `json:"arm,omitempty"`
	Unit     uint32 `json:"unit,omitempty"` // hash; 0 = the request has no unit
	Bucket   int32  `json:"bucket"`         // -1 = none
	// Endpoint is the one that would be asked first; empty = none would.
	Endpoint string `json:"endpoint,omitempty"`
	Region   string `json:"region,omitempty"`

	// Refused and Status are the answer instead, if there would be one of the sidecar's own;
	// Passed: the request would be handed on as it is.
	Refused string `json:"refused,omitempty"`
	Status  int    `json:"status,omitempty"`
	Passed  bool   `json:"passed,omitempty"`

	Policy      string              `json:"policy"` // live, last-good, none
	Position    uint64              `json:"position,omitempty"`
	WeightEpoch uint64              `json:"weight_epoch,omitempty"`
	LastGood    string              `json:"last_good,omitempty"`
	Experiment  string              `json:"experiment,omitempty"`
	Arms        []ExplainedArm      `json:"arms,omitempty"`
	Endpoints   []ExplainedEndpoint `json:"endpoints,omitempty"` // of the version, in the order to try
	Attempts    uint32              `json:"max_attempts,omitempty"`
	TimeoutMS   int64               `json:"timeout_ms,omitempty"`
	Why         []string            `json:"why"` // in words, in the order of the decisions
}

// ExplainedArm is one arm of the model's split.
type ExplainedArm struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Buckets uint32 `json:"buckets"` // of experiments.Buckets
	Out     bool   `json:"out,omitempty"`
}

// ExplainedEndpoint is one endpoint as it is now.
type ExplainedEndpoint struct {
	Address   string  `json:"address"`
	Region    string  `json:"region"`
	Breaker   string  `json:"breaker"`
	InFlight  int64   `json:"in_flight"`
	LatencyMS float64 `json:"latency_ms"`
	Ejected   bool    `json:"ejected,omitempty"`
	Skipped   bool    `json:"skipped,omitempty"` // its breaker refuses
}

// dryRun takes what a call that is only explained would have done instead of going on.
type dryRun struct {
	refused *apiError
	passed  bool
}

// nowhere is the ResponseWriter of a dry run, whose answer nobody reads.
type nowhere struct{ header http.Header }

func (n nowhere) Header() http.Header         { return n.header }
func (n nowhere) WriteHeader(int)             {}
func (n nowhere) Write(p []byte) (int, error) { return len(p), nil }

// Explain decides about a request as ServeHTTP would, by the same code, up to the point
// where the first attempt would begin. body is the request's, of at most MaxBody bytes.
func (h *Handler) Explain(r *http.Request, body []byte) Explanation {
	dry := &dryRun{}
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	c := &call{h: h, w: nowhere{http.Header{}}, r: r, start: h.now(), dry: dry}
	defer c.release()
	matched := h.match(r, &c.path)
	c.api = c.path.API
	if h.o.Policy != nil {
		c.policy, c.status = h.o.Policy()
	}
	e := Explanation{Policy: c.trust(), Bucket: -1}
	say := func(format string, args ...any) { e.Why = append(e.Why, fmt.Sprintf(format, args...)) }
	if c.policy != nil {
		e.Position = c.policy.Position
	}
	switch {
	case !matched && c.passes():
		e.Passed = true
		say("%s is no path of an inference API: the request is passed on", r.URL.Path)
		return e
	case !matched:
		e.Status, e.Refused = http.StatusNotFound, "unknown_url"
		say("%s is no path of an inference API, and nothing else takes it", r.URL.Path)
		return e
	}
	e.API = c.api.Family.Provider() + " " + c.api.Operation
	accepted := c.accept()
	c.explainModel(&e, say)
	switch {
	case dry.passed:
		e.Passed = true
		say("the policy does not know the model: the request is passed on")
		return e
	case !accepted:
		e.Status, e.Refused = dry.refused.status, dry.refused.code
		say("refused with %d: %s", e.Status, dry.refused.message)
		return e
	}
	c.explainVersion(&e, say)
	c.explainEndpoints(&e, say)
	return e
}

// explainModel says what is known once the model is, which a refusal may have prevented.
func (c *call) explainModel(e *Explanation, say func(string, ...any)) {
	m := c.assign.Model
	if m == nil {
		return
	}
	e.Model, e.WeightEpoch, e.LastGood, e.Experiment = m.Name, m.WeightEpoch, m.LastGood, m.Experiment
	for i := range m.Arms {
		a := ExplainedArm{Name: m.Arms[i].Name, Version: m.Arms[i].Version, Out: usable(m, m.Arms[i].Version) == nil}
		for _, r := range m.Arms[i].Ranges {
			a.Buckets += r.End - r.Start
		}
		e.Arms = append(e.Arms, a)
	}
	say("%s %s names model %s; the policy of position %d is %s, its weights are those of position %d", e.API, c.r.URL.Path, m.Name, e.Position, e.Policy, m.WeightEpoch)
}

// explainVersion says how the version was chosen.
func (c *call) explainVersion(e *Explanation, say func(string, ...any)) {
	a, m := &c.assign, c.assign.Model
	e.Arm, e.Version, e.Upstream, e.Attempts, e.TimeoutMS = a.Arm, a.Version.Name, a.Version.Upstream, max(m.MaxAttempts, 1), c.limit().Milliseconds()
	if a.HasUnit {
		e.Unit, e.Bucket = a.Unit, int32(a.Bucket)
		whose := "its unit"
		if c.drawsUnit() {
			whose = "it names no unit; one that is drawn for this request alone"
		}
		say("%s hashes to bucket %d of %d", whose, a.Bucket, experiments.Buckets)
	}
	named := m.ArmOf(a.Bucket)
	switch {
	case a.Arm == policy.ArmForced:
		say("%s sends it to version %s on purpose, as nobody's sample", HeaderForce, e.Version)
	case a.Arm == policy.ArmNotEnrolled:
		say("it takes no part in experiment %s: version %s", m.Experiment, e.Version)
	case a.Arm == ArmUnassigned:
		say("it carries no unit (the rule is %q): last good version %s", unitRule(m), e.Version)
	case a.Arm == ArmLastGood && c.status.DeadManExpired && m.DeadMan > 0:
		say("the control plane has been silent for longer than the dead-man lease of %v: last good version %s", m.DeadMan, e.Version)
	case a.Arm == ArmLastGood && named != nil:
		say("the bucket is arm %s's, whose version %s may not serve: last good version %s", named.Name, named.Version, e.Version)
	default:
		say("the bucket is arm %s's: version %s", a.Arm, e.Version)
	}
}

// drawsUnit reports whether unitOf has nothing to go by but chance.
func (c *call) drawsUnit() bool {
	f := headerFields(c.r.Header)
	return c.assign.Model.Unit == experiments.UnitRequest && unitOf(experiments.UnitSession, f, &c.env) == "" &&
		f.first(hdrRequestID) == "" && f.first(hdrIdempotency) == ""
}

func unitRule(m *policy.Model) experiments.Unit { return orDefault(m.Unit, experiments.UnitUser) }

// explainEndpoints says who would be asked, and in which order.
func (c *call) explainEndpoints(e *Explanation, say func(string, ...any)) {
	if c.pickEndpoint(e, say) {
		return
	}
	good := usable(c.assign.Model, c.assign.Model.LastGood)
	if good == nil || good == c.assign.Version {
		e.Status, e.Refused = http.StatusServiceUnavailable, "no_endpoint"
		say("no endpoint of version %s takes requests now, and there is no other last good version", e.Version)
		return
	}
	say("no endpoint of version %s takes requests now: last good version %s serves, and the failure counts against %s", e.Version, good.Name, e.Version)
	c.assign.Version, c.assign.Arm = good, ArmLastGood
	e.Version, e.Upstream, e.Arm, e.Endpoints = good.Name, good.Upstream, ArmLastGood, nil
	if !c.pickEndpoint(e, say) {
		e.Status, e.Refused = http.StatusServiceUnavailable, "no_endpoint"
		say("no endpoint of it takes requests either")
	}
}

// pickEndpoint lists the endpoints of the assigned version and names the first that takes
// requests; false if none does.
func (c *call) pickEndpoint(e *Explanation, say func(string, ...any)) bool {
	now := c.h.now()
	var skipped []string
	for _, t := range c.h.arrange(c.policy, c.model.versions[c.assign.Version], c.env.Sequence, now) {
		x := ExplainedEndpoint{Address: t.key.address, Region: t.key.region, Breaker: t.breaker.State().String(), InFlight: t.inflight.Load(),
			LatencyMS: t.latency() * float64(time.Second/time.Millisecond), Ejected: t.out(now.UnixNano())}
		if x.Skipped = t.breaker.State() == gobreaker.StateOpen; x.Skipped {
			skipped = append(skipped, x.Address)
		} else if e.Endpoint == "" {
			e.Endpoint, e.Region = x.Address, x.Region
		}
		e.Endpoints = append(e.Endpoints, x)
	}
	if len(skipped) > 0 {
		say("the breakers of %s are open", strings.Join(skipped, ", "))
	}
	if e.Endpoint == "" {
		return false
	}
	where := "this sidecar's region"
	if e.Region != c.h.o.Region {
		where = "region " + e.Region
	}
	say("endpoint %s in %s is first of %d; at most %d attempts in %d ms", e.Endpoint, where, len(e.Endpoints), e.Attempts, e.TimeoutMS)
	return true
}
