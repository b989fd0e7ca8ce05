//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func modelConfigure(c *clientFlags) *cobra.Command {
	req := &pb.ConfigureModelRequest{Limits: &pb.Limits{}}
	var timeout time.Duration
	var cost string
	cmd := &cobra.Command{Use: "configure MODEL", Short: "Set a model's unit, limits and cost formula; what is not given stays", Args: exactArgs("MODEL")}
	f := cmd.Flags()
	f.StringVar(&req.Unit, "unit", "", "what is randomised: user, session or request")
	f.Uint32Var(&req.MaxAttempts, "max-attempts", 0, "attempts of one request")
	f.Uint32Var(&req.Limits.MaxRequests, "max-requests", 0, "requests of one version that a sidecar has in flight; the next is answered 503 (default 1024)")
	f.Uint32Var(&req.Limits.MaxConnections, "max-connections", 0, "HTTP/1.1 connections of one version that carry requests; the next request waits (default: --max-requests)")
	f.Uint32Var(&req.Limits.MaxPendingRequests, "max-pending", 0, "requests that wait for a connection; the next is answered 503 (default: --max-requests)")
	f.Uint32Var(&req.Limits.MaxRetries, "max-retries", 0, "retries of one version in flight; the next is not made (default: a fifth of the requests)")
	f.Uint32Var(&req.Limits.ConsecutiveFailures, "consecutive-failures", 0, "failures of an endpoint in a row after which it is not asked for 10 s (default 5)")
	f.DurationVar(&timeout, "request-timeout", 0, "limit of one request")
	f.StringVar(&cost, "cost", "", `what a version costs, in CEL over requests, failures, cancelled, attempts, tokens_in, tokens_out, seconds: "tokens_in*2.5e-6 + tokens_out*1e-5"; empty = nothing is said`)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Flag("cost").Changed {
			req.Cost = &cost
		}
		return c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			req.Model, req.TimeoutMs, req.Actor = args[0], uint32(timeout.Milliseconds()), c.actor
			m, err := cl.admin.ConfigureModel(ctx, req)
			if err != nil {
				return err
			}
			return cl.printModel(m)
		})(cmd, args)
	}
	return cmd
}

func modelScore(c *clientFlags) *cobra.Command {
	o := &pb.OutcomeRecord{}
	cmd := &cobra.Command{Use: "score MODEL UNIT METRIC VALUE", Args: exactArgs("MODEL", "UNIT", "METRIC", "VALUE"),
		Short: "Say how well a version answered a unit: user_satisfaction, accuracy (0 to 1) or cost_per_request"}
	cmd.Flags().StringVar(&o.Version, "version", "", "the version that answered (default: the one the unit is assigned to)")
	cmd.Flags().StringVar(&o.Id, "id", "", "a second score of the unit and metric with the same id does not count")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) (err error) {
		o.Model, o.Unit, o.Metric = args[0], args[1], args[2]
		if o.Value, err = strconv.ParseFloat(args[3], 64); err != nil {
			return usageError{fmt.Errorf("VALUE %q is no number", args[3])}
		}
		return cl.record(ctx, o)
	})
	return cmd
}

func modelUnalias(c *clientFlags) *cobra.Command {
	var expected string
	cmd := &cobra.Command{Use: "unalias MODEL ALIAS", Short: "Take an alias (challenger, last_good) away", Args: exactArgs("MODEL", "ALIAS")}
	cmd.Flags().StringVar(&expected, "expected", "", "refuse unless the alias points here now")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req := &pb.DeleteAliasRequest{Model: args[0], Alias: args[1], Actor: c.actor}
		if expected != "" {
			req.Expected = &expected
		}
		m, err := cl.admin.DeleteAlias(ctx, req)
		if err != nil {
			return err
		}
		return cl.printModel(m)
	})
	return cmd
}

func modelMetrics(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "metrics MODEL", Short: "Say how a model's versions did over the last minute, copies of requests apart", Args: exactArgs("MODEL"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			r, err := cl.admin.ModelMetrics(ctx, &pb.NameRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return cl.out.message(r, func(w io.Writer) { printMetrics(w, r) })
		})}
}

func printMetrics(w io.Writer, r *pb.ModelMetricsResponse) {
	fmt.Fprintln(w, "VERSION\tSTATE\tOF\tREQUESTS\tSUCCESS\tMEAN MS\tP50\tP95\tP99\tTOKENS IN\tOUT\tCOST")
	for _, v := range r.Versions {
		for _, row := range []struct {
			of    string
			stats *pb.VersionStats
			needs bool
		}{{"last minute", v.Window, true}, {"start", v.Lifetime, true}, {"copies, last minute", v.ShadowWindow, false}, {"copies, start", v.ShadowLifetime, false}} {
			s := row.stats
			if s.GetRequests() == 0 && !row.needs {
				continue
			}
			success, cost := "-", "-"
			if s.GetRequests() > s.GetCancelled() {
				success = fmt.Sprintf("%.2f%%", 100*s.GetSuccessRate())
			}
			if r.Cost != "" {
				cost = fmt.Sprintf("%.6g", s.GetCost())
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%.1f\t%.1f\t%.1f\t%.1f\t%d\t%d\t%s\n", v.Version, v.State, row.of, s.GetRequests(), success,
				s.GetMeanMs(), s.GetP50Ms(), s.GetP95Ms(), s.GetP99Ms(), s.GetTokensIn(), s.GetTokensOut(), cost)
		}
	}
}
