package alerting

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

func compile(t *testing.T, r Rule) *Rule {
	t.Helper()
	out, err := Compile([]Rule{r})
	if err != nil {
		t.Fatal(err)
	}
	return &out[0]
}

func known(low, point, high float64) expr.Measure {
	return expr.Measure{Low: low, Point: point, High: high, N: 500, Known: true}
}

// The severity is that of what is certain, not of the best guess.
func TestGrade(t *testing.T) {
	errors := Rule{Metric: "error_rate", Warning: 0.01, Critical: 0.02}
	success := Rule{Metric: "success_rate", Warning: 0.99, Critical: 0.96}
	same := Rule{Metric: "error_rate", Warning: 0.01, Critical: 0.01}
	for _, c := range []struct {
		rule *Rule
		m    expr.Measure
		want Severity
	}{
		{&errors, known(0.0101, 0.05, 0.1), Low},
		{&errors, known(0.0134, 0.05, 0.1), Medium},
		{&errors, known(0.0167, 0.05, 0.1), High},
		{&errors, known(0.0199, 0.05, 0.1), High},
		{&errors, known(0.02, 0.05, 0.1), Critical},
		{&errors, known(1, 1, 1), Critical},
		{&success, known(0.5, 0.9, 0.989), Low},
		{&success, known(0.5, 0.9, 0.979), Medium},
		{&success, known(0.5, 0.9, 0.969), High},
		{&success, known(0.5, 0.9, 0.95), Critical},
		{&same, known(0.011, 0.05, 0.1), Critical},
		{&Rule{Condition: "system_failure", Severity: High}, expr.Exactly(1), High},
	} {
		if got := c.rule.Grade(c.m); got != c.want {
			t.Errorf("%s at %v is %v, want %v", c.rule.Metric, c.m, got, c.want)
		}
	}
}

// The published thresholds are the defaults, and each of them can fire.
func TestDefaultsCanFire(t *testing.T) {
	rules, err := Compile(Defaults())
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string]expr.Measure{"error_rate": known(0.03, 0.05, 0.07), "performance_degradation": known(0.21, 0.5, 0.8), "response_time": known(10_001, 12_000, 15_000)}
	for i := range rules {
		r := &rules[i]
		in, err := r.Read(func(n string) expr.Measure { return bad[n] })
		if err != nil || in.Holds != expr.True || in.Severity != Critical || !strings.Contains(in.Text, r.Metric) {
			t.Errorf("%s: %+v, %v", r.Name, in, err)
		}
		if _, step := Next(Status{}, r, in, time.Unix(0, 0)); step != Raise {
			t.Errorf("%s: %v", r.Name, step)
		}
		in, err = r.Read(func(string) expr.Measure { return expr.Measure{} })
		if err != nil || in.Holds != expr.Unknown {
			t.Errorf("%s without data: %+v, %v", r.Name, in, err)
		}
	}
	if len(rules) != 3 {
		t.Errorf("%d rules", len(rules))
	}
}

// look is one look after some seconds and what must follow from it.
type look struct {
	at     int
	holds  expr.Truth
	sev    Severity
	step   Step
	state  State
	severe Severity
}

