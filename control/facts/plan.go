package facts

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Metrics that sidecars report per unit without being asked.
const (
	MetricErrorRate    = "error_rate"    // failed requests per request
	MetricSuccessRate  = "success_rate"  // requests that did not fail, per request
	MetricResponseTime = "response_time" // milliseconds per request
	MetricFailedUnits  = "failed_units"  // share of units with a failed request
)

// reported are the definitions of what sidecars report.
func reported(name string) (experiments.Metric, bool) {
	m := experiments.Metric{Name: name, Kind: experiments.KindRatio, LowerIsBetter: true}
	switch name {
	case MetricErrorRate, MetricResponseTime:
	case MetricSuccessRate:
		m.LowerIsBetter = false
	case MetricFailedUnits:
		m.Kind = experiments.KindProportion
	default:
		return experiments.Metric{}, false
	}
	return m, true
}

// metricOf is the definition of a plan's metric. declared is false for a name that nothing
// reports and that comes without a kind: the wish stays in the plan, but no rule may rest
// on it.
func metricOf(m *pb.ExperimentMetric) (def experiments.Metric, declared bool, err error) {
	if def, ok := reported(m.GetName()); ok {
		return def, true, nil
	}
	def = experiments.Metric{Name: m.GetName(), Kind: experiments.MetricKind(cmp.Or(m.GetKind(), string(experiments.KindRatio))), LowerIsBetter: m.GetLowerIsBetter()}
	switch def.Kind {
	case experiments.KindRatio, experiments.KindMean, experiments.KindProportion:
		return def, m.GetKind() != "", nil
	}
	return def, false, outrigger.Errorf(outrigger.Invalid, "metric %q has kind %q; give %s, %s or %s", def.Name, def.Kind,
		experiments.KindRatio, experiments.KindMean, experiments.KindProportion)
}

// ReportedBySidecars says whether a metric's values come from sidecars, so that nobody
// else may give them.
func ReportedBySidecars(name string) bool {
	_, ok := reported(name)
	return ok
}

func metricNames() string {
	return strings.Join([]string{MetricErrorRate, MetricSuccessRate, MetricResponseTime, MetricFailedUnits}, ", ")
}

// PlanOf turns the plan of an experiment with these arms into what is judged by, and
// freezes it. Defaults: method cs, alpha 0.05, power 0.8, 5 looks, control the arm of
// that name, else the first; the spread of a rate without sd is √(p(1−p)) of the
// baseline p, that of one request per unit. A metric that sidecars do not report is fed by
// outcomes and OTLP; to decide or to guard it must say its kind. Errors have kind Invalid and name
// field, value and what is allowed.
func PlanOf(arms []ExperimentArm, p *pb.ExperimentPlan) (experiments.Plan, error) {
	out := experiments.Plan{MinDuration: p.GetMinDuration().AsDuration(), MaxDuration: p.GetMaxDuration().AsDuration(),
		MinUnits: p.GetMinUnits(), UnitsPerArm: p.GetUnitsPerArm(),
		Goal: experiments.Goal{Baseline: p.GetBaseline(), SD: p.GetSd(), MDE: p.GetMde(), Alpha: cmp.Or(p.GetAlpha(), 0.05),
			Power: cmp.Or(p.GetPower(), 0.8), Method: experiments.Method(cmp.Or(p.GetMethod(), string(experiments.MethodCS))),
			Looks: int(p.GetLooks()), Tuning: p.GetTuning()}}
	if out.Goal.Method == experiments.MethodOBF {
		out.Goal.Looks = cmp.Or(out.Goal.Looks, 5)
	}
	if m := out.Goal.Method; m == experiments.MethodEProcess {
		return out, outrigger.Errorf(outrigger.Invalid, "method is %q; reports of several sidecars have no order, so use cs, obf or fixed", m)
	}
	out.Control = controlOf(arms, p.GetControl())
	if !slices.ContainsFunc(arms, func(a ExperimentArm) bool { return a.Name == out.Control }) {
		return out, outrigger.Errorf(outrigger.Invalid, "control is %q; arms are %s", out.Control, armNames(arms))
	}
	for _, a := range arms {
		if a.Name != out.Control {
			out.Treatments = append(out.Treatments, a.Name)
		}
	}
	if err := planMetrics(&out, p); err != nil {
		return out, err
	}
	return out.Freeze()
}

func controlOf(arms []ExperimentArm, wish string) string {
	if wish != "" || len(arms) == 0 {
		return wish
	}
	for _, a := range arms {
		if a.Name == "control" {
			return a.Name
		}
	}
	return arms[0].Name
}

func armNames(arms []ExperimentArm) string {
	names := make([]string, len(arms))
	for i, a := range arms {
		names[i] = a.Name
	}
	return strings.Join(names, ", ")
}

