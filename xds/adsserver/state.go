package adsserver

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

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
	ttl     time.Duration       // 0 = for ever
	secrets []string            // that a cluster names
}

// typeState is all resources of one type at one version. Two states of the same
// content are the same pointer from one generation to the next.
type typeState struct {
	id      uint64 // unique in the process, never 0
	typeURL string
	version string
	names   []string // sorted
	entries map[string]*entry
	sum     setSum                // of names and versions
	leases  leases                // nil if nothing is leased
	all     []*discovery.Resource // by name
	anys    []*anypb.Any          // by name

	// The difference from the state before, computed once for the streams (nearly all)
	// that hold exactly that one. fromID instead of a pointer keeps old states collectable.
	fromID  uint64
	changed []*discovery.Resource
	removed []string

	// The responses that say all, and that say the change, without a nonce: marshalled by
	// the first stream that sends them.
	allOnce, changeOnce sync.Once
	allWire, changeWire []byte
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

// leased are the leased resources; none of a nil state.
func (s *typeState) leased() leases {
	if s == nil {
		return nil
	}
	return s.leases
}

// generation is one push: all types made from one position.
type generation struct {
	position uint64
	serial   uint64 // counts the pushes of the group from 1; 0 before it is served
	at       time.Time
	types    map[string]*typeState
	// open are the secrets without private keys: what streams in the clear are given.
	open *typeState
	// known is what the source had ever had by then; see withhold.go. nil = everything.
	known   func(model, version string) bool
	waiting atomic.Int64 // streams that hold back its second step; see retain.go
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
// touched lists, in push order and by name, all that may differ from the set prev was
// made of, source; without that knowledge (known is false) everything is looked at.
func newGeneration(ids *atomic.Uint64, prev *generation, source, res *translate.Resources, touched []translate.Key, known bool, position uint64, at time.Time) (*generation, error) {
	g := &generation{position: position, at: at, types: make(map[string]*typeState)}
	for _, typeURL := range xds.Pushed() {
		b := builder{ids: ids, typeURL: typeURL, source: source, res: res}
		if prev != nil {
			b.before = prev.types[typeURL]
		}
		if b.before == nil {
			known = false
		}
		n := 0
		for n < len(touched) && touched[n].TypeURL == typeURL {
			n++
		}
		var st *typeState
		var err error
		if known {
			st, err = b.update(touched[:n])
		} else {
			st, err = b.build()
		}
		if err != nil {
			return nil, err
		}
		touched = touched[n:]
		g.types[typeURL] = st
	}
	g.open = withoutKeys(ids, prev, g.types[xds.TypeSecret])
	return g, nil
}

// builder makes the next state of one type.
type builder struct {
	ids         *atomic.Uint64
	typeURL     string
	source, res *translate.Resources // what before was made of, and what the next is
	before      *typeState
}

// entry returns what is served of a name: the entry before, if nothing changed.
func (b *builder) entry(name string) (*entry, error) {
	m := b.res.Get(b.typeURL, name)
	if m == nil {
		return nil, nil
	}
	had := b.before.entry(name)
	if had != nil && b.source != nil && m == b.source.Get(b.typeURL, name) {
		return had, nil // the same immutable message
	}
	raw, err := translate.Marshal(m)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "marshal "+b.typeURL+" "+name)
	}
	ttl, version := b.res.TTL(b.typeURL, name), hashVersion(raw)
	if ttl > 0 { // the same content for as long as it is said to hold is something else
		version = hashVersion(raw, []byte(ttl.String()))
	}
	if had != nil && had.version == version {
		return had, nil
	}
	e := &entry{version: version, any: &anypb.Any{TypeUrl: b.typeURL, Value: raw}, ttl: ttl, secrets: translate.SecretsOf(m)}
	e.res = &discovery.Resource{Name: name, Version: version, Resource: e.any}
	if ttl > 0 {
		e.res.Ttl = durationpb.New(ttl)
	}
	return e, nil
}

