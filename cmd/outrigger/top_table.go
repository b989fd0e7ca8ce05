//go:build !dataplane

package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// table prints a picture for people.
func (v *topView) table(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "%s  region %s, policy %d, log %d\n\n", v.At.Local().Format("15:04:05"), v.Region, v.Position, v.Head)
	fmt.Fprintln(tw, "VERSION\tSTATE\tSHARE\tREQ/S\tERRORS\tP50\tP99\tREQUESTS\tFAILED")
	for _, x := range v.Versions {
		fmt.Fprintf(tw, "%s@%s\t%s\t%.1f%%\t%.1f\t%.1f%%\t%.1f ms\t%.1f ms\t%d\t%d\n", x.Model, x.Version, x.State, 100*x.Share, x.Rate, 100*x.ErrorRatio, x.P50, x.P99, x.Requests, x.Failures)
	}
	if len(v.Sidecars) > 0 {
		fmt.Fprintln(tw, "\nSIDECAR\tREQ/S\tERRORS\tMEAN\tIN FLIGHT\tOPEN BREAKERS\tREADS/S\tPROCESS\tNODE\tORIGIN")
	}
	for _, x := range v.Sidecars {
		fmt.Fprintf(tw, "%s\t%.1f\t%.1f%%\t%.1f ms\t%d\t%d\t%.1f\t%.1f%%\t%.1f%%\t%.1f%%\n", x.Node, x.Rate, 100*x.ErrorRatio, x.MeanMs, x.InFlight, x.Open, x.Reads, 100*x.Process, 100*x.NodeTier, 100*x.Origin)
	}
	fmt.Fprintln(tw, "\nNODE\tKIND\tCONNECTED\tPOLICY\tBEHIND\tFEED LAG\tREJECTS")
	for _, x := range v.Nodes {
		behind := "-"
		if x.Behind > 0 {
			behind = seconds(x.Behind)
		}
		fmt.Fprintf(tw, "%s\t%s\t%v\t%d\t%s\t%d\t%s\n", x.Node, x.Kind, x.Connected, x.Acked, behind, x.FeedLag, x.Rejects)
	}
	if len(v.Rollouts) > 0 {
		fmt.Fprintln(tw, "\nROLLOUT\tSTATE\tPHASE\tWEIGHT\tEVIDENCE")
	}
	for _, x := range v.Rollouts {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%.2f%%\t%.3g of 1\n", x.ID, x.State, x.Phase, 100*x.Weight, x.Evidence)
	}
	c := v.Cache
	fmt.Fprintf(tw, "\nvariables: %.1f reads/s, process %.1f%%, node %.1f%%, origin %.1f%%; invalidation p50 %.2f ms, p99 %.2f ms\n",
		c.Reads, 100*c.Process, 100*c.Node, 100*c.Origin, c.LagP50, c.LagP99)
	for _, a := range v.Alerts {
		fmt.Fprintf(tw, "alert %s\n", a)
	}
	return tw.Flush()
}
