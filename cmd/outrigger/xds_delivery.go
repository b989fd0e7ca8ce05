//go:build !dataplane

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
)

func (c *client) delivery() pb.DeliveryClient { return pb.NewDeliveryClient(c.conn) }

// largeAnswer lifts gRPC's limit of 4 MiB: bodies are bounded by the server.
func largeAnswer() grpc.CallOption { return grpc.MaxCallRecvMsgSize(96 << 20) }

// optionalArg is at most one argument, with our usage exit code.
func optionalArg(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			return usageError{fmt.Errorf("%s takes at most one argument (%s), got %d", cmd.CommandPath(), name, len(args))}
		}
		return nil
	}
}

func xdsStatus(c *clientFlags) *cobra.Command {
	r := &pb.XdsStatusRequest{}
	var check bool
	cmd := &cobra.Command{Use: "status [NODE]", Short: "Print what every client was sent and accepted", Args: optionalArg("NODE"),
		Long: `Status prints one line per xDS client of the control plane, those in trouble first: the
newest push it was sent and accepted, for how long it has lacked what its group has, and
the rejection that stands. With NODE it prints every resource type of that client. A client
that came back with something this control plane's log never had is sent nothing; it is
named at the end, with what that is, since when, and what can be done.
Exit code 1 with --check if any connected client is behind, rejects something or is sent
nothing.`}
	f := cmd.Flags()
	f.StringVar(&r.Group, "group", "", "only this group: default (sidecars), envoy, grpc")
	f.BoolVar(&r.Troubled, "troubled", false, "only clients that reject something, are behind or are gone")
	f.Int32Var(&r.Limit, "limit", 0, "how many, 1 to 10000; 0 = 1000")
	f.BoolVar(&check, "check", false, "exit with 1 if a client is behind or rejects something")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		if len(args) == 1 {
			r.Node = args[0]
		}
		out, err := cl.delivery().XdsStatus(ctx, r, largeAnswer())
		if err != nil {
			return err
		}
		if err := cl.out.message(out, func(w io.Writer) { xdsStatusText(w, out, r.Node != "") }); err != nil {
			return err
		}
		if check && out.Behind+out.Rejecting+out.Held > 0 {
			return answerError{}
		}
		return nil
	})
	return cmd
}

func xdsStatusText(w io.Writer, s *pb.XdsStatusResponse, types bool) {
	fmt.Fprintln(w, "NODE\tKIND\tGROUP\tCONNECTED\tSENT\tACKED\tBEHIND\tREJECTS")
	for _, n := range s.Nodes {
		behind := "-"
		if n.BehindSeconds > 0 {
			behind = seconds(n.BehindSeconds)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.Node.GetId(), cmp.Or(n.Node.GetKind(), "-"), n.Group, connectedText(n, s.Now),
			pushText(n.SentPush, n.SentPosition), pushText(n.AckedPush, n.AckedPosition), behind, nackLine(n.Nack))
	}
	if types {
		fmt.Fprintln(w, "\nTYPE\tFOLLOWS\tSENT\tSENT AT\tACKED\tACKED AT\tUNANSWERED\tREJECTS")
		for _, n := range s.Nodes {
			for _, t := range n.Types {
				follows := fmt.Sprintf("%d names", t.Names)
				if t.Wildcard {
					follows = "all"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", xds.ShortType(t.Type), follows, cmp.Or(t.Sent, "-"), timeText(t.SentAt),
					cmp.Or(t.Acked, "-"), timeText(t.AckedAt), t.Unanswered, nackLine(t.Nack))
			}
		}
	}
	fmt.Fprintf(w, "\n%d clients, %d behind, %d rejecting\n", s.Total, s.Behind, s.Rejecting)
	heldText(w, s)
}

// heldText names the clients that are sent nothing, and the remedy.
func heldText(w io.Writer, s *pb.XdsStatusResponse) {
	if s.Held == 0 {
		return
	}
	fmt.Fprintf(w, "\n%d clients hold what this control plane's log never had; they are sent nothing and go on with what they have:\n", s.Held)
	for _, n := range s.Nodes {
		if n.Held != "" {
			since := n.HeldSince.AsTime()
			fmt.Fprintf(w, "  %s: %s, since %s (%v)\n", n.Node.GetId(), n.Held, since.Format(time.RFC3339), s.Now.AsTime().Sub(since).Round(time.Second))
		}
	}
	fmt.Fprintln(w, "If the log was lost, restore its directory or register those versions again; if what they have\nis to go, restart the control plane with --adopt-clients.")
}

func connectedText(n *pb.XdsNode, now *timestamppb.Timestamp) string {
	d := now.AsTime().Sub(n.Since.AsTime()).Round(time.Second)
	if n.Connected && n.Via != "" {
		return "for " + d.String() + " through " + n.Via
	}
	if n.Connected {
		return "for " + d.String()
	}
	return "gone " + d.String()
}

