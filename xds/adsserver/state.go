package adsserver

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Everything in this file is immutable once built and shared by all streams; only the
// messages around it are made per stream, because the server writes a nonce into them.

// entry is one resource version: marshalled and hashed once.
type entry struct {
	version string
	any     *anypb.Any          // as state-of-the-world sends it
	res     *discovery.Resource // as delta sends it
}

// typeState is all resources of one type at one version. Two states of the same
// content are the same pointer from one generation to the next.
type typeState struct {
	id      uint64 // unique in the process, never 0
	typeURL string
	version string
	names   []string // sorted
	entries map[string]*entry
	all     []*discovery.Resource // by name
	anys    []*anypb.Any          // by name

	// The difference from the state before, computed once for the streams (nearly all)
	// that hold exactly that one. fromID instead of a pointer keeps old states collectable.
	fromID  uint64
	changed []*discovery.Resource
	removed []string
}

// versionOf is "" for a name that is not there, and for a nil state.
func (s *typeState) versionOf(name string) string {
	if s == nil {
		return ""
	}
	if e := s.entries[name]; e != nil {
		return e.version
	}
	return ""
}

// entry is nil for a name that is not there, and for a nil state.
func (s *typeState) entry(name string) *entry {
	if s == nil {
		return nil
	}
	return s.entries[name]
}

// generation is one push: all types made from one position.
type generation struct {
	position uint64
	serial   uint64 // counts the pushes of the group from 1; 0 before it is served
	at       time.Time
	types    map[string]*typeState
	waiting  atomic.Int64 // streams that hold back its second step; see retain.go
}

// same reports whether two generations serve the same resources.
func (g *generation) same(h *generation) bool { return maps.Equal(g.types, h.types) }

// hashVersion names content: 96 bits of SHA-256, so a version is never reused for other
// content by accident or by intent.
func hashVersion(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:12])
}

// newGeneration marshals and hashes res, reusing what prev (may be nil) already has.
func newGeneration(ids *atomic.Uint64, prev *generation, res *translate.Resources, position uint64, at time.Time) (*generation, error) {
	g := &generation{position: position, at: at, types: make(map[string]*typeState)}
	for _, typeURL := range xds.Pushed() {
		var before *typeState
		if prev != nil {
			before = prev.types[typeURL]
		}
		st, err := newTypeState(ids, before, typeURL, res)
		if err != nil {
			return nil, err
		}
		g.types[typeURL] = st
	}
	return g, nil
}

func newTypeState(ids *atomic.Uint64, before *typeState, typeURL string, res *translate.Resources) (*typeState, error) {
	st := &typeState{typeURL: typeURL, names: res.Names(typeURL)}
	st.entries = make(map[string]*entry, len(st.names))
	var digest []byte
	for _, name := range st.names {
		raw, err := translate.Marshal(res.Get(typeURL, name))
		if err != nil {
			return nil, outrigger.Wrap(outrigger.Internal, err, "marshal "+typeURL+" "+name)
		}
		version := hashVersion(raw)
		e := &entry{version: version, any: &anypb.Any{TypeUrl: typeURL, Value: raw}}
		if before.versionOf(name) == version {
			e = before.entries[name]
		} else {
			e.res = &discovery.Resource{Name: name, Version: version, Resource: e.any}
		}
		st.entries[name] = e
		st.all = append(st.all, e.res)
		st.anys = append(st.anys, e.any)
		digest = append(append(append(digest, name...), 0), version...)
	}
	st.version = hashVersion([]byte(typeURL), digest)
	if before != nil && before.version == st.version {
		return before, nil
	}
	st.id = ids.Add(1)
	if before != nil {
		st.fromID = before.id
		st.changed, st.removed = compare(before, st)
	}
	return st, nil
}

// compare lists what a holder of exactly before lacks to hold exactly after.
func compare(before, after *typeState) (changed []*discovery.Resource, removed []string) {
	for i, name := range after.names {
		if before.versionOf(name) != after.all[i].GetVersion() {
			changed = append(changed, after.all[i])
		}
	}
	for _, name := range before.names {
		if after.entries[name] == nil {
			removed = append(removed, name)
		}
	}
	return changed, removed
}
