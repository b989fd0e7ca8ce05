package variables

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// smallVariable is the largest encoded variable that rides along in a change.
const smallVariable = 4 << 10

// effect is what one event did, for everything that is derived from the state.
type effect struct {
	change  *pb.Change // nil: the event changed no variable and no session
	session sessionID
	next    *variable   // the variable after the event; nil for session events
	removed []*variable // live variables a session deletion took with it
	event   *pb.Event
}

// apply folds one event into st. It is deterministic and total: an event that makes no
// sense for the state (a set of an unknown variable, a newer payload, a broken name)
// only moves the position. It reads no clock and does no I/O.
func apply(st *state, e *pb.Event) effect {
	st.applied = e.GetPosition()
	eff := effect{event: e}
	switch p := e.GetPayload().(type) {
	case *pb.Event_SessionCreated:
		applySessionCreated(st, e, p.SessionCreated, &eff)
	case *pb.Event_SessionDeleted:
		applySessionDeleted(st, e, p.SessionDeleted, &eff)
	case *pb.Event_DependencyAdded:
		applyDependency(st, e, p.DependencyAdded.GetDependency())
	case *pb.Event_VariableRegistered, *pb.Event_VariableSet, *pb.Event_VariableDeleted,
		*pb.Event_OptimizationStarted, *pb.Event_OptimizationStopped:
		applyVariable(st, e, &eff)
	}
	if eff.change != nil {
		eff.change.CommittedUnixNano = uint64(e.GetAt().AsTime().UnixNano())
	}
	return eff
}

func applySessionCreated(st *state, e *pb.Event, p *pb.SessionCreated, eff *effect) {
	id, ok := parseSession(e.GetAggregate())
	if !ok {
		return
	}
	if old := st.sessions[id]; old != nil {
		old.seq = e.GetSequence()
		return
	}
	at := e.GetAt().AsTime()
	st.sessions[id] = &session{
		id: id, ttl: p.GetTtl().AsDuration(), metadata: p.GetMetadata(),
		createdAt: at, createdPos: e.GetPosition(), seq: e.GetSequence(),
		vars: make(map[string]*variable), ids: make(map[string]string),
		lastPos: e.GetPosition(), lastAt: at,
	}
	eff.session = id
	eff.change = sessionChange(st.origin, e, id, 0, false)
}

func applySessionDeleted(st *state, e *pb.Event, p *pb.SessionDeleted, eff *effect) {
	id, ok := parseSession(e.GetAggregate())
	if !ok {
		return
	}
	s := st.sessions[id]
	if s == nil {
		return
	}
	s.seq = e.GetSequence()
	if p.GetReason() == reasonExpired && e.GetAt().AsTime().Before(s.lastAt.Add(s.effectiveTTL())) {
		return // a write reached the log between the sweep's look and its event
	}
	for _, name := range slices.Sorted(maps.Keys(s.vars)) {
		if v := s.vars[name]; !v.deleted {
			eff.removed = append(eff.removed, v)
			delete(st.locked, keyOf(v))
		}
	}
	st.live -= s.live
	delete(st.sessions, id)
	eff.session = id
	eff.change = sessionChange(st.origin, e, id, s.lastPos, true)
}

func sessionChange(o origin, e *pb.Event, id sessionID, previous uint64, deleted bool) *pb.Change {
	return &pb.Change{
		Scope: pb.Change_SESSION, Key: &pb.Key{Tenant: id.tenant, Session: id.name},
		Position: e.GetPosition(), KeyPrevious: previous, Deleted: deleted,
		Version: fillVersion(o, e, &pb.Version{}, nil),
	}
}

