//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func xdsCanary(c *clientFlags) *cobra.Command {
	cmd := &cobra.Command{Use: "canary", Short: "Try policy changes on a few xDS clients first",
		Long: `After canary start, policy changes go to the chosen clients only; the others keep the policy
of before. When all chosen clients have had the newest policy for the dwell it is widened
to everybody and the canary is over. When one of them rejects it, is cut off after it was
sent it, or takes longer than the patience, everybody gets the policy of before, and keeps
it until a canary is started anew or the policy is widened by hand. A model of which a
version is quarantined or retired meanwhile changes everywhere at once.`}
	cmd.AddCommand(xdsCanaryStart(c), xdsCanaryEnd(c, "widen", true, "Give everybody the newest policy"),
		xdsCanaryEnd(c, "rollback", false, "Give everybody the policy of before the canary"), xdsCanaryStatus(c))
	return cmd
}

func xdsCanaryStart(c *clientFlags) *cobra.Command {
	r := &pb.XdsCanaryStartRequest{}
	var percent float64
	var dwell, patience time.Duration
	cmd := &cobra.Command{Use: "start", Short: "Have policy changes go to a few clients first", Args: exactArgs()}
	f := cmd.Flags()
	f.Float64Var(&percent, "percent", 0, "of the clients, drawn by their node ids")
	f.StringSliceVar(&r.Kinds, "kind", nil, "kinds to draw from: sidecar, envoy, grpc (default all)")
	f.StringSliceVar(&r.Nodes, "node", nil, "clients that are chosen in any case")
	f.DurationVar(&dwell, "dwell", 30*time.Second, "how long all of them must have a policy before it is widened")
	f.DurationVar(&patience, "patience", time.Minute, "how long they may take to accept it")
	f.StringVar(&r.Reason, "reason", "", "for the audit")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		if percent < 0 || percent > 100 {
			return usageError{fmt.Errorf("--percent is %g; give 0 to 100", percent)}
		}
		r.Share, r.Dwell, r.Patience, r.Actor = uint32(percent*100+0.5), durationpb.New(dwell), durationpb.New(patience), c.actor
		out, err := cl.delivery().XdsCanaryStart(ctx, r)
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) { xdsCanaryText(w, out) })
	})
	return cmd
}

func xdsCanaryEnd(c *clientFlags, use string, widen bool, short string) *cobra.Command {
	r := &pb.XdsCanaryEndRequest{Widen: widen}
	cmd := &cobra.Command{Use: use, Short: short, Args: exactArgs()}
	cmd.Flags().StringVar(&r.Reason, "reason", "", "for the audit")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		r.Actor = c.actor
		out, err := cl.delivery().XdsCanaryEnd(ctx, r)
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) { xdsCanaryText(w, out) })
	})
	return cmd
}

func xdsCanaryStatus(c *clientFlags) *cobra.Command {
	cmd := &cobra.Command{Use: "status", Short: "Print what is tried, on whom, and what is waited for", Args: exactArgs()}
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		out, err := cl.delivery().XdsCanary(ctx, &pb.XdsCanaryRequest{})
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) { xdsCanaryText(w, out) })
	})
	return cmd
}

func xdsCanaryText(w io.Writer, c *pb.XdsCanaryResponse) {
	if c.State == "off" {
		fmt.Fprintf(w, "off: every client gets the newest policy, %d\n", c.Policy)
		return
	}
	fmt.Fprintf(w, "%s: policy %d is tried on %.4g %% of %s, the others have %d\n", strings.ReplaceAll(c.State, "_", " "), c.Policy,
		float64(c.Share)/100, cmp.Or(strings.Join(c.Kinds, ", "), "all clients"), c.Base)
	fmt.Fprintf(w, "%s\n\nNODE\tCONNECTED\tACKED\tREJECTS\n", c.Reason)
	for _, n := range c.Chosen {
		fmt.Fprintf(w, "%s\t%t\t%d\t%s\n", n.Node, n.Connected, n.AckedPosition, nackLine(n.Nack))
	}
}
