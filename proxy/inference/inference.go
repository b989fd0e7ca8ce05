// Package inference is the sidecar's model layer: it maps the logical model an
// application names to a version by policy, forwards the request with only the model's
// bytes changed, and reports what came of it.
//
// Usage:
//
//	h, err := inference.New(inference.Options{Policy: current, Region: "eu", Transport: rt})
//	mux.Handle("/v1/", h) // or: if h.Match(r) { h.ServeHTTP(w, r) }
//	deltas := h.Recorder().Drain(now) // at 1 Hz, and within 100 ms of Recorder().Urgent()
//
// It serves the protocols of package shape (OpenAI, Azure, Open Inference Protocol v2,
// TGI, vLLM, Anthropic, Gemini, Ollama) without translating between them, and answers
// GET /v1/models, /v1/models/{id} (and the same below the other bases of OpenAI's API),
// /v2 and /v2/health/{live,ready} from the policy. Where
// neither path nor body names a model (TGI), x-outrigger-model or X-Gateway-Model-Name
// does, or Options.DefaultModel.
//
// Promises, per logical request.
//
//   - The body reaches the model byte for byte, except the string after "model" if that
//     is where the protocol names it; otherwise only the path changes. Unknown fields,
//     number formats and key order survive.
//   - Requests that belong to a sequence of the Open Inference Protocol (parameters.
//     sequence_id) go to one endpoint of the version as long as the policy stays and it
//     can be reached.
//   - One unit always gets the same arm of the same policy, in every sidecar (Assign).
//     All attempts of a request stay on one version, but for the next promise; a policy
//     change affects the next request, streams in flight finish on their version.
//   - If no endpoint of the assigned version can be reached (connections fail, breakers
//     are open, there is none), and the model has another last good version, that one
//     serves the request, under the arm "last-good", with at least one attempt more. The
//     assigned version and arm still get one failure, reported at once, so that the
//     evidence against them grows while users are served. A version that answers badly is
//     not hidden this way: its errors are passed on.
//   - Another attempt is made only while the client has received nothing, on another
//     endpoint of the version, within MaxAttempts and a budget of 20 % retries. Transport
//     errors, 5xx (except 501), 429, an answer cut before it was passed on, and a
//     stream whose first events hold no content before an error are retried.
//   - A stream is relayed event by event from its first content. If the model is lost
//     after that, the client gets an error event it can type, never [DONE], then the end.
//     A JSON answer cut after its head went out breaks the client's connection.
//   - The client going away cancels the upstream request at once; it is counted as
//     cancelled, neither success nor failure.
//   - Every answer, errors included, carries x-outrigger-policy ("live", "last-good" or
//     "none") and x-outrigger-attempts, and model, version, arm, region and bucket as far
//     as they are known. Client-supplied x-outrigger-* request fields go no further.
//
// Our own errors have the form of the protocol spoken. Bad input is refused: 400 for JSON that is malformed, nested
// deeper than 512, or ambiguous (a routing key twice); 413 over MaxBody; 415 for bodies in
// another coding than gzip and deflate, which reach the model decoded. Unknown models are 404 model_not_found, or go to Passthrough if there is one.
// Overload: more than MaxInFlight requests, or a version's MaxRequests, is 503; beyond a
// version's MaxConnections requests of HTTP/1.1 wait, in the order they came and as long as
// they may take, and beyond its MaxPending that is 503, too; a retry or hedge beyond
// MaxRetries is not made. All of these 503 come with retry-after and say overloaded. One model
// gets at most three quarters of MaxInFlight where there are several, so that a slow one
// does not take the others down (bulkhead); beyond the adaptive limit it is 429. With
// every endpoint's breaker open, the last good version's included, the answer is 503 with
// retry-after-ms. Without any policy
// it is 503; with the control plane gone the last policy keeps serving, and a model with
// a candidate live returns to its last good version when the dead-man lease expires.
//
// A caller's X-Request-Timeout (seconds, or 1500ms) or Grpc-Timeout bounds the request
// and reaches the model with what is left of it.
//
// With Options.Answers, a question whose parameters make its answer the same every time,
// or that opts in with x-outrigger-cache: on, is answered from memory if it was put to the
// same version, in the same arm, by the same tenant, before, and no variable that the version
// pins has changed since; while it is being answered,
// others read along. Cache-Control of requests and answers is obeyed. What comes from
// memory says so in x-outrigger-cache (and from which tier in x-outrigger-tier) and counts in
// no statistics of the version. With Options.NodeAnswers the node's other pods share it.
//
// Versions that the policy names as shadows get copies of requests (Options.Shadows), of
// the units in the buckets it says: of what may be made twice (no sequences, no stored
// responses, no body over MaxShadowBody, no field x-outrigger-shadow: off), once, without
// retries. Copies have a queue, a limit and an arm ("shadow-copy") of their own; with the
// queue full they are dropped and counted. Nothing a shadow does reaches the caller.
//
// An endpoint that fails clearly more often than its peers is ejected for a while: it is
// tried last (balance.Outliers). The breaker is per version × region × endpoint; it counts
// transport errors, 5xx and streams the model broke off, never the client's own mistakes or
// departures. It opens after ConsecutiveFailures failures in a row, in the order in which
// attempts end, if they are also as many as the endpoint's attempts that have neither failed
// nor begun to answer: what fails fast ends before what was asked earlier and succeeds, and
// five such failures are no proof that the endpoint is dead. Attempts that stay silent count
// until their time limit, so an endpoint that hangs and fails is given up at the latest after
// as many failures as it has silent attempts. One success starts the row anew.
//
// Relay lets event loops carry the calls that turn out to be simple. It changes none of
// this: the handler takes every other call over, at any point up to the end of the answer.
//
// Explain decides about a request without sending it, and Tap shows calls as they end;
// while nobody taps, a call pays one atomic load for that.
//
// New starts nothing; the handler runs on its callers' goroutines only and is safe for
// any number of them. Memory per request in flight: a body of 1 MiB and one answer buffer (1 MiB,
// or one event of at most 8 MiB); larger bodies, of at most MaxBody, have together 8 times
// MaxBody, beyond which requests with one are answered 503. With Options.Room all of it together
// is bounded by what the process may have: a call there is no room for is answered 503.
package inference

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Defaults of Options.
const (
	DefaultMaxBody     = 32 << 20
	DefaultMaxInFlight = 4096
	DefaultTimeout     = 10 * time.Minute // of a logical request, when the policy has none
)

