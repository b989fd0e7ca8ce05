package alerts

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/control/plan"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

// rulePrefix begins the names of alerts that rules raise.
const rulePrefix = "rule-"

// maxStanding bounds the alerts of rules that stand at a time.
const maxStanding = 200

// tracked is one rule and subject that is not inactive.
type tracked struct {
	alerting.Status
	rule, model, version string
}

// ruleSet are the rules in force, of the plan with that digest.
type ruleSet struct {
	of    string
	known bool
	rules []alerting.Rule
}

// alertID names the alert of a rule and subject. Names may be too long for an aggregate.
func alertID(rule, model, version string) string {
	id := strings.ReplaceAll(rulePrefix+rule+"-"+model+"-"+version, "/", "-")
	if most := outrigger.MaxNameBytes - len(facts.AlertPrefix); len(id) > most {
		sum := uint64(14695981039346656037) // FNV-1a, so that what is cut off still tells names apart
		for i := range len(id) {
			sum = (sum ^ uint64(id[i])) * 1099511628211
		}
		id = strings.ToValidUTF8(id[:most-17], "") + "-" + strconv.FormatUint(sum, 16)
	}
	return id
}

// adopt takes over the alerts of rules that stand in the log.
func (s *Service) adopt() {
	for _, a := range s.opts.Facts.Facts().Alerts() {
		severity, err := alerting.ParseSeverity(a.Severity)
		if strings.HasPrefix(a.ID, burnPrefix) && a.ResolvedAt.IsZero() && err == nil {
			s.burning[a.ID] = alerting.Status{State: alerting.Firing, Severity: severity, Since: a.Since}
		}
		if !strings.HasPrefix(a.ID, rulePrefix) || !a.ResolvedAt.IsZero() || err != nil {
			continue
		}
		s.tracked[a.ID] = tracked{alerting.Status{State: alerting.Firing, Severity: severity, Since: a.Since},
			a.Numbers["rule"], a.Numbers["model"], a.Numbers["version"]}
	}
}

// inForce are the rules of the configured plan. One that cannot be used (a newer version
// of this program wrote it) leaves those before in force.
func (s *Service) inForce() []alerting.Rule {
	var file seedconfig.File
	of := ""
	if d := s.opts.Facts.Facts().Deployment(); d != nil {
		file, of = d.File, d.SHA256
	}
	if s.rules.known && s.rules.of == of {
		return s.rules.rules
	}
	rules, err := plan.AlertRules(file)
	if err != nil {
		s.opts.Logger.Error("alert rules of the deployment plan not used; those before stay", "sha256", of, "error", err)
		rules = s.rules.rules
	}
	s.rules = ruleSet{of: of, known: true, rules: rules}
	return rules
}

// lookAtRules reads every rule for every subject.
func (s *Service) lookAtRules(ctx context.Context) {
	rules := s.inForce()
	seen := make(map[string]bool)
	subjects := s.opts.Subjects()
	for i := range subjects {
		x := &subjects[i]
		for j := range rules {
			r := &rules[j]
			id := alertID(r.Name, x.Model, x.Version)
			seen[id] = true
			in, err := r.Read(x.Measure)
			if err != nil {
				s.opts.Logger.Warn("alert rule not read", "rule", r.Name, "error", err)
				continue
			}
			s.take(ctx, id, r, x, in)
		}
	}
	// What nobody says anything about any more.
	for _, id := range slices.Sorted(maps.Keys(s.tracked)) {
		if t := s.tracked[id]; !seen[id] {
			i := slices.IndexFunc(rules, func(r alerting.Rule) bool { return r.Name == t.rule })
			if i < 0 {
				s.resolve(ctx, id, "the rule is gone")
				continue
			}
			s.take(ctx, id, &rules[i], &monitor.Subject{Model: t.model, Version: t.version}, alerting.Reading{})
		}
	}
}