func applyVariable(st *state, e *pb.Event, eff *effect) {
	key, ok := parseVar(e.GetAggregate())
	if !ok {
		return
	}
	s := st.sessions[sessionID{key.Tenant, key.Session}]
	if s == nil {
		return
	}
	old := s.vars[key.Name]
	next := fold(st.origin, key, old, e)
	if next != nil && !next.deleted && !s.mayUse(next.pb.GetId(), key.Name) {
		next = nil
	}
	if next == nil {
		if old != nil { // keep up with the aggregate, or every later write would conflict
			skipped := *old
			skipped.seq = e.GetSequence()
			s.vars[key.Name] = &skipped
			st.noteLock(&skipped)
		}
		return
	}
	previous := s.previous(key.Name)
	st.live += s.put(key.Name, old, next, st.limits.graves)
	st.noteLock(next)
	s.lastPos = e.GetPosition()
	s.lastAt = e.GetAt().AsTime()
	eff.session, eff.next = s.id, next
	eff.change = &pb.Change{
		Key: next.pb.GetKey(), Position: e.GetPosition(), KeyPrevious: previous,
		Deleted: next.deleted, Version: next.pb.GetVersion(),
	}
	if !next.deleted && proto.Size(next.pb) <= smallVariable {
		eff.change.Variable = next.pb
	}
}

// mayUse reports whether an id is free for a name: ids are unique among live variables.
// The service never appends anything else; an alien event might.
func (s *session) mayUse(id, name string) bool {
	owner, taken := s.ids[id]
	return !taken || owner == name
}

// put replaces a variable, keeps the indexes and returns the change in live variables.
func (s *session) put(name string, old, next *variable, graves int) int {
	wasLive := old != nil && !old.deleted
	if wasLive {
		delete(s.ids, old.pb.GetId())
	}
	s.vars[name] = next
	if !next.deleted {
		s.ids[next.pb.GetId()] = name
		s.lastID = max(s.lastID, idNumber(next.pb.GetId(), name))
		if !wasLive {
			s.live++
			return 1
		}
		return 0
	}
	s.bury(grave{name, next.position}, graves)
	s.deps = s.deps.without(name)
	s.live--
	return -1
}

// bury keeps at most limit tombstones. A grave whose name was registered again, or
// deleted again later, is empty and only leaves the list.
func (s *session) bury(g grave, limit int) {
	s.graves = append(s.graves, g)
	for len(s.graves) > limit {
		g, s.graves = s.graves[0], s.graves[1:]
		if v := s.vars[g.name]; v != nil && v.deleted && v.position == g.position {
			delete(s.vars, g.name)
			s.floor = max(s.floor, g.position)
		}
	}
}

// fold applies a variable event to one variable (nil = never registered in this life of
// the session) and returns the next one, or nil when the event makes no sense for it.
func fold(o origin, key outrigger.Key, old *variable, e *pb.Event) *variable {
	switch p := e.GetPayload().(type) {
	case *pb.Event_VariableRegistered:
		if old != nil && !old.deleted {
			return nil
		}
		return foldRegistered(o, key, old, e, p.VariableRegistered)
	case *pb.Event_VariableSet:
		if old == nil || old.deleted {
			return nil
		}
		return foldSet(o, old, e, p.VariableSet)
	case *pb.Event_OptimizationStarted:
		if old == nil || old.deleted {
			return nil
		}
		return foldOptimization(o, old, e, started(old, e, p.OptimizationStarted))
	case *pb.Event_OptimizationStopped:
		if old == nil || old.deleted || old.pb.GetOptimization().GetId() != p.OptimizationStopped.GetOptimizationId() {
			return nil
		}
		return foldOptimization(o, old, e, nil)
	case *pb.Event_VariableDeleted:
		if old == nil || old.deleted {
			return nil
		}
		return &variable{
			pb: &pb.Variable{
				Id: old.pb.GetId(), Key: old.pb.GetKey(),
				Version: fillVersion(o, e, p.VariableDeleted.GetVersion(), old.pb.GetVersion()),
			},
			seq: e.GetSequence(), position: e.GetPosition(), deleted: true,
		}
	}
	return nil
}

func foldRegistered(o origin, key outrigger.Key, old *variable, e *pb.Event, p *pb.VariableRegistered) *variable {
	var before *pb.Version
	if old != nil {
		before = old.pb.GetVersion()
	}
	c, err := outrigger.ParseConstraints(p.GetConstraintsJson())
	if err != nil {
		c = outrigger.Constraints{} // checked before it was appended; an alien event sets no limit
	}
	return &variable{
		pb: &pb.Variable{
			Id: p.GetId(), Key: wire.KeyPB(key), Value: p.GetValue(), ConstraintsJson: p.GetConstraintsJson(),
			Metadata: p.GetMetadata(), Source: e.GetSource(), Version: fillVersion(o, e, p.GetVersion(), before),
			CreatedAt: e.GetAt(), UpdatedAt: e.GetAt(),
		},
		constraints: c, seq: e.GetSequence(), position: e.GetPosition(),
	}
}

