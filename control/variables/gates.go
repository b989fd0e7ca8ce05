package variables

import (
	"context"
	"hash/maphash"
	"slices"
)

// gateCount is the number of gates: with 128 writers on different keys about two share
// one by chance, which costs them one commit's time.
const gateCount = 4096

// gates let the writers of one key in one after the other. Correctness does not depend
// on them (the log's Expect decides); they keep writers of a hot key in this process
// from losing the same race again and again, and are fair because channels are. A
// waiting writer holds no lock and gives up with its context.
type gates struct {
	seed maphash.Seed
	slot [gateCount]chan struct{} // holds one element while the gate is taken
}

func newGates() *gates {
	g := &gates{seed: maphash.MakeSeed()}
	for i := range g.slot {
		g.slot[i] = make(chan struct{}, 1)
	}
	return g
}

// enter waits for the gates of all aggregates, in one order for everybody so that no
// two callers wait for each other, and returns how to leave them.
func (g *gates) enter(ctx context.Context, aggregates ...string) (leave func(), err error) {
	slots := make([]int, 0, len(aggregates))
	for _, a := range aggregates {
		slots = append(slots, int(maphash.String(g.seed, a)%gateCount))
	}
	slices.Sort(slots)
	slots = slices.Compact(slots)
	taken := 0
	leave = func() {
		for _, i := range slots[:taken] {
			<-g.slot[i]
		}
	}
	for _, i := range slots {
		select {
		case g.slot[i] <- struct{}{}:
			taken++
		case <-ctx.Done():
			leave()
			return nil, ctx.Err()
		}
	}
	return leave, nil
}
