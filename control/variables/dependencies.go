package variables

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// maxDependencies bounds the edges of one session, and with them every walk.
const maxDependencies = 4096

// edge says that variable to depends on variable from.
type edge struct{ from, to string }

// dependencies are the edges of one session by kind. The graph has no cycle. It is never
// modified: each event replaces it.
type dependencies map[edge]string

// with returns d and one more edge.
func (d dependencies) with(e edge, kind string) dependencies {
	out := make(dependencies, len(d)+1)
	for k, v := range d {
		out[k] = v
	}
	out[e] = kind
	return out
}

// without returns d less the edges of a name that is gone; d itself if it has none.
func (d dependencies) without(name string) dependencies {
	touched := false
	for e := range d {
		touched = touched || e.from == name || e.to == name
	}
	if !touched {
		return d
	}
	out := make(dependencies, len(d))
	for e, kind := range d {
		if e.from != name && e.to != name {
			out[e] = kind
		}
	}
	return out
}

// dependents are the edges by origin, targets sorted.
func (d dependencies) dependents() map[string][]string {
	out := make(map[string][]string)
	for e := range d {
		out[e.from] = append(out[e.from], e.to)
	}
	for _, to := range out {
		slices.Sort(to)
	}
	return out
}

// path returns a way along the edges from one name to another, both included, or nil.
func (d dependencies) path(from, to string) []string {
	next, came := d.dependents(), map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		if queue[0] == to {
			var way []string
			for n := to; ; n = came[n] {
				way = append(way, n)
				if n == from {
					slices.Reverse(way)
					return way
				}
			}
		}
		for _, n := range next[queue[0]] {
			if _, seen := came[n]; !seen {
				came[n] = queue[0]
				queue = append(queue, n)
			}
		}
	}
	return nil
}

// order lists what depends on from, directly or not (everything with an edge when from is
// ""), each name after all that it depends on; among equals by name.
func (d dependencies) order(from string) []string {
	next := d.dependents()
	reached := make(map[string]int) // how many edges from reached names lead to it
	var starts []string
	if from != "" {
		starts = []string{from}
	} else {
		for e := range d {
			starts = append(starts, e.from)
		}
	}
	walked := make(map[string]bool)
	for len(starts) > 0 {
		n := starts[0]
		if starts = starts[1:]; walked[n] {
			continue
		}
		walked[n] = true
		for _, to := range next[n] {
			reached[to]++
			starts = append(starts, to)
		}
	}
	var ready, out []string
	for n := range walked {
		if reached[n] == 0 {
			ready = append(ready, n)
		}
	}
	slices.Sort(ready)
	for len(ready) > 0 {
		n := ready[0]
		ready = ready[1:]
		if n != from {
			out = append(out, n)
		}
		for _, to := range next[n] {
			if reached[to]--; reached[to] == 0 {
				i, _ := slices.BinarySearch(ready, to)
				ready = slices.Insert(ready, i, to)
			}
		}
	}
	return out
}

func (d dependencies) message(from string) *pb.Dependencies {
	out := &pb.Dependencies{Order: d.order(from)}
	for e, kind := range d {
		out.Dependencies = append(out.Dependencies, &pb.Dependency{From: e.from, To: e.to, Type: kind})
	}
	slices.SortFunc(out.Dependencies, func(a, b *pb.Dependency) int {
		return cmp.Or(cmp.Compare(a.GetFrom(), b.GetFrom()), cmp.Compare(a.GetTo(), b.GetTo()))
	})
	return out
}

// decideDependency returns the event that adds an edge, nil when it is there already.
func decideDependency(d dependencies, e edge, kind string, a author) (*pb.Event, error) {
	if kind == "" {
		kind = "data"
	}
	if kind != "data" && kind != "compute" {
		return nil, outrigger.Errorf(outrigger.Invalid, "dependency type is %q; give data or compute", kind)
	}
	if old, there := d[e]; there {
		if old == kind {
			return nil, nil
		}
		return nil, outrigger.Errorf(outrigger.Exists, "%s depends on %s already, by type %s", e.to, e.from, old)
	}
	if way := d.path(e.to, e.from); way != nil {
		return nil, outrigger.Errorf(outrigger.Locked, "would_create_cycle: %s", strings.Join(append(way, e.to), " → "))
	}
	if len(d) >= maxDependencies {
		return nil, outrigger.Errorf(outrigger.Exhausted, "the session has %d dependencies, the limit is %d; delete variables that are no longer used", len(d), maxDependencies)
	}
	out := a.event()
	out.Payload = &pb.Event_DependencyAdded{DependencyAdded: &pb.DependencyAdded{
		Dependency: &pb.Dependency{From: e.from, To: e.to, Type: kind},
	}}
	return out, nil
}

