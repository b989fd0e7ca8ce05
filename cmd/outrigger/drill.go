//go:build !dataplane

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func drillCommand(g *globals) *cobra.Command {
	cmd := group("drill", "Rehearse rollbacks: on this machine with real processes, or of a running rollout")
	cmd.AddCommand(drillRollback(g), drillRollout(g))
	return cmd
}

// drillFlags are the settings of a drill on this machine.
type drillFlags struct {
	sidecars, processes int
	runs, kills         int
	envoys              int
	envoy               string
	rps                 float64
	weight              uint32
	errorRate           float64
	deadMan             time.Duration
	warm, after         time.Duration
	seed                uint64
	strict              bool
}

// Targets of a drill: what the design promises at 100 sidecars.
const (
	drillDecisionTarget = time.Second
	drillPushTarget     = 250 * time.Millisecond
)

func drillRollback(g *globals) *cobra.Command {
	d := &drillFlags{}
	cmd := &cobra.Command{Use: "rollback", Short: "Measure how long a bad version lives, end to end, on this machine", Args: exactArgs(),
		Long: `Rollback starts a control plane, --processes processes that host --sidecars sidecars (each
with a listener, a policy stream and a report stream of its own; those of one process share
a variable cache, as the pods of a node do) and sends traffic through every sidecar to two
versions of a model, which are servers of this command. Each run rolls a new version out
as a canary, lets it turn bad, and waits until the mesh has taken it out by itself.

The judge is the bad version's server: it knows from each request through which sidecar it
came and when its client began it. A request that began after its sidecar had the
rollback's policy in force, which is before the sidecar acknowledges it, is wrong; there
must be none. After the runs come --kills more, in which the control plane is killed
(SIGKILL) and stays away for longer than the dead-man lease: at a random moment around the
rollback, and in every second one when the first sidecar has it and the others are being
told. No request that begins after the lease may reach the bad version, and the control
plane that comes back must finish the rollback.

With --envoys Envoys serve beside the sidecars and are judged by the lease in the same way.
When an Envoy has a rollback is known to itself only, so without a kill the last request
that one sends to the bad version is reported and not judged.

Exit code 1 if a request was wrong, a rollback or an acknowledgement is missing, or a call
failed for another reason than the bad version; with --strict also if a target is missed.`}
	f := cmd.Flags()
	f.IntVar(&d.sidecars, "sidecars", 100, "sidecars, 1 to 1000")
	f.IntVar(&d.processes, "processes", 0, "processes that host them (default one for every 20 sidecars)")
	f.IntVar(&d.runs, "runs", 20, "rollbacks to measure, 0 to 1000")
	f.IntVar(&d.kills, "kills", 4, "further rollbacks in which the control plane is killed, 0 to 1000")
	f.Float64Var(&d.rps, "rps", 500, "requests per second over all sidecars, 1 to 20000")
	f.IntVar(&d.envoys, "envoys", 0, "Envoys beside the sidecars, 0 to 20; they have a client that calls 20 times per second")
	f.StringVar(&d.envoy, "envoy", "envoy", "the Envoy program")
	f.Uint32Var(&d.weight, "weight", 1000, "the canary's part of the users, of 10000")
	f.Float64Var(&d.errorRate, "error-rate", 0.5, "part of its calls that the bad version fails, above 0 to 1")
	f.DurationVar(&d.deadMan, "dead-man", 10*time.Second, "the control plane's --dead-man")
	f.DurationVar(&d.warm, "warm", time.Second, "how long the canary is healthy first")
	f.DurationVar(&d.after, "after", 500*time.Millisecond, "how long traffic is watched after the rollback")
	f.Uint64Var(&d.seed, "seed", 1, "of the moments at which the version turns bad and the control plane is killed")
	f.BoolVar(&d.strict, "strict", false, "fail if a target is missed")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := d.validate(); err != nil {
			return usageError{err}
		}
		return d.run(cmd, g)
	}
	return cmd
}