// Options configure New.
type Options struct {
	// Policy returns the current policy, nil while there is none, and how far to trust
	// it. It is called once per request and must be cheap; the policy must not change
	// after it was returned. A nil function is a sidecar without policy: everything goes
	// to Passthrough.
	Policy func() (*policy.Policy, PolicyStatus)
	// Region of this sidecar; its endpoints are preferred.
	Region string
	// Order overrides the order in which endpoints are tried; nil = local region first,
	// then priority, then least loaded of two.
	Order OrderFunc
	// Transport sends attempts; required. It must not decompress answers.
	Transport http.RoundTripper
	// Secure returns what sends attempts to endpoints over TLS; nil = they fail.
	Secure func(*policy.TLS) (http.RoundTripper, error)
	// Passthrough serves requests for models the policy does not name, unchanged but for
	// x-outrigger-* fields; nil = 404 model_not_found.
	Passthrough http.Handler
	// DefaultModel is the model of requests that name none; "" = such requests go to
	// Passthrough or are refused.
	DefaultModel string
	// Passes reports whether Passthrough takes a request; nil = every one.
	Passes func(*http.Request) bool
	// Now is the clock; nil = time.Now.
	Now func() time.Time
	// Logger gets breaker transitions and refused stream events; nil discards.
	Logger *slog.Logger
	// Meter for the GenAI metrics; nil = none.
	Meter metric.Meter
	// Recorder collects outcomes; nil = a new one with default bounds.
	Recorder *Recorder
	// TryTimeout bounds one attempt up to the first content of its answer (a JSON answer:
	// up to its end); another endpoint may be tried after it. 0 = the whole request's only.
	TryTimeout time.Duration
	// HedgeAfter, if above 0, asks a second endpoint when the first has not begun to answer
	// for that long, within the limits of retries. Only APIs that change nothing are hedged
	// (embeddings, scores, inference without a sequence), never generation.
	HedgeAfter time.Duration
	// Adaptive limits how many requests a version gets at once to what it was seen to take
	// (balance.Limit); the rest are refused with 429 at once instead of queueing.
	Adaptive bool
	// Prices of LLM tokens by logical model, for the cost metric; models without one have none.
	Prices map[string]Price
	// Answers is the cache of answers, see package answers; nil = none. AnswerAll puts
	// answers there that their protocol's parameters do not make deterministic.
	Answers   *answers.Cache
	AnswerAll bool
	// NodeAnswers is what the node's pods share beyond Answers, while RunAnswers runs; nil =
	// nothing.
	NodeAnswers *answers.Node
	// Pinned tells the present version of a variable that a version of a model pins, in the
	// default tenant: the write behind it, or that it is absent. With false nothing current is
	// known of it, and the question is put to the model. Needed for answers of such versions.
	Pinned func(ctx context.Context, session, name string) (version string, current bool)
	// Grants verifies what testers send as x-outrigger-force (identity.Keys.VerifyGrant);
	// nil = such requests are refused.
	Grants func(text string, now time.Time) (identity.Grant, error)
	// Shadows bounds the copies of requests that are under way to shadow versions; they are
	// sent while RunShadows runs. 0 = none are made.
	Shadows int
	// MaxBody bounds a request body in bytes, decoded, MaxInFlight the requests at one time.
	MaxBody     int64
	MaxInFlight int
	// Room is the memory of the process, of which calls take what they hold: bodies, and
	// answers until they are passed on. A call there is no room for is answered 503; an answer
	// is then passed on as it comes, without another attempt should it break off. nil = as
	// much as there is.
	Room *heap.Room
}

