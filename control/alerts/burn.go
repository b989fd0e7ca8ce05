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

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/plan"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

// burnPrefix begins the names of alerts about error budgets: burn-<window>-<model>.
const burnPrefix = "burn-"

// lookAtBudgets reads every burn of every objective of the plan in force. What stands in
// the log and no objective asks for any more is over.
func (s *Service) lookAtBudgets(ctx context.Context) {
	if s.opts.Spent == nil {
		return
	}
	var objectives []alerting.Objective
	if d := s.opts.Facts.Facts().Deployment(); d != nil {
		objectives = plan.Objectives(d.File)
	}
	seen := map[string]bool{}
	for _, o := range objectives {
		for _, b := range alerting.Burns() {
			id := burnPrefix + b.Name + "-" + strings.ReplaceAll(o.Model, "/", "-")
			seen[id] = true
			s.takeBurn(ctx, id, o, b)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.burning)) {
		if !seen[id] && s.resolveBurn(ctx, id, "the objective is gone") {
			delete(s.burning, id)
		}
	}
}

func (s *Service) takeBurn(ctx context.Context, id string, o alerting.Objective, b alerting.Burn) {
	long, short := s.opts.Spent(o.Model, b.Long), s.opts.Spent(o.Model, b.Short)
	next, step := alerting.Next(s.burning[id], &alerting.Rule{Severity: b.Severity}, b.Read(o, long, short), s.opts.Now())
	switch step {
	case alerting.Raise:
		a := s.opts.Facts.Facts().Alert(id)
		if a != nil && a.ResolvedAt.IsZero() {
			break // another replica, or this one before an answer got lost
		}
		if err := s.append(ctx, id, &pb.Event{Payload: &pb.Event_AlertRaised{AlertRaised: burnRaised(o, b, long, short)}}); err != nil {
			s.opts.Logger.Warn("alert not raised; retrying at the next look", "alert", id, "error", err)
			return
		}
		s.inst.steps.Add(ctx, 1, metric.WithAttributes(attribute.String("step", step.String())))
	case alerting.Resolve:
		if !s.resolveBurn(ctx, id, fmt.Sprintf("the last %v spent %.3g times the budget, the limit is %.3g", b.Short, short.Rate(o), b.Rate(o))) {
			return
		}
	}
	if next.State == alerting.Inactive {
		delete(s.burning, id)
		return
	}
	s.burning[id] = next
}

func (s *Service) resolveBurn(ctx context.Context, id, reason string) bool {
	if err := s.append(ctx, id, &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: reason}}}); err != nil {
		s.opts.Logger.Warn("alert not resolved; retrying at the next look", "alert", id, "error", err)
		return false
	}
	s.inst.steps.Add(ctx, 1, metric.WithAttributes(attribute.String("step", alerting.Resolve.String())))
	return true
}

func burnRaised(o alerting.Objective, b alerting.Burn, long, short alerting.Spent) *pb.AlertRaised {
	real := func(v float64) string { return strconv.FormatFloat(v, 'g', 4, 64) }
	count := func(s alerting.Spent) string { return fmt.Sprintf("%d/%d", s.Failures, s.Requests) }
	return &pb.AlertRaised{Severity: b.Severity.String(),
		Summary: fmt.Sprintf("%s spends its error budget %.3g times too fast over the last %s (%s requests failed; the objective is %g over %v), and still does",
			o.Model, long.Rate(o), b.Name, count(long), o.Target, o.Period),
		Numbers: map[string]string{"model": o.Model, "target": real(o.Target), "period": o.Period.String(), "limit": real(b.Rate(o)),
			"window": b.Long.String(), "rate": real(long.Rate(o)), "failed": count(long),
			"short window": b.Short.String(), "short rate": real(short.Rate(o)), "short failed": count(short)}}
}