func planMetrics(out *experiments.Plan, p *pb.ExperimentPlan) error {
	if len(p.GetMetrics()) == 0 {
		return outrigger.Errorf(outrigger.Invalid, "metrics is empty; name the one that decides, of %s", metricNames())
	}
	for i, m := range p.GetMetrics() {
		def, declared, err := metricOf(m)
		switch {
		case err != nil:
			return err
		case i == 0 && !declared:
			return outrigger.Errorf(outrigger.Invalid, "metrics[0] is %q, which sidecars do not report, and it decides; put one of %s first, or say its kind (ratio, mean, proportion) if outcomes or OTLP bring it",
				m.GetName(), metricNames())
		case i == 0:
			out.Primary = def
		default:
			out.Secondary = append(out.Secondary, def)
		}
	}
	for _, g := range p.GetGuardrails() {
		def, declared, err := metricOf(g)
		if err != nil {
			return err
		}
		if !declared {
			return outrigger.Errorf(outrigger.Invalid, "guardrail %q is not reported by sidecars; use one of %s, or say its kind (ratio, mean, proportion)", g.GetName(), metricNames())
		}
		out.Guardrails = append(out.Guardrails, experiments.Guardrail{Metric: def, Margin: g.GetMargin()})
	}
	goal := &out.Goal
	if rate := out.Primary.Name == MetricErrorRate || out.Primary.Name == MetricSuccessRate; rate && goal.SD == 0 {
		if !(goal.Baseline > 0 && goal.Baseline < 1) {
			return outrigger.Errorf(outrigger.Invalid, "baseline is %v; for %s give the control's rate, in (0, 1), or sd", goal.Baseline, out.Primary.Name)
		}
		goal.SD = math.Sqrt(goal.Baseline * (1 - goal.Baseline))
	}
	return nil
}

// FrozenPB is the plan with everything filled in that PlanOf fills in; PlanOf of it is
// the same plan again.
func FrozenPB(p *pb.ExperimentPlan, frozen experiments.Plan) *pb.ExperimentPlan {
	metric := func(m experiments.Metric, margin float64) *pb.ExperimentMetric {
		return &pb.ExperimentMetric{Name: m.Name, Kind: string(m.Kind), LowerIsBetter: m.LowerIsBetter, Margin: margin}
	}
	out := &pb.ExperimentPlan{Control: frozen.Control, Method: string(frozen.Goal.Method), Baseline: frozen.Goal.Baseline, Sd: frozen.Goal.SD,
		Mde: frozen.Goal.MDE, Alpha: frozen.Goal.Alpha, Power: frozen.Goal.Power, Looks: uint32(frozen.Goal.Looks), Tuning: frozen.Goal.Tuning,
		MinDuration: span(frozen.MinDuration), MaxDuration: span(frozen.MaxDuration), MinUnits: frozen.MinUnits, UnitsPerArm: frozen.UnitsPerArm,
		KeepChampion: p.GetKeepChampion(), Metrics: []*pb.ExperimentMetric{metric(frozen.Primary, 0)}}
	for _, m := range frozen.Secondary {
		out.Metrics = append(out.Metrics, metric(m, 0))
	}
	for _, g := range frozen.Guardrails {
		out.Guardrails = append(out.Guardrails, metric(g.Metric, g.Margin))
	}
	return out
}

func span(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// transition reads an event as a step of the experiment's life; ok is false for one that
// changes arms only.
func transition(e *Experiment, p *pb.ExperimentChanged, at time.Time) (t experiments.Transition, ok bool, err error) {
	t = experiments.Transition{To: experiments.State(p.GetState()), At: at, Look: p.GetLook(), Outcome: experiments.Outcome(p.GetOutcome()),
		Serve: p.GetServe(), Cause: experiments.Cause(p.GetCause())}
	if t.To == experiments.StateStopped && t.Cause == "" {
		t.Cause = experiments.CauseManual
	}
	if t.To == experiments.StatePlanned {
		plan, err := PlanOf(e.Arms, p.GetPlan())
		if err != nil {
			return t, false, err
		}
		t.Plan = &plan
	}
	return t, t.Look != 0 || t.Plan != nil || t.To != e.Life.State, nil
}

// ExperimentAt names the experiment whose split was in force for a model in a weight
// epoch: the running one, or else one that ended; "" if there was none.
func (f *Facts) ExperimentAt(model string, epoch uint64) string {
	m := f.models[model]
	if m == nil {
		return ""
	}
	if e := f.experiments[m.Experiment]; e != nil && slices.Contains(e.Epochs, epoch) {
		return e.Name
	}
	return f.epochs[epoch]
}
