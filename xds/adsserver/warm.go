package adsserver

import (
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// warming holds back, from an Envoy, what refers to clusters that are new to it until it has
// their load assignments. It asks for these once it has taken the clusters in, and answers 503
// to what is routed to them meanwhile; so the order in one breath, clusters, endpoints, routes,
// is not enough (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol, "Eventual
// consistency considerations"). An Envoy that never asks is waited for answerPatience long.
// Our sidecars put a push in force as a whole and gRPC clients resolve what routes name before
// they follow them: nothing is held back from those. Guarded by session.mu.
type warming struct {
	names   []string // of new clusters, those not known to be usable
	secrets []string // that new clusters name, those the client is not known to have
	holds   bool     // something of the target waits for them
	timer   *time.Timer
}

// refers reports whether resources of the type name clusters, so that they go after these.
func refers(typeURL string) bool {
	return typeURL == xds.TypeExtension || typeURL == xds.TypeListener || typeURL == xds.TypeScopedRoute || typeURL == xds.TypeRoute
}

// warm notes the clusters of next that are new to the client and get their endpoints from us.
// Called with mu held, before anything of next is launched.
func (s *session) warm(next *generation) {
	s.warming.names, s.warming.secrets = nil, nil
	clusters := s.types[xds.TypeCluster]
	if !s.delta || s.node.Kind != string(translate.KindEnvoy) || clusters == nil || !clusters.answered {
		return // the first of everything an Envoy puts in order itself
	}
	after, loads := next.types[xds.TypeCluster], next.types[xds.TypeEndpoint]
	if after == nil || loads == nil || clusters.base == after {
		return
	}
	secrets := s.stateOf(next, xds.TypeSecret)
	consider := func(name string) {
		if clusters.held(name) != "" {
			return
		}
		if loads.entries[name] != nil {
			s.warming.names = append(s.warming.names, name)
		}
		for _, secret := range after.entries[name].secrets {
			if secrets.versionOf(secret) != "" { // nobody waits for what there is not
				s.warming.secrets = append(s.warming.secrets, secret)
			}
		}
	}
	if clusters.follows(after) {
		for _, r := range after.changed {
			consider(r.GetName())
		}
		return
	}
	for _, name := range after.names {
		consider(name)
	}
}

// cold reports whether new clusters are still without endpoints. Called with mu held.
func (s *session) cold() bool {
	w := &s.warming
	w.names, w.secrets = s.without(xds.TypeEndpoint, w.names), s.without(xds.TypeSecret, w.secrets)
	return len(w.names)+len(w.secrets) > 0
}

// without drops the names of resources that the client has said to have. Called with mu held.
func (s *session) without(typeURL string, names []string) []string {
	t := s.types[typeURL]
	if len(names) == 0 || t == nil || t.fired || len(t.force) > 0 || len(t.pending) > 0 || t.acked == nil {
		return names
	}
	return slices.DeleteFunc(names, func(name string) bool {
		_, named := t.names[name]
		return (named || t.wildcard) && t.acked.versionOf(name) != ""
	})
}

// holdsBack reports whether t has to wait for new clusters, and sees to it that it does not for
// ever. Called with mu held.
func (s *session) holdsBack(t *typeSub) bool {
	if !refers(t.typeURL) || !s.cold() {
		return false
	}
	s.warming.holds = true
	if s.warming.timer == nil {
		s.warming.timer = time.AfterFunc(answerPatience, s.giveUpWarming)
	}
	return true
}

// warmed launches what was held back, if nothing is in its way any more, and reports whether
// the target is launched as a whole. Called with mu held.
func (s *session) warmed() bool {
	w := &s.warming
	if !w.holds {
		return true
	}
	if s.cold() {
		return false
	}
	w.holds = false
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	s.launchAll(s.target)
	return s.open <= s.late
}

// giveUpWarming goes on without what an Envoy did not ask for.
func (s *session) giveUpWarming() {
	s.mu.Lock()
	s.warming.names, s.warming.secrets, s.warming.timer = nil, nil, nil
	if !s.closed {
		s.advance()
	}
	s.mu.Unlock()
	s.dropRetained()
}

// rewarm sends the load assignment of every cluster that changes along with it, changed
// itself or not: an Envoy takes a changed cluster into use once it has got its load
// assignment anew, and does not ask for it, so it would wait 15 s. Called with mu held.
func (s *session) rewarm(next *generation) {
	clusters, loads := s.types[xds.TypeCluster], s.types[xds.TypeEndpoint]
	if !s.delta || s.node.Kind != string(translate.KindEnvoy) || clusters == nil || loads == nil {
		return
	}
	after, present := next.types[xds.TypeCluster], next.types[xds.TypeEndpoint]
	if clusters.base == after {
		return
	}
	consider := func(name string) {
		if was := clusters.held(name); was != "" && was != after.versionOf(name) && present.entries[name] != nil {
			loads.demand(name)
		}
	}
	if clusters.follows(after) {
		for _, r := range after.changed {
			if _, named := loads.names[r.GetName()]; named {
				consider(r.GetName())
			}
		}
		return
	}
	for name := range loads.names {
		consider(name)
	}
}
