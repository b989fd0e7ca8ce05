//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

func rolloutCommand(g *globals) *cobra.Command {
	cmd := group("rollout", "Roll a model version out in phases, or back")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(rolloutStart(c, "start", "Start rolling a version out"), rolloutStart(c, "plan", "Print what start would do, how long each gate needs, and what it cannot prove"),
		rolloutAction(c, "advance", "Move to the next phase now; gates must have passed", pb.AdminClient.AdvanceRollout),
		rolloutAction(c, "promote", "The same as advance", pb.AdminClient.AdvanceRollout),
		rolloutAction(c, "hold", "Keep the weight as it is until resume", pb.AdminClient.HoldRollout),
		rolloutAction(c, "resume", "Let a held rollout go on", pb.AdminClient.ResumeRollout),
		rolloutAction(c, "abort", "Roll back to the last good version; the candidate is not blamed", pb.AdminClient.AbortRollout),
		rolloutAction(c, "retry", "Start again by the same plan, one phase before the one that failed", pb.AdminClient.RetryRollout),
		rolloutApprove(c), rolloutRollback(c), rolloutWatch(c),
		&cobra.Command{Use: "list", Short: "List rollouts", Args: exactArgs(),
			RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
				r, err := cl.admin.ListRollouts(ctx, &pb.ListRequestAll{})
				if err != nil {
					return err
				}
				return cl.out.message(r, func(w io.Writer) { printRollouts(w, r.Rollouts) })
			})},
		&cobra.Command{Use: "status ID", Aliases: []string{"show"}, Short: "Print one rollout with its gates and evidence", Args: exactArgs("ID"),
			RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
				r, err := cl.admin.GetRollout(ctx, &pb.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return cl.printRollout(r)
			})})
	return cmd
}

// rolloutStart is the verbs start and plan, which take the same arguments.
func rolloutStart(c *clientFlags, verb, short string) *cobra.Command {
	var phases []string
	var from string
	req := &pb.StartRolloutRequest{}
	var cooldown time.Duration
	cmd := &cobra.Command{Use: verb + " MODEL CANDIDATE", Short: short, Args: exactArgs("MODEL", "CANDIDATE")}
	f := cmd.Flags()
	f.StringSliceVar(&phases, "phase", nil, "name=weight[:min-duration[:min-requests]], weight in parts of 10000; repeatable (default the configured plan, else canary 1 %, limited 10 %, full 100 %)")
	f.StringVar(&req.Plan, "plan", "", `"standard": development, staging, canary, limited_production, full_production`)
	f.StringVar(&from, "from", "", "deployment plan whose phases are followed")
	f.StringVar(&req.Id, "id", "", "name of the rollout (default MODEL-CANDIDATE-n)")
	f.StringVar(&req.Reason, "reason", "", "why, for the audit")
	f.Float64Var(&req.Alpha, "alpha", 0, "accepted probability of a false rollback per phase (default 0.01)")
	f.DurationVar(&cooldown, "cooldown", 0, "after a rollback, until the model may be rolled out again (default 10m, or the plan's)")
	f.BoolVar(&req.Force, "force", false, "also during the cooldown")
	if verb == "plan" {
		f.Float64Var(&req.RequestsPerSecond, "rps", 0, "expected requests of the model per second (default as measured)")
	}
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req.Model, req.Candidate, req.Actor = args[0], args[1], c.actor
		if from != "" {
			if err := readPlan(req, from); err != nil {
				return err
			}
		}
		for _, p := range phases {
			ph, err := parsePhase(p)
			if err != nil {
				return err
			}
			req.Phases = append(req.Phases, ph)
		}
		if cooldown != 0 {
			req.Cooldown = durationPB(cooldown)
		}
		if verb == "plan" {
			return cl.printPlan(ctx, req)
		}
		r, err := cl.admin.StartRollout(ctx, req)
		if err != nil {
			return err
		}
		return cl.printRollout(r)
	})
	return cmd
}

