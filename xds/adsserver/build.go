package adsserver

import (
	"maps"
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/xds"
)

// buildDelta makes the delta response that brings t to the stream's target.
func (s *session) buildDelta(t *typeSub) *discovery.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.stateOf(s.target, t.typeURL)
	out := &discovery.DeltaDiscoveryResponse{TypeUrl: t.typeURL}
	if next == nil {
		out.RemovedResources = slices.Sorted(maps.Keys(t.force)) // a type nobody publishes: none exists
		s.built(t, response{})
		return out
	}
	out.SystemVersionInfo = next.version
	if !t.answered {
		t.rejoin(next)
	}
	resent := 0
	if simple := t.wildcard && len(t.force) == 0 && len(t.rejected) == 0; simple {
		s.wire = t.shared(next, out)
	} else {
		out.Resources, out.RemovedResources = t.difference(next)
		resent = t.repeats(out.Resources)
	}
	if s.postpones(t) {
		s.postpone(t, out.RemovedResources)
		out.RemovedResources, s.wire = nil, nil
	}
	if t.vouched { // asked for by name, so these bytes are of this stream alone
		out.ControlPlane, t.vouched = &core.ControlPlane{Identifier: xds.Vouched}, false
	}
	sent := len(out.Resources)
	alone := s.pulse(t, next, out)
	if !alone {
		s.account(t, sent, resent)
	}
	s.built(t, response{resources: out.Resources, state: next, beat: alone})
	return out
}

// repeats counts resources that the client holds at the version they are sent at.
func (t *typeSub) repeats(sent []*discovery.Resource) (n int) {
	for _, r := range sent {
		if t.held(r.GetName()) == r.GetVersion() {
			n++
		}
	}
	return n
}

// shared answers the common cases with what all streams share: nothing, everything, or
// exactly the last change. It fills out and returns its bytes, nil where nobody else is
// sent the same.
func (t *typeSub) shared(next *typeState, out *discovery.DeltaDiscoveryResponse) []byte {
	switch {
	case t.base == next:
	case t.base == nil && len(t.over) == 0:
		out.Resources = next.all
		next.allOnce.Do(func() { next.allWire = wireOf(out) })
		return next.allWire
	case t.base != nil && next.fromID == t.base.id:
		out.Resources, out.RemovedResources = next.changed, next.removed
		next.changeOnce.Do(func() { next.changeWire = wireOf(out) })
		return next.changeWire
	case t.base != nil:
		out.Resources, out.RemovedResources = compare(t.base, next)
	default:
		out.Resources, out.RemovedResources = t.difference(next)
	}
	return nil
}

// difference compares name by name: the general case.
func (t *typeSub) difference(next *typeState) (changed []*discovery.Resource, removed []string) {
	send := make(map[string]struct{})
	resend := t.rejectedChanged(next)
	names := t.scope
	if t.follows(next) {
		names = t.stirred
	}
	for _, name := range names(next) {
		_, forced := t.force[name]
		want, held := next.versionOf(name), t.held(name)
		switch {
		case want == "" && (held != "" || forced):
			removed = append(removed, name)
		case want != "" && (want != held || forced):
			send[name] = struct{}{}
		}
	}
	if resend {
		for name := range t.rejected {
			if next.entries[name] != nil {
				send[name] = struct{}{}
			}
		}
		t.rejected = nil
	}
	for _, name := range slices.Sorted(maps.Keys(send)) {
		changed = append(changed, next.entries[name].res)
	}
	slices.Sort(removed)
	return changed, removed
}

// follows reports whether the client holds exactly what next was made from, so that only
// what next changed can be due.
func (t *typeSub) follows(next *typeState) bool {
	return t.base != nil && (t.base == next || next.fromID == t.base.id)
}

// stirred lists what may be due to a client that follows: what next changed of what it
// subscribed to, and what is forced.
func (t *typeSub) stirred(next *typeState) []string {
	out := slices.Collect(maps.Keys(t.force))
	if t.base == next {
		return out
	}
	consider := func(name string) {
		_, named := t.names[name]
		if _, forced := t.force[name]; !forced && (named || t.wildcard) {
			out = append(out, name)
		}
	}
	for _, r := range next.changed {
		consider(r.GetName())
	}
	for _, name := range next.removed {
		consider(name)
	}
	return out
}

// rejectedChanged reports whether a rejected resource is now another one, or gone.
func (t *typeSub) rejectedChanged(next *typeState) bool {
	for name := range t.rejected {
		if next.versionOf(name) != t.held(name) {
			return true
		}
	}
	return false
}

// scope lists the names the subscription covers, once each: with a wildcard all there
// are or the client holds, and always the explicit and forced ones.
func (t *typeSub) scope(next *typeState) []string {
	set := maps.Clone(t.names)
	if set == nil {
		set = make(map[string]struct{})
	}
	for name := range t.force {
		set[name] = struct{}{}
	}
	if t.wildcard {
		for _, name := range next.names {
			set[name] = struct{}{}
		}
		if t.base != nil {
			for _, name := range t.base.names {
				set[name] = struct{}{}
			}
		}
		for name := range t.over {
			set[name] = struct{}{}
		}
	}
	return slices.Collect(maps.Keys(set))
}

// buildSotw makes the state-of-the-world response that brings t to the stream's target.
func (s *session) buildSotw(t *typeSub) *discovery.DiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.stateOf(s.target, t.typeURL)
	out := &discovery.DiscoveryResponse{TypeUrl: t.typeURL, VersionInfo: next.version}
	names := next.names
	if t.wildcard {
		out.Resources, t.rejected = next.anys, nil
		if len(next.leases) > 0 {
			out.Resources, names = next.lasting()
		}
	} else {
		names = t.selectSotw(next)
		out.Resources = make([]*anypb.Any, len(names))
		for i, name := range names {
			out.Resources[i] = next.entries[name].any
		}
	}
	s.account(t, len(names), t.repeatsSotw(next, names))
	if !t.answered && t.claimed != "" && t.claimed == next.version {
		s.traffic.refreshed++
	}
	s.built(t, response{names: names, state: next})
	return out
}

// repeatsSotw is repeats of the other protocol, in which a response of some types has to list
// what did not change beside what did.
func (t *typeSub) repeatsSotw(next *typeState, names []string) (n int) {
	if t.base == nil || (t.wildcard || fullState(t.typeURL)) && t.base.version != next.version {
		return 0
	}
	for _, name := range names {
		if t.held(name) == next.versionOf(name) {
			n++
		}
	}
	return n
}

// selectSotw lists what a named subscription is sent: all of it for LDS and CDS, what
// changed or was asked for otherwise.
func (t *typeSub) selectSotw(next *typeState) []string {
	var out []string
	whole, resend := fullState(t.typeURL), t.rejectedChanged(next)
	names := maps.Keys(t.names)
	if !whole && !resend && t.follows(next) {
		names = slices.Values(t.stirred(next))
	}
	for _, name := range slices.Sorted(names) {
		want := next.versionOf(name)
		_, forced := t.force[name]
		_, rejected := t.rejected[name]
		if _, leased := next.leases[name]; leased {
			continue // the protocol's wrapper for it is understood by few, and never renewed here
		}
		if want != "" && (whole || forced || rejected && resend || want != t.held(name)) {
			out = append(out, name)
		}
	}
	if whole || resend {
		t.rejected = nil
	}
	return out
}
