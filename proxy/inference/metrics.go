package inference

import (
	"context"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// metrics are the instruments of OpenTelemetry's GenAI semantic conventions, with the
// conventions' names, units and bucket bounds. Attributes besides the conventions' own:
// outrigger.version, outrigger.arm, outrigger.region, and on token usage
// outrigger.token.estimated. A nil *metrics records nothing.
type metrics struct {
	duration metric.Float64Histogram // gen_ai.server.request.duration, s
	ttft     metric.Float64Histogram // gen_ai.server.time_to_first_token, s
	shadows  metric.Int64Counter     // outrigger.inference.shadow
	tokens   metric.Int64Histogram   // gen_ai.client.token.usage, {token}
	refusals metric.Int64Counter     // outrigger.inference.refused, {request}
	answers  metric.Int64Counter     // outrigger.inference.cache, {request}
	perToken metric.Float64Histogram // gen_ai.server.time_per_output_token, s
	cost     metric.Float64Counter   // outrigger.inference.cost, in the unit of Options.Prices
}

func newMetrics(m metric.Meter) (*metrics, error) {
	if m == nil {
		return nil, nil
	}
	var out metrics
	var err error
	keep := func(e error) {
		if err == nil && e != nil {
			err = outrigger.Wrap(outrigger.Invalid, e, "inference: create metric")
		}
	}
	var e error
	out.duration, e = m.Float64Histogram("gen_ai.server.request.duration", metric.WithUnit("s"),
		metric.WithDescription("Time from a request to the last byte of its answer."),
		metric.WithExplicitBucketBoundaries(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92))
	keep(e)
	out.ttft, e = m.Float64Histogram("gen_ai.server.time_to_first_token", metric.WithUnit("s"),
		metric.WithDescription("Time from a request to the first content of its stream."),
		metric.WithExplicitBucketBoundaries(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10))
	keep(e)
	out.tokens, e = m.Int64Histogram("gen_ai.client.token.usage", metric.WithUnit("{token}"),
		metric.WithDescription("LLM tokens per request; outrigger.token.estimated tells counts from estimates."),
		metric.WithExplicitBucketBoundaries(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864))
	keep(e)
	out.refusals, e = m.Int64Counter("outrigger.inference.refused", metric.WithUnit("{request}"),
		metric.WithDescription("Requests answered by the sidecar before any version was tried, by error.type."))
	keep(e)
	out.answers, e = m.Int64Counter("outrigger.inference.cache", metric.WithUnit("{request}"),
		metric.WithDescription("Requests the answer cache had a key for, by outrigger.cache (hit, joined, miss) and outrigger.tier, where the answer came from (process, node, origin)."))
	keep(e)
	out.shadows, e = m.Int64Counter("outrigger.inference.shadow", metric.WithUnit("{request}"),
		metric.WithDescription("Copies of requests for shadow versions, by outrigger.shadow: sent, dropped (no room), skipped (not to be made twice)."))
	keep(e)
	out.perToken, e = m.Float64Histogram("gen_ai.server.time_per_output_token", metric.WithUnit("s"),
		metric.WithDescription("Time per output token after the first, of streams; outrigger.token.estimated tells counts from estimates."),
		metric.WithExplicitBucketBoundaries(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5))
	keep(e)
	out.cost, e = m.Float64Counter("outrigger.inference.cost", metric.WithUnit("{currency}"),
		metric.WithDescription("What LLM tokens cost at the configured prices; estimated counts are priced like reported ones."))
	keep(e)
	return &out, err
}

// cached counts what came of a question that has a key.
func (m *metrics) cached(c *call, how, tier string) {
	if m != nil {
		m.answers.Add(context.WithoutCancel(c.r.Context()), 1, metric.WithAttributes(attribute.String("outrigger.cache", how), attribute.String("outrigger.tier", tier)))
	}
}

// shadow counts what became of a copy.
func (m *metrics) shadow(how string) {
	if m != nil {
		m.shadows.Add(context.Background(), 1, metric.WithAttributes(attribute.String("outrigger.shadow", how)))
	}
}

// labelKey holds what attribute sets vary by. All parts come from the policy or from a
// closed set of words and status codes, so their number is bounded.
type labelKey struct {
	op, version, arm, region, tag string
	provider                      shape.Family
	model                         string
	tokenType                     string
	estimated                     bool
}

// labels returns the attribute set, built once per plan.
func (c *call) labels(k labelKey) metric.MeasurementOption {
	if o := c.plan.labels.get(k); o != nil {
		return o
	}
	o := metric.WithAttributeSet(c.attributes(k))
	c.plan.labels.put(k, o)
	return o
}

func (c *call) attributes(k labelKey) attribute.Set {
	kv := []attribute.KeyValue{
		attribute.String("gen_ai.operation.name", k.op),
		attribute.String("gen_ai.provider.name", c.api.Family.Provider()), // the API spoken
		attribute.String("gen_ai.request.model", k.model),
		attribute.String("gen_ai.response.model", orDefault(c.assign.Version.Upstream, k.model)),
		attribute.String("outrigger.version", k.version),
		attribute.String("outrigger.arm", k.arm),
		attribute.String("outrigger.region", k.region),
	}
	if k.tag != "" {
		kv = append(kv, attribute.String("error.type", k.tag))
	}
	if k.tokenType != "" {
		kv = append(kv, attribute.String("gen_ai.token.type", k.tokenType), attribute.Bool("outrigger.token.estimated", k.estimated))
	}
	return attribute.NewSet(kv...)
}

// bound are the measurements of successful calls under one key, with nothing left to look
// up. Each target has those of its last call on a loop.
type bound struct {
	plan     *plan
	api      *shape.API
	version  *policy.Version
	arm, tag string
	reported bool

	duration func(float64)
	in, out  func(int64)
}

// bind returns nil if the instruments cannot be bound (package telemetry says how).
func (m *metrics) bind(c *call, k labelKey) *bound {
	duration, ok := m.duration.(interface {
		Bind(attribute.Set) func(float64)
	})
	tokens, ok2 := m.tokens.(interface {
		Bind(attribute.Set) func(int64)
	})
	if !ok || !ok2 {
		return nil
	}
	b := &bound{plan: c.plan, api: c.api, version: c.assign.Version, arm: k.arm, tag: k.tag, reported: c.usage.Reported, duration: duration.Bind(c.attributes(k))}
	k.tag, k.estimated, k.tokenType = "", !c.usage.Reported, "input"
	b.in = tokens.Bind(c.attributes(k))
	k.tokenType = "output"
	b.out = tokens.Bind(c.attributes(k))
	return b
}

// carried records a call that went well on a loop; false if it has to be done as ever.
func (m *metrics) carried(c *call, end ending, d time.Duration) bool {
	if c.bound == nil || c.ttft > 0 || end.failed || end.cancelled || c.h.o.Prices != nil {
		return false
	}
	b := c.bound.Load()
	if b == nil || b.plan != c.plan || b.api != c.api || b.version != c.assign.Version || b.arm != c.assign.Arm || b.tag != end.tag || b.reported != c.usage.Reported {
		if b = m.bind(c, c.labelKey(end)); b == nil {
			return false
		}
		c.bound.Store(b)
	}
	b.duration(d.Seconds())
	b.in(int64(c.usage.In))
	b.out(int64(c.usage.Out))
	return true
}

func (c *call) labelKey(end ending) labelKey {
	return labelKey{op: c.api.Operation, provider: c.api.Family, model: c.assign.Model.Name, version: c.assign.Version.Name, arm: c.assign.Arm, region: c.region, tag: end.tag}
}

// labelSets are the attribute sets of one plan. A map of its own kind, because a sync.Map
// would put every key it is asked for on the heap.
type labelSets struct {
	mu sync.RWMutex
	m  map[labelKey]metric.MeasurementOption
}

func (l *labelSets) get(k labelKey) metric.MeasurementOption {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.m[k]
}

func (l *labelSets) put(k labelKey, o metric.MeasurementOption) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = map[labelKey]metric.MeasurementOption{}
	}
	l.m[k] = o
}