func parsePhase(s string) (*pb.RolloutPhase, error) {
	bad := usageError{fmt.Errorf("--phase %q is not name=weight[:min-duration[:min-requests]]", s)}
	name, rest, ok := strings.Cut(s, "=")
	parts := strings.Split(rest, ":")
	if !ok || len(parts) > 3 {
		return nil, bad
	}
	w, err := strconv.ParseUint(parts[0], 10, 32)
	if err != nil {
		return nil, bad
	}
	out := &pb.RolloutPhase{Name: name, Weight: uint32(w)}
	if len(parts) > 1 {
		d, err := time.ParseDuration(parts[1])
		if err != nil {
			return nil, bad
		}
		out.MinDuration = durationPB(d)
	}
	if len(parts) > 2 {
		if out.MinRequests, err = strconv.ParseUint(parts[2], 10, 64); err != nil {
			return nil, bad
		}
	}
	return out, nil
}

func rolloutAction(c *clientFlags, use, short string, do func(pb.AdminClient, context.Context, *pb.RolloutActionRequest, ...grpc.CallOption) (*pb.Rollout, error)) *cobra.Command {
	req := &pb.RolloutActionRequest{}
	cmd := &cobra.Command{Use: use + " ID", Short: short, Args: exactArgs("ID")}
	f := cmd.Flags()
	f.StringVar(&req.Reason, "reason", "", "why, for the audit")
	f.Uint64Var(&req.ExpectedSequence, "expect", 0, "refuse if the rollout's last event is not this one (see status --output json)")
	if use == "advance" || use == "promote" || use == "retry" {
		f.BoolVar(&req.Force, "force", false, "also with gates that have not passed, or during the cooldown")
	}
	if use == "advance" || use == "promote" {
		f.StringVar(&req.ToPhase, "to", "", "phase to move to (default the next one)")
		f.StringToStringVar(&req.Metadata, "metadata", nil, "key=value, recorded with the approval")
	}
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req.Id, req.Actor = args[0], c.actor
		r, err := do(cl.admin, ctx, req)
		if err != nil {
			return err
		}
		return cl.printRollout(r)
	})
	return cmd
}

func (c *client) printRollout(r *pb.Rollout) error {
	return c.out.message(r, func(w io.Writer) { printRollouts(w, []*pb.Rollout{r}) })
}

func regionCommand(g *globals) *cobra.Command {
	cmd := group("region", "Regions and where they are")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(&cobra.Command{Use: "list", Short: "List known regions", Args: exactArgs(),
		RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
			r, err := cl.admin.ListRegions(ctx, &pb.ListRequestAll{})
			if err != nil {
				return err
			}
			return cl.out.message(r, func(w io.Writer) {
				fmt.Fprintln(w, "REGION\tGATEWAY\tLATITUDE\tLONGITUDE\tHEALTH\tRTT MS\tSTALE\tSOURCE")
				for _, x := range r.Regions {
					fmt.Fprintf(w, "%s\t%s\t%.4f\t%.4f\t%s\t%.1f\t%v\t%s\n", x.Name, x.Gateway, x.Latitude, x.Longitude, x.Health, x.RttMs, x.Stale, r.Source)
				}
			})
		})})
	return cmd
}

func auditCommand(g *globals) *cobra.Command {
	var req pb.AuditRequest
	var since, until string
	cmd := &cobra.Command{Use: "audit", Short: "Print recorded events: who changed what, when and why", Args: exactArgs()}
	c := addClientFlags(cmd, g)
	f := cmd.Flags()
	f.StringVar(&req.AggregatePrefix, "aggregate", "", `only aggregates that start so, e.g. "rollout/" or "var/default/chat/"`)
	f.StringVar(&req.Actor, "by", "", "only this actor")
	f.StringVar(&req.Kind, "kind", "", `only this kind of event, e.g. "rollback_started"`)
	f.StringVar(&since, "since", "", "RFC 3339 time or a duration back from now, e.g. 1h")
	f.StringVar(&until, "until", "", "same forms as --since")
	f.Int32Var(&req.Limit, "limit", 100, "how many, 1 to 1000")
	f.BoolVar(&req.NewestFirst, "newest-first", false, "start at the end")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		var err error
		if req.Since, err = parseWhen("--since", since); err != nil {
			return err
		}
		if req.Until, err = parseWhen("--until", until); err != nil {
			return err
		}
		r, err := cl.admin.Audit(ctx, &req)
		if err != nil {
			return err
		}
		return cl.out.message(r, func(w io.Writer) {
			fmt.Fprintln(w, "POSITION\tAT\tACTOR\tAGGREGATE\tEVENT")
			for _, e := range r.Events {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\n", e.Position, e.At.AsTime().Format(time.RFC3339Nano), e.Actor, e.Aggregate, eventLine(e))
			}
		})
	})
	return cmd
}

