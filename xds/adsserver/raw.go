package adsserver

import (
	"maps"
	"slices"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
)

// PublishRaw makes resources that another server sent the configuration of a group: their
// bytes and versions are passed on as they are, so a client may move between that server and
// this one without being sent anything anew. set holds all resources by type URL and name;
// a resource in it must not be modified afterwards, the maps may. position has to be above
// the one before (kind Conflict) and is for the ledger only.
//
// Nothing else is checked and nothing is retained: whoever made the set did. A group is fed
// by PublishRaw or by Publish, never by both.
func (s *Server) PublishRaw(name string, set map[string]map[string]*discovery.Resource, position uint64) error {
	g := s.group(name)
	g.publishing.Lock()
	defer g.publishing.Unlock()
	prev := g.current.Load()
	if prev != nil && position <= prev.position {
		return outrigger.Errorf(outrigger.Conflict, "position %d is not above the published %d", position, prev.position)
	}
	next := &generation{position: position, at: time.Now(), types: make(map[string]*typeState), known: s.known()}
	for _, typeURL := range xds.Pushed() {
		var before *typeState
		if prev != nil {
			before = prev.types[typeURL]
		}
		next.types[typeURL] = rawState(&s.ids, typeURL, before, set[typeURL])
	}
	next.open = withoutKeys(&s.ids, prev, next.types[xds.TypeSecret])
	g.serve(next, false)
	return nil
}

// rawState makes the next state of one type; before itself if nothing differs.
func rawState(ids *atomic.Uint64, typeURL string, before *typeState, set map[string]*discovery.Resource) *typeState {
	st := &typeState{typeURL: typeURL, names: slices.Sorted(maps.Keys(set)), entries: make(map[string]*entry, len(set))}
	if before != nil {
		st.sum = before.sum
	}
	same := before != nil && len(before.names) == len(st.names)
	for _, name := range st.names {
		had := before.entry(name)
		e := had
		if r := set[name]; had == nil || had.version != r.GetVersion() {
			e = &entry{version: r.GetVersion(), any: r.GetResource(), res: r, ttl: r.GetTtl().AsDuration()}
			same = false
			if had != nil {
				st.sum.subtract(name, had.version)
			}
			st.sum.add(name, e.version)
			st.changed = append(st.changed, e.res)
		}
		st.entries[name] = e
		st.list(e)
		st.leases = st.leases.with(name, e)
	}
	if same {
		return before
	}
	if before != nil {
		for _, name := range before.names {
			if st.entries[name] == nil {
				st.sum.subtract(name, before.versionOf(name))
				st.removed = append(st.removed, name)
			}
		}
	} else {
		st.changed = nil
	}
	b := builder{ids: ids, before: before}
	b.finish(st)
	return st
}