// pushText is the push's id, or its position if the control plane no longer knows the id.
func pushText(id string, position uint64) string {
	if id == "" && position == 0 {
		return "-"
	}
	return cmp.Or(id, fmt.Sprint(position))
}

func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	if d > time.Minute {
		return d.Round(time.Second).String()
	}
	return d.Round(10 * time.Microsecond).String()
}

func timeText(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().Format("15:04:05.000")
}

func nackLine(n *pb.XdsNack) string {
	if n == nil {
		return "-"
	}
	return strings.TrimSpace(xds.ShortType(n.Type)+" "+n.Resource) + ": " + strings.Join(strings.Fields(n.Message), " ")
}

func xdsConfig(c *clientFlags) *cobra.Command {
	r := &pb.XdsConfigRequest{}
	var names bool
	cmd := &cobra.Command{Use: "config NODE", Short: "Print the configuration a client has in force", Args: exactArgs("NODE"),
		Long: `Config prints every resource a client follows: whether what its group should have is in
force (live), else what is the matter, and the body in force as JSON. Secrets (keys, header
values that open a model, salts) are redacted.`}
	f := cmd.Flags()
	f.StringVar(&r.Type, "type", "", "only this type, e.g. Cluster or RouteConfiguration")
	f.StringVar(&r.NamePrefix, "prefix", "", "only names that begin with this")
	f.BoolVar(&names, "names", false, "without bodies")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r.Node, r.Bodies = args[0], !names
		out, err := cl.delivery().XdsConfig(ctx, r, largeAnswer())
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) { xdsConfigText(w, out) })
	})
	return cmd
}

func xdsConfigText(w io.Writer, out *pb.XdsConfigResponse) {
	for _, x := range out.Resources {
		fmt.Fprintf(w, "%s %s: %s, version %s", xds.ShortType(x.Type), x.Name, x.Verdict, cmp.Or(x.Version, "none"))
		if x.Wanted != x.Version {
			fmt.Fprintf(w, ", wanted %s", cmp.Or(x.Wanted, "none"))
		}
		if x.Nack != nil {
			fmt.Fprintf(w, "; %s", nackLine(x.Nack))
		}
		fmt.Fprintln(w)
		if x.Body != "" {
			fmt.Fprintln(w, indentJSON(x.Body))
		}
	}
	leftOut(w, out.LeftOut)
}

func leftOut(w io.Writer, n uint32) {
	if n > 0 {
		fmt.Fprintf(w, "%d resources are left out, the answer would be too large; ask for less\n", n)
	}
}

func indentJSON(body string) string {
	var out bytes.Buffer
	if json.Indent(&out, []byte(body), "", "  ") != nil {
		return body
	}
	return out.String()
}

func xdsDiff(c *clientFlags) *cobra.Command {
	r := &pb.XdsDiffRequest{}
	cmd := &cobra.Command{Use: "diff NODE FROM [TO] | diff --with OTHER NODE", Short: "Compare two pushes, or two clients",
		Long: `Diff compares what a client's group was served as of two pushes, given by id (see
push-log) or log position; without TO, the newest. With --with it compares what two clients
have in force. Exit code 0 if there is no difference, 1 if there is.`}
	cmd.Flags().StringVar(&r.Other, "with", "", "compare with what this client has in force")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if n := len(args); r.Other != "" && n != 1 || r.Other == "" && (n < 2 || n > 3) {
			return usageError{fmt.Errorf("%s needs NODE FROM [TO], or --with OTHER NODE; got %d arguments", cmd.CommandPath(), n)}
		}
		return nil
	}
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r.Node = args[0]
		if len(args) > 1 {
			r.From = args[1]
		}
		if len(args) > 2 {
			r.To = args[2]
		}
		out, err := cl.delivery().XdsDiff(ctx, r, largeAnswer())
		if err != nil {
			return err
		}
		if err := cl.out.message(out, func(w io.Writer) { xdsDiffText(w, out) }); err != nil {
			return err
		}
		if len(out.Changes)+int(out.LeftOut) > 0 {
			return answerError{}
		}
		return nil
	})
	return cmd
}

func xdsDiffText(w io.Writer, out *pb.XdsDiffResponse) {
	fmt.Fprintf(w, "--- %s\n+++ %s\n", out.From, out.To)
	for _, x := range out.Changes {
		fmt.Fprintf(w, "%s %s: %s -> %s\n", xds.ShortType(x.Type), x.Name, cmp.Or(x.FromVersion, "none"), cmp.Or(x.ToVersion, "none"))
		from, to := lines(x.FromBody), lines(x.ToBody)
		if x.FromBody == x.ToBody {
			fmt.Fprintln(w, "  the difference is in what is redacted")
			continue
		}
		for _, line := range diffLines(from, to) {
			fmt.Fprintln(w, line)
		}
	}
	leftOut(w, out.LeftOut)
}