func applyDependency(st *state, e *pb.Event, p *pb.Dependency) {
	id, ok := parseSession(e.GetAggregate())
	s := st.sessions[id]
	if !ok || s == nil {
		return
	}
	s.seq = e.GetSequence()
	s.lastAt = e.GetAt().AsTime()
	next := edge{p.GetFrom(), p.GetTo()}
	for _, name := range []string{next.from, next.to} {
		if v := s.vars[name]; v == nil || v.deleted {
			return
		}
	}
	if s.deps.path(next.to, next.from) == nil { // an alien event might close a cycle
		s.deps = s.deps.with(next, p.GetType())
	}
}

// AddDependency implements pb.VariablesServer. It is decided on the session's sequence, so
// that of two edges that close a cycle together one is refused.
func (s *Service) AddDependency(ctx context.Context, req *pb.AddDependencyRequest) (*pb.Dependencies, error) {
	start := s.opt.Now()
	out, err := s.addDependency(ctx, req)
	s.done(ctx, "add_dependency", start, err)
	return reply(ctx, out, err)
}

func (s *Service) addDependency(ctx context.Context, req *pb.AddDependencyRequest) (*pb.Dependencies, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	d := req.GetDependency()
	identifiers := []string{d.GetFrom(), d.GetTo()}
	for _, x := range identifiers {
		if err := checkIdentifier(x); err != nil {
			return nil, err
		}
	}
	a, err := newAuthor(req.GetOptions(), s.opt.Now())
	if err != nil {
		return nil, err
	}
	leave, err := s.gates.enter(ctx, sessionAggregate(id))
	if err != nil {
		return nil, err
	}
	defer leave()
	app, err := s.commit(ctx, scoped(id, a.requestID), func(floors) ([]eventlog.Write, error) {
		w, vars, err := s.see(id, identifiers...)
		if err != nil {
			return nil, missing(id, identifiers[0], req.GetOptions())
		}
		writes := []eventlog.Write{w.guard(id)}
		for i, v := range vars {
			if v == nil {
				return nil, outrigger.ErrVariableNotFound(identifiers[i])
			}
			if i == 0 || v != vars[0] {
				writes = append(writes, eventlog.Write{Aggregate: varAggregate(keyOf(v)), Expect: int64(v.seq)})
			}
		}
		e, err := decideDependency(w.deps, edge{keyOf(vars[0]).Name, keyOf(vars[1]).Name}, d.GetType(), a)
		if e == nil || err != nil {
			return nil, err
		}
		writes[0].Events = []*pb.Event{e}
		return writes, nil
	})
	if err != nil {
		return nil, err
	}
	if app.Duplicate && (len(app.Events) != 1 || app.Events[0].GetDependencyAdded() == nil) {
		return nil, errReused(a.requestID)
	}
	return s.listDependencies(&pb.ListDependenciesRequest{Tenant: req.GetTenant(), Session: req.GetSession()})
}

// ListDependencies implements pb.VariablesServer.
func (s *Service) ListDependencies(ctx context.Context, req *pb.ListDependenciesRequest) (*pb.Dependencies, error) {
	out, err := s.listDependencies(req)
	return reply(ctx, out, err)
}

func (s *Service) listDependencies(req *pb.ListDependenciesRequest) (*pb.Dependencies, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	if req.GetFrom() == "" {
		w, _, err := s.see(id)
		return w.deps.message(""), err
	}
	if err := checkIdentifier(req.GetFrom()); err != nil {
		return nil, err
	}
	w, vars, err := s.see(id, req.GetFrom())
	if err != nil {
		return nil, err
	}
	if vars[0] == nil {
		return nil, outrigger.ErrVariableNotFound(req.GetFrom())
	}
	return w.deps.message(keyOf(vars[0]).Name), nil
}
