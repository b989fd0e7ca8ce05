// Package ofrep answers the OpenFeature Remote Evaluation Protocol, so that applications
// with any OpenFeature SDK find what the arms of experiments configure, without a call to
// anything but their sidecar.
//
//	POST /ofrep/v1/evaluate/flags/{key}   one flag
//	POST /ofrep/v1/evaluate/flags         all of them, with an ETag
//
// # Flags
//
// Every experiment whose split is in force is a flag of its name: an object of the arm's
// settings, with the arm as variant. Every setting is also a flag of its own,
// "<experiment>.<setting>", with the type that its JSON has. An experiment that was started
// without a plan is a plain feature flag: it divides units and is judged by nobody.
//
// The arm follows from the context's targetingKey by the rule that divides model calls:
// same salt, same buckets, same arm in every sidecar. So the key must be what the calls
// carry as their user (or session, where that is the model's unit).
//
// Who is answered is exposed, and that is recorded once per unit, experiment and weight
// epoch, as for model calls; the sets that say so hold at most 2 × MaxExposed units, and
// forgetting one costs a repeated row that counts for nothing. The bulk answer exposes to
// all that it answers, since nobody hears which flags are then used (intent to treat).
//
// # Answers
//
// 200 with key, value, variant, reason SPLIT and metadata; 304 for a bulk request whose
// If-None-Match names the answer it would get: the tag covers the context and every value.
// 400 TARGETING_KEY_MISSING, INVALID_CONTEXT (targetingKey is no text) or PARSE_ERROR, 404
// FLAG_NOT_FOUND, also for a setting that the unit's arm does not have, and for a unit
// that takes no part in the experiment (its target may name members of the context, or
// fields of the request's head); 405, 413 over
// MaxBody, 503 while there is no policy. Nothing is guessed: on an error the application
// uses its default.
//
// A Handler may be used by any number of goroutines and starts none.
package ofrep

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Bounds.
const (
	MaxBody    = 1 << 20
	MaxExposed = 65_536
)

const (
	prefix  = "/ofrep/v1/evaluate/flags"
	maxUnit = 1024 // bytes of a targeting key
)

// Options of a Handler; all are required.
type Options struct {
	// Policy returns the policy in force, nil while there is none.
	Policy func() *policy.Policy
	// Region of this sidecar, under which exposures are reported.
	Region   string
	Recorder *inference.Recorder
}

// Handler serves the protocol.
type Handler struct {
	o Options

	enrolments atomic.Pointer[enrolments]

	mu       sync.Mutex
	now, old map[exposure]struct{} // now fills, then becomes old
}

// enrolments are those of a policy, ready to be asked, by model.
type enrolments struct {
	policy *policy.Policy
	of     map[string]*inference.Enrolment
}

type exposure struct {
	model, arm string
	epoch      uint64
	unit       uint32
}

// New starts nothing.
func New(o Options) *Handler { return &Handler{o: o, now: map[exposure]struct{}{}} }

