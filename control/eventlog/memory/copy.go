package memory

import (
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Copy is a Log whose events come from another log, with Ingest. Build it with New and
// WithIncarnation of that log.
type Copy struct{ *Log }

// Ingest stores events as they are, all or nothing: they must continue the copy, else kind
// Conflict. See control/eventlog/pebble.Copy.
func (c *Copy) Ingest(_ context.Context, events []*outriggerv1.Event) error {
	l := c.Log
	l.mu.Lock()
	defer l.mu.Unlock()
	added := make(map[string]uint64)
	for i, e := range events {
		added[e.GetAggregate()]++
		position, sequence := uint64(len(l.events)+i)+1, uint64(len(l.positions[e.GetAggregate()]))+added[e.GetAggregate()]
		if e.GetPosition() != position || e.GetSequence() != sequence {
			return outrigger.Errorf(outrigger.Conflict, "event at position %d, sequence %d of %q does not continue the copy, which wants %d and %d",
				e.GetPosition(), e.GetSequence(), e.GetAggregate(), position, sequence)
		}
	}
	for _, e := range events {
		own := proto.CloneOf(e)
		l.events = append(l.events, own)
		l.positions[own.Aggregate] = append(l.positions[own.Aggregate], own.Position)
		l.clock.Resume(own)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return nil
}