// build looks at every resource.
func (b *builder) build() (*typeState, error) {
	st := &typeState{typeURL: b.typeURL, names: b.res.Names(b.typeURL)}
	st.entries = make(map[string]*entry, len(st.names))
	for _, name := range st.names {
		e, err := b.entry(name)
		if err != nil {
			return nil, err
		}
		st.entries[name] = e
		st.list(e)
		st.leases = st.leases.with(name, e)
		st.sum.add(name, e.version)
	}
	if b.before != nil && maps.Equal(b.before.entries, st.entries) {
		return b.before, nil
	}
	b.finish(st)
	if b.before != nil {
		st.changed, st.removed = compare(b.before, st)
	}
	return st, nil
}

// update looks at the touched names only; the rest costs the copy of a pointer each.
func (b *builder) update(touched []translate.Key) (*typeState, error) {
	next := make(map[string]*entry, len(touched))
	members := false // some come or go
	for _, k := range touched {
		e, err := b.entry(k.Name)
		if err != nil {
			return nil, err
		}
		if had := b.before.entries[k.Name]; had != e {
			next[k.Name] = e
			members = members || had == nil || e == nil
		}
	}
	if len(next) == 0 {
		return b.before, nil
	}
	st := &typeState{typeURL: b.typeURL, names: b.before.names, entries: maps.Clone(b.before.entries), sum: b.before.sum, leases: maps.Clone(b.before.leases)}
	for _, name := range slices.Sorted(maps.Keys(next)) {
		e := next[name]
		st.leases = st.leases.with(name, e)
		if had := b.before.entries[name]; had != nil {
			st.sum.subtract(name, had.version)
		}
		if e == nil {
			delete(st.entries, name)
			st.removed = append(st.removed, name)
			continue
		}
		st.entries[name] = e
		st.sum.add(name, e.version)
		st.changed = append(st.changed, e.res)
	}
	if members {
		st.names = slices.Sorted(maps.Keys(st.entries))
		for _, name := range st.names {
			st.list(st.entries[name])
		}
	} else {
		st.all, st.anys = slices.Clone(b.before.all), slices.Clone(b.before.anys)
		for _, r := range st.changed {
			i, _ := slices.BinarySearch(st.names, r.GetName())
			e := next[r.GetName()]
			st.all[i], st.anys[i] = e.res, e.any
		}
	}
	b.finish(st)
	return st, nil
}

// finish numbers a state that differs from the one before.
func (b *builder) finish(st *typeState) {
	st.version = st.sum.version(st.typeURL)
	st.id = b.ids.Add(1)
	if b.before != nil {
		st.fromID = b.before.id
	}
}

// list appends e to what is sent to those who follow everything.
func (s *typeState) list(e *entry) {
	s.all = append(s.all, e.res)
	s.anys = append(s.anys, e.any)
}

// since lists what a holder of exactly before lacks to hold exactly s.
func (s *typeState) since(before *typeState) (changed []*discovery.Resource, removed []string) {
	if s.fromID == before.id {
		return s.changed, s.removed
	}
	return compare(before, s)
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

// setSum is a hash of a set of names and versions that is kept up to date by adding and
// subtracting members: the sum of their SHA-256 modulo 2^256 (Bellare and Micciancio,
// "A new paradigm for collision-free hashing: incrementality at reduced cost", 1997).
type setSum [4]uint64

func (s *setSum) add(name, version string) {
	d := member(name, version)
	var carry uint64
	for i := range s {
		s[i], carry = bits.Add64(s[i], d[i], carry)
	}
}

func (s *setSum) subtract(name, version string) {
	d := member(name, version)
	var borrow uint64
	for i := range s {
		s[i], borrow = bits.Sub64(s[i], d[i], borrow)
	}
}

// version names the set.
func (s *setSum) version(typeURL string) string {
	var raw []byte
	for _, word := range s {
		raw = binary.LittleEndian.AppendUint64(raw, word)
	}
	return hashVersion([]byte(typeURL), raw)
}

func member(name, version string) (out setSum) {
	h := sha256.Sum256([]byte(name + "\x00" + version))
	for i := range out {
		out[i] = binary.LittleEndian.Uint64(h[8*i:])
	}
	return out
}