func lines(body string) []string {
	if body == "" {
		return nil
	}
	return strings.Split(indentJSON(body), "\n")
}

// diffLines is the shortest edit from a to b, changed lines only, up to a bound of work;
// beyond it everything differs.
func diffLines(a, b []string) (out []string) {
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	const most = 4 << 20
	if len(a)*len(b) <= most {
		return shortestEdit(a, b)
	}
	for _, line := range a {
		out = append(out, "- "+line)
	}
	for _, line := range b {
		out = append(out, "+ "+line)
	}
	return out
}

// shortestEdit keeps a longest common subsequence.
func shortestEdit(a, b []string) (out []string) {
	common := make([][]int32, len(a)+1) // of a[i:] and b[j:]
	for i := range common {
		common[i] = make([]int32, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out = append(out, "- "+a[i])
			i++
		default:
			out = append(out, "+ "+b[j])
			j++
		}
	}
	return out
}

func xdsPushLog(c *clientFlags) *cobra.Command {
	r := &pb.XdsPushLogRequest{}
	cmd := &cobra.Command{Use: "push-log [PUSH]", Short: "Print the newest pushes and how they went", Args: optionalArg("PUSH"),
		Long: `Push-log prints the newest pushes: what they changed, how many clients accepted them, how
long the last of these took, and who lags. With the id of a push it prints every client.`}
	cmd.Flags().StringVar(&r.Group, "group", "", "only this group: default (sidecars), envoy, grpc")
	cmd.Flags().Int32Var(&r.Limit, "limit", 0, "how many, 1 to 256; 0 = 20")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		if len(args) == 1 {
			r.Push = args[0]
		}
		out, err := cl.delivery().XdsPushLog(ctx, r, largeAnswer())
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) { xdsPushLogText(w, out, r.Push != "") })
	})
	return cmd
}

func xdsPushLogText(w io.Writer, out *pb.XdsPushLogResponse, nodes bool) {
	fmt.Fprintln(w, "PUSH\tAT\tCHANGES\tACKED\tLAST ACK\tLAGGARDS")
	for _, p := range out.Pushes {
		changes, last := fmt.Sprint(p.Changes), "-"
		if p.First {
			changes = fmt.Sprintf("all %d", p.Resources)
		}
		if p.Acked > 0 {
			last = seconds(p.Seconds)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d of %d\t%s\t%s\n", p.Id, timeText(p.At), changes, p.Acked, len(p.Nodes), last, cmp.Or(strings.Join(p.Laggards, " "), "-"))
	}
	if !nodes {
		return
	}
	for _, p := range out.Pushes {
		for _, name := range p.Changed {
			fmt.Fprintf(w, "changed %s\n", name)
		}
		fmt.Fprintln(w, "\nNODE\tOUTCOME\tSENT\tTOOK\tREJECTS")
		for _, n := range p.Nodes {
			took := "-"
			if n.Seconds > 0 {
				took = seconds(n.Seconds)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", n.Node, n.Outcome, timeText(n.SentAt), took, nackLine(n.Nack))
		}
	}
}

func xdsExplain(c *clientFlags) *cobra.Command {
	r := &pb.XdsExplainRequest{}
	cmd := &cobra.Command{Use: "explain NODE RESOURCE", Short: "Is a resource live at a client, since when, why not", Args: exactArgs("NODE", "RESOURCE"),
		Long: `Explain answers for one resource name at one client, for every type that has it. Exit code
0 if all of it is live, 1 if not.`}
	cmd.Flags().StringVar(&r.Type, "type", "", "only this type, e.g. Cluster or RouteConfiguration")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r.Node, r.Resource = args[0], args[1]
		out, err := cl.delivery().XdsExplain(ctx, r)
		if err != nil {
			return err
		}
		if err := cl.out.message(out, func(w io.Writer) { xdsExplainText(w, out) }); err != nil {
			return err
		}
		if !out.Live {
			return answerError{}
		}
		return nil
	})
	return cmd
}

func xdsExplainText(w io.Writer, out *pb.XdsExplainResponse) {
	for _, a := range out.Answers {
		x := a.Resource
		fmt.Fprintf(w, "%s %s at %s: %s\n", cmp.Or(xds.ShortType(x.Type), "Resource"), x.Name, out.Node, x.Verdict)
		if x.Version != "" {
			since := "since an unknown time"
			if a.Since != nil {
				since = "since " + a.Since.AsTime().Format(time.RFC3339Nano)
				if a.AtLatest {
					since += " or before"
				}
			}
			fmt.Fprintf(w, "  in force: version %s, %s\n", x.Version, since)
		}
		if x.Wanted != x.Version {
			fmt.Fprintf(w, "  wanted: version %s\n", cmp.Or(x.Wanted, "none"))
		}
		if a.Push != "" {
			fmt.Fprintf(w, "  push: %s\n", a.Push)
		}
		fmt.Fprintf(w, "  why: %s\n", a.Why)
	}
}
