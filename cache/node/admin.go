package node

import (
	"context"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Limits of Dump.
const (
	defaultDump = 1000
	maxDump     = 100_000
)

// SessionKeys implements pb.CoherenceServer: the keys the agent was given, else those of
// the origin. Who may ask is whoever may connect to the agent's socket; callers known to
// be on another machine are refused.
func (a *Agent) SessionKeys(ctx context.Context, r *pb.SessionKeysRequest) (*pb.SessionKeysResponse, error) {
	if p, ok := peer.FromContext(ctx); ok && !authz.LocalPeer(p.Addr) {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Denied, "session keys are handed out on this machine only"))
	}
	if f := a.o.SessionKeys; f != nil {
		return &pb.SessionKeysResponse{Keys: f().Text()}, nil
	}
	return a.coh.SessionKeys(ctx, r)
}

// Admin returns the service that shows and operates this node's cache. It judges nobody:
// serve it where only operators and the node's own processes connect.
func (a *Agent) Admin() pb.NodeAdminServer { return &nodeAdmin{a: a} }

type nodeAdmin struct {
	pb.UnimplementedNodeAdminServer
	a *Agent
}

// readCounts sum what the node's processes report.
type readCounts struct{ process, node, origin, stale, failed atomic.Uint64 }

// ReportReads adds one process's counts since its last report, and lets its table know
// which keys were hits.
func (n *nodeAdmin) ReportReads(ctx context.Context, r *pb.ReadCounts) (*pb.ReportReadsResponse, error) {
	c := &n.a.reads
	c.process.Add(r.GetProcess())
	c.node.Add(r.GetNode())
	c.origin.Add(r.GetOrigin())
	c.stale.Add(r.GetStale())
	c.failed.Add(r.GetFailed())
	n.a.readElsewhere(ctx, r.GetTouched(), r.GetTouchWeight())
	return &pb.ReportReadsResponse{}, nil
}

// Stat returns the counters since the agent started.
func (n *nodeAdmin) Stat(context.Context, *pb.NodeStatRequest) (*pb.NodeStat, error) {
	a := n.a
	s, c := a.Stats(), &a.reads
	feed, now := a.feedState()
	out := &pb.NodeStat{
		Node: a.o.Node.ID, Region: s.Region, Incarnation: s.Incarnation, Applied: s.Applied, Head: feed.Head,
		FeedUp: s.FeedUp, LeaseLive: now < feed.Lease, LeaseRemainingMs: remaining(feed, now), LeaseMs: a.o.Lease.Milliseconds(),
		Reads: &pb.ReadCounts{Process: c.process.Load(), Node: c.node.Load(), Origin: c.origin.Load(),
			Stale: c.stale.Load(), Failed: c.failed.Load()},
		AgentHits: s.Hits, Fetches: s.Fetches, Joined: s.Joined, Changes: s.Changes, Gaps: s.Gaps, Resyncs: s.Flushes,
		Checked: s.Checked, Repairs: s.Repaired, Evictions: s.Table.Evictions, Refused: s.Refused,
		Entries: uint64(s.Table.Entries), Bytes: uint64(s.Table.LiveBytes), CapacityBytes: uint64(s.Table.ArenaBytes),
		Sidecars: uint32(s.Sidecars), Stale: s.Stale,
	}
	if !s.Lag.IsEmpty() {
		q, err := s.Lag.GetValuesAtQuantiles([]float64{0.5, 0.99})
		if err != nil {
			return nil, status.ToGRPC(outrigger.Wrap(outrigger.Internal, err, "quantiles of the invalidation lag"))
		}
		out.LagP50Ms, out.LagP99Ms = q[0]*millis, q[1]*millis
	}
	return out, nil
}

func (a *Agent) feedState() (coherence.Feed, int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.Feed(), a.o.Clock()
}

// remaining is how long the table may still be served, in milliseconds; a lease that was
// never granted has none.
func remaining(f coherence.Feed, now int64) int64 {
	if f.Lease == 0 {
		return 0
	}
	return time.Duration(f.Lease - now).Milliseconds()
}

