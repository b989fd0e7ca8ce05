package dashboard

import (
	"context"
	"encoding/json"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// busy is a view in which every field of the groups has a source.
func busy(t *testing.T) *View {
	t.Helper()
	now := time.Date(2026, 3, 1, 12, 30, 0, 0, time.UTC)
	results, err := structpb.NewStruct(map[string]any{
		"arms": []any{map[string]any{"name": "control", "units": 500, "n": 500, "value": 0.90, "interval": map[string]any{"low": 0.86, "high": 0.93}},
			map[string]any{"name": "treatment", "units": 510, "n": 510, "value": 0.95, "interval": map[string]any{"low": 0.92, "high": 0.97}},
			map[string]any{"name": "late", "units": 0, "n": 0, "value": 0}},
		"primary": []any{map[string]any{"metric": "accuracy", "p": 0.01, "significant": true, "n": 1010, "difference": 0.05, "interval": map[string]any{"low": 0.01, "high": 0.09}}}})
	if err != nil {
		t.Fatal(err)
	}
	return &View{
		Status: &pb.StatusResponse{Now: timestamppb.New(now),
			Models: []*pb.Model{{Name: "chat", Cost: "requests", Versions: []*pb.ModelVersion{
				{Version: "v1", Stats: &pb.VersionStats{Requests: 1000, Failures: 40, MeanMs: 200, Cost: 100}},
				{Version: "v2", Stats: &pb.VersionStats{Requests: 100, Failures: 1, Cancelled: 50, MeanMs: 150, Cost: 12}},
				{Version: "v0", Stats: &pb.VersionStats{Requests: 900}}}}},
			Rollouts: []*pb.Rollout{
				{Id: "old", Model: "chat", Candidate: "v0", LastGood: "v1", State: "rolled_back"},
				{Id: "r", Model: "chat", Candidate: "v2", LastGood: "v1", State: "running", Weight: 250, Phase: 1, Phases: []*pb.RolloutPhase{{Name: "staging"}, {Name: "canary"}},
					Gates:    []*pb.RolloutGateDecided{{Gate: "quality", Outcome: "inconclusive"}},
					Evidence: []*pb.Evidence{{Stratum: "all", CandidateRequests: 100, CandidateFailures: 1, BaselineRequests: 1000, BaselineFailures: 40, EValue: 3, Threshold: 400}, {Stratum: "eu/7", CandidateRequests: 9, EValue: 12, Threshold: 800}}}},
			Alerts: []*pb.Alert{
				{Id: "a", Severity: "high", Since: timestamppb.New(now.Add(-10 * time.Minute)), Summary: "fails", Numbers: map[string]string{"n": "1"}},
				{Id: "b", Severity: "low", Since: timestamppb.New(now.Add(-2 * time.Hour)), ResolvedAt: timestamppb.New(now), SilencedUntil: timestamppb.New(now.Add(time.Hour))},
				{Id: "c", Severity: "low", Since: timestamppb.New(now.Add(-48 * time.Hour)), SilencedUntil: timestamppb.New(now.Add(time.Hour))}}},
		Experiments: []*pb.ExperimentResultsResponse{
			{Experiment: &pb.Experiment{Name: "draft", State: "draft"}},
			{Experiment: &pb.Experiment{Name: "ab", Model: "chat", State: "running", Arms: []*pb.ExperimentArm{{Name: "control", Version: "v1"}, {Name: "treatment", Version: "v2"}}}, Results: results}}}
}

func near(t *testing.T, what string, got *float64, want float64) {
	t.Helper()
	if got == nil || math.Abs(*got-want) > 1e-9 {
		t.Errorf("%s is %v, want %g", what, realText(got), want)
	}
}

// Every field of the published groups, from numbers that can be checked by hand.
func TestGroups(t *testing.T) {
	g := busy(t).Groups()
	if o := g.Overview; o.TotalExecutions != 2000 || o.DspyExecutions != 100 || o.TraditionalExecutions != 1000 {
		t.Errorf("%+v", o)
	}
	near(t, "success rate", g.Overview.SuccessRate, 1-41./1950)
	near(t, "mean time", g.Overview.AverageResponseTime, (1000*200.+100*150)/2000)
	p := g.Performance
	near(t, "under test", p.Dspy.SuccessRate, 0.98)
	near(t, "baseline", p.Traditional.SuccessRate, 0.96)
	near(t, "its time", p.Dspy.AverageResponseTime, 150)
	near(t, "failures avoided", p.Dspy.OptimizationEffectiveness, 0.5)
	near(t, "time saved", p.Comparison.PerformanceImprovement, 0.25)
	near(t, "cost", p.Comparison.CostComparison, 0.2)
	near(t, "quality", p.Comparison.QualityImprovement, 0.05)
	if len(g.Experiments) != 1 || g.Experiments[0].Participants != 1010 || len(g.Experiments[0].Results) != 3 || g.Experiments[0].Results[2].Value != nil || !g.Experiments[0].Significance.Significant {
		t.Errorf("%+v", g.Experiments)
	}
	near(t, "an interval", g.Experiments[0].Results[1].Low, 0.92)
	if a := g.Alerts; len(a.Active) != 2 || len(a.Recent) != 2 || len(a.Trends) != 24 || a.Trends[23].Raised != 1 || a.Trends[21].Raised != 1 ||
		a.Active[0].State != "firing" || a.Active[1].State != "silenced" || a.Recent[1].State != "resolved" {
		t.Errorf("%+v", a)
	}
	d := g.Deployment
	if *d.CurrentPhase != "canary" || *d.RolloutPercentage != 2.5 || *d.CanaryHealth != "suspect" || d.PhaseMetrics.CandidateFailures != 1 || d.PhaseMetrics.Gates["quality"] != "inconclusive" || len(d.All) != 1 {
		t.Errorf("%+v", d)
	}
}

// What is not known is null, and never a number.
func TestGroupsWithoutData(t *testing.T) {
	g := (&View{Status: &pb.StatusResponse{Now: timestamppb.Now()}}).Groups()
	raw, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"success_rate":null`, `"average_response_time":null`, `"performance_improvement":null`, `"cost_comparison":null`, `"quality_improvement":null`,
		`"current_phase":null`, `"canary_health":null`, `"experiments":[]`, `"active_alerts":[]`, `"all":[]`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("no %s in %s", want, raw)
		}
	}
}

func TestHealth(t *testing.T) {
	e := func(n uint64, strength float64) *pb.Evidence {
		return &pb.Evidence{CandidateRequests: n, EValue: strength, Threshold: 100}
	}
	for _, c := range []struct {
		state, want string
		of          []*pb.Evidence
	}{
		{"running", "no data", nil}, {"running", "no data", []*pb.Evidence{e(0, 1)}}, {"running", "healthy", []*pb.Evidence{e(5, 1), e(0, 1)}},
		{"running", "suspect", []*pb.Evidence{e(5, 1), e(5, 10)}}, {"running", "failing", []*pb.Evidence{e(5, 10), e(5, 100)}}, {"rolling_back", "failing", []*pb.Evidence{e(5, 1)}},
	} {
		if got := health(c.of, c.state); got != c.want {
			t.Errorf("%v %s: %s, want %s", c.of, c.state, got, c.want)
		}
	}
}

// The four dashboards have their groups, as JSON and on one page; others are not found.
func TestDashboards(t *testing.T) {
	d := newDashboard(t, func(o *Options) { o.View = func(context.Context, Moment) (*View, error) { return busy(t), nil } })
	for path, want := range map[string][]string{
		"/data":                        {"overview", "performance", "experiments", "alerts", "deployment"},
		"/data/production_overview":    {"overview", "deployment", "alerts"},
		"/data/experiment_results":     {"experiments"},
		"/data/performance_comparison": {"performance"},
		"/data/alert_summary":          {"alerts"},
	} {
		w := get(d, path)
		var got map[string]json.RawMessage
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != http.StatusOK || len(got) != len(want) {
			t.Errorf("%s: %d, %v, %d groups", path, w.Code, err, len(got))
		}
		for _, k := range want {
			if got[k] == nil {
				t.Errorf("%s has no %s", path, k)
			}
		}
	}
	if w := get(d, "/data/moon_phase"); w.Code != http.StatusNotFound {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	page := get(d, "/dashboards").Body.String()
	for _, want := range []string{"98.00 %", "&#43;25.0 %", "&#43;20.0 %", "significant", "canary", "2.5 %", "suspect"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q", want)
		}
	}
}

// A page shows where each version answers and how fast, and who was told of an alert.
func TestPlacesAndDeliveries(t *testing.T) {
	v := busy(t)
	v.Places = []Place{{Model: "chat", Version: "v1", Region: "us", Requests: 10, P50: 20, P99: 90, Of: 10}, {Model: "chat", Version: "v1", Region: "eu", Requests: 7, Failures: 7, Of: 7}, {Model: "chat", Version: "v2", Region: "us", Requests: 3}}
	if m := v.Matrix(); strings.Join(m.Regions, " ") != "eu us" || len(m.Lines) != 2 || m.Lines[0].Cells[0].Failures != 7 || m.Lines[1].Cells[0] != nil || m.Lines[1].Cells[1].Requests != 3 {
		t.Errorf("%+v", m)
	}
	v.Status.Alerts[0].Deliveries = []*pb.AlertDelivery{{Contacts: []string{"sales"}, Error: "no route reaches sales"},
		{Route: "pager", Contacts: []string{"engineering"}, Told: "high", Delivered: true, Attempts: 1, At: timestamppb.Now()},
		{Route: "chat", Told: "high", Attempts: 3, Error: "status 503"}, {Route: "dead", Told: "high", Attempts: 15, Error: "status 500", At: timestamppb.Now()}}
	d := newDashboard(t, func(o *Options) { o.View = func(context.Context, Moment) (*View, error) { return v, nil } })
	page := get(d, "/alerts").Body.String()
	for _, want := range []string{"no route reaches sales", "pager (engineering) was told, high", "chat is being told: 3 attempts, status 503", "dead was not told: given up after 15 attempts, status 500"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q", want)
		}
	}
	if regions := get(d, "/regions").Body.String(); !strings.Contains(regions, "20 ms, 99th 90 ms") || !strings.Contains(regions, "100.00 % failing") {
		t.Errorf("the matrix is not on the page of regions")
	}
}

// The page of experiments draws the interval of each arm that has data.
func TestExperimentIntervals(t *testing.T) {
	x := trialOf(busy(t).Experiments[1])
	if len(x.Arms) != 3 || !x.Arms[0].Plot || !x.Arms[1].Plot || x.Arms[2].Plot || x.Arms[1].Text != "0.92 to 0.97" || x.Arms[1].Units != "510" {
		t.Errorf("%+v", x.Arms)
	}
}
