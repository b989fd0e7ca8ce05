//go:build linux

package loop

// wheel is a coarse timer: entries sit in the slot of their deadline, or of an earlier
// time at which they are looked at again. Moving a deadline to later costs nothing, which
// is what every request on a connection does; only an earlier one relinks. Times are
// nanoseconds on any clock that does not go backwards.
type wheel struct {
	tick  int64
	at    int64 // slots up to this tick number have been emptied
	slots [wheelSlots]*timer
	used  [wheelSlots / 64]uint64
	n     int
}

const wheelSlots = 512

// timer is embedded in what the wheel holds.
type timer struct {
	next, prev *timer
	slot       int32 // tick number mod wheelSlots, valid while linked
	linked     bool
	due        int64 // tick number of the slot
	conn       *conn
	link       *link // instead of conn
}

// set makes t come up no later than deadline, to within a tick after it. An entry that is
// in an earlier slot stays there.
func (w *wheel) set(t *timer, deadline int64) {
	due := max(deadline/w.tick+1, w.at+1)
	due = min(due, w.at+wheelSlots-1)
	if t.linked {
		if t.due <= due {
			return
		}
		w.remove(t)
	}
	t.due, t.slot, t.linked = due, int32(due%wheelSlots), true
	t.prev, t.next = nil, w.slots[t.slot]
	if t.next != nil {
		t.next.prev = t
	}
	w.slots[t.slot] = t
	w.used[t.slot/64] |= 1 << (t.slot % 64)
	w.n++
}

// remove unlinks t; it may be unlinked already.
func (w *wheel) remove(t *timer) {
	if !t.linked {
		return
	}
	if t.prev != nil {
		t.prev.next = t.next
	} else if w.slots[t.slot] = t.next; t.next == nil {
		w.used[t.slot/64] &^= 1 << (t.slot % 64)
	}
	if t.next != nil {
		t.next.prev = t.prev
	}
	t.next, t.prev, t.linked = nil, nil, false
	w.n--
}

// advance unlinks every entry whose slot has passed at now and calls due for it, which
// may set it again.
func (w *wheel) advance(now int64, due func(*timer)) {
	to := now / w.tick
	if to-w.at >= wheelSlots {
		// Slept longer than a turn: one turn empties every slot.
		w.at = to - wheelSlots
	}
	for w.at < to {
		w.at++
		slot := w.at % wheelSlots
		for t := w.slots[slot]; t != nil; t = w.slots[slot] {
			w.remove(t)
			due(t)
		}
	}
}

// next returns when advance will find something, or -1 if the wheel is empty.
func (w *wheel) next() int64 {
	if w.n == 0 {
		return -1
	}
	for i := w.at + 1; i < w.at+wheelSlots; i++ {
		slot := i % wheelSlots
		if slot%64 == 0 && w.used[slot/64] == 0 {
			i += 63
			continue
		}
		if w.used[slot/64]&(1<<(slot%64)) != 0 {
			return i * w.tick
		}
	}
	return (w.at + wheelSlots) * w.tick
}
