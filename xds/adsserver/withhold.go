package adsserver

import (
	"maps"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// A control plane that lost its disk looks like one that has just been installed: what its
// clients have in force is, to it, nothing that ever was. To say so would be obeyed, as the
// removal of all models. But clients come back with what they hold: delta streams with the
// versions of resources (initial_resource_versions), gRPC clients with the names they follow
// and the version of the type they had last (version_info). What was removed is something
// the source has had; what it never had cannot have been removed by it. So a stream that
// holds such a thing is sent nothing at all (half a set is worse than an old one): every
// client keeps and serves what it has, as with the control plane away, until the source has
// had all of it, or an operator says that the source is right.
//
// A client that starts anew holds nothing and is answered as ever, also with nothing.

// Know tells what the source of sets has ever had, from the next Publish or Stage on:
// known(model, version) of a version that could serve, known(model, "") of any of a model,
// known("", "") of any at all. The function must give the same answer each time, from any
// goroutine. nil, as before the first call, means everything: all that a set lacks is
// removed from clients.
func (s *Server) Know(known func(model, version string) bool) {
	if known == nil {
		s.source.Store(nil)
		return
	}
	s.source.Store(&known)
}

func (s *Server) known() func(model, version string) bool {
	if f := s.source.Load(); f != nil {
		return *f
	}
	return nil
}

// had reports whether the source of g ever had a resource, as far as names tell: what
// belongs to no model, every source has that has a model.
func (g *generation) had(typeURL, name string) bool {
	if typeURL == xds.TypeMeshPolicy {
		return true
	}
	if model, version, ok := translate.SubjectOf(typeURL, name); ok {
		return g.known(model, version)
	}
	return g.known("", "")
}

// withholds reports whether the stream must not be given g, and keeps the ledger informed.
// Called with mu held.
func (s *session) withholds(g *generation) bool {
	held, unsure := "", false
	if g.known != nil {
		for _, typeURL := range xds.Pushed() {
			t := s.types[typeURL]
			if t == nil || t.known {
				continue
			}
			name, certain := s.stranger(t, g)
			t.known = name == ""
			switch {
			case name == "":
			case !certain:
				unsure = true
			case held == "":
				held = xds.ShortType(typeURL) + " " + name
			}
		}
	}
	s.waits = held != "" || unsure
	if held == s.held {
		return s.waits
	}
	if s.held == "" {
		s.srv.log.Warn("client holds what this control plane never had, and is sent nothing: it keeps what it has",
			"node", s.node.ID, "group", s.group.name, "resource", held, "position", g.position)
	}
	s.held = held
	s.srv.ledger.record(s, func(e *nodeEntry) {
		if e.Held == "" || held == "" {
			e.HeldSince = time.Now()
		}
		e.Held = held
	})
	return s.waits
}

// stranger is the first resource of a type that the client holds and the source of g never
// had, "" if there is none; not certain if it may hold none of that name.
func (s *session) stranger(t *typeSub, g *generation) (name string, certain bool) {
	next := g.types[t.typeURL]
	switch {
	case next == nil: // nobody publishes the type, so nobody can have had it from here
	case t.claimed != "" && next.version != t.claimed:
		return s.claim(t, g)
	case s.delta:
		for _, name := range slices.Sorted(maps.Keys(t.over)) {
			if next.versionOf(name) != t.over[name] && !g.had(t.typeURL, name) {
				return name, true
			}
		}
	}
	return "", true
}

// claim is stranger for a state-of-the-world type. Its names are what the client wants: of
// clusters, routes and endpoints it has learnt them from a control plane, so that it holds
// them; a listener may also be a name that somebody mistyped. Which of the two shows by the
// clusters, which a client that holds listeners asks for on the same stream; it is sent
// nothing until then.
func (s *session) claim(t *typeSub, g *generation) (name string, certain bool) {
	if len(t.names) == 0 && !g.known("", "") {
		return xds.Wildcard, true
	}
	for _, name := range slices.Sorted(maps.Keys(t.names)) {
		if g.had(t.typeURL, name) {
			continue
		}
		if t.typeURL != xds.TypeListener {
			return name, true
		}
		if clusters := s.types[xds.TypeCluster]; clusters == nil || !clusters.known {
			return name, false
		}
	}
	return "", true
}
