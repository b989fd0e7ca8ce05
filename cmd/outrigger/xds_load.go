//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func xdsLoad(c *clientFlags) *cobra.Command {
	r := &pb.XdsLoadRequest{}
	cmd := &cobra.Command{Use: "load", Short: "Print what Envoys and gRPC clients report of their requests", Args: exactArgs(),
		Long: `Load prints, per version and region, the requests that clients without a sidecar reported
since this control plane started, and the mean of each metric their endpoints attach (ORCA).`}
	cmd.Flags().StringVar(&r.Model, "model", "", "only this model")
	cmd.Flags().StringVar(&r.Group, "group", "", "only this group: envoy, grpc")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		out, err := cl.delivery().XdsLoad(ctx, r, largeAnswer())
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) {
			fmt.Fprintln(w, "GROUP\tMODEL\tVERSION\tREGION\tISSUED\tSUCCEEDED\tFAILED\tDROPPED\tMETRICS")
			for _, x := range out.Rows {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t", x.Group, x.Model, x.Version, x.Region, x.Issued, x.Succeeded, x.Failed, x.Dropped)
				for _, m := range x.Metrics {
					fmt.Fprintf(w, "%s=%.4g ", m.Name, m.Total/float64(max(m.Requests, 1)))
				}
				fmt.Fprintln(w)
			}
		})
	})
	return cmd
}
