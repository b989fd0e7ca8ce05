package adsserver

import (
	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
)

// held is the version the client holds of a name, "" for none.
func (t *typeSub) held(name string) string {
	if t.base == nil {
		return t.over[name]
	}
	return t.base.versionOf(name)
}

// fullState reports whether a state-of-the-world response of the type must list every
// resource, absence meaning deletion (LDS and CDS); for the others absence means
// "unchanged" and a deletion cannot be said.
func fullState(typeURL string) bool {
	return typeURL == xds.TypeListener || typeURL == xds.TypeCluster
}

// lacks reports whether the client, by its subscription, needs a response to hold next.
// When it does not, the client is known to hold next from here on.
func (s *session) lacks(t *typeSub, g *generation) bool {
	next := s.stateOf(g, t.typeURL)
	if next == nil {
		return false // a type we do not publish; answered on request only
	}
	if s.delta && (len(t.force) > 0 || !t.answered && len(t.names) > 0) {
		return true
	}
	if t.base == nil {
		return t.wildcard || !t.answered && len(t.names) > 0 && fullState(t.typeURL) || s.lacksNames(t, next)
	}
	if t.base == next || t.base.version == next.version {
		return false
	}
	if t.wildcard {
		return true
	}
	if s.lacksNames(t, next) {
		return true
	}
	if t.acked == t.base {
		t.acked = next // nothing it follows has changed, so it holds that too
	}
	t.base = next
	return false
}

func (s *session) lacksNames(t *typeSub, next *typeState) bool {
	if t.follows(next) {
		for _, name := range t.stirred(next) {
			if _, named := t.names[name]; named && (next.entries[name] != nil || s.delta || fullState(t.typeURL)) {
				return true
			}
		}
		return false
	}
	for name := range t.names {
		want := next.versionOf(name)
		if want == t.held(name) {
			continue
		}
		if want != "" || s.delta || fullState(t.typeURL) {
			return true
		}
	}
	return false
}

// subscribeDelta applies one delta request to the subscription. stock is what the stock
// server made of it. It reports whether an answer is due whatever the client holds.
func (t *typeSub) subscribeDelta(stock subscription, first bool, subscribe, unsubscribe []string, held map[string]string) (due bool, err error) {
	wasWildcard, before := t.wildcard, t.names
	if err := t.adopt(stock); err != nil {
		return false, err
	}
	if first {
		t.over = make(map[string]string, len(held)) // the request's map belongs to the stock server
		for name, version := range held {
			t.over[name] = version
		}
	}
	for _, name := range subscribe {
		if name == xds.Wildcard {
			continue
		}
		// First subscription with a reported version: a difference decides. Any other
		// subscription, also a repeated one, is answered.
		if _, reported := t.over[name]; !first || !reported {
			t.demand(name)
			due = true
		}
	}
	for _, name := range unsubscribe {
		if _, had := before[name]; had && t.wildcard {
			t.demand(name) // "xds-protocol-unsubscribe": still covered by the wildcard, so say what it is now
			due = true
		}
	}
	if !first && t.wildcard && !wasWildcard {
		t.widen(before)
		due = true
	}
	return due || first && (t.wildcard || len(t.names) > 0), nil
}

// widen turns knowledge of some names into explicit versions, because after a switch
// to wildcard the client does not hold the rest of base.
func (t *typeSub) widen(names map[string]struct{}) {
	over := make(map[string]string, len(names))
	for name := range names {
		if v := t.held(name); v != "" {
			over[name] = v
		}
	}
	t.base, t.over = nil, over
}

// subscribeSotw applies one state-of-the-world request. repeated says the request
// carries a nonce that was answered before.
func (t *typeSub) subscribeSotw(stock subscription, first, repeated bool) (due bool, err error) {
	wasWildcard, before := t.wildcard, t.names
	if err := t.adopt(stock); err != nil {
		return false, err
	}
	same := wasWildcard == t.wildcard && len(before) == len(t.names)
	for name := range t.names {
		if _, had := before[name]; !had {
			t.demand(name)
			same, due = false, true
		}
	}
	if !first && t.wildcard && !wasWildcard {
		t.widen(before)
		due = true
	}
	// The same names again under an old nonce: an Envoy that re-warms a cluster asks
	// for endpoints it already has, and waits for them.
	if repeated && same && (t.wildcard || len(t.names) > 0) {
		for name := range t.names {
			t.demand(name)
		}
		due = true
	}
	return due || first && t.wildcard, nil
}

// subscription is what we need of the stock server's view.
type subscription interface {
	SubscribedResources() map[string]struct{}
	IsWildcard() bool
}

// adopt copies the stock view, which the stock server goes on changing in place.
func (t *typeSub) adopt(stock subscription) error {
	names := stock.SubscribedResources()
	if len(names) > maxNames {
		return outrigger.Errorf(outrigger.Exhausted, "subscription to %d names of type %s, the limit is %d; use the wildcard", len(names), t.typeURL, maxNames)
	}
	t.wildcard = stock.IsWildcard()
	t.names = nil
	if len(names) > 0 {
		t.names = make(map[string]struct{}, len(names))
		for name := range names {
			t.names[name] = struct{}{}
		}
	}
	return nil
}
