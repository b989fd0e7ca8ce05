// Package plan turns a deployment plan as people write it (internal/seedconfig) into the
// phases of a rollout (deploy), and explains what was understood.
//
// # Meaning of the keys
//
//	phases.<name>               in the order of the file. A name of the published strategy
//	                            brings its defaults: share, flags, level, thresholds
//	  user_percentage, steps    the candidate's share of users; 0 here in development and staging
//	  duration                  the phase lasts at least this long; null: no minimum
//	  success_criteria          one gate "success_criteria": all must certainly hold
//	  rollback_threshold        certainly above: roll back. Takes precedence over
//	                            rollback.automatic_triggers of the same metric
//	  gates                     further gates
//	rollback.automatic_triggers roll back in every phase that does not say otherwise
//	rollback.manual_approval_required  what would roll back by itself holds and waits for
//	                            a person
//	rollback.emergency_contacts who is told, those on call first
//	rollback.cooldown           after a rollback
//
//	monitoring.alerts           rules of alerts (package deploy/alerting); without any the
//	                            published thresholds
//	monitoring.objectives       error budgets of models: alerting.Burns of each
//
// experiments and monitoring.dashboards are read and checked here; packages trials and
// dashboard use them.
//
// Of is pure. Errors have kind Invalid and name phase, gate and fault.
package plan

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

// Kinds of notes.
const (
	Default       = "default"       // the file does not say, so this holds
	Precedence    = "precedence"    // the file says two things, and this one holds
	Contradiction = "contradiction" // the file says two things that cannot both be meant
	Unprovable    = "unprovable"    // nothing reports what is asked for
)

// Note explains one thing about a file.
type Note struct {
	Line, Column int
	Kind, Text   string
}

// String returns "line:column: kind: text".
func (n Note) String() string { return fmt.Sprintf("%d:%d: %s: %s", n.Line, n.Column, n.Kind, n.Text) }

// Plan is what a file means.
type Plan struct {
	Phases         []*pb.RolloutPhase
	Notify         []string // contacts, those on call first
	ManualRollback bool
	Cooldown       *durationpb.Duration // nil = the default
	Notes          []Note               // in the order of the file
}

// GateCriteria is the name of the gate that success_criteria become.
const GateCriteria = "success_criteria"

// Of reads a file's phases. A file without phases means the standard plan.
func Of(f seedconfig.File) (Plan, error) {
	b := &builder{file: f}
	b.ManualRollback = f.Rollback.ManualApprovalRequired
	if f.Rollback.Cooldown > 0 {
		b.Cooldown = durationpb.New(f.Rollback.Cooldown)
	}
	for _, oncall := range []bool{true, false} {
		for _, c := range f.Rollback.Contacts {
			if c.OnCall == oncall {
				b.Notify = append(b.Notify, c.Team)
			}
		}
	}
	var phases []deploy.Phase
	for _, p := range f.Phases {
		steps, err := b.phase(p)
		if err != nil {
			return Plan{}, err
		}
		phases = append(phases, steps...)
	}
	if len(f.Phases) == 0 {
		b.note(seedconfig.Position{Line: 1, Column: 1}, Default, "no phases: development, staging, canary 1 %%, limited_production 10 %%, full_production")
		phases = deploy.StandardPhases()
	}
	if err := b.alerts(); err != nil {
		return Plan{}, err
	}
	if err := b.checkObjectives(); err != nil {
		return Plan{}, err
	}
	b.Phases = deploy.PhasesPB(phases)
	// What a start would refuse must not be taken as a configuration.
	_, err := deploy.Start(&pb.StartRolloutRequest{Model: "model", Candidate: "candidate", Phases: b.Phases}, "last-good")
	slices.SortStableFunc(b.Notes, func(x, y Note) int { return cmp.Or(cmp.Compare(x.Line, y.Line), cmp.Compare(x.Column, y.Column)) })
	return b.Plan, err
}

type builder struct {
	Plan
	file seedconfig.File
}

func (b *builder) note(at seedconfig.Position, kind, format string, args ...any) {
	b.Notes = append(b.Notes, Note{at.Line, at.Column, kind, fmt.Sprintf(format, args...)})
}

