package dashboard

import (
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Groups are the five groups of figures of the published deployment strategy, with the
// field names it gives them. "dspy" there is what is under test: the candidates of rollouts
// under way and the treatments of running experiments. "traditional" is what it is compared
// with: their last good versions and control arms. A field without data is null; times are
// milliseconds, shares 0..1, counts since this replica started.
type Groups struct {
	Overview    OverviewGroup     `json:"overview"`
	Performance PerformanceGroup  `json:"performance"`
	Experiments []ExperimentGroup `json:"experiments"`
	Alerts      AlertGroup        `json:"alerts"`
	Deployment  DeploymentGroup   `json:"deployment"`
}

// OverviewGroup counts requests of all models.
type OverviewGroup struct {
	TotalExecutions       uint64   `json:"total_executions"`
	DspyExecutions        uint64   `json:"dspy_executions"`
	TraditionalExecutions uint64   `json:"traditional_executions"`
	SuccessRate           *float64 `json:"success_rate"`
	AverageResponseTime   *float64 `json:"average_response_time"`
}

// PerformanceGroup compares the two sides.
type PerformanceGroup struct {
	Dspy        SidePerformance `json:"dspy_performance"`
	Traditional SidePerformance `json:"traditional_performance"`
	Comparison  Comparison      `json:"comparison"`
}

// SidePerformance is one side. OptimizationEffectiveness, of what is under test only, is the
// share of the other side's failures that it avoids: 1 − its failing share / the other's.
type SidePerformance struct {
	SuccessRate               *float64 `json:"success_rate"`
	AverageResponseTime       *float64 `json:"average_response_time"`
	OptimizationEffectiveness *float64 `json:"optimization_effectiveness,omitempty"`
}

// Comparison is what is under test against the other side. PerformanceImprovement is the
// share of the mean response time that is saved; CostComparison is cost per request by the
// models' formulas, relative, less one; QualityImprovement is the difference of the primary
// metric of the first running experiment with data. What it is the metric of, and within
// which interval, is in the group of experiments.
type Comparison struct {
	PerformanceImprovement *float64 `json:"performance_improvement"`
	CostComparison         *float64 `json:"cost_comparison"`
	QualityImprovement     *float64 `json:"quality_improvement"`
}

// ExperimentGroup is one running experiment. Significance holds at every look.
type ExperimentGroup struct {
	ID           string              `json:"id"`
	Name         string              `json:"name"`
	Status       string              `json:"status"`
	Participants uint64              `json:"participants"`
	Results      []ExperimentOutcome `json:"results"`
	Significance *Significance       `json:"statistical_significance"`
}

// ExperimentOutcome is one arm: the primary metric with its interval.
type ExperimentOutcome struct {
	Arm   string   `json:"arm"`
	Units uint64   `json:"units"`
	Value *float64 `json:"value"`
	Low   *float64 `json:"low"`
	High  *float64 `json:"high"`
}

// Significance is that of the first treatment against the control.
type Significance struct {
	Metric      string   `json:"metric"`
	P           *float64 `json:"p"`
	Significant bool     `json:"significant"`
	Difference  *float64 `json:"difference"`
	Low         *float64 `json:"low"`
	High        *float64 `json:"high"`
}

// AlertGroup are alerts: those that stand, those raised in the last day, and how many were
// raised in each of its hours, the oldest first.
type AlertGroup struct {
	Active []AlertLine  `json:"active_alerts"`
	Recent []AlertLine  `json:"recent_alerts"`
	Trends []AlertCount `json:"alert_trends"`
}

// AlertLine is one alert.
type AlertLine struct {
	ID       string            `json:"id"`
	Severity string            `json:"severity"`
	State    string            `json:"state"`
	Summary  string            `json:"summary"`
	Since    time.Time         `json:"since"`
	Numbers  map[string]string `json:"numbers"`
}

// AlertCount is one hour.
type AlertCount struct {
	Hour   time.Time `json:"hour"`
	Raised int       `json:"raised"`
}

// DeploymentGroup is the rollout that began last of those under way; All are all of them.
type DeploymentGroup struct {
	CurrentPhase      *string          `json:"current_phase"`
	PhaseMetrics      *PhaseMetrics    `json:"phase_metrics"`
	RolloutPercentage *float64         `json:"rollout_percentage"`
	CanaryHealth      *string          `json:"canary_health"`
	All               []DeploymentLine `json:"all"`
}

// DeploymentLine is one rollout under way.
type DeploymentLine struct {
	Rollout           string       `json:"rollout"`
	Model             string       `json:"model"`
	Candidate         string       `json:"candidate"`
	CurrentPhase      string       `json:"current_phase"`
	PhaseMetrics      PhaseMetrics `json:"phase_metrics"`
	RolloutPercentage float64      `json:"rollout_percentage"` // of the candidate, 0..100
	CanaryHealth      string       `json:"canary_health"`      // healthy, suspect, failing, no data
}

// PhaseMetrics is the evidence of the present phase, all strata together, and its gates.
type PhaseMetrics struct {
	CandidateRequests uint64            `json:"candidate_requests"`
	CandidateFailures uint64            `json:"candidate_failures"`
	BaselineRequests  uint64            `json:"baseline_requests"`
	BaselineFailures  uint64            `json:"baseline_failures"`
	Evidence          float64           `json:"evidence"`
	Threshold         float64           `json:"threshold"`
	Gates             map[string]string `json:"gates"` // pass, fail, inconclusive by name
}

// suspectEvidence is the odds above which a candidate is not called healthy any more.
const suspectEvidence = 10

// sums of one side.
type sums struct {
	requests, failures, cancelled uint64
	ms, cost                      float64
	priced                        uint64 // requests of models with a formula
}

func (s *sums) add(m *pb.Model, x *pb.VersionStats) {
	s.requests, s.failures, s.cancelled = s.requests+x.GetRequests(), s.failures+x.GetFailures(), s.cancelled+x.GetCancelled()
	s.ms += x.GetMeanMs() * float64(x.GetRequests())
	if m.GetCost() != "" {
		s.cost, s.priced = s.cost+x.GetCost(), s.priced+x.GetRequests()
	}
}

// ratio is nil without a whole.
func ratio(part, whole float64) *float64 {
	if whole <= 0 {
		return nil
	}
	x := part / whole
	return &x
}

// less is 1 − a/b where both are known.
func less(a, b *float64) *float64 {
	if a == nil || b == nil || *b <= 0 {
		return nil
	}
	x := 1 - *a / *b
	return &x
}

func (s *sums) failing() *float64 {
	ended := s.requests - min(s.requests, s.cancelled)
	return ratio(float64(min(s.failures, ended)), float64(ended))
}

func (s *sums) success() *float64 {
	if f := s.failing(); f != nil {
		x := 1 - *f
		return &x
	}
	return nil
}

func (s *sums) mean() *float64 {
	if s.ms <= 0 { // reporters that do not add times up
		return nil
	}
	return ratio(s.ms, float64(s.requests))
}

// Groups computes the figures.
func (v *View) Groups() Groups {
	var g Groups
	total, tested, other := v.sides()
	g.Overview = OverviewGroup{TotalExecutions: total.requests, DspyExecutions: tested.requests, TraditionalExecutions: other.requests,
		SuccessRate: total.success(), AverageResponseTime: total.mean()}
	g.Performance.Dspy = SidePerformance{SuccessRate: tested.success(), AverageResponseTime: tested.mean(), OptimizationEffectiveness: less(tested.failing(), other.failing())}
	g.Performance.Traditional = SidePerformance{SuccessRate: other.success(), AverageResponseTime: other.mean()}
	c := &g.Performance.Comparison
	c.PerformanceImprovement = less(tested.mean(), other.mean())
	if saved := less(ratio(tested.cost, float64(tested.priced)), ratio(other.cost, float64(other.priced))); saved != nil {
		x := -*saved
		c.CostComparison = &x
	}
	g.Experiments = v.experimentGroups()
	for _, e := range g.Experiments {
		if c.QualityImprovement == nil && e.Significance != nil {
			c.QualityImprovement = e.Significance.Difference
		}
	}
	g.Alerts, g.Deployment = v.alertGroup(), v.deploymentGroup()
	return g
}

// sides sums all versions, those under test and those they are compared with.
func (v *View) sides() (total, tested, other sums) {
	type version struct{ model, name string }
	under, against := map[version]bool{}, map[version]bool{}
	for _, r := range v.Running() {
		under[version{r.GetModel(), r.GetCandidate()}] = true
		against[version{r.GetModel(), r.GetLastGood()}] = true
	}
	for _, e := range v.Experiments {
		if x := e.GetExperiment(); x.GetState() == "running" {
			for i, arm := range x.GetArms() {
				if i > 0 {
					under[version{x.GetModel(), arm.GetVersion()}] = true
				} else {
					against[version{x.GetModel(), arm.GetVersion()}] = true
				}
			}
		}
	}
	for _, m := range v.Status.GetModels() {
		for _, x := range m.GetVersions() {
			total.add(m, x.GetStats())
			switch at := (version{m.GetName(), x.GetVersion()}); {
			case under[at]:
				tested.add(m, x.GetStats())
			case against[at]:
				other.add(m, x.GetStats())
			}
		}
	}
	return total, tested, other
}

func (v *View) experimentGroups() []ExperimentGroup {
	out := []ExperimentGroup{}
	number := func(x any) *float64 {
		if f, ok := x.(float64); ok {
			return &f
		}
		return nil
	}
	within := func(m map[string]any) (low, high *float64) {
		i, _ := m["interval"].(map[string]any)
		return number(i["low"]), number(i["high"])
	}
	for _, e := range v.Experiments {
		x := e.GetExperiment()
		if x.GetState() != "running" {
			continue
		}
		g := ExperimentGroup{ID: x.GetName(), Name: x.GetName(), Status: x.GetState(), Results: []ExperimentOutcome{}}
		res := e.GetResults().AsMap()
		arms, _ := res["arms"].([]any)
		for _, a := range arms {
			m, _ := a.(map[string]any)
			name, _ := m["name"].(string)
			units, _ := m["units"].(float64)
			o := ExperimentOutcome{Arm: name, Units: uint64(units)}
			if m["n"] != 0.0 {
				o.Value = number(m["value"])
				o.Low, o.High = within(m)
			}
			g.Participants += o.Units
			g.Results = append(g.Results, o)
		}
		if primary, _ := res["primary"].([]any); len(primary) > 0 {
			m, _ := primary[0].(map[string]any)
			metric, _ := m["metric"].(string)
			significant, _ := m["significant"].(bool)
			g.Significance = &Significance{Metric: metric, P: number(m["p"]), Significant: significant}
			if n, _ := m["n"].(float64); n > 0 {
				g.Significance.Difference = number(m["difference"])
				g.Significance.Low, g.Significance.High = within(m)
			}
		}
		out = append(out, g)
	}
	return out
}

// now is when the view is of.
func (v *View) now() time.Time {
	if !v.At.IsZero() {
		return v.At
	}
	return v.Status.GetNow().AsTime()
}

func (v *View) alertGroup() AlertGroup {
	g := AlertGroup{Active: []AlertLine{}, Recent: []AlertLine{}}
	hour := v.now().UTC().Truncate(time.Hour)
	for i := range 24 {
		g.Trends = append(g.Trends, AlertCount{Hour: hour.Add(time.Duration(i-23) * time.Hour)})
	}
	for _, a := range v.Status.GetAlerts() {
		since := a.GetSince()
		if since == nil {
			since = a.GetRaisedAt()
		}
		line := AlertLine{ID: a.GetId(), Severity: a.GetSeverity(), State: alertState(a, v.now()), Summary: a.GetSummary(), Since: since.AsTime(), Numbers: a.GetNumbers()}
		if a.GetResolvedAt() == nil {
			g.Active = append(g.Active, line)
		}
		if i := slices.IndexFunc(g.Trends, func(c AlertCount) bool { return c.Hour.Equal(line.Since.Truncate(time.Hour)) }); i >= 0 {
			g.Trends[i].Raised++
			g.Recent = append(g.Recent, line)
		}
	}
	return g
}

// alertState is firing, silenced or resolved.
func alertState(a *pb.Alert, now time.Time) string {
	switch {
	case a.GetResolvedAt() != nil:
		return "resolved"
	case a.GetSilencedUntil() != nil && now.Before(a.GetSilencedUntil().AsTime()):
		return "silenced"
	}
	return "firing"
}

func (v *View) deploymentGroup() DeploymentGroup {
	g := DeploymentGroup{All: []DeploymentLine{}}
	running := v.Running()
	slices.SortStableFunc(running, func(x, y *pb.Rollout) int { return y.GetStartedAt().AsTime().Compare(x.GetStartedAt().AsTime()) })
	for _, r := range running {
		line := DeploymentLine{Rollout: r.GetId(), Model: r.GetModel(), Candidate: r.GetCandidate(), RolloutPercentage: float64(r.GetWeight()) / 100, CanaryHealth: "no data"}
		if i := int(r.GetPhase()); i < len(r.GetPhases()) {
			line.CurrentPhase = r.GetPhases()[i].GetName()
		}
		line.PhaseMetrics.Gates = map[string]string{}
		for _, gate := range r.GetGates() {
			line.PhaseMetrics.Gates[gate.GetGate()] = gate.GetOutcome()
		}
		if e := r.GetEvidence(); len(e) > 0 {
			m := &line.PhaseMetrics
			m.CandidateRequests, m.CandidateFailures, m.BaselineRequests, m.BaselineFailures = e[0].GetCandidateRequests(), e[0].GetCandidateFailures(), e[0].GetBaselineRequests(), e[0].GetBaselineFailures()
			m.Evidence, m.Threshold = max(e[0].GetEValue(), e[0].GetSrValue()), e[0].GetThreshold()
			line.CanaryHealth = health(e, r.GetState())
		}
		g.All = append(g.All, line)
	}
	if len(g.All) > 0 {
		first := &g.All[0]
		g.CurrentPhase, g.PhaseMetrics, g.RolloutPercentage, g.CanaryHealth = &first.CurrentPhase, &first.PhaseMetrics, &first.RolloutPercentage, &first.CanaryHealth
	}
	return g
}

// health is that of the worst stratum.
func health(evidence []*pb.Evidence, state string) string {
	out := "no data"
	for _, e := range evidence {
		strength := max(e.GetEValue(), e.GetSrValue())
		switch {
		case strength >= e.GetThreshold() || state == "rolling_back" || state == "draining":
			return "failing"
		case strength >= suspectEvidence:
			out = "suspect"
		case e.GetCandidateRequests() > 0 && out == "no data":
			out = "healthy"
		}
	}
	return out
}

// named are the four dashboards of the published strategy and the groups that each has.
var named = []struct {
	Name, Title string
	Groups      []string
}{
	{"production_overview", "Production overview", []string{"overview", "deployment", "alerts"}},
	{"experiment_results", "Experiment results", []string{"experiments"}},
	{"performance_comparison", "Performance comparison", []string{"performance"}},
	{"alert_summary", "Alert summary", []string{"alerts"}},
}

// only keeps the groups of one dashboard; "" keeps all. ok is false for an unknown name.
func (g Groups) only(name string) (out map[string]any, ok bool) {
	all := map[string]any{"overview": g.Overview, "performance": g.Performance, "experiments": g.Experiments, "alerts": g.Alerts, "deployment": g.Deployment}
	if name == "" {
		return all, true
	}
	out = map[string]any{}
	for _, d := range named {
		if d.Name == name {
			for _, k := range d.Groups {
				out[k] = all[k]
			}
			return out, true
		}
	}
	return nil, false
}

// data serves the groups as JSON: all of them, or those of one dashboard; ?at= as on pages.
func (d *Dashboard) data(w http.ResponseWriter, r *http.Request) {
	m, err := moment(r.URL.Query().Get("at"))
	if err != nil {
		status.WriteHTTP(w, err)
		return
	}
	v, err := d.opts.View(r.Context(), m)
	if err != nil {
		status.WriteHTTP(w, err)
		return
	}
	out, ok := v.Groups().only(r.PathValue("name"))
	if !ok {
		status.WriteHTTP(w, outrigger.Errorf(outrigger.NotFound, "dashboard %q not found; there are production_overview, experiment_results, performance_comparison and alert_summary", clip(r.PathValue("name"))))
		return
	}
	raw, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		status.WriteHTTP(w, outrigger.Wrap(outrigger.Internal, err, "encode the dashboard"))
		return
	}
	w.Header().Set("content-type", "application/json")
	w.Header().Set("cache-control", "no-store")
	_, _ = w.Write(append(raw, '\n')) // nobody is left to tell
}
