// Package alerting decides when an alert is raised, escalates and is over.
//
// A Rule is a condition over metrics that are known within intervals (internal/expr, the
// metrics of package deploy). Its alert stands for one subject, usually one version of a
// model:
//
//	inactive ──certainly holds──▶ pending ──for Rule.For──▶ firing ──over──▶ inactive
//
// # Promises
//
//   - An alert is raised only while its condition certainly holds: the whole interval lies
//     beyond the threshold. No data raises nothing.
//   - It is raised once and then only escalates: while it fires its severity never falls,
//     so nobody is told twice about the same thing, and never less than before.
//   - It is over when the condition has certainly not held for ResolveAfter, or has not
//     been known to hold for StaleAfter. One look in between starts that time anew.
//   - Severity follows from the distance between what is certain and the thresholds:
//     a metric of which only "above warning" is certain is low, and it is critical once
//     "at or above critical" is. See Rule.Grade.
//
// Everything is a pure function of its arguments and safe for concurrent use. Bad rules are
// refused by Compile with kind Invalid, naming rule and fault; nothing panics.
package alerting

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// How long a condition must not hold until its alert is over: certainly not, or not known to.
const (
	ResolveAfter = 15 * time.Second
	StaleAfter   = 5 * time.Minute
)

// Bounds of rules: how many, and how long one may wait.
const (
	MaxRules = 100
	MaxFor   = 24 * time.Hour
)

// Severity orders alerts. The zero value is no severity.
type Severity uint8

// The severities, as they are written in events, routes and rules.
const (
	None Severity = iota
	Low
	Medium
	High
	Critical
)

var severityNames = [...]string{"none", "low", "medium", "high", "critical"}

// String returns "low" to "critical", or "none".
func (s Severity) String() string { return severityNames[min(s, Critical)] }

// ParseSeverity reads "low" to "critical". The error has kind Invalid.
func ParseSeverity(text string) (Severity, error) {
	if i := slices.Index(severityNames[1:], text); i >= 0 {
		return Severity(i + 1), nil
	}
	return None, outrigger.Errorf(outrigger.Invalid, "severity %q is not one of low, medium, high, critical", text)
}

// Rule is one condition and how bad it is. Either Metric has two thresholds, and the
// severity follows from the distance, or Condition and Severity are given.
type Rule struct {
	// Name identifies the rule; its alerts are called "<name> of <subject>".
	Name string
	// Condition is what raises the alert; empty = Metric beyond Warning.
	Condition string
	// For is how long the condition must hold without interruption; 0 = one look suffices.
	For time.Duration
	// Severity of a rule that has no thresholds.
	Severity Severity
	// Metric, Warning and Critical grade the severity, in the metric's unit (shares 0..1,
	// milliseconds). Critical below Warning means that less is worse.
	Metric            string
	Warning, Critical float64

	compiled *expr.Condition
}

// Defaults are the thresholds of the published deployment strategy: they hold where no
// deployment plan has alerts of its own. Response times are 95th percentiles.
func Defaults() []Rule {
	return []Rule{
		{Name: "error_rate", Metric: "error_rate", Warning: 0.01, Critical: 0.02},
		{Name: deploy.MetricDegradation, Metric: deploy.MetricDegradation, Warning: 0.1, Critical: 0.2},
		{Name: "response_time", Metric: "response_time", Warning: 5_000, Critical: 10_000},
	}
}

// Compile checks rules and makes them ready for Read. The argument is not modified.
func Compile(rules []Rule) ([]Rule, error) {
	if len(rules) > MaxRules {
		return nil, outrigger.Errorf(outrigger.Invalid, "%d alert rules; the limit is %d", len(rules), MaxRules)
	}
	out := slices.Clone(rules)
	for i := range out {
		r := &out[i]
		err := outrigger.CheckName("name", r.Name)
		switch {
		case err != nil:
		case slices.ContainsFunc(out[:i], func(o Rule) bool { return o.Name == r.Name }):
			err = outrigger.Errorf(outrigger.Invalid, "the name is used twice")
		case r.For < 0 || r.For > MaxFor:
			err = outrigger.Errorf(outrigger.Invalid, "for is %v, allowed is 0 to %v", r.For, MaxFor)
		case r.Metric == "" && (r.Condition == "" || r.Severity == None || r.Severity > Critical):
			err = outrigger.Errorf(outrigger.Invalid, "it has neither a metric with two thresholds nor a condition with a severity")
		default:
			err = r.compile()
		}
		if err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("alert rule %q", r.Name))
		}
	}
	return out, nil
}

