package inference

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// SelectPath answers which version of a model a caller is to use, for applications that
// must know before they call, or that call a model themselves:
//
//	POST /v1/select-model {"type": "chat", "context": {"user": "u1", "plan": "pro"}}
//	GET  /v1/select-model?type=chat&user=u1
//
// type is the logical model. The context names the unit (user, session, request; the
// fields X-User-Id, X-Session-Id, X-Request-Id of the request count, too) and holds what
// an experiment's target may ask for. The answer is a Selection, decided in the sidecar
// from its policy by the code that routes calls, so a call with the fields that the
// selection lists goes to the same version as long as the policy stays. Selecting is no
// sample: only calls are. Errors are those of the REST interface: 404 for a model that the
// policy does not know, 503 without a policy or a version that may serve, 401 for a grant
// that does not hold.
const SelectPath = "/v1/select-model"

const maxSelect = 64 << 10 // bytes of a question

// Reasons of a Selection.
const (
	ReasonChampion    = "champion"     // the version that serves what is not under test
	ReasonExperiment  = "experiment"   // the unit's arm of the running experiment
	ReasonRollout     = "rollout"      // the unit's side of a rollout
	ReasonNotEnrolled = "not_enrolled" // the unit takes no part in the running experiment
	ReasonForced      = "forced"       // a tester's grant
	ReasonNoUnit      = "no_unit"      // the context names nobody: last good version
	ReasonLastGood    = "last_good"    // the assigned version may not serve
)

// Selection is which version of a model to use.
type Selection struct {
	Model   string `json:"model"`
	Version string `json:"version"`
	// Upstream is the name the version's endpoints know it under; Endpoints are where they
	// are, for callers that do not go through the sidecar.
	Upstream  string   `json:"upstream_model"`
	Endpoints []string `json:"endpoints"`

	Arm         string `json:"arm"`
	Experiment  string `json:"experiment,omitempty"`
	Bucket      int32  `json:"bucket"` // -1 = the unit has none
	WeightEpoch uint64 `json:"weight_epoch"`
	Policy      string `json:"policy"` // live, last-good
	Reason      string `json:"reason"`
	Why         string `json:"why"` // the reason in words
	// Headers are what a call must carry to be assigned alike.
	Headers map[string]string `json:"headers,omitempty"`
	// Settings are what the arm configures, as JSON.
	Settings map[string]json.RawMessage `json:"settings,omitempty"`
}

// selectFields is a fieldSource of a context, and of the head of the request behind it.
type selectFields struct {
	context map[string]string
	head    http.Header
}

// contextUnits are the members of a context that name units, by the field they stand for.
func contextUnits(canonical string) []string {
	switch canonical {
	case hdrUser:
		return []string{"user", "user_id"}
	case hdrSession:
		return []string{"session", "session_id"}
	case hdrRequestID:
		return []string{"request", "request_id"}
	}
	return nil
}

func (f selectFields) first(canonical string) string {
	if canonical != hdrForce { // a grant is the caller's own
		for _, name := range contextUnits(canonical) {
			if v := f.context[name]; v != "" {
				return v
			}
		}
		for name, v := range f.context {
			if http.CanonicalHeaderKey(name) == canonical && v != "" {
				return v
			}
		}
	}
	return first(f.head, canonical)
}

// Select decides which version of a model a context gets. head is that of the request that
// asks. Errors have kind NotFound, Unavailable or Unauthorised.
func (h *Handler) Select(model string, context map[string]string, head http.Header) (Selection, error) {
	var p *policy.Policy
	var st PolicyStatus
	if h.o.Policy != nil {
		p, st = h.o.Policy()
	}
	if p == nil {
		return Selection{}, outrigger.Errorf(outrigger.Unavailable, "the sidecar has no routing policy yet; it is waiting for the control plane")
	}
	m := p.Model(model)
	if m == nil {
		return Selection{}, outrigger.Errorf(outrigger.NotFound, "type %.200q is not a model of the routing policy", model)
	}
	f := selectFields{context, head}
	headers := map[string]string{}
	for _, name := range []string{hdrUser, hdrSession, hdrRequestID} {
		if v := f.first(name); v != "" {
			headers[name] = v
		}
	}
	if m.Unit == experiments.UnitRequest && len(headers) == 0 {
		// Drawn here and told, so that the call can be the same request.
		id := strconv.FormatUint(rand.Uint64(), 36)
		f.head = http.Header{hdrRequestID: {id}, hdrForce: head[hdrForce]}
		headers[hdrRequestID] = id
	}
	a, err := assignTo(h, h.planFor(p).models[m], m, unitOf(m.Unit, f, &shape.Envelope{}), f, st, h.now())
	if err != nil {
		return Selection{}, err
	}
	s := Selection{Model: m.Name, Version: a.Version.Name, Upstream: a.Version.Upstream, Endpoints: []string{}, Arm: a.Arm, Experiment: m.Experiment,
		Bucket: -1, WeightEpoch: m.WeightEpoch, Policy: "last-good", Headers: headers}
	if st.Live {
		s.Policy = "live"
	}
	if a.HasUnit {
		s.Bucket = int32(a.Bucket)
	}
	for _, e := range a.Version.Endpoints {
		s.Endpoints = append(s.Endpoints, e.Address)
	}
	s.Reason, s.Why = reasonOf(&a)
	for i := range m.Arms {
		if m.Arms[i].Name == a.Arm {
			for _, x := range m.Arms[i].Settings {
				if s.Settings == nil {
					s.Settings = map[string]json.RawMessage{}
				}
				s.Settings[x.Name] = json.RawMessage(x.JSON)
			}
		}
	}
	return s, nil
}

