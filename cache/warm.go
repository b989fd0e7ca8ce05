package cache

import (
	"context"
	"time"

	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/cache/tier"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// WarmUp bounds how a new process fills its process tier from the node's table, so that
// what others on the node read is a hit here at once. Zero values mean the defaults in
// brackets; whichever bound is reached first ends it.
//
// It happens once, in the background, from the first table of the node's agent that is
// being kept current. Keys come roughly newest first from a table
// with room; a full one holds what is most used, in no order. It
// pauses a millisecond after every 64 entries, and takes nothing's place: once the tier's
// part for a key is full, that key is left out.
type WarmUp struct {
	Off     bool
	Bytes   int64         // no more is added once the tier is charged this much [half of ProcessBytes]
	Entries int           // most that are added [65,536]
	Time    time.Duration // since Run began, waiting for the table included [10 s]
}

func (w *WarmUp) complete(processBytes int64) {
	if processBytes == 0 {
		processBytes = tier.DefaultBytes
	}
	if w.Bytes == 0 {
		w.Bytes = processBytes / 2
	}
	if w.Entries == 0 {
		w.Entries = 1 << 16
	}
	if w.Time == 0 {
		w.Time = 10 * time.Second
	}
}

const (
	warmLook  = 20 * time.Millisecond // between two looks for a table
	warmSlots = 512                   // looked at in one step, a few microseconds
	warmBatch = 64                    // entries between two pauses: some 200 µs of work
	warmPause = time.Millisecond
)

// warmUp fills the process tier within its bounds.
func (s *Store) warmUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.o.WarmUp.Time)
	defer cancel()
	for ctx.Err() == nil {
		v := s.current()
		if own := s.private.Load(); own == nil || own.view != v {
			if _, ok := s.live(v, s.clock()); ok {
				s.warmFrom(ctx, v)
				s.o.Logger.Info("warmed up from the node's table", "entries", s.warmed.Load(), "bytes", s.tier.Bytes())
				return
			}
		}
		pause.For(ctx, warmLook)
	}
}

// warmFrom walks the table in bands, each as deep as all those before it.
func (s *Store) warmFrom(ctx context.Context, v *view) {
	arena := v.reader.ArenaBytes()
	for near, far := int64(0), arena/16; near < arena; near, far = far, 2*far {
		if !s.warmBand(ctx, v, v.reader.Scan(near, far)) {
			return
		}
	}
}

// warmBand adds what one walk finds; false = a bound was reached, or the table is no
// longer current.
func (s *Store) warmBand(ctx context.Context, v *view, scan *shm.Scan) bool {
	var ids []string
	for pending := 0; ; {
		ids = ids[:0]
		more := scan.Next(warmSlots, func(id string) { ids = append(ids, id) })
		for _, id := range ids {
			if int(s.warmed.Load()) >= s.o.WarmUp.Entries || s.tier.Bytes() >= s.o.WarmUp.Bytes || s.view.Load() != v || !s.warm(id, v) {
				return false
			}
			if pending++; pending == warmBatch {
				pending = 0
				pause.For(ctx, warmPause)
			}
			if ctx.Err() != nil {
				return false
			}
		}
		if !more {
			return true
		}
	}
}

// warm adds the entry of one key if it is current; false = the table is not. The order
// is that of local: lease, head, entry.
func (s *Store) warm(id string, v *view) bool {
	now := s.clock()
	base, live := s.live(v, now)
	if !live {
		return false
	}
	if s.tier.Peek(id) != nil {
		return true
	}
	e, state := s.fromTable(id, v, base, headOf(v))
	if state != shm.Present && state != shm.Negative {
		return true
	}
	// Hit proves it again at each read; here it saves the room of what has changed since.
	if _, ok := s.proof(e, v, now); ok && s.tier.Offer(id, e) {
		s.warmed.Add(1)
	}
	return true
}
