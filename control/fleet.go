package control

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/replicate"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// fleet is who follows policy through any replica of this log: the leader's own clients, and
// those its followers stand for. On a follower it is its own clients only.
type fleet struct {
	*adsserver.Server
	remote *replicate.Leader // nil on a follower
	now    func() time.Time

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when either part changed
}

func newFleet(own *adsserver.Server, remote *replicate.Leader, now func() time.Time) *fleet {
	return &fleet{Server: own, remote: remote, now: now, changed: make(chan struct{})}
}

// run passes on the changes of both parts until ctx ends.
func (f *fleet) run(ctx context.Context) error {
	if f.remote == nil {
		return nil
	}
	for {
		own, remote := f.Server.Changed(), f.remote.Changed()
		// After the channels were taken, so that no change falls between.
		f.mu.Lock()
		close(f.changed)
		f.changed = make(chan struct{})
		f.mu.Unlock()
		select {
		case <-own:
		case <-remote:
		case <-ctx.Done():
			return nil
		}
	}
}

// Changed returns a channel that is closed by the next change of the ledger. Take it before
// reading.
func (f *fleet) Changed() <-chan struct{} {
	if f.remote == nil {
		return f.Server.Changed()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Ledger returns one line per known node, sorted by node id. Of a node that several replicas
// know, the line of the one it is connected to counts, else the latest.
func (f *fleet) Ledger() []adsserver.NodeState {
	own := f.Server.Ledger()
	if f.remote == nil {
		return own
	}
	remote := f.remote.Nodes()
	if len(remote) == 0 {
		return own
	}
	at := make(map[string]int, len(own))
	for i := range own {
		at[own[i].Node.ID] = i
	}
	for _, s := range remote {
		n := stateOf(s)
		i, known := at[n.Node.ID]
		switch {
		case !known:
			own = append(own, n)
		case n.Connected != own[i].Connected && n.Connected, n.Connected == own[i].Connected && n.Since.After(own[i].Since):
			own[i] = n
		}
	}
	slices.SortFunc(own, func(a, b adsserver.NodeState) int { return cmp.Compare(a.Node.ID, b.Node.ID) })
	return own
}

// Acked is adsserver.Server.Acked over the whole fleet.
func (f *fleet) Acked(position uint64) (acked, laggards []string, done bool) {
	if f.remote == nil || len(f.remote.Nodes()) == 0 {
		return f.Server.Acked(position)
	}
	acked, laggards = f.Tally(f.Ledger(), position, f.now())
	return acked, laggards, len(laggards) == 0
}

// elsewhere is how many sidecars that followers stand for have accepted a position.
func (f *fleet) elsewhere(position uint64) (n int) {
	if f.remote == nil {
		return 0
	}
	for _, s := range f.remote.Nodes() {
		if s.GetSidecar() && s.GetConnected() && s.GetAcked() >= position && s.GetNode().GetKind() != xds.KindRelay {
			n++
		}
	}
	return n
}

func stateOf(s *pb.NodeStanding) adsserver.NodeState {
	var nack *adsserver.Nack
	if s.GetNackType() != "" {
		nack = &adsserver.Nack{Type: s.GetNackType(), Resource: s.GetNackResource(), Message: s.GetNackMessage(), At: s.GetNackedAt().AsTime()}
	}
	n := adsserver.Remote(wire.Node(s.GetNode()), s.GetSidecar(), s.GetConnected(), s.GetSince().AsTime(), s.GetAcked(), nack)
	if s.GetVia() != nil {
		via := wire.Node(s.GetVia())
		n.Via = &via
	}
	return n
}

// standings are the clients of a follower, as its leader is told of them.
type standings struct{ *adsserver.Server }

// Standings implements replicate.Standings.
func (s standings) Standings() []*pb.NodeStanding {
	nodes := s.Ledger()
	out := make([]*pb.NodeStanding, 0, min(len(nodes), replicate.MaxStandingNodes))
	for _, n := range nodes {
		if len(n.Node.ID) == 0 || len(n.Node.ID) > outrigger.MaxNameBytes || len(out) == cap(out) {
			continue // nothing the leader would take
		}
		x := &pb.NodeStanding{Node: wire.NodePB(n.Node), Connected: n.Connected, Acked: n.Acked, Since: wire.TimePB(n.Since), Sidecar: n.Sidecar()}
		if n.Via != nil {
			x.Via = wire.NodePB(*n.Via)
		}
		if n.Nack != nil {
			x.NackType, x.NackResource, x.NackMessage, x.NackedAt = n.Nack.Type, n.Nack.Resource, n.Nack.Message, wire.TimePB(n.Nack.At)
		}
		out = append(out, x)
	}
	return out
}
