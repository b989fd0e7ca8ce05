//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// cacheCommand operates one node's cache through its agent's socket.
func cacheCommand(g *globals) *cobra.Command {
	cmd := group("cache", "Look into and flush a node's cache")
	cmd.Long = `Cache talks to a node agent: give its socket, --server unix:DIR/agent.sock, where DIR is
the agent's --dir. The socket's permissions say who may.`
	c := addClientFlags(cmd, g)
	cmd.AddCommand(cacheStat(c), cacheGet(c), cacheDump(c), cacheFlush(c))
	return cmd
}

func (c *client) node() pb.NodeAdminClient { return pb.NewNodeAdminClient(c.conn) }

func cacheStat(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "stat", Short: "Print what the node's cache did", Args: exactArgs(),
		RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
			s, err := cl.node().Stat(ctx, &pb.NodeStatRequest{})
			if err != nil {
				return err
			}
			return cl.out.message(s, func(w io.Writer) { statText(w, s) })
		})}
}

func statText(w io.Writer, s *pb.NodeStat) {
	r := s.Reads
	fmt.Fprintf(w, "node\t%s, region %s\n", s.Node, s.Region)
	fmt.Fprintf(w, "reads\tprocess %d, node %d, origin %d, stale %d, failed %d\n", r.GetProcess(), r.GetNode(), r.GetOrigin(), r.GetStale(), r.GetFailed())
	fmt.Fprintf(w, "staleness bound\t%d ms, lease %s\n", s.LeaseMs, leaseText(s.LeaseRemainingMs))
	fmt.Fprintf(w, "invalidation lag\tp50 %.2f ms, p99 %.2f ms\n", s.LagP50Ms, s.LagP99Ms)
	fmt.Fprintf(w, "feed\t%s, position %d of %d, log incarnation %x\n", upDown(s.FeedUp), s.Applied, s.Head, s.Incarnation)
	fmt.Fprintf(w, "feed events\tchanges %d, gaps %d, resyncs %d\n", s.Changes, s.Gaps, s.Resyncs)
	fmt.Fprintf(w, "freshness\tchecked %d, repairs %d\n", s.Checked, s.Repairs)
	fmt.Fprintf(w, "fetches\t%d, stampedes avoided %d, refused %d\n", s.Fetches, s.Joined, s.Refused)
	fmt.Fprintf(w, "table\tkeys %d, bytes %d of %d, evictions %d, sidecars %d\n", s.Entries, s.Bytes, s.CapacityBytes, s.Evictions, s.Sidecars)
}

func upDown(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

func leaseText(ms int64) string {
	d := time.Duration(ms) * time.Millisecond
	switch {
	case ms > 0:
		return fmt.Sprintf("%v left", d)
	case ms == 0:
		return "not held"
	}
	return fmt.Sprintf("lapsed %v ago", -d)
}

func cacheGet(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "get SESSION/NAME", Short: "Print what the node knows of one key, without fetching it", Args: exactArgs("SESSION/NAME"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			session, name, err := cl.splitKey(args[0])
			if err != nil {
				return err
			}
			e, err := cl.node().GetEntry(ctx, &pb.GetEntryRequest{Key: &pb.Key{Tenant: c.tenant, Session: session, Name: name}})
			if err != nil {
				return err
			}
			return cl.out.message(e, func(w io.Writer) {
				entryHeader(w)
				entryLine(w, e)
				fmt.Fprintf(w, "feed position %d of %d, lease %s\n", e.Applied, e.Head, leaseText(e.LeaseRemainingMs))
			})
		})}
}

func entryHeader(w io.Writer) {
	fmt.Fprintln(w, "KEY\tSTATE\tVERSION\tDOT\tFLOOR\tAS OF\tSTAMP\tVALUE")
}

func entryLine(w io.Writer, e *pb.NodeEntry) {
	version, dot, value := "-", "-", "-"
	if v := e.Variable; v != nil {
		version, dot = fmt.Sprint(v.Version.GetCounter()), wire.Dot(v.Version.GetDot()).String()
		value = clipText(string(v.Value.GetJson()))
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%x\t%s\n", wire.Key(e.Key), e.State, version, dot, e.Floor, e.AsOf, e.Stamp, value)
}

func clipText(s string) string {
	const limit = 60
	if r := []rune(s); len(r) > limit {
		return string(r[:limit]) + "…"
	}
	return s
}

func cacheDump(c *clientFlags) *cobra.Command {
	var prefix string
	var limit int32
	var all bool
	cmd := &cobra.Command{Use: "dump", Short: "Print the node's entries, one line each", Args: exactArgs()}
	cmd.Flags().StringVar(&prefix, "session", "", "only sessions that begin with this")
	cmd.Flags().Int32Var(&limit, "limit", 1000, "how many, 1 to 100000")
	cmd.Flags().BoolVar(&all, "all-tenants", false, "of every tenant instead of --tenant")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		r := &pb.DumpRequest{Tenant: c.tenant, SessionPrefix: prefix, Limit: limit}
		if all {
			r.Tenant = ""
		}
		stream, err := cl.node().Dump(ctx, r)
		if err != nil {
			return err
		}
		if !cl.out.json {
			fmt.Fprintln(cl.out.w, "KEY  STATE  VERSION  DOT  FLOOR  AS OF  STAMP  VALUE")
		}
		for {
			e, err := stream.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			if err := cl.out.message(e, func(w io.Writer) { entryLine(w, e) }); err != nil {
				return err
			}
		}
	})
	return cmd
}

func cacheFlush(c *clientFlags) *cobra.Command {
	var session string
	var all bool
	cmd := &cobra.Command{Use: "flush", Short: "Make the node ask the origin anew for a session, a tenant or everything", Args: exactArgs(),
		Long: `Flush drops what the node holds of the tenant (--tenant), of one of its sessions
(--session) or of everybody (--all), and raises the floors, so that nothing read before can
come back. Reads go on; the next of each key asks the origin.`}
	cmd.Flags().StringVar(&session, "session", "", "one session of the tenant")
	cmd.Flags().BoolVar(&all, "all", false, "every tenant")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
		r := &pb.FlushRequest{Tenant: c.tenant, Session: session}
		if all {
			if session != "" {
				return usageError{fmt.Errorf("--all and --session %q exclude each other; keep one", session)}
			}
			r.Tenant = ""
		}
		out, err := cl.node().Flush(ctx, r)
		if err != nil {
			return err
		}
		return cl.out.message(out, func(w io.Writer) { fmt.Fprintf(w, "flushed %d entries\n", out.Entries) })
	})
	return cmd
}

// sidecarTarget turns what --via accepts into what gRPC dials: one port of a sidecar
// speaks HTTP/1 and gRPC.
func sidecarTarget(via string) (string, error) {
	target := strings.TrimSuffix(strings.TrimPrefix(via, "http://"), "/")
	if strings.Contains(strings.TrimPrefix(target, "unix:"), "://") || !strings.HasPrefix(target, "unix:") && strings.Contains(target, "/") {
		return "", usageError{fmt.Errorf("--via is %q; give http://host:port, host:port or unix:path of a sidecar", via)}
	}
	return target, nil
}

// explained reads one header of an answer.
func explained(values []string) (string, error) {
	if len(values) != 1 {
		return "", outrigger.Errorf(outrigger.Unavailable, "the answer explains nothing; --explain needs a sidecar, give its address with --via")
	}
	return values[0], nil
}