// eventLine is one event's payload in one line.
func eventLine(e *pb.Event) string {
	switch p := e.Payload.(type) {
	case *pb.Event_RollbackStarted:
		return fmt.Sprintf("rollback_started %s → %s: %s", p.RollbackStarted.FromVersion, p.RollbackStarted.ToVersion, p.RollbackStarted.Reason)
	case *pb.Event_RollbackCompleted:
		return fmt.Sprintf("rollback_completed: %d sidecars acknowledged, laggards %v", p.RollbackCompleted.Acked, p.RollbackCompleted.Laggards)
	case *pb.Event_RolloutStarted:
		return fmt.Sprintf("rollout_started %s, candidate %s, last good %s", p.RolloutStarted.Model, p.RolloutStarted.Candidate, p.RolloutStarted.LastGood)
	case *pb.Event_RolloutAdvanced:
		return fmt.Sprintf("rollout_advanced to phase %d: %s", p.RolloutAdvanced.Phase, p.RolloutAdvanced.Reason)
	case *pb.Event_ModelVersionState:
		return fmt.Sprintf("model_version_state %s %s: %s", p.ModelVersionState.Version, p.ModelVersionState.State, p.ModelVersionState.Reason)
	case *pb.Event_AliasMoved:
		return fmt.Sprintf("alias_moved %s: %s → %s", p.AliasMoved.Alias, p.AliasMoved.From, p.AliasMoved.To)
	case *pb.Event_AlertNotified:
		return fmt.Sprintf("alert_notified %s: %s, delivered %v %s", p.AlertNotified.Route, p.AlertNotified.Told, p.AlertNotified.Delivered, p.AlertNotified.Error)
	case *pb.Event_AlertRaised:
		return fmt.Sprintf("alert_raised %s: %s", p.AlertRaised.Severity, p.AlertRaised.Summary)
	case *pb.Event_VariableSet:
		return fmt.Sprintf("variable_set version %d = %s", p.VariableSet.GetVersion().GetCounter(), p.VariableSet.GetValue().GetJson())
	}
	return eventlog.EventKind(e)
}

func parseWhen(flag, s string) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return timestamppb.New(time.Now().Add(-d)), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s is %q; give an RFC 3339 time or a duration like 1h", flag, s)}
	}
	return timestamppb.New(t), nil
}

func statusCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "status", Short: "Summarise the mesh as the control plane sees it", Args: exactArgs()}
	c := addClientFlags(cmd, g)
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		s, err := cl.admin.Status(ctx, &pb.ListRequestAll{})
		if err != nil {
			return err
		}
		return cl.out.message(s, func(w io.Writer) {
			fmt.Fprintf(w, "region %s, log position %d, policy %d\n\nNODE\tKIND\tCONNECTED\tACKED\tREJECTED\n", s.Region, s.Head, s.PolicyPosition)
			for _, n := range s.Nodes {
				fmt.Fprintf(w, "%s\t%s\t%v\t%d\t%s\n", n.Node.GetId(), n.Node.GetKind(), n.Connected, n.AckedPosition, n.Nack)
			}
			fmt.Fprintln(w)
			printModels(w, s.Models)
			fmt.Fprintln(w)
			printRollouts(w, s.Rollouts)
		})
	})
	return cmd
}