// finished records one logical request. Background: measurements must not be lost
// because the request's context has ended.
func (m *metrics) finished(c *call, end ending, d time.Duration) {
	if m == nil || m.carried(c, end, d) {
		return
	}
	ctx := context.Background()
	if c.r != nil { // exemplars point to the caller's trace
		ctx = context.WithoutCancel(c.r.Context())
	}
	k := c.labelKey(end)
	m.duration.Record(ctx, d.Seconds(), c.labels(k))
	k.tag = ""
	if c.ttft > 0 {
		m.ttft.Record(ctx, c.ttft.Seconds(), c.labels(k))
	}
	if end.failed || end.cancelled {
		return
	}
	k.estimated = !c.usage.Reported
	if c.ttft > 0 && c.usage.Out > 1 {
		k.tokenType = "output"
		m.perToken.Record(ctx, (d-c.ttft).Seconds()/float64(c.usage.Out-1), c.labels(k))
	}
	if p, ok := c.h.o.Prices[k.model]; ok {
		k.tokenType = ""
		m.cost.Add(ctx, (p.In*float64(c.usage.In)+p.Out*float64(c.usage.Out))/1e6, c.labels(k))
	}
	for _, t := range [...]struct {
		name string
		n    uint64
	}{{"input", c.usage.In}, {"output", c.usage.Out}} {
		k.tokenType = t.name
		m.tokens.Record(ctx, int64(t.n), c.labels(k))
	}
}

// refused counts an answer that no version took part in.
func (m *metrics) refused(c *call, code string) {
	if m != nil {
		m.refusals.Add(context.WithoutCancel(c.r.Context()), 1, metric.WithAttributes(attribute.String("error.type", code)))
	}
}