func (d *drillFlags) validate() error {
	if d.envoys > 0 {
		path, err := exec.LookPath(d.envoy)
		if err != nil {
			return fmt.Errorf("--envoy: %w; give the path of an Envoy", err)
		}
		d.envoy = path
	}
	if d.processes == 0 {
		d.processes = (d.sidecars + 19) / 20
	}
	switch {
	case d.sidecars < 1 || d.sidecars > 1000:
		return fmt.Errorf("--sidecars is %d; give 1 to 1000", d.sidecars)
	case d.processes < 1 || d.processes > d.sidecars:
		return fmt.Errorf("--processes is %d; give 1 to the %d sidecars", d.processes, d.sidecars)
	case d.runs < 0 || d.runs > 1000 || d.kills < 0 || d.kills > 1000 || d.runs+d.kills == 0:
		return fmt.Errorf("--runs is %d and --kills %d; give 0 to 1000, and at least one of them", d.runs, d.kills)
	case d.envoys < 0 || d.envoys > 20:
		return fmt.Errorf("--envoys is %d; give 0 to 20", d.envoys)
	case !(d.rps >= 1 && d.rps <= 20_000):
		return fmt.Errorf("--rps is %v; give 1 to 20000", d.rps)
	case d.weight < 1 || d.weight > 9999:
		return fmt.Errorf("--weight is %d; give 1 to 9999 parts of 10000", d.weight)
	case !(d.errorRate > 0 && d.errorRate <= 1):
		return fmt.Errorf("--error-rate is %v; give more than 0, at most 1", d.errorRate)
	case d.deadMan < time.Second || d.deadMan > time.Minute:
		return fmt.Errorf("--dead-man is %v; give 1s to 1m", d.deadMan)
	case d.warm < 0 || d.warm > time.Hour || d.after < 0 || d.after > time.Hour:
		return fmt.Errorf("--warm is %v and --after %v; give 0 to 1h", d.warm, d.after)
	}
	return nil
}

// run starts everything, rehearses, and always stops every process again.
func (d *drillFlags) run(cmd *cobra.Command, g *globals) error {
	dir, cleanup, err := (&upFlags{}).workDir()
	if err != nil {
		return err
	}
	defer cleanup()
	m := newDrillMesh(dir, d, g, cmd.ErrOrStderr())
	defer m.stop()
	if err := m.start(cmd.Context()); err != nil {
		return err
	}
	report, err := m.rehearseAll(cmd.Context())
	if err != nil {
		return err
	}
	if err := report.print(g.output == "json", cmd.OutOrStdout()); err != nil {
		return err
	}
	return report.verdict(d.strict)
}

// drillRollout is the drill of a running rollout: everything a rollback does, but the
// weights stay.
func drillRollout(g *globals) *cobra.Command {
	var reason string
	var within time.Duration
	cmd := &cobra.Command{Use: "rollout ID", Short: "Rehearse the rollback of a running rollout; nothing moves", Args: exactArgs("ID"),
		Long: `Rollout makes the control plane write, compile, push and await a policy as a rollback of
this rollout would, with every weight left as it is, and prints how long that took until
the last sidecar had acknowledged it. Exit code 1 if a sidecar did not, or with --within if
it took longer. The audit keeps both ends of the drill.`}
	c := addClientFlags(cmd, g)
	f := cmd.Flags()
	f.StringVar(&reason, "reason", "drill", "why, for the audit")
	f.DurationVar(&within, "within", 0, "fail if it takes longer; 0 = any time will do")
	cmd.RunE = c.verb(true, func(ctx context.Context, cl *client, args []string) error {
		done, err := cl.rehearse(ctx, args[0], reason)
		if err != nil {
			return err
		}
		if err := cl.out.message(done, func(w io.Writer) {
			fmt.Fprintf(w, "a rollback of %s would reach %d sidecars in %.0f ms\n", args[0], done.Acked, done.TotalMs)
			for _, l := range done.Laggards {
				fmt.Fprintf(w, "not acknowledged by %s\n", l)
			}
		}); err != nil {
			return err
		}
		switch took := time.Duration(done.TotalMs * float64(time.Millisecond)); {
		case len(done.Laggards) > 0:
			return outrigger.Errorf(outrigger.Unavailable, "%d sidecars did not acknowledge the drill: %v", len(done.Laggards), done.Laggards)
		case within > 0 && took > within:
			return outrigger.Errorf(outrigger.Timeout, "the drill took %v, more than --within %v", took.Round(time.Millisecond), within)
		}
		return nil
	})
	return cmd
}

// rehearse starts a drill and waits for its end, which the control plane bounds.
func (c *client) rehearse(ctx context.Context, id, reason string) (*pb.RollbackDrillCompleted, error) {
	started, err := c.admin.RollbackRollout(ctx, &pb.RollbackRolloutRequest{Id: id, Mode: "drill", Reason: reason, Actor: c.flags.actor})
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := c.admin.GetRollout(ctx, &pb.NameRequest{Name: id})
		if err != nil {
			return nil, err
		}
		// A drill's end is an event of the rollout; one before ours has a lower push.
		if d := r.Drill; d != nil && (started.Drill == nil || d.Push > started.Drill.Push) {
			return d, nil
		}
		if r.State != "running" && r.State != "held" {
			return nil, outrigger.Errorf(outrigger.Locked, "rollout %s became %s during the drill", id, r.State)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(errors.New("the drill goes on without us"), ctx.Err())
		}
	}
}
