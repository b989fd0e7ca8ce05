package node

import (
	"github.com/DataDog/sketches-go/ddsketch"
	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// millis is the unit of reports; the agent's own statistics are in seconds.
const millis = 1e3

// drain returns the lag observed since the last call, in milliseconds; nil = none.
func (l *lagSketch) drain() *ddsketch.DDSketch {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.recent
	l.recent = nil
	return s
}

// CacheDelta returns what the agent has to report since the last call: the invalidation
// lag in milliseconds, and entries that were served as current and were not. nil means
// nothing happened. One caller.
func (a *Agent) CacheDelta() *pb.CacheDelta {
	out := &pb.CacheDelta{}
	out.Violations, out.ViolationsDropped = a.fresh.drain()
	if s := a.lag.drain(); s != nil && !s.IsEmpty() {
		raw, err := proto.Marshal(s.ToProto())
		if err != nil {
			a.o.Logger.Error("encode the invalidation lag", "error", err)
		}
		out.InvalidationLagSketch = raw
	}
	if len(out.InvalidationLagSketch) == 0 && len(out.Violations) == 0 {
		return nil
	}
	return out
}
