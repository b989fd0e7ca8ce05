//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

func whyCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "why [ROLLOUT]", Short: "Print the last decision about a rollout, with the numbers it was made on", Args: optionalArg("ROLLOUT"),
		Long: `Why prints the newest decision about a rollout (the newest one of all without ROLLOUT): who
decided what and when, the reason, the evidence per stratum with the line it had to cross,
what the gates said, and how long each stage of a rollback took.`}
	c := addClientFlags(cmd, g)
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		a := answerOfWhy{}
		prefix := "rollout/"
		if len(args) == 1 {
			prefix += args[0]
		}
		var err error
		if a.event, err = cl.lastDecision(ctx, prefix, len(args) == 1); err != nil {
			return err
		}
		if a.rollout, err = cl.admin.GetRollout(ctx, &pb.NameRequest{Name: a.event.Aggregate[len("rollout/"):]}); err != nil {
			return err
		}
		return a.print(cl.out)
	})
	return cmd
}

// decisions are the kinds of events that decide about a rollout; the others prepare one,
// or follow from it.
var decisions = []string{"rollout_started", "rollout_advanced", "rollout_held", "rollout_resumed", "rollout_stepped_back", "rollout_draining",
	"rollback_started", "rollout_ended"}

// lastDecision finds the newest decision under prefix. The end of a rollback is not one:
// its start was. Errors have kind NotFound if there is none.
func (c *client) lastDecision(ctx context.Context, prefix string, exact bool) (*pb.Event, error) {
	var last *pb.Event
	for _, kind := range decisions {
		r, err := c.admin.Audit(ctx, &pb.AuditRequest{AggregatePrefix: prefix, Kind: kind, NewestFirst: true, Limit: 20})
		if err != nil {
			return nil, err
		}
		for _, e := range r.Events {
			if exact && e.Aggregate != prefix || e.GetRolloutEnded() != nil && e.GetRolloutEnded().Outcome != "completed" {
				continue
			}
			if last == nil || e.Position > last.Position {
				last = e
			}
			break
		}
	}
	if last == nil && exact {
		return nil, outrigger.Errorf(outrigger.NotFound, "rollout %q not found", prefix[len("rollout/"):])
	}
	if last == nil {
		return nil, outrigger.Errorf(outrigger.NotFound, "no rollout found: nothing was decided yet")
	}
	return last, nil
}

// answerOfWhy is a decision with the rollout it was about, as that is now.
type answerOfWhy struct {
	event   *pb.Event
	rollout *pb.Rollout
}

func (a *answerOfWhy) print(p printer) error {
	if !p.json {
		tw := tabwriter.NewWriter(p.w, 0, 8, 2, ' ', 0)
		a.text(tw)
		return tw.Flush()
	}
	out := map[string]json.RawMessage{}
	for name, m := range map[string]proto.Message{"decision": a.event, "rollout": a.rollout} {
		raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return err
		}
		out[name] = raw
	}
	return json.NewEncoder(p.w).Encode(out)
}

// reasonOf is the reason in an event's payload.
func reasonOf(e *pb.Event) string {
	if p, ok := payloadOf(e).(interface{ GetReason() string }); ok && p.GetReason() != "" {
		return p.GetReason()
	}
	return e.Metadata["reason"]
}

func payloadOf(e *pb.Event) any {
	switch p := e.Payload.(type) {
	case *pb.Event_RolloutStarted:
		return p.RolloutStarted
	case *pb.Event_RolloutAdvanced:
		return p.RolloutAdvanced
	case *pb.Event_RolloutHeld:
		return p.RolloutHeld
	case *pb.Event_RolloutResumed:
		return p.RolloutResumed
	case *pb.Event_RolloutSteppedBack:
		return p.RolloutSteppedBack
	case *pb.Event_RolloutDraining:
		return p.RolloutDraining
	case *pb.Event_RollbackStarted:
		return p.RollbackStarted
	case *pb.Event_RolloutEnded:
		return p.RolloutEnded
	}
	return nil
}

func (a *answerOfWhy) text(w io.Writer) {
	r, e := a.rollout, a.event
	phase := "-"
	if int(r.Phase) < len(r.Phases) {
		phase = r.Phases[r.Phase].Name
	}
	fmt.Fprintf(w, "%s: %s by %s at %s (position %d)\n", r.Id, eventlog.EventKind(e), cmp.Or(e.Actor, "-"), e.At.AsTime().Local().Format(time.RFC3339), e.Position)
	fmt.Fprintf(w, "because: %s\n", cmp.Or(reasonOf(e), "no reason was given"))
	fmt.Fprintf(w, "%s %s, last good %s, now %s in phase %s at %.2f %%\n", r.Model, r.Candidate, r.LastGood, r.State, phase, float64(r.Weight)/100)
	evidence, gates := r.Evidence, r.Gates
	if b := e.GetRollbackStarted(); b != nil {
		evidence, gates = b.Evidence, nil
		stages(w, b, r.RollbackCompleted)
	}
	if p := e.GetRolloutAdvanced(); p != nil {
		gates = p.Gates
	}
	if len(evidence) > 0 {
		fmt.Fprintln(w, "\nSTRATUM\tCANDIDATE FAILED\tBASELINE FAILED\tE VALUE\tSR VALUE\tROLLS BACK AT")
	}
	for _, x := range evidence {
		fmt.Fprintf(w, "%s\t%s\t%s\t%.3g\t%.3g\tE ≥ %.3g\n", x.Stratum, share(x.CandidateFailures, x.CandidateRequests), share(x.BaselineFailures, x.BaselineRequests),
			x.EValue, x.SrValue, x.Threshold)
	}
	if len(gates) > 0 {
		fmt.Fprintln(w, "\nGATE\tOUTCOME\tWHY")
	}
	for _, g := range gates {
		fmt.Fprintf(w, "%s\t%s\t%s\n", g.Gate, g.Outcome, g.Reason)
	}
	if r.Waiting != "" {
		fmt.Fprintf(w, "\nwaiting: %s\n", r.Waiting)
	}
}

func share(n, of uint64) string {
	if of == 0 {
		return "0 of 0"
	}
	return fmt.Sprintf("%d of %d (%.2f %%)", n, of, 100*float64(n)/float64(of))
}

// stages are the times of a rollback.
func stages(w io.Writer, b *pb.RollbackStarted, done *pb.RollbackCompleted) {
	fmt.Fprintf(w, "mode %s, from %s to %s\n", b.Mode, b.FromVersion, b.ToVersion)
	decided := b.DecidedAt.AsTime()
	if b.FirstBadAt != nil {
		fmt.Fprintf(w, "decided %v after the first bad answer\n", decided.Sub(b.FirstBadAt.AsTime()).Round(time.Millisecond))
	}
	if done == nil {
		fmt.Fprintln(w, "not acknowledged by every sidecar yet")
		return
	}
	fmt.Fprintf(w, "acknowledged by %d sidecars %v after the decision\n", done.Acked, done.AckedAt.AsTime().Sub(decided).Round(time.Millisecond))
	laggards := slices.Clone(done.Laggards)
	slices.Sort(laggards)
	for _, l := range laggards {
		fmt.Fprintf(w, "not acknowledged by %s\n", l)
	}
}