// take does what follows from one reading. What cannot be appended is tried again at the
// next look, from the status before.
func (s *Service) take(ctx context.Context, id string, r *alerting.Rule, x *monitor.Subject, in alerting.Reading) {
	t, known := s.tracked[id]
	if !known {
		t = tracked{rule: r.Name, model: x.Model, version: x.Version}
	}
	next, step := alerting.Next(t.Status, r, in, s.opts.Now())
	a := s.opts.Facts.Facts().Alert(id)
	standing := a != nil && a.ResolvedAt.IsZero()
	if step == alerting.Nothing && next.State == alerting.Firing && in.Holds == expr.True && !standing {
		step = alerting.Raise // another replica, which sees other reports, took it for over
	}
	switch step {
	case alerting.Resolve:
		s.resolve(ctx, id, "the condition "+in.Holds.String()+" for long enough: "+r.Condition)
		return
	case alerting.Raise, alerting.Escalate:
		if standing && severityOf(a) >= next.Severity {
			break // another replica, or this one before an answer got lost
		}
		if step == alerting.Raise && !s.room(ctx, id) {
			return
		}
		raised := raisedBy(r, x, in, next.Severity)
		if err := s.append(ctx, id, &pb.Event{Cause: x.Rollout, Payload: &pb.Event_AlertRaised{AlertRaised: raised}}); err != nil {
			s.opts.Logger.Warn("alert not raised; retrying at the next look", "alert", id, "error", err)
			return
		}
		s.inst.steps.Add(ctx, 1, metric.WithAttributes(attribute.String("step", step.String())))
	}
	t.Status = next
	if next.State == alerting.Inactive {
		delete(s.tracked, id)
		return
	}
	s.tracked[id] = t
}

func (s *Service) resolve(ctx context.Context, id, reason string) {
	if s.tracked[id].State == alerting.Firing {
		err := s.append(ctx, id, &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: reason}}})
		if err != nil {
			s.opts.Logger.Warn("alert not resolved; retrying at the next look", "alert", id, "error", err)
			return
		}
		s.inst.steps.Add(ctx, 1, metric.WithAttributes(attribute.String("step", alerting.Resolve.String())))
	}
	delete(s.tracked, id)
}

// room reports whether one more alert may stand.
func (s *Service) room(ctx context.Context, id string) bool {
	firing := 0
	for _, t := range s.tracked {
		if t.State == alerting.Firing {
			firing++
		}
	}
	if firing >= maxStanding {
		s.opts.Logger.WarnContext(ctx, "alert not raised: too many stand", "alert", id, "limit", maxStanding)
	}
	return firing < maxStanding
}

func severityOf(a *facts.Alert) alerting.Severity {
	severity, err := alerting.ParseSeverity(a.Severity)
	if err != nil {
		return alerting.Low // a severity nobody knows is still an alert
	}
	return severity
}

// raisedBy is the event with every number behind it.
func raisedBy(r *alerting.Rule, x *monitor.Subject, in alerting.Reading, severity alerting.Severity) *pb.AlertRaised {
	real := func(v float64) string { return strconv.FormatFloat(v, 'g', 4, 64) }
	numbers := map[string]string{"rule": r.Name, "condition": r.Condition, "model": x.Model, "version": x.Version,
		"window": "60s", "requests": strconv.FormatUint(x.Requests, 10)}
	if r.For > 0 {
		numbers["for"] = r.For.String()
	}
	if r.Metric != "" {
		numbers["warning"], numbers["critical"] = real(r.Warning), real(r.Critical)
	}
	if x.Rollout != "" {
		numbers["rollout"], numbers["baseline"] = x.Rollout, x.Baseline
	}
	for _, name := range r.Metrics() {
		m := x.Measure(name)
		numbers[name], numbers[name+" low"], numbers[name+" high"] = real(m.Point), real(m.Low), real(m.High)
		numbers[name+" n"] = strconv.FormatUint(m.N, 10)
	}
	return &pb.AlertRaised{Severity: severity.String(), Numbers: numbers,
		Summary: fmt.Sprintf("%s of %s %s over the last minute: %s, so %s", r.Name, x.Model, x.Version, in.Text, r.Condition)}
}