// reasonOf says why an assignment is as it is.
func reasonOf(a *Assignment) (word, why string) {
	m := a.Model
	switch a.Arm {
	case policy.ArmForced:
		return ReasonForced, "the grant in " + HeaderForce + " names an arm of experiment " + m.Experiment + " that has this version"
	case policy.ArmNotEnrolled:
		return ReasonNotEnrolled, "the unit takes no part in experiment " + m.Experiment
	case ArmUnassigned:
		return ReasonNoUnit, fmt.Sprintf("the context names no unit (the rule is %q): last good version", unitRule(m))
	case ArmLastGood:
		return ReasonLastGood, "the version that the unit is assigned to may not serve: last good version"
	}
	switch {
	case m.Experiment != "":
		return ReasonExperiment, fmt.Sprintf("bucket %d is that of arm %s of experiment %s", a.Bucket, a.Arm, m.Experiment)
	case len(m.Arms) > 1:
		return ReasonRollout, fmt.Sprintf("bucket %d is that of arm %s of a rollout", a.Bucket, a.Arm)
	}
	return ReasonChampion, "nothing is under test: the champion serves everybody"
}

// ServeSelect serves SelectPath.
func (h *Handler) ServeSelect(w http.ResponseWriter, r *http.Request) {
	model, context, err := readSelect(r)
	var s Selection
	if err == nil {
		s, err = h.Select(model, context, r.Header)
	}
	if err != nil {
		status.WriteHTTP(w, err)
		return
	}
	raw, err := json.Marshal(s)
	if err != nil {
		status.WriteHTTP(w, outrigger.Wrap(outrigger.Internal, err, "encode the selection"))
		return
	}
	w.Header().Set("content-type", "application/json")
	w.Header().Set("cache-control", "no-store")
	_, _ = w.Write(append(raw, '\n')) // nobody is left to tell
}

// readSelect reads a question. Errors have kind Invalid.
func readSelect(r *http.Request) (model string, context map[string]string, err error) {
	context = map[string]string{}
	switch r.Method {
	case http.MethodGet:
		for name, values := range r.URL.Query() {
			if len(values) != 1 {
				return "", nil, outrigger.Errorf(outrigger.Invalid, "query parameter %.100q is given %d times", name, len(values))
			}
			context[name] = values[0]
		}
		model = context["type"]
		delete(context, "type")
	case http.MethodPost:
		raw, err := io.ReadAll(io.LimitReader(r.Body, maxSelect+1))
		if err != nil || len(raw) > maxSelect {
			return "", nil, outrigger.Errorf(outrigger.Invalid, "the body cannot be read or has more than %d bytes", maxSelect)
		}
		var q struct {
			Type    string         `json:"type"`
			Context map[string]any `json:"context"`
		}
		if err := json.Unmarshal(raw, &q); err != nil {
			return "", nil, outrigger.Errorf(outrigger.Invalid, "the body is not {\"type\": …, \"context\": {…}}: %v", err)
		}
		model = q.Type
		for name, v := range q.Context {
			switch v := v.(type) {
			case string:
				context[name] = v
			case float64, bool:
				context[name] = fmt.Sprint(v)
			default:
				return "", nil, outrigger.Errorf(outrigger.Invalid, "context.%.100s is neither text, a number nor a truth value", name)
			}
		}
	default:
		return "", nil, outrigger.Errorf(outrigger.Invalid, "method is %s; %s takes GET and POST", r.Method, SelectPath)
	}
	if model == "" {
		return "", nil, outrigger.Errorf(outrigger.Invalid, "type is missing; it is the name of a model")
	}
	return model, context, nil
}
