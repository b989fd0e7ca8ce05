package control

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger/control/facts"
)

// Bounds of what one collection shows; lists and pages have the rest.
const (
	metricModels      = 200
	metricExperiments = 50
)

// gauges are what the control plane knows, read when metrics are collected: versions as
// sidecars report them, rollouts, experiments, alerts and nodes. Labels are names of
// models, versions, rollouts, phases, experiments and arms, and closed sets of words.
//
//	outrigger.version.requests, .failures   counted since the replica started
//	outrigger.version.tokens                by direction (in, out)
//	outrigger.version.cost                  by the model's formula, in its currency
//	outrigger.version.latency               of the last minute, by quantile, seconds
//	outrigger.rollout.weight                the candidate's share, 0..1, with phase and state
//	outrigger.rollout.evidence, .threshold  against the candidate, all strata; it is rolled
//	                                        back when the first reaches the second
//	outrigger.experiment.units              assigned, by arm
//	outrigger.experiment.value              of the primary metric, by arm and bound (low, point, high)
//	outrigger.alerts.standing               by severity and state (firing, silenced)
//	outrigger.nodes                         by state: current, behind, rejecting, gone
type gauges struct {
	requests, failures, tokens metric.Int64ObservableCounter
	cost                       metric.Float64ObservableCounter
	latency                    metric.Float64ObservableGauge
	weight, evidence, limit    metric.Float64ObservableGauge
	units                      metric.Int64ObservableGauge
	value                      metric.Float64ObservableGauge
	alerts, nodes              metric.Int64ObservableGauge
}

// observe registers the gauges.
func (a *admin) observe(m metric.Meter) (err error) {
	g := &gauges{}
	counter := func(name, unit, what string) (c metric.Int64ObservableCounter) {
		if err == nil {
			c, err = m.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(what))
		}
		return c
	}
	real := func(name, unit, what string) (x metric.Float64ObservableGauge) {
		if err == nil {
			x, err = m.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what))
		}
		return x
	}
	whole := func(name, unit, what string) (x metric.Int64ObservableGauge) {
		if err == nil {
			x, err = m.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what))
		}
		return x
	}
	g.requests = counter("outrigger.version.requests", "{request}", "Requests of a model version that sidecars reported to this replica")
	g.failures = counter("outrigger.version.failures", "{request}", "Those of them that failed")
	g.tokens = counter("outrigger.version.tokens", "{token}", "LLM tokens of a model version by direction")
	if err == nil {
		g.cost, err = m.Float64ObservableCounter("outrigger.version.cost", metric.WithUnit("{currency}"), metric.WithDescription("What a model version cost by its model's formula"))
	}
	g.latency = real("outrigger.version.latency", "s", "Time to the end of the answer in the last minute by quantile")
	g.weight = real("outrigger.rollout.weight", "1", "Share of the candidate of a rollout that has not ended")
	g.evidence = real("outrigger.rollout.evidence", "", "Evidence against the candidate, all strata together, as a ratio of likelihoods")
	g.limit = real("outrigger.rollout.threshold", "", "Evidence at which the rollout is rolled back")
	g.units = whole("outrigger.experiment.units", "{unit}", "Units assigned to an arm of a running experiment")
	g.value = real("outrigger.experiment.value", "", "Primary metric of an arm of a running experiment: estimate and ends of its interval")
	g.alerts = whole("outrigger.alerts.standing", "{alert}", "Alerts that are not resolved by severity and state")
	g.nodes = whole("outrigger.nodes", "{node}", "Clients of this replica's policy by state: current, behind, rejecting, gone")
	if err != nil {
		return err
	}
	_, err = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		f := a.facts.Facts()
		a.observeVersions(o, g, f)
		a.observeRollouts(o, g, f)
		a.observeExperiments(o, g, f)
		a.observeState(o, g, f)
		return nil
	}, g.requests, g.failures, g.tokens, g.cost, g.latency, g.weight, g.evidence, g.limit, g.units, g.value, g.alerts, g.nodes)
	return err
}

// with is the labels of one observation, in pairs.
func with(pairs ...string) metric.MeasurementOption {
	out := make([]attribute.KeyValue, 0, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		out = append(out, attribute.String(pairs[i], pairs[i+1]))
	}
	return metric.WithAttributes(out...)
}

