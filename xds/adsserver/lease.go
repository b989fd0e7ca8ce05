package adsserver

import (
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// A leased resource (translate.Resources.PutLeased) is dropped by the client when it has not
// heard of it for its time to live, and what says "still so" is a heartbeat: the resource
// without its body, at the version the client holds
// (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#time-to-live).
//
// A heartbeat is no push: it changes no account of what was sent and accepted. It waits its
// turn behind what the client has yet to answer, one at a time. A client that let the lease
// run out holds nothing a heartbeat could renew, so after a long pause, after a reconnect and
// after a client refused a heartbeat the whole resource is sent.

// beatsPerLease is how often a lease is renewed: three heartbeats may be lost.
const beatsPerLease = 4

// leases are the leased resources of one type, by name; nil = none, the usual case.
type leases map[string]time.Duration

// with is l, which it may change, after a resource became e; nil = it is gone.
func (l leases) with(name string, e *entry) leases {
	delete(l, name)
	if e == nil || e.ttl == 0 {
		return l
	}
	if l == nil {
		l = make(leases)
	}
	l[name] = e.ttl
	return l
}

// shortest is 0 if there are none.
func (l leases) shortest() (out time.Duration) {
	for _, ttl := range l {
		if out == 0 || ttl < out {
			out = ttl
		}
	}
	return out
}

// followed lists, sorted, the leased resources that the stream follows and holds.
func (t *typeSub) followed(st *typeState) (names []string) {
	if st == nil {
		return nil
	}
	for name := range st.leases {
		if _, named := t.names[name]; !named && !t.wildcard {
			continue
		}
		if _, rejected := t.rejected[name]; !rejected && t.held(name) == st.versionOf(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// patience is how long the lease of t runs without a word; 0 = it has none.
func (t *typeSub) patience() time.Duration {
	if t.base == nil || len(t.followed(t.base)) == 0 {
		return 0
	}
	return t.base.leases.shortest()
}

// keepAlive starts the heartbeats of a stream that was just sent something leased. Called with
// mu held.
func (s *session) keepAlive(t *typeSub) {
	if ttl := t.patience(); ttl > 0 && s.beats == nil && !s.closed {
		s.beats = time.AfterFunc(ttl/beatsPerLease, s.beat)
	}
}

// beat renews what is leased, and sets the time of the next one.
func (s *session) beat() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beats = nil
	if s.closed {
		return
	}
	next := time.Duration(0)
	speaks := s.srv.speaksFor() > 0
	for _, t := range s.types {
		ttl := t.patience()
		if ttl == 0 {
			continue
		}
		if next == 0 || ttl < next {
			next = ttl
		}
		if !speaks || !t.armed {
			continue // it has yet to answer what was sent before, or asks something else
		}
		if t.beating = true; time.Since(t.heardAt) > ttl/2 {
			t.renew() // the client may have dropped it by now
		}
		s.launch(t)
	}
	if next > 0 {
		s.beats = time.AfterFunc(next/beatsPerLease, s.beat)
	}
}

// renew has the leased resources sent whole.
func (t *typeSub) renew() {
	for _, name := range t.followed(t.base) {
		t.demand(name)
	}
}

// rejoin has what is leased sent whole to a client that has come back with it: how much of
// the lease is left only the client knows.
func (t *typeSub) rejoin(next *typeState) {
	for name := range next.leased() {
		if _, named := t.names[name]; named || t.wildcard {
			t.demand(name)
		}
	}
}

// speaksFor is how much longer this server may speak for what is leased.
func (s *Server) speaksFor() time.Duration {
	if s.opt.Lease == nil {
		return 1<<63 - 1
	}
	return s.opt.Lease()
}

// pulse adds the heartbeats that are due to a response and reports whether it is nothing else.
// Called with mu held, before base is what the response brings.
func (s *session) pulse(t *typeSub, next *typeState, out *discovery.DeltaDiscoveryResponse) (alone bool) {
	due := t.beating
	t.beating = false
	left := s.srv.speaksFor()
	if !due || left <= 0 {
		return false
	}
	alone = len(out.Resources) == 0 && len(out.RemovedResources) == 0
	sent := out.Resources
	for _, name := range t.followed(next) {
		if slices.ContainsFunc(sent, func(r *discovery.Resource) bool { return r.GetName() == name }) {
			continue
		}
		s.wire = nil
		// out.Resources may be shared with other streams: append to a copy.
		out.Resources = append(out.Resources[:len(out.Resources):len(out.Resources)], &discovery.Resource{
			Name: name, Version: next.versionOf(name), Ttl: durationpb.New(min(next.leases[name], left))})
	}
	return alone && len(out.Resources) > 0
}

// beaten handles the answer to a response that was heartbeats only. Called with mu held.
func (s *session) beaten(t *typeSub, refused bool) {
	if !refused {
		return
	}
	// It holds what it was to renew no longer.
	s.srv.log.Debug("client had dropped what is leased", "node", s.node.ID, "type", t.typeURL)
	t.renew()
}

// lasting is what is not leased.
func (s *typeState) lasting() (anys []*anypb.Any, names []string) {
	for i, name := range s.names {
		if _, leased := s.leases[name]; !leased {
			anys, names = append(anys, s.anys[i]), append(names, name)
		}
	}
	return anys, names
}