func (b *builder) phase(in seedconfig.Phase) ([]deploy.Phase, error) {
	p, standard := deploy.StandardPhase(in.Name)
	p.Name = in.Name
	if !standard && !in.HasPercentage && len(in.Steps) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "%d:%d: phase %q has no user_percentage, and none is known for that name", in.At.Line, in.At.Column, in.Name)
	}
	if in.HasPercentage {
		p.Share = weight(in.UserPercentage)
	} else if len(in.Steps) == 0 {
		b.note(in.At, Default, "phase %s: user_percentage %g", in.Name, float64(p.Share)/100)
	}
	if in.Environment != "" {
		p.Environment = in.Environment
		if p.Environment == "production" {
			p.Environment = ""
		}
	}
	if p.Weight = p.Share; p.Environment != "" {
		p.Weight = 0
		b.note(in.At, Default, "phase %s: %g %% of environment %s, nothing of this mesh", in.Name, float64(p.Share)/100, p.Environment)
	}
	if in.HasDuration {
		p.MinDuration = in.Duration
	} else {
		b.note(in.At, Default, "phase %s: duration %v", in.Name, p.MinDuration)
	}
	p.MinRequests = in.MinRequests
	b.attributes(in, &p)
	b.triggers(in, &p)
	b.gates(in, &p)
	var steps []uint32
	for _, s := range in.Steps {
		steps = append(steps, weight(s))
	}
	return deploy.Steps(p, steps)
}

func weight(percent float64) uint32 { return uint32(math.Round(percent * deploy.FullWeight / 100)) }

func (b *builder) attributes(in seedconfig.Phase, p *deploy.Phase) {
	if in.FeatureFlags != nil {
		p.FeatureFlags = in.FeatureFlags
	} else if len(p.FeatureFlags) > 0 {
		b.note(in.At, Default, "phase %s: feature_flags %s", in.Name, strings.Join(p.FeatureFlags, ", "))
	}
	if in.MonitoringLevel != "" {
		p.MonitoringLevel = in.MonitoringLevel
	} else if p.MonitoringLevel != "" {
		b.note(in.At, Default, "phase %s: monitoring_level %s", in.Name, p.MonitoringLevel)
	}
}

// triggers joins the phase's thresholds with the global triggers on other metrics.
func (b *builder) triggers(in seedconfig.Phase, p *deploy.Phase) {
	var own []string // metrics the phase says something about
	switch {
	case in.Rollback != nil:
		p.RollbackWhen = nil
		for _, c := range in.Rollback {
			p.RollbackWhen, own = append(p.RollbackWhen, c.String()), append(own, c.Metric)
		}
	case len(p.RollbackWhen) > 0:
		b.note(in.At, Default, "phase %s: rollback_threshold %s", in.Name, strings.Join(p.RollbackWhen, ", "))
		for _, s := range p.RollbackWhen {
			metric, _, _ := strings.Cut(s, " ")
			own = append(own, metric)
		}
	}
	for _, t := range b.file.Rollback.Triggers {
		i := slices.Index(own, t.Metric)
		if i < 0 {
			p.RollbackWhen = append(p.RollbackWhen, t.String())
			continue
		}
		if p.RollbackWhen[i] != t.String() {
			b.note(t.At, Precedence, "phase %s rolls back at %s; the trigger %s does not count there", in.Name, p.RollbackWhen[i], t)
		}
	}
}

// gates turns the criteria into one gate and compares them with the rollback conditions.
func (b *builder) gates(in seedconfig.Phase, p *deploy.Phase) {
	p.Gates = nil
	if len(in.Success) > 0 {
		g := &pb.RolloutGate{Name: GateCriteria, Kind: deploy.GateMetrics}
		for _, c := range in.Success {
			g.Conditions = append(g.Conditions, c.String())
			b.criterion(in, p, c)
		}
		p.Gates = append(p.Gates, g)
	} else if len(in.Gates) == 0 {
		b.note(in.At, Default, "phase %s: no success_criteria and no gates; it ends with its duration", in.Name)
	}
	p.Gates = append(p.Gates, in.Gates...)
}

func (b *builder) criterion(in seedconfig.Phase, p *deploy.Phase, c seedconfig.Condition) {
	switch c.Metric {
	case deploy.MetricSatisfaction, deploy.MetricAccuracy:
		b.note(c.At, Unprovable, "phase %s: %s is inconclusive, and the phase waits, until applications report %s", in.Name, c, c.Metric)
	case deploy.MetricCost:
		b.note(c.At, Unprovable, "phase %s: %s is inconclusive, and the phase waits, until the model has a cost formula or applications report it", in.Name, c)
	}
	for _, s := range p.RollbackWhen {
		var at float64
		if n, _ := fmt.Sscanf(s, c.Metric+" > %g", &at); n != 1 || !strings.HasPrefix(c.Op, "<") {
			continue
		}
		if c.Value > at {
			b.note(c.At, Contradiction, "phase %s advances with %s but rolls back at %s; ask for less than %g to advance", in.Name, c, s, at)
		}
	}
}

