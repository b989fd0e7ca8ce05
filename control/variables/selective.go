package variables

import (
	"context"
	"fmt"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// selectStep bounds the changes a selective stream takes from the ring at a time.
const selectStep = 4096

// listen makes the stream selective if its subscribe was, and has it woken for what
// concerns it.
func (f *feed) listen(first *pb.Select) error {
	if first == nil {
		f.ring.listeners.add(everyShard, f)
		return nil
	}
	if err := checkSelect(first); err != nil {
		return err
	}
	f.sel = &selection{}
	f.take(first)
	return nil
}

func (f *feed) unlisten() {
	if f.sel == nil {
		f.ring.listeners.remove(everyShard, f)
		return
	}
	for shard := range uint16(everyShard) {
		if f.sel.concerns(shard) {
			f.ring.listeners.remove(shard, f)
		}
	}
}

// take changes the selection.
func (f *feed) take(sel *pb.Select) {
	f.sel.number = sel.GetNumber()
	for _, x := range sel.GetRemove() {
		if shard := uint16(x); f.sel.concerns(shard) {
			f.sel.has[shard/64] &^= 1 << (shard % 64)
			f.ring.listeners.remove(shard, f)
		}
	}
	for _, x := range sel.GetAdd() {
		if shard := uint16(x); !f.sel.concerns(shard) {
			f.sel.has[shard/64] |= 1 << (shard % 64)
			f.ring.listeners.add(shard, f)
		}
	}
}

// choose takes a select and answers it. Nothing after the cursor was sent yet, so what
// follows is everything from there on.
func (f *feed) choose(sel *pb.Select) error {
	if sel.GetNumber() <= f.sel.number {
		return outrigger.Errorf(outrigger.Invalid, "select.number is %d after %d; numbers rise within a stream", sel.GetNumber(), f.sel.number)
	}
	f.take(sel)
	return f.answerSelect()
}

func (f *feed) answerSelect() error {
	o := f.s.origin
	return f.out.send(&pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region, Selective: true,
		Kind: &pb.FeedFrame_Selected{Selected: &pb.Selected{Number: f.sel.number, Position: f.cursor}},
	})
}

// advance sends a selective stream one frame of what concerns it, or, with cover, one that
// says that there was nothing. more is false when it sent nothing. Of more than lagging
// changes the newest of each key are sent, and then the frame may end earlier.
func (f *feed) advance(cover bool) (more bool, err error) {
	w := &f.work
	defer w.done()
	through, stale := f.ring.since(f.cursor, f.sel, selectStep, w)
	switch {
	case stale:
		return true, f.reset(through, fmt.Sprintf("position %d is no longer kept", f.cursor))
	case len(w.parts) == 0 && (!cover || through == f.cursor):
		return false, nil
	case len(w.parts) > lagging:
		through, err = f.sendMerged(w.parts, through)
	default:
		err = f.sendParts(w, through)
	}
	if err != nil {
		return false, err
	}
	f.s.metrics.frames.Add(context.Background(), 1)
	f.moveTo(through)
	return true, nil
}

func (f *feed) sendMerged(parts []part, through uint64) (uint64, error) {
	changes := make([]*pb.Change, len(parts))
	for i, p := range parts {
		changes[i] = p.of.changes[p.i]
	}
	merged := coalesce(split(f.cursor, through, changes))
	msg := merged.plain(f.s.origin)
	msg.Selective = true
	return merged.through, f.out.send(msg)
}

func (f *feed) sendParts(w *work, through uint64) error {
	w.pieces = w.pieces[:0]
	for _, p := range w.parts {
		b, err := p.of.piece(p.i)
		if err != nil {
			return err
		}
		w.pieces = append(w.pieces, b)
	}
	return f.out.sendPieces(f.s.origin, f.cursor, through, w.pieces)
}
