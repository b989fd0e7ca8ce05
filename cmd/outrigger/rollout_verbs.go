//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/plan"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

// loadPlan reads and checks a deployment plan.
func loadPlan(file string) ([]byte, plan.Plan, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, plan.Plan{}, configError{err}
	}
	f, err := seedconfig.Parse(file, text)
	if err != nil {
		return nil, plan.Plan{}, configError{err}
	}
	p, err := plan.Of(f)
	if err != nil {
		return nil, plan.Plan{}, configError{fmt.Errorf("%s: %w", file, err)}
	}
	return text, p, nil
}

// readPlan fills a request from a deployment plan.
func readPlan(req *pb.StartRolloutRequest, file string) error {
	_, p, err := loadPlan(file)
	if err != nil {
		return err
	}
	req.Phases, req.ManualRollback, req.Cooldown = p.Phases, p.ManualRollback, p.Cooldown
	return nil
}

func (c *client) printPlan(ctx context.Context, req *pb.StartRolloutRequest) error {
	p, err := c.admin.PlanRollout(ctx, req)
	if err != nil {
		return err
	}
	return c.out.message(p, func(w io.Writer) {
		fmt.Fprintf(w, "%s of %s, back to %s, at %.4g requests per second of the model\n", p.Rollout.Candidate, p.Rollout.Model, p.Rollout.LastGood, p.RequestsPerSecond)
		fmt.Fprintln(w, "PHASE\tWEIGHT\tLASTS\tROLLS BACK WHEN")
		for _, ph := range p.Rollout.Phases {
			fmt.Fprintf(w, "%s\t%.2f%%\t%v\t%v\n", ph.Name, float64(ph.Weight)/100, ph.MinDuration.AsDuration(), ph.RollbackWhen)
		}
		fmt.Fprintln(w, "PHASE\tGATE\tREQUESTS\tABOUT\tNEEDS")
		for _, f := range p.Forecasts {
			fmt.Fprintf(w, "%s\t%s\t%d\t%v\t%s\n", f.Phase, f.Gate, f.Requests, f.Expected.AsDuration().Round(time.Second), f.Needs)
		}
		for _, warning := range p.Warnings {
			fmt.Fprintf(w, "warning: %s\n", warning)
		}
	})
}

func rolloutApprove(c *clientFlags) *cobra.Command {
	req := &pb.ApproveRolloutRequest{}
	cmd := &cobra.Command{Use: "approve ID", Short: "Say yes to a gate of the present phase", Args: exactArgs("ID")}
	f := cmd.Flags()
	f.StringVar(&req.Gate, "gate", "", "which gate (default the only one that waits)")
	f.StringVar(&req.Comment, "comment", "", "for the audit")
	f.BoolVar(&req.Withdraw, "withdraw", false, "take an approval back")
	f.Uint64Var(&req.ExpectedSequence, "expect", 0, "refuse if the rollout's last event is not this one")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req.Id, req.Actor = args[0], c.actor
		r, err := cl.admin.ApproveRollout(ctx, req)
		if err != nil {
			return err
		}
		return cl.printRollout(r)
	})
	return cmd
}

func rolloutRollback(c *clientFlags) *cobra.Command {
	req := &pb.RollbackRolloutRequest{}
	var ramp, drain, ttl time.Duration
	cmd := &cobra.Command{Use: "rollback ID", Short: "Roll back: at once, gracefully, in an emergency, or as a drill", Args: exactArgs("ID"),
		Long: `Rollback takes a rollout's traffic back to the last good version.

  --mode manual     at once (default); with --to-phase to an earlier phase, held there
  --mode graceful   the weight falls by quarters over --ramp, then what is in flight may end
  --mode emergency  the version is taken out on the replica reached, before anything is in
                    the log and also while the log takes no writes
  --mode drill      nothing moves; status tells how long a rollback would have taken`}
	f := cmd.Flags()
	f.StringVar(&req.Mode, "mode", "manual", "manual, graceful, emergency or drill")
	f.StringVar(&req.Reason, "reason", "", "why, for the audit")
	f.StringVar(&req.ToPhase, "to-phase", "", "back to this phase instead of the last good version")
	f.DurationVar(&ramp, "ramp", time.Minute, "graceful: until weight 0")
	f.DurationVar(&drain, "drain", 30*time.Second, "graceful: at weight 0, at most")
	f.DurationVar(&ttl, "ttl", time.Hour, "emergency: how long it holds if the log never takes it")
	f.BoolVar(&req.Blameless, "blameless", false, "do not quarantine the candidate")
	f.BoolVar(&req.SkipChecks, "skip-checks", false, "graceful: without looking first")
	f.Uint64Var(&req.ExpectedSequence, "expect", 0, "refuse if the rollout's last event is not this one")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req.Id, req.Actor, req.Ramp, req.Drain = args[0], c.actor, durationPB(ramp), durationPB(drain)
		if req.Mode == "emergency" {
			return cl.emergency(ctx, args[0], req.Reason, ttl)
		}
		r, err := cl.admin.RollbackRollout(ctx, req)
		if err != nil {
			return err
		}
		return cl.printRollout(r)
	})
	return cmd
}