// AlertRules are the alert rules of a file, those of the published strategy if it has none,
// ready for use. Errors have kind Invalid and name the rule.
func AlertRules(f seedconfig.File) ([]alerting.Rule, error) {
	if len(f.Alerts) == 0 {
		return alerting.Compile(alerting.Defaults())
	}
	var rules []alerting.Rule
	for _, a := range f.Alerts {
		r := alerting.Rule{Name: a.Metric, For: a.For, Condition: a.Condition}
		if a.Condition == "" {
			r.Metric, r.Warning, r.Critical = a.Metric, a.Warning.Value, a.Critical.Value
		}
		if a.Condition != "" || a.Severity != "" {
			severity, err := alerting.ParseSeverity(cmp.Or(a.Severity, "high"))
			if err != nil {
				return nil, outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("%d:%d: alert %q", a.At.Line, a.At.Column, a.Metric))
			}
			if r.Metric != "" {
				return nil, outrigger.Errorf(outrigger.Invalid, "%d:%d: alert %q has a severity, but its thresholds say how bad it is; leave severity out, or give a condition", a.At.Line, a.At.Column, a.Metric)
			}
			r.Severity = severity
		}
		if known := deploy.Metrics(); r.Metric != "" && !slices.ContainsFunc(known, func(n expr.Name) bool { return n.Name == r.Metric }) {
			continue // noted as one that never fires
		}
		rules = append(rules, r)
	}
	return alerting.Compile(rules)
}

// defaultPeriod is that of an objective that gives none.
const defaultPeriod = 30 * 24 * time.Hour

// Objectives are the service level objectives of a file.
func Objectives(f seedconfig.File) (out []alerting.Objective) {
	for _, o := range f.Objectives {
		out = append(out, alerting.Objective{Model: o.Model, Target: o.Target, Period: cmp.Or(o.Period, defaultPeriod)})
	}
	return out[:min(len(out), alerting.MaxObjectives)]
}

// checkObjectives refuses what cannot be watched.
func (b *builder) checkObjectives() error {
	if n := len(b.file.Objectives); n > alerting.MaxObjectives {
		return outrigger.Errorf(outrigger.Invalid, "%d objectives; the limit is %d", n, alerting.MaxObjectives)
	}
	for i, o := range Objectives(b.file) {
		if err := o.Check(); err != nil {
			at := b.file.Objectives[i].At
			return outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("%d:%d", at.Line, at.Column))
		}
	}
	return nil
}

// lessIsWorse are the metrics whose critical level lies below the warning.
var lessIsWorse = []string{"success_rate", deploy.MetricSatisfaction, deploy.MetricAccuracy}

// alerts compares the levels of alerts with each other.
func (b *builder) alerts() error {
	known := deploy.Metrics()
	if len(b.file.Alerts) == 0 {
		var defaults []string
		for _, r := range alerting.Defaults() {
			defaults = append(defaults, fmt.Sprintf("%s above %g, critical %g", r.Metric, r.Warning, r.Critical))
		}
		b.note(seedconfig.Position{Line: 1, Column: 1}, Default, "alerts: %s", strings.Join(defaults, "; "))
	}
	for _, a := range b.file.Alerts {
		if a.Condition != "" {
			continue
		}
		if a.Critical.Value < a.Warning.Value && !slices.Contains(lessIsWorse, a.Metric) {
			b.note(a.At, Contradiction, "alert %s: critical %g is below warning %g, so it fires when %s is low", a.Metric, a.Critical.Value, a.Warning.Value, a.Metric)
		}
		if !slices.ContainsFunc(known, func(n expr.Name) bool { return n.Name == a.Metric }) {
			b.note(a.At, Unprovable, "alert %s: nothing measures it, so it never fires", a.Metric)
		}
	}
	for _, t := range b.file.Rollback.Triggers {
		for _, a := range b.file.Alerts {
			if a.Metric == t.Metric && t.Op == ">" && t.Value < a.Warning.Value {
				b.note(a.At, Contradiction, "alert %s: warns at %g, but a rollback comes first at %s", a.Metric, a.Warning.Value, t)
			}
		}
	}
	_, err := AlertRules(b.file)
	return err
}