func TestNext(t *testing.T) {
	const T, F, U = expr.True, expr.False, expr.Unknown
	for name, c := range map[string]struct {
		wait  time.Duration
		looks []look
	}{
		"at once, once, and over after a while": {0, []look{
			{0, F, 0, Nothing, Inactive, 0}, {1, T, Low, Raise, Firing, Low}, {2, T, Low, Nothing, Firing, Low},
			{3, F, 0, Nothing, Firing, Low}, {17, F, 0, Nothing, Firing, Low}, {18, F, 0, Resolve, Inactive, 0}, {19, F, 0, Nothing, Inactive, 0}}},
		"only escalates": {0, []look{
			{0, T, Medium, Raise, Firing, Medium}, {1, T, Critical, Escalate, Firing, Critical}, {2, T, Low, Nothing, Firing, Critical}, {3, T, Critical, Nothing, Firing, Critical}}},
		"for must pass without interruption": {10 * time.Second, []look{
			{0, T, Low, Nothing, Pending, 0}, {9, T, Low, Nothing, Pending, 0}, {9, U, 0, Nothing, Inactive, 0},
			{10, T, High, Nothing, Pending, 0}, {19, T, High, Nothing, Pending, 0}, {20, T, Medium, Raise, Firing, Medium}}},
		"one look starts the end anew": {0, []look{
			{0, T, Low, Raise, Firing, Low}, {10, F, 0, Nothing, Firing, Low}, {20, T, Low, Nothing, Firing, Low}, {25, F, 0, Nothing, Firing, Low}, {39, F, 0, Nothing, Firing, Low}, {40, F, 0, Resolve, Inactive, 0}}},
		"not known is not over, for a while": {0, []look{
			{0, T, Low, Raise, Firing, Low}, {1, U, 0, Nothing, Firing, Low}, {300, U, 0, Nothing, Firing, Low}, {301, U, 0, Resolve, Inactive, 0}}},
		"certainty is lost and comes back": {0, []look{
			{0, T, Low, Raise, Firing, Low}, {1, F, 0, Nothing, Firing, Low}, {10, U, 0, Nothing, Firing, Low}, {16, F, 0, Nothing, Firing, Low}, {31, F, 0, Resolve, Inactive, 0}}},
		"nothing known raises nothing": {0, []look{{0, U, 0, Nothing, Inactive, 0}, {1000, U, 0, Nothing, Inactive, 0}}},
	} {
		r := &Rule{For: c.wait}
		var s Status
		for _, l := range c.looks {
			var step Step
			s, step = Next(s, r, Reading{Holds: l.holds, Severity: l.sev}, time.Unix(int64(l.at), 0))
			if step != l.step || s.State != l.state || s.Severity != l.severe {
				t.Errorf("%s, at %d: %v, state %d, severity %v; want %+v", name, l.at, step, s.State, s.Severity, l)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	for want, rules := range map[string][]Rule{
		"limit is 100":             make([]Rule, 101),
		"name is empty":            {{Condition: "requests > 1", Severity: Low}},
		"used twice":               {{Name: "a", Metric: "error_rate", Critical: 1}, {Name: "a", Metric: "error_rate", Critical: 1}},
		"for is -1s":               {{Name: "a", Metric: "error_rate", Critical: 1, For: -time.Second}},
		"for is 24h0m1s":           {{Name: "a", Metric: "error_rate", Critical: 1, For: 24*time.Hour + time.Second}},
		"neither a metric":         {{Name: "a", Condition: "requests > 1"}},
		"undeclared reference":     {{Name: "a", Metric: "moon_phase", Critical: 1}},
		"Syntax error":             {{Name: "a", Condition: "error_rate >", Severity: Low}},
		"number or metric (right)": {{Name: "a", Condition: "0.1 < error_rate", Severity: Low}},
	} {
		_, err := Compile(rules)
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := (&Rule{Name: "raw", Metric: "error_rate"}).Read(nil); err == nil {
		t.Error("a rule that was not compiled was read")
	}
	for _, s := range []Severity{Low, Medium, High, Critical} {
		if got, err := ParseSeverity(s.String()); got != s || err != nil {
			t.Errorf("%v: %v, %v", s, got, err)
		}
	}
	for _, text := range []string{"", "none", "fatal"} {
		if _, err := ParseSeverity(text); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A rule of which less is worse reads the other end of the interval.
func TestLessIsWorse(t *testing.T) {
	r := compile(t, Rule{Name: "quality", Metric: "user_satisfaction", Warning: 0.95, Critical: 0.9})
	for m, want := range map[expr.Measure]Reading{
		known(0.7, 0.8, 0.96):                  {Holds: expr.Unknown},
		known(0.97, 0.98, 0.99):                {Holds: expr.False},
		known(0.5, 0.6, 0.7):                   {Holds: expr.True, Severity: Critical},
		{Low: math.Inf(-1), High: math.Inf(1)}: {Holds: expr.Unknown},
	} {
		got, err := r.Read(func(string) expr.Measure { return m })
		if err != nil || got.Holds != want.Holds || got.Severity != want.Severity {
			t.Errorf("%v: %+v, %v; want %+v", m, got, err, want)
		}
	}
}