func (a *admin) observeVersions(o metric.Observer, g *gauges, f *facts.Facts) {
	models := f.Models()
	for _, m := range models[:min(metricModels, len(models))] {
		price := a.price(m)
		for i := range m.Versions {
			v := m.Versions[i].Name
			s := a.monitor.VersionStats(m.Name, v)
			life := price(s.Lifetime)
			o.ObserveInt64(g.requests, int64(life.GetRequests()), with("model", m.Name, "version", v))
			o.ObserveInt64(g.failures, int64(life.GetFailures()), with("model", m.Name, "version", v))
			o.ObserveInt64(g.tokens, int64(life.GetTokensIn()), with("model", m.Name, "version", v, "direction", "in"))
			o.ObserveInt64(g.tokens, int64(life.GetTokensOut()), with("model", m.Name, "version", v, "direction", "out"))
			if m.Cost != "" {
				o.ObserveFloat64(g.cost, life.GetCost(), with("model", m.Name, "version", v))
			}
			if s.Window.Requests > 0 {
				for quantile, ms := range map[string]float64{"0.5": s.Window.P50, "0.95": s.Window.P95, "0.99": s.Window.P99} {
					o.ObserveFloat64(g.latency, ms/1000, with("model", m.Name, "version", v, "quantile", quantile))
				}
			}
		}
	}
}

func (a *admin) observeRollouts(o metric.Observer, g *gauges, f *facts.Facts) {
	for _, r := range f.RunningRollouts() {
		o.ObserveFloat64(g.weight, float64(r.CandidateWeight())/10_000, with("rollout", r.ID, "model", r.Model, "candidate", r.Candidate,
			"phase", r.CurrentPhase().Name, "state", string(r.State)))
		if e := a.evidence(r.ID); len(e) > 0 { // the combination of all strata comes first
			labels := with("rollout", r.ID, "model", r.Model, "candidate", r.Candidate)
			o.ObserveFloat64(g.evidence, max(e[0].GetEValue(), e[0].GetSrValue()), labels)
			o.ObserveFloat64(g.limit, e[0].GetThreshold(), labels)
		}
	}
}

func (a *admin) observeExperiments(o metric.Observer, g *gauges, f *facts.Facts) {
	shown := 0
	for _, e := range f.Experiments() {
		if e.State != facts.Running || shown == metricExperiments {
			continue
		}
		shown++
		results, _, err := a.trials.Results(e, a.now())
		if err != nil {
			continue // the call for results says why
		}
		arms, _ := results.AsMap()["arms"].([]any)
		for _, x := range arms {
			arm, _ := x.(map[string]any)
			name, _ := arm["name"].(string)
			units, _ := arm["units"].(float64)
			o.ObserveInt64(g.units, int64(units), with("experiment", e.Name, "arm", name))
			interval, _ := arm["interval"].(map[string]any)
			for bound, v := range map[string]any{"point": arm["value"], "low": interval["low"], "high": interval["high"]} {
				if v, ok := v.(float64); ok && arm["n"] != 0.0 {
					o.ObserveFloat64(g.value, v, with("experiment", e.Name, "arm", name, "bound", bound))
				}
			}
		}
	}
}

func (a *admin) observeState(o metric.Observer, g *gauges, f *facts.Facts) {
	alerts := map[[2]string]int64{}
	for _, severity := range []string{"low", "medium", "high", "critical"} {
		alerts[[2]string{severity, alertFiring}] = 0 // so that a graph falls to nothing, not away
	}
	for _, x := range f.Alerts() {
		if state := a.alertState(x); state != alertResolved {
			alerts[[2]string{x.Severity, state}]++
		}
	}
	for k, n := range alerts {
		o.ObserveInt64(g.alerts, n, with("severity", k[0], "state", k[1]))
	}
	nodes := map[string]int64{"current": 0, "behind": 0, "rejecting": 0, "gone": 0}
	position := a.position()
	for _, n := range a.ledger.Ledger() {
		switch {
		case n.Nack != nil:
			nodes["rejecting"]++
		case !n.Connected:
			nodes["gone"]++
		case n.Acked < position:
			nodes["behind"]++
		default:
			nodes["current"]++
		}
	}
	for state, n := range nodes {
		o.ObserveInt64(g.nodes, n, with("state", state))
	}
}