func (c *client) emergency(ctx context.Context, id, reason string, ttl time.Duration) error {
	r, err := c.admin.GetRollout(ctx, &pb.NameRequest{Name: id})
	if err != nil {
		return err
	}
	out, err := c.admin.BreakGlass(ctx, &pb.BreakGlassRequest{Model: r.Model, Version: r.Candidate, Actor: c.flags.actor, Reason: reason, Ttl: durationPB(ttl)})
	if err != nil {
		return err
	}
	return c.out.message(out, func(w io.Writer) {
		fmt.Fprintf(w, "%s of %s is out, %s serves", out.Version, out.Model, out.Serves)
		if out.Recorded {
			fmt.Fprintln(w, "; the log has it")
			return
		}
		fmt.Fprintf(w, " until %s: %s\n", out.Until.AsTime().Format(time.RFC3339), out.Pending)
	})
}

// watchEvery is how often watch asks.
const watchEvery = 500 * time.Millisecond

func rolloutWatch(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "watch ID", Short: "Print a rollout at each change until it ends; fails if it was rolled back", Args: exactArgs("ID"),
		RunE: c.verb(true, func(ctx context.Context, cl *client, args []string) error {
			timer := time.NewTicker(watchEvery)
			defer timer.Stop()
			var seen uint64
			for {
				r, err := cl.admin.GetRollout(ctx, &pb.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if r.Sequence != seen {
					seen = r.Sequence
					if err := cl.printRollout(r); err != nil {
						return err
					}
				}
				switch r.State {
				case "completed":
					return nil
				case "rolled_back", "aborted":
					return outrigger.Errorf(outrigger.Locked, "rollout %s was %s: %s", r.Id, r.State, r.Reason)
				}
				select {
				case <-timer.C:
				case <-ctx.Done():
					return nil
				}
			}
		})}
}

func configCommand(g *globals) *cobra.Command {
	cmd := group("config", "Deployment plans: check one, or make it the one that rollouts follow")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(&cobra.Command{Use: "validate FILE", Short: "Explain a deployment plan: defaults, precedence, contradictions; touches no server", Args: exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, p, err := loadPlan(args[0])
			if err != nil {
				return err
			}
			out := &pb.DeploymentConfiguration{Name: args[0]}
			for _, n := range p.Notes {
				out.Notes = append(out.Notes, n.String())
			}
			return printer{json: g.output == "json", w: cmd.OutOrStdout()}.message(out, func(w io.Writer) {
				for _, n := range out.Notes {
					fmt.Fprintf(w, "%s:%s\n", args[0], n)
				}
				fmt.Fprintf(w, "%s: %d phases, told: %v\n", args[0], len(p.Phases), p.Notify)
			})
		}},
		&cobra.Command{Use: "apply FILE", Short: "Make a deployment plan the one that new rollouts follow", Args: exactArgs("FILE"),
			RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
				text, _, err := loadPlan(args[0])
				if err != nil {
					return err
				}
				return cl.printDeployment(cl.admin.ConfigureDeployment(ctx, &pb.ConfigureDeploymentRequest{Name: planName(args[0]), Text: text, Actor: c.actor}))
			})},
		&cobra.Command{Use: "show", Short: "Print the deployment plan in force", Args: exactArgs(),
			RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
				return cl.printDeployment(cl.admin.GetDeployment(ctx, &pb.NameRequest{}))
			})})
	return cmd
}

func (c *client) printDeployment(d *pb.DeploymentConfiguration, err error) error {
	if err != nil {
		return err
	}
	return c.out.message(d, func(w io.Writer) {
		fmt.Fprintf(w, "%s by %s since %s, sha256 %s\n", d.Name, d.Actor, d.Since.AsTime().Format(time.RFC3339), d.Sha256)
		for _, n := range d.Notes {
			fmt.Fprintf(w, "%s:%s\n", d.Name, n)
		}
	})
}

func printRollouts(w io.Writer, rollouts []*pb.Rollout) {
	fmt.Fprintln(w, "ROLLOUT\tMODEL\tCANDIDATE\tLAST GOOD\tSTATE\tPHASE\tWEIGHT\tREASON")
	for _, r := range rollouts {
		phase, weight := "-", "-"
		if int(r.Phase) < len(r.Phases) {
			phase = r.Phases[r.Phase].Name
			weight = fmt.Sprintf("%.2f%%", float64(r.Weight)/100)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Id, r.Model, r.Candidate, r.LastGood, r.State, phase, weight, r.Reason)
		if r.Waiting != "" {
			fmt.Fprintf(w, "  %s\n", r.Waiting)
		}
		for _, g := range r.Gates {
			dry := ""
			if g.DryRun {
				dry = " (dry run)"
			}
			fmt.Fprintf(w, "  gate %s\t%s%s\t%s\n", g.Gate, g.Outcome, dry, g.Reason)
		}
		if d := r.Drill; d != nil {
			fmt.Fprintf(w, "  drill: a rollback would reach %d sidecars in %.0f ms, laggards %v\n", d.Acked, d.TotalMs, d.Laggards)
		}
		for _, e := range r.Evidence {
			fmt.Fprintf(w, "  stratum %s\tcandidate %d/%d failed\tbaseline %d/%d failed\tE %.3g\tSR %.3g\trolls back at E ≥ %.3g\t\t\n", e.Stratum,
				e.CandidateFailures, e.CandidateRequests, e.BaselineFailures, e.BaselineRequests, e.EValue, e.SrValue, e.Threshold)
		}
	}
}
