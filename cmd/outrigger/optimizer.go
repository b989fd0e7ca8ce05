//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// optimizerCommand are the verbs of the registry of optimisers.
func optimizerCommand(g *globals) *cobra.Command {
	cmd := group("optimizer", "Optimisers: list them and how they did, register plugins, choose one")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(optimizerList(c), optimizerRegister(c), optimizerRemove(c), optimizerSelect(c))
	return cmd
}

func optimizerList(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List optimisers, and how they did by type of task", Args: exactArgs(),
		RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
			r, err := cl.admin.ListOptimizers(ctx, &pb.ListRequestAll{})
			if err != nil {
				return err
			}
			return cl.out.message(r, func(w io.Writer) {
				fmt.Fprintln(w, "OPTIMIZER\tFAMILY\tWORKS ON\tBUDGET\tWHERE")
				for _, o := range r.GetOptimizers() {
					optimizerLine(w, o)
				}
				if len(r.GetHistory()) > 0 {
					fmt.Fprintln(w, "\nTASK TYPE\tOPTIMIZER\tRUNS\tMEAN SCORE")
				}
				for _, h := range r.GetHistory() {
					fmt.Fprintf(w, "%s\t%s\t%d\t%.3f\n", h.GetTaskType(), h.GetOptimizer(), h.GetRuns(), h.GetMeanScore())
				}
			})
		})}
}

func optimizerLine(w io.Writer, o *pb.Optimizer) {
	i := o.GetInfo()
	fmt.Fprintf(w, "%s\t%s\t%v\t%d to %d\t%s\n", i.GetId(), i.GetFamily(), i.GetKinds(), i.GetMinBudget(), i.GetMaxBudget(), cmp.Or(o.GetAddress(), "built in"))
}

func optimizerRegister(c *clientFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: "register ADDRESS", Short: "Examine the plugin at ADDRESS and make it known",
		Long: `Asks the plugin (service outrigger.v1.OptimizerPlugin) at ADDRESS, host:port or unix:path as
the control plane reaches it, what it is, and has it optimise test problems: every trial must
lie inside its space, the same seed must give the same trials, and it must do better than
random search, within a minute. One that does not is refused with the reason. Later uses are
checked too. It needs an administrator.`,
		Args: exactArgs("ADDRESS")}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit")
	cmd.RunE = c.verb(true, func(ctx context.Context, cl *client, args []string) error {
		o, err := cl.admin.RegisterOptimizer(ctx, &pb.RegisterOptimizerRequest{Address: args[0], Reason: reason, Actor: c.actor})
		if err != nil {
			return err
		}
		return cl.out.message(o, func(w io.Writer) { optimizerLine(w, o) })
	})
	return cmd
}

func optimizerRemove(c *clientFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: "remove ID", Short: "Forget a plugin; what it recorded stays", Args: exactArgs("ID")}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		o, err := cl.admin.RemoveOptimizer(ctx, &pb.RemoveOptimizerRequest{Name: args[0], Reason: reason, Actor: c.actor})
		if err != nil {
			return err
		}
		return cl.out.message(o, func(w io.Writer) { fmt.Fprintf(w, "removed %s\n", args[0]) })
	})
	return cmd
}

func optimizerSelect(c *clientFlags) *cobra.Command {
	r := &pb.SelectOptimizerRequest{}
	cmd := &cobra.Command{Use: "select TASK-TYPE", Short: "Say which optimiser a strategy chooses, and why", Args: exactArgs("TASK-TYPE")}
	f := cmd.Flags()
	f.StringVar(&r.Strategy, "strategy", "performance_weighted", "performance_weighted, feature_matching, adaptive or experimental")
	f.StringVar(&r.Task, "task", "", "id of the optimisation; the same one gets the same answer")
	f.Int32Var(&r.Budget, "budget", 0, "evaluations; 0 = unknown")
	f.BoolVar(&r.Noisy, "noisy", false, "evaluating twice gives different losses")
	f.BoolVar(&r.Smooth, "smooth", false, "the loss has a slope to follow")
	f.Int32Var(&r.Parallel, "parallel", 0, "evaluations at once")
	f.StringSliceVar(&r.Wants, "wants", nil, "families or tags, any of which will do")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r.TaskType = args[0]
		s, err := cl.admin.SelectOptimizer(ctx, r)
		if err != nil {
			return err
		}
		return cl.out.message(s, func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\n", s.GetOptimizer().GetInfo().GetId(), s.GetReason()) })
	})
	return cmd
}
