package adsserver

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/xds"
)

// A server that is about to stop must not leave its clients to find out by themselves: until
// they do they hear of no change. Nor must all of them arrive elsewhere in the same instant.

// errStopping is what streams of a stopping server end with, and are refused with.
var errStopping = outrigger.Errorf(outrigger.Unavailable, "this replica is stopping; go on with another one")

// Drain ends all ADS streams, one every pause in random order, and refuses new ones from its
// first moment; where ctx has a deadline the pauses are as short as that asks for. It returns
// when the last has ended; when ctx ends first, it ends the rest at once and returns ctx's
// error. A stream ends with status Unavailable after the response that is being sent; what its
// client has yet to be given it gets where it goes next. There is no way back.
func (s *Server) Drain(ctx context.Context, pause time.Duration) error {
	s.draining.Store(true)
	list := s.everyone()
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	began := time.Now()
	if end, ok := ctx.Deadline(); ok && len(list) > 0 {
		pause = min(pause, time.Until(end)*9/10/time.Duration(len(list)))
	}
	t := time.NewTimer(0)
	defer t.Stop()
	for i, sess := range list {
		due := pause * time.Duration(i)
		for wait := due - time.Since(began); wait > 0 && ctx.Err() == nil; wait = due - time.Since(began) {
			t.Reset(wait)
			select {
			case <-t.C:
			case <-ctx.Done():
			}
		}
		sess.end()
	}
	for s.streams.Load() > 0 {
		select {
		case <-s.empty:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.log.Info("streams drained", "streams", len(list), "took", time.Since(began))
	return nil
}

// everyone is the streams that have said who they are; the others are refused when they do.
func (s *Server) everyone() (out []*session) {
	s.mu.Lock()
	var groups []*group
	for _, g := range s.groups {
		groups = append(groups, g)
	}
	s.mu.Unlock()
	for _, g := range groups {
		out = append(out, g.sessions()...)
	}
	return out
}

// end has the stream's handler return.
func (s *session) end() {
	s.ending.Store(true)
	s.cancel()
}

// outcome is what the stream's handler returns for what the stock server did.
func (s *session) outcome(err error) error {
	if s.ending.Load() {
		err = errStopping
	}
	return status.ToGRPC(err)
}

// traffic is what went over one stream. Guarded by session.mu.
type traffic struct {
	resumed bool // the client came back with what it had got before
	// Responses but for heartbeats, and resources in them; resent are those the client had at
	// that version, said so or had been sent it here, and was sent again: asked anew, or along
	// with something else. MeshPolicy is not among the resources: to repeat it is how a push
	// ends and how a probe is answered.
	responses, resources, resent int
	// refreshed are first responses, one of a type at most, that told a state-of-the-world
	// client the version it came back with: its protocol has no shorter answer.
	refreshed int
}

// account adds a response of t. Called with mu held.
func (s *session) account(t *typeSub, resources, resent int) {
	s.traffic.responses++
	if t.typeURL == xds.TypeMeshPolicy {
		return
	}
	s.traffic.resources += resources
	if resent > 0 {
		s.traffic.resent += resent
		s.srv.metrics.again(s.ctx, t.typeURL, resent)
	}
}

// tellTraffic says how a stream went, for who wonders what a reconnect cost.
func (s *session) tellTraffic() {
	if s.group == nil {
		return
	}
	s.mu.Lock()
	x, types := s.traffic, len(s.types)
	s.mu.Unlock()
	s.srv.log.Debug("stream ended", "node", s.node.ID, "kind", s.node.Kind, "group", s.group.name, "delta", s.delta, "drained", s.ending.Load(),
		"resumed", x.resumed, "types", types, "responses", x.responses, "resources", x.resources, "resent", x.resent, "refreshed", x.refreshed)
}