// Match says whether a request is one of the protocol's.
func Match(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/ofrep/v1/") }

// flag is one evaluation, in the protocol's words.
type flag struct {
	Key      string          `json:"key"`
	Reason   string          `json:"reason"`
	Variant  string          `json:"variant"`
	Value    json.RawMessage `json:"value"`
	Metadata map[string]any  `json:"metadata"`
}

// failure is an error of one evaluation or of a request.
type failure struct {
	status  int
	Key     string `json:"key,omitempty"`
	Code    string `json:"errorCode,omitempty"`
	Details string `json:"errorDetails"`
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key, single := strings.CutPrefix(r.URL.Path, prefix+"/")
	if !single && r.URL.Path != prefix || single && key == "" {
		write(w, http.StatusNotFound, failure{Details: r.URL.Path + " not found; the sidecar serves " + prefix + "[/{key}]"})
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("allow", http.MethodPost)
		write(w, http.StatusMethodNotAllowed, failure{Details: "method is " + r.Method + "; it is POST"})
		return
	}
	s, context, f := read(r)
	p := h.o.Policy()
	if f == nil && p == nil {
		w.Header().Set("retry-after", "1")
		f = &failure{status: http.StatusServiceUnavailable, Code: "PROVIDER_NOT_READY", Details: "the sidecar has no policy yet"}
	}
	if f != nil {
		f.Key = key
		write(w, f.status, f)
		return
	}
	if !single {
		h.bulk(w, r, p, s, context)
		return
	}
	out, f := h.one(p, key, s)
	if f != nil {
		write(w, f.status, f)
		return
	}
	write(w, http.StatusOK, out)
}

// read takes the targeting key out of the context.
func read(r *http.Request) (s expr.Subject, context []byte, f *failure) {
	raw, err := io.ReadAll(io.LimitReader(r.Body, MaxBody+1))
	if err != nil || len(raw) > MaxBody {
		return s, nil, &failure{status: http.StatusRequestEntityTooLarge, Code: "INVALID_CONTEXT", Details: "the body cannot be read or has more than a MiB"}
	}
	var body struct {
		Context map[string]any `json:"context"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		var kind *json.UnmarshalTypeError
		if errors.As(err, &kind) {
			return s, nil, &failure{status: http.StatusBadRequest, Code: "INVALID_CONTEXT", Details: "the body is not {\"context\": {…}}: " + err.Error()}
		}
		return s, nil, &failure{status: http.StatusBadRequest, Code: "PARSE_ERROR", Details: "the body is no JSON: " + err.Error()}
	}
	switch v := body.Context["targetingKey"].(type) {
	case nil:
	case string:
		s.Unit = v
	default:
		return s, nil, &failure{status: http.StatusBadRequest, Code: "INVALID_CONTEXT", Details: "targetingKey is not text"}
	}
	if s.Unit == "" {
		return s, nil, &failure{status: http.StatusBadRequest, Code: "TARGETING_KEY_MISSING", Details: "the context has no targetingKey; without a unit nobody is assigned"}
	}
	if len(s.Unit) > maxUnit {
		return s, nil, &failure{status: http.StatusBadRequest, Code: "INVALID_CONTEXT", Details: "targetingKey has more than 1024 bytes"}
	}
	context, err = json.Marshal(body.Context) // keys in order
	if err != nil {
		return s, nil, &failure{status: http.StatusBadRequest, Code: "PARSE_ERROR", Details: err.Error()}
	}
	s.Attribute = func(name string) (string, bool) { return attribute(body.Context, r.Header, name) }
	return s, context, nil
}

// attribute is what a target reads: a member of the context, numbers and truth values as
// JSON, else a field of the request's head, which is all a model call has.
func attribute(context map[string]any, head http.Header, name string) (string, bool) {
	switch v := context[name].(type) {
	case string:
		return v, true
	case float64, bool:
		raw, err := json.Marshal(v)
		return string(raw), err == nil
	}
	v := head.Get(name)
	return v, v != ""
}

// includes reports whether a unit takes part in the experiment of a model.
func (h *Handler) includes(p *policy.Policy, m *policy.Model, s expr.Subject) bool {
	if !m.Enrolment.Limited() {
		return true
	}
	known := h.enrolments.Load()
	if known == nil || known.policy != p {
		known = &enrolments{policy: p, of: map[string]*inference.Enrolment{}}
		for i := range p.Models {
			// A target that does not compile includes nobody, and the inference side has said so.
			known.of[p.Models[i].Name], _ = inference.CompileEnrolment(&p.Models[i].Enrolment)
		}
		h.enrolments.Store(known)
	}
	s.Model, s.Region = m.Name, h.o.Region
	return known.of[m.Name].Includes(s)
}

// one evaluates one flag. The longest experiment name that fits is meant: names may hold
// dots.
func (h *Handler) one(p *policy.Policy, key string, s expr.Subject) (*flag, *failure) {
	var best *policy.Model
	setting := ""
	for i := range p.Models {
		m := &p.Models[i]
		rest, ok := strings.CutPrefix(key, m.Experiment)
		if m.Experiment == "" || !ok || rest != "" && rest[0] != '.' || best != nil && len(best.Experiment) >= len(m.Experiment) {
			continue
		}
		best, setting = m, strings.TrimPrefix(rest, ".")
	}
	if best == nil {
		return nil, &failure{status: http.StatusNotFound, Key: key, Code: "FLAG_NOT_FOUND", Details: "no experiment of that name is running"}
	}
	if !h.includes(p, best, s) {
		return nil, &failure{status: http.StatusNotFound, Key: key, Code: "FLAG_NOT_FOUND", Details: "the unit takes no part in experiment " + best.Experiment}
	}
	arm, hash := assign(best, s.Unit)
	out := evaluate(best, arm, key, setting)
	if out == nil {
		return nil, &failure{status: http.StatusNotFound, Key: key, Code: "FLAG_NOT_FOUND", Details: "arm " + arm.Name + " of experiment " + best.Experiment + " has no setting " + setting}
	}
	h.expose(best, arm, hash)
	return out, nil
}

// assign finds a unit's arm; the arms cover all buckets, so there is one.
func assign(m *policy.Model, unit string) (*policy.Arm, uint32) {
	hash := experiments.UnitHash(m.Salt, unit)
	return m.ArmOf(uint32(uint64(hash) * experiments.Buckets >> 32)), hash
}

// evaluate is the value of one flag, nil if the arm has none. An empty setting means all.
func evaluate(m *policy.Model, arm *policy.Arm, key, setting string) *flag {
	out := &flag{Key: key, Reason: "SPLIT", Variant: arm.Name, Metadata: map[string]any{
		"experiment": m.Experiment, "model": m.Name, "version": arm.Version, "weight_epoch": float64(m.WeightEpoch)}}
	if setting == "" {
		all := make(map[string]json.RawMessage, len(arm.Settings))
		for _, s := range arm.Settings {
			all[s.Name] = json.RawMessage(s.JSON)
		}
		raw, err := json.Marshal(all)
		if err != nil {
			return nil // settings are JSON: the policy was validated
		}
		out.Value = raw
		return out
	}
	for _, s := range arm.Settings {
		if s.Name == setting {
			out.Value = json.RawMessage(s.JSON)
			return out
		}
	}
	return nil
}

// bulk evaluates every flag.
func (h *Handler) bulk(w http.ResponseWriter, r *http.Request, p *policy.Policy, s expr.Subject, context []byte) {
	body := struct {
		Flags []*flag `json:"flags"`
	}{[]*flag{}}
	for i := range p.Models {
		m := &p.Models[i]
		if m.Experiment == "" {
			continue
		}
		if !h.includes(p, m, s) {
			continue
		}
		arm, hash := assign(m, s.Unit)
		for _, setting := range append([]policy.Setting{{}}, arm.Settings...) {
			key := m.Experiment
			if setting.Name != "" {
				key += "." + setting.Name
			}
			if f := evaluate(m, arm, key, setting.Name); f != nil {
				body.Flags = append(body.Flags, f)
			}
		}
		h.expose(m, arm, hash)
	}
	raw, err := json.Marshal(body)
	if err != nil {
		write(w, http.StatusInternalServerError, failure{Details: err.Error()})
		return
	}
	sum := sha256.New()
	sum.Write(context)
	sum.Write([]byte{0})
	sum.Write(raw)
	tag := `"` + base64.RawURLEncoding.EncodeToString(sum.Sum(nil)[:18]) + `"`
	w.Header().Set("etag", tag)
	w.Header().Set("cache-control", "no-cache")
	for _, known := range strings.Split(r.Header.Get("if-none-match"), ",") {
		if known = strings.TrimPrefix(strings.TrimSpace(known), "W/"); known == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	w.Header().Set("content-type", "application/json")
	_, _ = w.Write(raw) // a caller that left cannot be told
}

// expose records a unit's first exposure.
func (h *Handler) expose(m *policy.Model, arm *policy.Arm, unit uint32) {
	e := exposure{m.Name, arm.Name, m.WeightEpoch, unit}
	h.mu.Lock()
	_, known := h.now[e]
	if _, before := h.old[e]; !known && !before {
		if len(h.now) >= MaxExposed {
			h.old, h.now = h.now, map[exposure]struct{}{}
		}
		h.now[e] = struct{}{}
	} else {
		known = true
	}
	h.mu.Unlock()
	if !known {
		h.o.Recorder.Expose(m.Name, arm.Version, arm.Name, h.o.Region, m.WeightEpoch, unit)
	}
}

func write(w http.ResponseWriter, code int, body any) {
	raw, err := json.Marshal(body)
	if err != nil {
		code, raw = http.StatusInternalServerError, []byte(`{"errorDetails":"the answer cannot be written"}`)
	}
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(raw) // a caller that left cannot be told
}