func foldSet(o origin, old *variable, e *pb.Event, p *pb.VariableSet) *variable {
	return &variable{
		pb: &pb.Variable{
			Id: old.pb.GetId(), Key: old.pb.GetKey(), Value: p.GetValue(), ConstraintsJson: old.pb.GetConstraintsJson(),
			Metadata: merged(old.pb.GetMetadata(), p.GetMetadata()), Source: e.GetSource(),
			Version:   fillVersion(o, e, p.GetVersion(), old.pb.GetVersion()),
			CreatedAt: old.pb.GetCreatedAt(), UpdatedAt: e.GetAt(),
			Optimization: optimizationAfter(old.pb.GetOptimization(), e, p.GetOptimizationId()),
		},
		constraints: old.constraints, seq: e.GetSequence(), position: e.GetPosition(),
	}
}

// merged returns a ∪ b with b winning; it may return a itself.
func merged(a, b map[string]string) map[string]string {
	if len(b) == 0 {
		return a
	}
	out := make(map[string]string, len(a)+len(b))
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}

// fillVersion completes an event's version: what the writer could not know yet (its
// position and time) comes from the envelope, and the context is the union of what the
// event and the variable had, plus the dot.
func fillVersion(o origin, e *pb.Event, v, before *pb.Version) *pb.Version {
	dot := &pb.Dot{
		Region: v.GetDot().GetRegion(), Incarnation: v.GetDot().GetIncarnation(), Position: v.GetDot().GetPosition(),
	}
	if dot.Region == "" {
		dot.Region = o.region
	}
	if dot.Incarnation == 0 {
		dot.Incarnation = o.incarnation
	}
	if dot.Position == 0 {
		dot.Position = e.GetPosition()
	}
	out := &pb.Version{Counter: v.GetCounter(), Dot: dot, Hlc: v.GetHlc()}
	if out.Hlc == 0 {
		out.Hlc = e.GetHlc()
	}
	out.Context = mergeContext(before.GetContext(), v.GetContext(), &pb.ContextEntry{Region: dot.Region, Position: dot.Position})
	return out
}

// mergeContext is the component-wise maximum, sorted by region.
func mergeContext(a, b []*pb.ContextEntry, own *pb.ContextEntry) []*pb.ContextEntry {
	if len(a) <= 1 && len(b) <= 1 && onlyRegion(a, own) && onlyRegion(b, own) { // one region: the usual case
		for _, c := range [][]*pb.ContextEntry{a, b} {
			if len(c) == 1 {
				own.Position = max(own.Position, c[0].GetPosition())
			}
		}
		return []*pb.ContextEntry{own}
	}
	high := map[string]uint64{own.GetRegion(): own.GetPosition()}
	for _, entries := range [][]*pb.ContextEntry{a, b} {
		for _, c := range entries {
			high[c.GetRegion()] = max(high[c.GetRegion()], c.GetPosition())
		}
	}
	out := make([]*pb.ContextEntry, 0, len(high))
	for _, r := range slices.Sorted(maps.Keys(high)) {
		out = append(out, &pb.ContextEntry{Region: r, Position: high[r]})
	}
	return out
}

func onlyRegion(c []*pb.ContextEntry, own *pb.ContextEntry) bool {
	return len(c) == 0 || c[0].GetRegion() == own.GetRegion()
}

// variableID is the id of the n-th registration of a session.
func variableID(name string, n int) string { return "var_" + name + "_" + strconv.Itoa(n) }

// idNumber reads n from an id of name; 0 when the id has another form.
func idNumber(id, name string) int {
	digits, ok := strings.CutPrefix(id, "var_"+name+"_")
	n, err := strconv.Atoi(digits)
	if !ok || err != nil || n < 0 {
		return 0
	}
	return n
}
