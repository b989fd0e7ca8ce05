//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func alertCommand(g *globals) *cobra.Command {
	cmd := group("alert", "What needs attention, who was told, and silences")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(alertList(c), alertShow(c), alertSilence(c))
	return cmd
}

func alertList(c *clientFlags) *cobra.Command {
	var all, check bool
	cmd := &cobra.Command{Use: "list", Short: "List alerts that stand, with who was told", Args: exactArgs()}
	cmd.Flags().BoolVar(&all, "all", false, "also those that are resolved")
	cmd.Flags().BoolVar(&check, "check", false, "fail if an alert stands that is not silenced")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		r, err := cl.alerts(ctx)
		if err != nil {
			return err
		}
		firing := 0
		shown := &pb.ListAlertsResponse{}
		for _, a := range r {
			if a.State == "firing" {
				firing++
			}
			if all || a.State != "resolved" {
				shown.Alerts = append(shown.Alerts, a)
			}
		}
		if err := cl.out.message(shown, func(w io.Writer) { printAlerts(w, shown.Alerts) }); err != nil {
			return err
		}
		if check && firing > 0 {
			return outrigger.Errorf(outrigger.Locked, "%d alerts stand", firing)
		}
		return nil
	})
	return cmd
}

func (c *client) alerts(ctx context.Context) ([]*pb.Alert, error) {
	r, err := c.admin.ListAlerts(ctx, &pb.ListRequestAll{Limit: 1000})
	return r.GetAlerts(), err
}

func printAlerts(w io.Writer, alerts []*pb.Alert) {
	fmt.Fprintln(w, "ALERT\tSEVERITY\tSTATE\tSINCE\tTOLD\tSUMMARY")
	for _, a := range alerts {
		since := "-"
		if a.Since != nil {
			since = a.Since.AsTime().Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", a.Id, a.Severity, a.State, since, toldText(a), a.Summary)
	}
}

// toldText says who was told what, in a word per route.
func toldText(a *pb.Alert) string {
	var out []string
	for _, d := range a.Deliveries {
		switch {
		case d.Route == "":
			out = append(out, "nobody for "+strings.Join(d.Contacts, "+"))
		case d.Delivered:
			out = append(out, d.Route+": "+d.Told)
		case d.At == nil:
			out = append(out, fmt.Sprintf("%s: retrying (%s)", d.Route, d.Error))
		default:
			out = append(out, fmt.Sprintf("%s: given up (%s)", d.Route, d.Error))
		}
	}
	if len(out) == 0 {
		return "-"
	}
	return strings.Join(out, ", ")
}

func alertShow(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "show ID", Short: "Print one alert with the numbers that fired it", Args: exactArgs("ID"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			all, err := cl.alerts(ctx)
			if err != nil {
				return err
			}
			i := slices.IndexFunc(all, func(a *pb.Alert) bool { return a.Id == args[0] })
			if i < 0 {
				return outrigger.Errorf(outrigger.NotFound, "alert %q not found", args[0])
			}
			a := all[i]
			return cl.out.message(a, func(w io.Writer) {
				printAlerts(w, []*pb.Alert{a})
				for _, k := range slices.Sorted(maps.Keys(a.Numbers)) {
					fmt.Fprintf(w, "  %s\t%s\n", k, a.Numbers[k])
				}
				if len(a.Notify) > 0 {
					fmt.Fprintf(w, "  for\t%s\n", strings.Join(a.Notify, ", "))
				}
			})
		})}
}

func alertSilence(c *clientFlags) *cobra.Command {
	req := &pb.SilenceAlertRequest{}
	var d time.Duration
	cmd := &cobra.Command{Use: "silence ID", Short: "Tell nobody about an alert for a while", Args: exactArgs("ID")}
	cmd.Flags().DurationVar(&d, "for", time.Hour, "how long, up to 720h; 0 lifts the silence")
	cmd.Flags().StringVar(&req.Reason, "reason", "", "why, for the audit")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req.Id, req.Actor, req.For = args[0], c.actor, durationPB(d)
		a, err := cl.admin.SilenceAlert(ctx, req)
		if err != nil {
			return err
		}
		return cl.out.message(a, func(w io.Writer) { printAlerts(w, []*pb.Alert{a}) })
	})
	return cmd
}
