package translate

import (
	"cmp"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/xds"
)

// Resources is one set of xDS resources by type URL and name. The zero value is an
// empty set. Messages in a set are immutable once put; a set itself is not safe for
// concurrent writes.
type Resources struct {
	byType map[string]map[string]*item
	// Of a fork: who it is, whom it was forked from, which of its maps are still those of
	// the other one, and what was put or deleted since.
	id, from *lineage
	shared   map[string]bool
	touched  map[Key]struct{}
}

// Key names one resource.
type Key struct{ TypeURL, Name string }

// lineage is an identity; it is not empty because pointers to empty values may be equal.
type lineage struct{ _ byte }

// item is one message and the references it makes, found when they are first asked for.
type item struct {
	message proto.Message
	ttl     time.Duration
	refs    atomic.Pointer[[]Ref]
}

func (i *item) needs() []Ref {
	if r := i.refs.Load(); r != nil {
		return *r
	}
	r := needs(i.message) // twice at worst, with the same outcome
	i.refs.Store(&r)
	return r
}

// Fork returns a set with the content of r that costs nothing until it is changed and
// knows what was changed (Since). Messages are shared. r must not be changed any more.
func (r *Resources) Fork() *Resources {
	out := &Resources{byType: make(map[string]map[string]*item, len(r.byType)), id: new(lineage), from: r.id,
		shared: make(map[string]bool, len(r.byType)), touched: make(map[Key]struct{})}
	for t, m := range r.byType {
		out.byType[t], out.shared[t] = m, true
	}
	return out
}

// Since lists what was put or deleted in r since it was forked from prev, in push order
// and by name; what is listed may be unchanged. ok is false if r is no fork of prev: then
// nothing is known.
func (r *Resources) Since(prev *Resources) (touched []Key, ok bool) {
	if prev == nil || prev.id == nil || r.from != prev.id {
		return nil, false
	}
	return r.sortedTouched(), true
}

func (r *Resources) sortedTouched() []Key {
	order := make(map[string]int, len(r.byType))
	for i, t := range xds.Pushed() {
		order[t] = i
	}
	return slices.SortedFunc(maps.Keys(r.touched), func(a, b Key) int {
		return cmp.Or(cmp.Compare(order[a.TypeURL], order[b.TypeURL]), cmp.Compare(a.Name, b.Name))
	})
}

// own makes the map of a type r's own before it is written.
func (r *Resources) own(typeURL, name string) map[string]*item {
	if r.byType == nil {
		r.byType = make(map[string]map[string]*item)
	}
	m := r.byType[typeURL]
	switch {
	case m == nil:
		m = make(map[string]*item)
		r.byType[typeURL] = m
	case r.shared[typeURL]:
		m = maps.Clone(m)
		r.byType[typeURL] = m
	}
	delete(r.shared, typeURL)
	if r.touched != nil {
		r.touched[Key{typeURL, name}] = struct{}{}
	}
	return m
}

// Put adds or replaces a resource.
func (r *Resources) Put(typeURL, name string, m proto.Message) {
	r.own(typeURL, name)[name] = &item{message: m}
}

// PutLeased is Put for a resource that clients are to drop by themselves when they have not
// heard of it for ttl (> 0).
func (r *Resources) PutLeased(typeURL, name string, m proto.Message, ttl time.Duration) {
	r.own(typeURL, name)[name] = &item{message: m, ttl: ttl}
}

// TTL is how long clients keep a resource they hear nothing of; 0 = for ever.
func (r *Resources) TTL(typeURL, name string) time.Duration {
	if i := r.byType[typeURL][name]; i != nil {
		return i.ttl
	}
	return 0
}

// Delete removes a resource if it is there.
func (r *Resources) Delete(typeURL, name string) {
	if r.byType[typeURL][name] != nil {
		delete(r.own(typeURL, name), name)
	}
}

// Get returns a resource, or nil.
func (r *Resources) Get(typeURL, name string) proto.Message {
	if i := r.byType[typeURL][name]; i != nil {
		return i.message
	}
	return nil
}

// Names returns the sorted names of one type.
func (r *Resources) Names(typeURL string) []string {
	return slices.Sorted(maps.Keys(r.byType[typeURL]))
}

// Count is the number of resources of one type.
func (r *Resources) Count(typeURL string) int { return len(r.byType[typeURL]) }

// Len is the number of resources of all types.
func (r *Resources) Len() int {
	n := 0
	for _, m := range r.byType {
		n += len(m)
	}
	return n
}

// Clone returns a set that can be changed without changing r; messages are shared.
func (r *Resources) Clone() *Resources {
	out := &Resources{byType: make(map[string]map[string]*item, len(r.byType))}
	for t, m := range r.byType {
		out.byType[t] = maps.Clone(m)
	}
	return out
}