// Price is what a million LLM tokens cost, in whatever currency the operator thinks in.
type Price struct{ In, Out float64 }

// Handler is the http.Handler of this package.
type Handler struct {
	o        Options
	log      *slog.Logger
	now      func() time.Time
	recorder *Recorder
	metrics  *metrics

	shadows  *shadows // nil = no copies are made
	buffers  buffers  // of answers
	inflight atomic.Int64
	large    atomic.Int64 // bytes of request bodies that are large, or may become so
	taps     taps
	plan     atomic.Pointer[plan]
	compile  sync.Mutex // held while a new plan is made; never during I/O

	generations uint64 // handed out to versions; guarded by compile
}

// New returns a Handler. It fails, with kind Invalid, without a Transport or with
// negative limits, and if the meter refuses an instrument.
func New(o Options) (*Handler, error) {
	if o.Secure == nil {
		o.Secure = noSecure
	}
	if o.Transport == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "inference: Options.Transport is nil")
	}
	if o.MaxBody < 0 || o.MaxInFlight < 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "inference: MaxBody %d and MaxInFlight %d must not be negative", o.MaxBody, o.MaxInFlight)
	}
	o.MaxBody = orDefault(o.MaxBody, DefaultMaxBody)
	o.MaxInFlight = orDefault(o.MaxInFlight, DefaultMaxInFlight)
	h := &Handler{o: o, log: o.Logger, now: o.Now, recorder: o.Recorder}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	if h.now == nil {
		h.now = time.Now
	}
	h.shadows = newShadows(o.Shadows)
	if h.recorder == nil {
		h.recorder = NewRecorder(RecorderOptions{})
	}
	var err error
	if h.metrics, err = newMetrics(o.Meter); err != nil {
		return nil, err
	}
	return h, nil
}

// Recorder returns where outcomes are collected.
func (h *Handler) Recorder() *Recorder { return h.recorder }

func isModelsPath(path string) bool {
	_, _, ok := shape.Models(path)
	return ok
}

// match finds the API of a request. The root path is TGI's, but only where the operator
// says which model it stands for: anything else may live there.
func (h *Handler) match(r *http.Request, route *shape.Route) bool {
	ok := false
	*route, ok = shape.Match(r.URL.EscapedPath())
	if !ok && r.URL.Path == "/" && r.Method == http.MethodPost && h.o.DefaultModel != "" {
		*route, ok = shape.Match("/generate")
	}
	return ok
}

