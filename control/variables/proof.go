package variables

import (
	"context"
	"sync/atomic"
	"time"
)

// proofLimit bounds the wait for a proof: a heartbeat's answer would be worth no lease later.
const proofLimit = time.Second

// maxProofs bounds the heartbeats of one feed that wait for a proof; a node sends ten in a
// second, and what is dropped is followed by the next.
const maxProofs = 4

// proven is Current for a feed: what it says of the log's end has to hold for the leader's.
func (s *Service) proven(ctx context.Context) error {
	if s.opt.Confirm == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, proofLimit)
	defer cancel()
	return s.Current(ctx)
}

// proofs are the heartbeats of one feed that wait for a proof. On a replica that follows, the
// answer to a heartbeat says that the node has missed nothing, so it may only be given after
// the leader said where its log ends, which it was asked after the heartbeat came.
type proofs struct{ waiting atomic.Int32 }

// ask calls then, in a goroutine of its own, once it is proven; a heartbeat that cannot be
// proven is not answered, and the node's lease runs out.
func (p *proofs) ask(s *Service, then func()) {
	if p.waiting.Add(1) > maxProofs {
		p.waiting.Add(-1)
		return
	}
	go func() { // ends within proofLimit
		defer p.waiting.Add(-1)
		if s.proven(context.Background()) == nil {
			then()
		}
	}()
}
