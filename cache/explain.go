package cache

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Explain is what was known of a key and of its table just after an answer.
type Explain struct {
	Table       bool          // there is one; else the fields below are zero
	Lease       time.Duration // remaining; negative = lapsed that long ago
	Incarnation uint64        // of the log followed
	Applied     uint64        // position the table has applied

	Agent bool   // its agent answered; else the fields below are zero
	Head  uint64 // highest position the agent has heard of
	Floor uint64 // nothing older is served for the key
}

// explainTimeout bounds the call to the agent: an explanation is worth no long wait.
const explainTimeout = 200 * time.Millisecond

func (s *Store) explain(ctx context.Context, key outrigger.Key) *Explain {
	out := &Explain{}
	v := s.view.Load()
	if v == nil {
		return out
	}
	head := headOf(v)
	out.Table, out.Applied, out.Incarnation = true, head.position, head.incarnation
	if until := v.reader.Lease(); until > 0 {
		out.Lease = time.Duration(until - s.clock())
	}
	for _, p := range s.peers() {
		if !s.keeps(p) {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, explainTimeout)
		defer cancel()
		e, err := pb.NewNodeAdminClient(p.cc).GetEntry(ctx, &pb.GetEntryRequest{Key: wire.KeyPB(key)})
		if err == nil {
			out.Agent, out.Head, out.Floor = true, e.GetHead(), e.GetFloor()
		}
		break
	}
	return out
}

// text says a miss in words.
func (m miss) text() string {
	switch m.why {
	case noTable:
		return "no node table"
	case lapsed:
		if m.by == 0 {
			return "no lease was granted"
		}
		return fmt.Sprintf("lease lapsed %v ago", m.by.Round(time.Millisecond))
	case notYetProved:
		return "table not proved as new as an answer from elsewhere"
	case tooOld:
		return fmt.Sprintf("table proved current only %v ago", m.by.Round(time.Millisecond))
	case mustAsk:
		return "strong"
	case absent:
		return "not in the node table"
	case outdated:
		return "changed since it was stored"
	case behind:
		return "table is behind the session token"
	case otherLog:
		return "the session token is of another log incarnation"
	}
	return "current"
}

// whyTier says why a tier of this machine could answer.
func whyTier(t outrigger.Tier) string {
	if t == outrigger.TierProcess {
		return "process copy current by stamp"
	}
	return "node table entry under a live lease"
}

// reportEvery is how often agents are told what was read.
const reportEvery = time.Second

// reportReads tells agents what this process answered: the node's how much, and whichever
// keeps the table in use for which keys, or they would leave it as if nobody used them. A
// report of counts whose answer is lost is made again with the next, so they may be too high
// by one; an agent that takes none is left alone. Keys are reported once or not at all.
func (s *Store) reportReads(ctx context.Context) {
	var told Stats
	var hashes []uint64
	counted := s.agent != nil
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		keeper, touched := s.keeper(), &pb.ReadCounts{}
		var weight int
		hashes, weight = s.samples.Take(hashes[:0])
		touched.Touched, touched.TouchWeight = hashes, uint32(weight)
		if own := keeper != nil && keeper != s.agent; own && len(hashes) > 0 {
			_ = s.report(ctx, keeper, touched) // soft state
		}
		if !counted {
			continue
		}
		now := s.Stats()
		r := &pb.ReadCounts{Process: now.Process.Hits - told.Process.Hits, Node: now.Node - told.Node, Origin: now.Origin - told.Origin,
			Stale: now.Stale - told.Stale, Failed: now.Failed - told.Failed}
		if r.Process+r.Node+r.Origin+r.Stale+r.Failed == 0 {
			continue
		}
		if keeper == s.agent {
			r.Touched, r.TouchWeight = touched.Touched, touched.TouchWeight
		}
		switch err := s.report(ctx, s.agent, r); {
		case err == nil:
			told = now
		case gstatus.Code(err) == codes.Unimplemented:
			counted = false
		}
	}
}

func (s *Store) report(ctx context.Context, p *peer, r *pb.ReadCounts) error {
	ctx, cancel := context.WithTimeout(ctx, s.o.Timeout)
	defer cancel()
	_, err := pb.NewNodeAdminClient(p.cc).ReportReads(ctx, r)
	return err
}

// keeper is the agent that keeps the table in use; nil when that cannot be asked.
func (s *Store) keeper() *peer {
	for _, p := range s.peers() {
		if p != s.origin && s.keeps(p) {
			return p
		}
	}
	return nil
}