func (r *Rule) compile() (err error) {
	if r.Metric != "" && r.Condition == "" {
		r.Condition = fmt.Sprintf("%s %s %g", r.Metric, r.operator(), r.Warning)
	}
	r.compiled, err = expr.Compile(r.Condition, deploy.Metrics())
	return err
}

// less reports whether less of the metric is worse.
func (r *Rule) less() bool { return r.Critical < r.Warning }

func (r *Rule) operator() string {
	if r.less() {
		return "<"
	}
	return ">"
}

// Grade is the severity of a measurement beyond the warning: with d = (certain − warning) /
// (critical − warning), where certain is the end of the interval on the harmless side, low
// below a third, medium below two thirds, high below one, then critical.
func (r *Rule) Grade(m expr.Measure) Severity {
	if r.Metric == "" {
		return r.Severity
	}
	certain := m.Low
	if r.less() {
		certain = m.High
	}
	span := r.Critical - r.Warning
	switch d := (certain - r.Warning) / span; {
	case span == 0 || d >= 1:
		return Critical
	case d >= 2./3:
		return High
	case d >= 1./3:
		return Medium
	}
	return Low
}

// Reading is what one look at a rule found.
type Reading struct {
	Holds    expr.Truth
	Severity Severity // while it holds
	Text     string   // the measurements, for people
}

// Read looks at a rule that Compile returned. The error has kind Invalid: a comparison
// without meaning.
func (r *Rule) Read(measure func(name string) expr.Measure) (Reading, error) {
	if r.compiled == nil {
		return Reading{}, outrigger.Errorf(outrigger.Invalid, "alert rule %q was not compiled", r.Name)
	}
	truth, err := r.compiled.Eval(measure)
	if err != nil || truth != expr.True {
		return Reading{Holds: truth}, err
	}
	return Reading{Holds: truth, Severity: cmp.Or(r.Grade(measure(r.Metric)), Low), Text: r.compiled.Explain(measure)}, nil
}

// Metrics are the names the rule's condition uses, sorted; nil before Compile.
func (r *Rule) Metrics() []string {
	if r.compiled == nil {
		return nil
	}
	return r.compiled.Names
}

// State of one alert.
type State uint8

// The states.
const (
	Inactive State = iota
	Pending        // the condition holds, but not for long enough
	Firing
)

// Status is what is remembered about one rule and subject. The zero value is inactive.
type Status struct {
	State    State
	Severity Severity  // while firing, the highest so far
	Since    time.Time // pending: since when it holds
	NotSince time.Time // firing: since when it certainly does not hold; zero = it may
	LostAt   time.Time // firing: since when it is not known to hold; zero = it is
}

// Step is what follows from a look.
type Step uint8

// The steps.
const (
	Nothing Step = iota
	Raise
	Escalate // raise again, more severe
	Resolve
)

// String returns the word used in logs and metrics.
func (s Step) String() string {
	return [...]string{"nothing", "raise", "escalate", "resolve"}[min(s, Resolve)]
}

// Next is the state machine: the status after a look at now, and what to do. Looks are
// given in order of time.
func Next(s Status, r *Rule, in Reading, now time.Time) (Status, Step) {
	if in.Holds == expr.True {
		return holds(s, r, in, now)
	}
	if s.State != Firing {
		return Status{}, Nothing
	}
	if s.LostAt.IsZero() {
		s.LostAt = now
	}
	switch {
	case in.Holds != expr.False:
		s.NotSince = time.Time{}
	case s.NotSince.IsZero():
		s.NotSince = now
	}
	if !s.NotSince.IsZero() && now.Sub(s.NotSince) >= ResolveAfter || now.Sub(s.LostAt) >= StaleAfter {
		return Status{}, Resolve
	}
	return s, Nothing
}

func holds(s Status, r *Rule, in Reading, now time.Time) (Status, Step) {
	s.NotSince, s.LostAt = time.Time{}, time.Time{}
	if s.State == Firing {
		if in.Severity > s.Severity {
			s.Severity = in.Severity
			return s, Escalate
		}
		return s, Nothing
	}
	if s.State == Inactive {
		s = Status{State: Pending, Since: now}
	}
	if now.Sub(s.Since) < r.For {
		return s, Nothing
	}
	s.State, s.Severity = Firing, in.Severity
	return s, Raise
}