// Match reports whether the request's path belongs to this handler. Retrieving or
// cancelling stored responses (/v1/responses/{id}) names no model and does not.
func (h *Handler) Match(r *http.Request) bool {
	var route shape.Route
	return h.match(r, &route) || isModelsPath(r.URL.Path) || isServerPath(r.URL.Path)
}

// ServeHTTP serves one logical request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{h: h, w: w, r: r, start: h.now()}
	matched := h.match(r, &c.path)
	c.api = c.path.API
	if h.o.Policy != nil {
		c.policy, c.status = h.o.Policy()
	}
	if h.inflight.Add(1) > int64(h.o.MaxInFlight) {
		h.inflight.Add(-1)
		c.refuse(apiError{status: http.StatusServiceUnavailable, code: "overloaded", retryAfter: overloadDelay, retry: retryYes,
			message: "the sidecar has reached its limit of requests in flight; try again"})
		return
	}
	defer h.inflight.Add(-1)
	defer c.release()
	if !c.grow(callBytes) {
		c.w.Header()["Connection"] = []string{"close"} // rather than reading the body
		c.refuse(noRoom)
		return
	}
	switch {
	case matched:
		c.serveInference()
		return
	case isModelsPath(r.URL.Path):
		c.serveModels()
		return
	case isServerPath(r.URL.Path):
		c.serveServer()
		return
	}
	if c.passes() {
		c.passThrough(nil)
		return
	}
	c.refuse(apiError{status: http.StatusNotFound, kind: invalidRequest, code: "unknown_url", message: "no such path: " + r.Method + " " + r.URL.Path})
}

// EndpointStats is the state of one endpoint of one version, as this sidecar sees it.
type EndpointStats struct {
	Model     string  `json:"model"`
	Version   string  `json:"version"`
	Region    string  `json:"region"`
	Address   string  `json:"address"`
	Breaker   string  `json:"breaker"` // closed, half-open, open
	InFlight  int64   `json:"in_flight"`
	LatencyMS float64 `json:"latency_ms"` // moving average to the response head; 0 = not measured
	// EjectedMS is for how long it is still ejected as an outlier; 0 = it is not.
	EjectedMS int64 `json:"ejected_ms"`
}

// Stats is a snapshot for the sidecar's own admin page.
type Stats struct {
	Arms         []Total            `json:"arms"`
	Endpoints    []EndpointStats    `json:"endpoints"`
	InFlight     int64              `json:"in_flight"`
	HeldBytes    int64              `json:"held_bytes"` // of Options.Room, by all who take of it
	CellsDropped uint64             `json:"cells_dropped"`
	Answers      *answers.Stats     `json:"answers,omitempty"`      // nil without a cache
	NodeAnswers  *answers.NodeStats `json:"node_answers,omitempty"` // nil without a node tier
	Shadows      *ShadowStats       `json:"shadows,omitempty"`      // nil if no copies are made
}

// LocalStats returns totals since start and the present state of endpoints, in policy
// order.
func (h *Handler) LocalStats() Stats {
	s := Stats{Arms: h.recorder.Totals(), InFlight: h.inflight.Load(), HeldBytes: h.o.Room.Held(), CellsDropped: h.recorder.CellsDropped(), Shadows: h.shadows.stats(), NodeAnswers: h.o.NodeAnswers.Stats()}
	if h.o.Answers != nil {
		a := h.o.Answers.Stats()
		s.Answers = &a
	}
	p := h.plan.Load()
	if p == nil {
		return s
	}
	now := h.now().UnixNano()
	for i := range p.policy.Models {
		m := &p.policy.Models[i]
		for j := range m.Versions {
			for _, t := range p.models[m].versions[&m.Versions[j]].targets {
				s.Endpoints = append(s.Endpoints, EndpointStats{
					Model: m.Name, Version: t.key.version, Region: t.key.region, Address: t.key.address,
					Breaker: t.breaker.State().String(), InFlight: t.inflight.Load(), LatencyMS: t.latency() * 1000,
					EjectedMS: (max(0, t.outTill.Load()-now) + 999_999) / 1_000_000,
				})
			}
		}
	}
	return s
}
