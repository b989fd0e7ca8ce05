package adsserver

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
)

// Bounds of what is remembered of one group's pushes; the oldest go first. The newest one
// is always remembered.
const (
	MaxPushes       = 256
	MaxPushAge      = 7 * 24 * time.Hour
	maxPushChanges  = 20_000 // changed resources, over all remembered pushes
	firstPushSerial = 1
)

// history is the newest pushes of a group, as differences: a push costs memory for what
// it changed, not for what there is. Its lock is taken under publishing and above no
// other one, and held for computation only.
type history struct {
	mu      sync.Mutex
	pushes  []pushRecord // oldest first, serials without gaps
	changes int          // over all of them
}

// pushRecord is one push.
type pushRecord struct {
	serial   uint64
	id       string
	position uint64
	step     int
	at       time.Time
	size     int  // resources in the set
	first    bool // of this process: changes is empty, everything was new
	changes  []change
}

// change is what a push did to one resource; a nil entry means it was not there.
type change struct {
	typeURL, name string
	before, after *entry
}

// add numbers next and remembers how it differs from prev, which may be nil.
func (h *history) add(group string, prev, next *generation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := pushRecord{serial: firstPushSerial, position: next.position, at: next.at, first: prev == nil}
	if prev != nil {
		r.serial = prev.serial + 1
		if last := h.pushes[len(h.pushes)-1]; last.position == r.position {
			r.step = last.step + 1
		}
		r.changes = changesOf(prev, next)
	}
	r.id = pushID(group, r.position, r.step)
	for _, st := range next.types {
		r.size += len(st.names)
	}
	next.serial = r.serial
	h.pushes, h.changes = append(h.pushes, r), h.changes+len(r.changes)
	h.trim(next.at)
}

// trim forgets what is beyond the bounds at now. Called with mu held.
func (h *history) trim(now time.Time) {
	drop := 0
	for left := len(h.pushes); left > 1; left-- {
		if left <= MaxPushes && h.changes <= maxPushChanges && now.Sub(h.pushes[drop].at) <= MaxPushAge {
			break
		}
		h.changes -= len(h.pushes[drop].changes)
		drop++
	}
	h.pushes = slices.Delete(h.pushes, 0, drop)
}

// pushID names a push: the same position gives the same id on every replica. Steps after
// the first are re-publications of a position, such as the removal of what it retained.
func pushID(group string, position uint64, step int) string {
	if step == 0 {
		return fmt.Sprintf("%s/%d", group, position)
	}
	return fmt.Sprintf("%s/%d.%d", group, position, step)
}

func changesOf(prev, next *generation) (out []change) {
	for _, typeURL := range xds.Pushed() {
		before, after := prev.types[typeURL], next.types[typeURL]
		if before == after {
			continue
		}
		changed, removed := after.since(before)
		for _, r := range changed {
			name := r.GetName()
			out = append(out, change{typeURL, name, before.entry(name), after.entry(name)})
		}
		for _, name := range removed {
			out = append(out, change{typeURL, name, before.entry(name), nil})
		}
	}
	return out
}

// list copies the records as of now, the newest first.
func (h *history) list(now time.Time) []pushRecord {
	h.mu.Lock()
	h.trim(now)
	out := slices.Clone(h.pushes)
	h.mu.Unlock()
	slices.Reverse(out)
	return out
}

// find returns the push a person names: an id, or a position, which means the newest
// push of it.
func find(pushes []pushRecord, name string) (pushRecord, bool) {
	for _, p := range pushes {
		if p.id == name || strings.HasSuffix(p.id, "/"+name) || fmt.Sprint(p.position) == name {
			return p, true
		}
	}
	return pushRecord{}, false
}

// resource is one resource of a set, by type and name.
type resource struct{ typeURL, name string }

// set is a whole configuration: what a group was served, or a node holds.
type set map[resource]*entry

// stateAt is everything the group served as of a push: the present set with the newer
// changes undone. pushes are those of list; current is the generation of pushes[0].
func stateAt(current *generation, pushes []pushRecord, serial uint64) set {
	out := make(set)
	for typeURL, st := range current.types {
		for name, e := range st.entries {
			out[resource{typeURL, name}] = e
		}
	}
	for _, p := range pushes {
		if p.serial <= serial {
			break
		}
		for _, c := range p.changes {
			if c.before == nil {
				delete(out, resource{c.typeURL, c.name})
			} else {
				out[resource{c.typeURL, c.name}] = c.before
			}
		}
	}
	return out
}

// snapshot returns the present generation and the pushes up to it, the newest first; nil
// before the first Publish.
func (g *group) snapshot() (*generation, []pushRecord) {
	for {
		current := g.current.Load()
		if current == nil {
			return nil, nil
		}
		pushes := g.history.list(time.Now())
		// serve records a push before it makes it current.
		for len(pushes) > 0 && pushes[0].serial > current.serial {
			pushes = pushes[1:]
		}
		if len(pushes) > 0 {
			return current, pushes
		}
	}
}
