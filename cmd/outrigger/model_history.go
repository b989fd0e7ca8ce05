//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func modelVersions(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "versions MODEL", Short: "List a model's versions with digest, parameters, pins and lineage", Args: exactArgs("MODEL"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			m, err := cl.admin.GetModel(ctx, &pb.NameRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return cl.out.message(m, func(w io.Writer) { printVersions(w, m) })
		})}
}

func printVersions(w io.Writer, m *pb.Model) {
	fmt.Fprintln(w, "NUMBER\tVERSION\tSTATE\tREGISTERED\tDIGEST\tPARAMETERS\tPINS\tPARENTS\tARTIFACT")
	for _, v := range m.Versions {
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%v\t%s\n", v.Number, v.Version, v.State, v.RegisteredAt.AsTime().Format(time.RFC3339),
			short(v.Digest), pairs(v.Parameters), pairs(v.Pins), v.Parents, short(v.Artifact))
	}
}

// short cuts a digest to what tells it apart on a screen; JSON has all of it.
func short(digest string) string {
	const shown = len("sha256:") + 12
	return digest[:min(len(digest), shown)]
}

func pairs[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%s=%v", k, m[k]))
	}
	return out
}

func modelServedAt(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "served-at MODEL TIME", Short: "Say which versions answered at a time (RFC 3339, now, or an age such as 2h)",
		Args: exactArgs("MODEL", "TIME"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			req := &pb.ServedAtRequest{Model: args[0]}
			if args[1] != "now" {
				var err error
				if req.At, err = parseWhen("TIME", args[1]); err != nil {
					return err
				}
			}
			r, err := cl.admin.ServedAt(ctx, req)
			if err != nil {
				return err
			}
			return cl.out.message(r, func(w io.Writer) { printServed(w, r) })
		})}
}

func printServed(w io.Writer, r *pb.ServedAtResponse) {
	fmt.Fprintln(w, "VERSION\tARM\tSHARE\tSINCE\tBY\tPOSITION")
	for _, a := range r.Arms {
		if a.Weight > 0 {
			fmt.Fprintf(w, "%s\t%s\t%.2f%%\t%s\t%s\t%d\n", a.Version, a.Name, float64(a.Weight)/100, r.Since.AsTime().Format(time.RFC3339Nano), r.Actor, r.WeightEpoch)
		}
	}
}