// GetEntry shows one key as the table and the protocol have it.
func (n *nodeAdmin) GetEntry(_ context.Context, r *pb.GetEntryRequest) (*pb.NodeEntry, error) {
	key := wire.Key(r.GetKey())
	if err := key.Validate(); err != nil {
		return nil, status.ToGRPC(err)
	}
	a := n.a
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tables.Load().of(key.Tenant)
	if t == nil {
		return a.describe(key, shm.Entry{}, nil), nil
	}
	e, b := t.r.Get(key.String(), a.value[:0])
	a.value = b
	return a.describe(key, e, b), nil
}

// describe needs the mutex.
func (a *Agent) describe(key outrigger.Key, e shm.Entry, value []byte) *pb.NodeEntry {
	known, feed := a.state.Known(key), a.state.Feed()
	out := &pb.NodeEntry{Key: wire.KeyPB(key), State: e.State.String(), Floor: known.Floor, AsOf: known.AsOf, Fetching: known.Fetching,
		Applied: feed.Applied, Head: feed.Head, Incarnation: feed.Incarnation, LeaseRemainingMs: remaining(feed, a.o.Clock())}
	switch e.State {
	case shm.Absent:
		return out
	case shm.Negative:
		absence, _ := ParseAbsence(value)
		out.SessionExists = absence.SessionExists
	default:
		// What is Invalid may have been a negative entry.
		if v, err := ParseVariable(key.String(), value); err == nil && len(value) > 0 {
			out.Variable, out.SessionExists = v, true
		}
	}
	out.Slot, out.Stamp = e.Slot, e.Stamp
	return out
}

// Dump streams what the table holds. The keys are those of one moment; each entry is
// described as it is when it is sent, and left out if it has gone by then.
func (n *nodeAdmin) Dump(r *pb.DumpRequest, out grpc.ServerStreamingServer[pb.NodeEntry]) error {
	limit := int(r.GetLimit())
	switch {
	case limit == 0:
		limit = defaultDump
	case limit < 0 || limit > maxDump:
		return status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "limit is %d; give 1 to %d", limit, maxDump))
	}
	a := n.a
	for _, key := range a.heldKeys(r.GetTenant(), r.GetSessionPrefix(), limit) {
		entry, err := n.GetEntry(out.Context(), &pb.GetEntryRequest{Key: wire.KeyPB(key)})
		if err != nil {
			return err
		}
		if entry.GetState() == shm.Absent.String() {
			continue
		}
		if err := out.Send(entry); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) heldKeys(tenant, sessionPrefix string, limit int) []outrigger.Key {
	var out []outrigger.Key
	for _, t := range a.tables.Load().list {
		t.w.Range(func(id string, _ shm.Entry, _ []byte) bool {
			if len(out) >= limit {
				return false
			}
			k, err := outrigger.ParseKey(id)
			if err == nil && (tenant == "" || k.Tenant == tenant) && strings.HasPrefix(k.Session, sessionPrefix) {
				out = append(out, k)
			}
			return true
		})
	}
	return out
}

// Flush drops entries; see coherence.State.Drop.
func (n *nodeAdmin) Flush(_ context.Context, r *pb.FlushRequest) (*pb.FlushResponse, error) {
	a, tenant := n.a, r.GetTenant()
	if r.GetSession() != "" {
		tenant = wire.Tenant(tenant)
	}
	a.mu.Lock()
	outs, dropped := a.state.Drop(tenant, r.GetSession(), a.o.Clock())
	for _, o := range outs {
		a.carry(o)
	}
	a.run(a.consequences()...)
	a.mu.Unlock()
	a.o.Logger.Info("flushed by an operator", "tenant", r.GetTenant(), "session", r.GetSession(), "entries", dropped)
	return &pb.FlushResponse{Entries: uint64(dropped)}, nil
}
