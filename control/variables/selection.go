package variables

import (
	"slices"
	"sync"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
)

// everyShard marks a change that concerns all sessions.
const everyShard = coherence.Shards

// shardOf is the shard a change belongs to.
func shardOf(c *pb.Change) uint16 {
	if c.GetScope() == pb.Change_ALL {
		return everyShard
	}
	return uint16(coherence.ShardOf(c.GetKey().GetTenant(), c.GetKey().GetSession()))
}

// selection is the set of shards of one selective stream. Only the stream's handler uses
// it. A nil selection is every change.
type selection struct {
	has    [coherence.Shards / 64]uint64
	number uint64 // of the last select taken
}

func (s *selection) concerns(shard uint16) bool {
	return s == nil || shard == everyShard || s.has[shard/64]&(1<<(shard%64)) != 0
}

// checkSelect refuses shards there are none of.
func checkSelect(sel *pb.Select) error {
	for _, list := range [][]uint32{sel.GetAdd(), sel.GetRemove()} {
		if len(list) > coherence.Shards {
			return outrigger.Errorf(outrigger.Invalid, "select names %d shards, there are %d", len(list), coherence.Shards)
		}
		for _, x := range list {
			if x >= coherence.Shards {
				return outrigger.Errorf(outrigger.Invalid, "select names shard %d; shards are 0 to %d", x, coherence.Shards-1)
			}
		}
	}
	return nil
}

// listenerStripes divide the shards' listeners between locks.
const listenerStripes = 64

// listeners are the streams to wake per shard, so that a change costs nothing to those it
// does not concern. Index everyShard has the streams that take every change.
type listeners struct {
	locks [listenerStripes]sync.RWMutex // of the shards with this remainder
	of    [coherence.Shards + 1][]*feed
}

func (l *listeners) add(shard uint16, f *feed) {
	m := &l.locks[shard%listenerStripes]
	m.Lock()
	defer m.Unlock()
	l.of[shard] = append(l.of[shard], f)
}

func (l *listeners) remove(shard uint16, f *feed) {
	m := &l.locks[shard%listenerStripes]
	m.Lock()
	defer m.Unlock()
	if i := slices.Index(l.of[shard], f); i >= 0 {
		last := len(l.of[shard]) - 1
		l.of[shard][i], l.of[shard][last] = l.of[shard][last], nil
		if l.of[shard] = l.of[shard][:last]; last == 0 {
			l.of[shard] = nil
		}
	}
}

// wake tells the streams a shard concerns that there is something for them. It sends
// nothing itself and never waits for a stream.
func (l *listeners) wake(shard uint16) {
	m := &l.locks[shard%listenerStripes]
	m.RLock()
	defer m.RUnlock()
	for _, f := range l.of[shard] {
		f.rouse()
	}
}

// wakeAll tells every stream.
func (l *listeners) wakeAll() {
	for shard := range l.of {
		l.wake(uint16(shard))
	}
}
