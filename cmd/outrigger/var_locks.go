//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// varOptimization are the verbs of optimisation locks.
func varOptimization(c *clientFlags) *cobra.Command {
	cmd := group("optimization", "Optimisation locks: while one stands, only its holder writes the variable")
	cmd.AddCommand(optimizationList(c), optimizationStart(c), optimizationStop(c))
	return cmd
}

func optimizationList(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "list SESSION", Short: "List the variables of a session that are being optimised", Args: exactArgs("SESSION"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			r, err := cl.List(ctx, &pb.ListRequest{Tenant: c.tenant, Session: args[0]})
			if err != nil {
				return err
			}
			held := &pb.ListResponse{}
			for _, v := range r.GetVariables() {
				if v.GetOptimization() != nil {
					held.Variables = append(held.Variables, v)
				}
			}
			return cl.out.message(held, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tOPTIMIZATION\tHOLDER\tPRIORITY\tSINCE\tLAST SIGN")
				for _, v := range held.Variables {
					lockLine(w, v)
				}
			})
		})}
}

func lockLine(w io.Writer, v *pb.Variable) {
	o := v.GetOptimization()
	fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", v.GetKey().GetName(), o.GetId(), o.GetOptimizer(), o.GetPriority(),
		o.GetStartedAt().AsTime().Format(time.RFC3339), o.GetRenewedAt().AsTime().Format(time.RFC3339))
}

func optimizationStart(c *clientFlags) *cobra.Command {
	var holder string
	var priority int32
	var preempt bool
	cmd := &cobra.Command{Use: "start SESSION/NAME", Short: "Lock a variable for an optimiser, or renew its lock, and print the id that writes must name",
		Args: exactArgs("SESSION/NAME")}
	cmd.Flags().StringVar(&holder, "optimizer", "", "who holds the lock; the same name renews it (default: --actor)")
	cmd.Flags().Int32Var(&priority, "priority", 0, "what a later --preempt must exceed")
	cmd.Flags().BoolVar(&preempt, "preempt", false, "take over a lock of lower priority")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		session, name, err := cl.splitKey(args[0])
		if err != nil {
			return err
		}
		if holder == "" {
			holder = c.actor
		}
		req := &pb.StartOptimizationRequest{Tenant: c.tenant, Session: session, Identifier: name, Optimizer: holder,
			Config: map[string]string{"priority": fmt.Sprint(priority)}, Options: cl.options()}
		if preempt {
			req.Config["on_conflict"] = "preempt"
		}
		v, err := cl.StartOptimization(ctx, req)
		if err != nil {
			return err
		}
		return cl.out.message(v, func(w io.Writer) { fmt.Fprintln(w, v.GetOptimization().GetId()) })
	})
	return cmd
}

func optimizationStop(c *clientFlags) *cobra.Command {
	var id string
	var force bool
	cmd := &cobra.Command{Use: "stop SESSION/NAME", Short: "Release the optimisation lock of a variable", Args: exactArgs("SESSION/NAME")}
	cmd.Flags().StringVar(&id, "optimization", "", "id of the lock, as start printed it")
	cmd.Flags().BoolVar(&force, "force", false, "end it whoever holds it")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		session, name, err := cl.splitKey(args[0])
		if err != nil {
			return err
		}
		if (id == "") == !force {
			return usageError{fmt.Errorf("give either --optimization ID or --force")}
		}
		v, err := cl.StopOptimization(ctx, &pb.StopOptimizationRequest{Tenant: c.tenant, Session: session, Identifier: name, Force: force, Options: holding(cl.options(), id)})
		if err != nil {
			return err
		}
		return cl.printVariable(v)
	})
	return cmd
}

// holding adds the optimisation that a writer holds.
func holding(o *pb.WriteOptions, id string) *pb.WriteOptions {
	if id != "" {
		o.OptimizationIds = []string{id}
	}
	return o
}

// varDependency are the verbs of what depends on what.
func varDependency(c *clientFlags) *cobra.Command {
	cmd := group("dependency", "What variables are computed from")
	cmd.AddCommand(dependencyAdd(c), dependencyList(c))
	return cmd
}

func dependencyAdd(c *clientFlags) *cobra.Command {
	var kind string
	cmd := &cobra.Command{Use: "add SESSION FROM TO", Short: "Record that TO is computed from FROM; a cycle is refused", Args: exactArgs("SESSION", "FROM", "TO")}
	cmd.Flags().StringVar(&kind, "type", "data", "data or compute")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r, err := cl.AddDependency(ctx, &pb.AddDependencyRequest{Tenant: c.tenant, Session: args[0],
			Dependency: &pb.Dependency{From: args[1], To: args[2], Type: kind}, Options: cl.options()})
		if err != nil {
			return err
		}
		return cl.printDependencies(r)
	})
	return cmd
}

func dependencyList(c *clientFlags) *cobra.Command {
	var from string
	cmd := &cobra.Command{Use: "list SESSION", Short: "List a session's dependencies", Args: exactArgs("SESSION")}
	cmd.Flags().StringVar(&from, "from", "", "say in which order what depends on this variable is to be recomputed")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r, err := cl.ListDependencies(ctx, &pb.ListDependenciesRequest{Tenant: c.tenant, Session: args[0], From: from})
		if err != nil {
			return err
		}
		return cl.printDependencies(r)
	})
	return cmd
}

func (c *client) printDependencies(r *pb.Dependencies) error {
	return c.out.message(r, func(w io.Writer) {
		fmt.Fprintln(w, "FROM\tTO\tTYPE")
		for _, d := range r.GetDependencies() {
			fmt.Fprintf(w, "%s\t%s\t%s\n", d.GetFrom(), d.GetTo(), d.GetType())
		}
		if len(r.GetOrder()) > 0 {
			fmt.Fprintf(w, "order: %v\n", r.GetOrder())
		}
	})
}
