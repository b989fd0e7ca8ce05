package variables

import (
	"context"
	"slices"
	"strconv"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// defaultHistory is the number of versions returned when no limit is given.
const defaultHistory = 50

// History implements pb.VariablesServer: the variable's versions in the present life of
// its session, newest first, read from the log. A name that was deleted still has one,
// as long as its tombstone is kept.
func (s *Service) History(ctx context.Context, req *pb.HistoryRequest) (*pb.HistoryResponse, error) {
	out, err := s.history(ctx, req)
	return reply(ctx, out, err)
}

func (s *Service) history(ctx context.Context, req *pb.HistoryRequest) (*pb.HistoryResponse, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	if err := checkIdentifier(req.GetIdentifier()); err != nil {
		return nil, err
	}
	limit, err := checkLimit(req.GetLimit(), defaultHistory, outrigger.MaxHistory)
	if err != nil {
		return nil, err
	}
	v, life, err := s.known(id, req.GetIdentifier())
	if err != nil {
		return nil, err
	}
	// Sequences are gapless, so the last versions are a range of them, which is longer than
	// limit by the optimisations in it.
	for window := uint64(limit); ; window *= 4 {
		from := v.seq - min(v.seq, window) + 1
		out, err := s.versions(ctx, v, from, life)
		if err != nil {
			return nil, err
		}
		if n := len(out.Entries); n >= limit || from == 1 {
			out.Entries = out.Entries[:min(n, limit)]
			return out, nil
		}
	}
}

// versions reads the versions of v from a sequence on, newest first.
func (s *Service) versions(ctx context.Context, v *variable, from, life uint64) (*pb.HistoryResponse, error) {
	out := &pb.HistoryResponse{}
	var before *pb.Version
	for e, err := range s.log.Read(ctx, varAggregate(keyOf(v)), from) {
		if err != nil {
			return nil, err
		}
		if e.GetSequence() > v.seq {
			break // newer than the projection the call was decided on
		}
		if e.GetPosition() <= life {
			continue
		}
		if entry := s.historyEntry(e, before); entry != nil {
			before = entry.GetVersion()
			out.Entries = append(out.Entries, entry)
		}
	}
	slices.Reverse(out.Entries)
	return out, nil
}

// known finds a live variable, or the tombstone of a name, and the position its session
// was created at.
func (s *Service) known(id sessionID, identifier string) (*variable, uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sess := s.state.sessions[id]
	if sess == nil {
		return nil, 0, outrigger.ErrSessionNotFound(id.name)
	}
	v := sess.lookup(identifier)
	if v == nil {
		v = sess.vars[identifier]
	}
	if v == nil {
		return nil, 0, outrigger.ErrVariableNotFound(identifier)
	}
	return v, sess.createdPos, nil
}

func keyOf(v *variable) outrigger.Key {
	k := v.pb.GetKey()
	return outrigger.Key{Tenant: k.GetTenant(), Session: k.GetSession(), Name: k.GetName()}
}

// historyEntry returns nil for an event that is not a version.
func (s *Service) historyEntry(e *pb.Event, before *pb.Version) *pb.HistoryEntry {
	version := eventVersion(e)
	if version == nil {
		return nil
	}
	out := &pb.HistoryEntry{Version: fillVersion(s.origin, e, version, before), At: e.GetAt(), Actor: e.GetActor()}
	switch p := e.GetPayload().(type) {
	case *pb.Event_VariableRegistered:
		out.Value, out.Metadata = p.VariableRegistered.GetValue(), p.VariableRegistered.GetMetadata()
	case *pb.Event_VariableSet:
		out.Value, out.Metadata = p.VariableSet.GetValue(), p.VariableSet.GetMetadata()
		if p.VariableSet.RolledBackTo != nil {
			out.Metadata = merged(out.Metadata, map[string]string{"rolled_back_to": strconv.Itoa(int(p.VariableSet.GetRolledBackTo()))})
		}
	case *pb.Event_VariableDeleted:
		out.Deleted = true
	}
	return out
}

// Rollback implements pb.VariablesServer: the value of an earlier version of the present
// life of the session becomes a new version, if it still satisfies type and constraints.
func (s *Service) Rollback(ctx context.Context, req *pb.RollbackRequest) (*pb.Variable, error) {
	start := s.opt.Now()
	out, err := s.rollback(ctx, req)
	s.done(ctx, "rollback", start, err)
	return reply(ctx, out, err)
}

func (s *Service) rollback(ctx context.Context, req *pb.RollbackRequest) (*pb.Variable, error) {
	target := req.GetTargetVersion()
	if target < 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "target_version is %d; versions start at 0", target)
	}
	c := change{s: s, tenant: req.GetTenant(), session: req.GetSession(), identifier: req.GetIdentifier(), options: req.GetOptions()}
	c.mine = func(e *pb.Event) bool {
		return e.GetVariableSet() != nil && e.GetVariableSet().RolledBackTo != nil && e.GetVariableSet().GetRolledBackTo() == target
	}
	v, err := c.run(ctx, func(v *variable, w view, a author) (*pb.Event, error) {
		value, err := s.valueAt(ctx, v, w.life, target)
		if err != nil {
			return nil, err
		}
		return decideSet(s.origin, v, setInput{value: value, rolledBackTo: &target}, a)
	})
	if err != nil {
		return nil, err
	}
	return v.pb, nil
}

// valueAt reads the value a variable had at a version of the session's present life.
func (s *Service) valueAt(ctx context.Context, v *variable, life uint64, target int32) (*pb.Value, error) {
	name := v.pb.GetKey().GetName()
	if target > v.counter() {
		return nil, errNoVersion(name, target, v.counter())
	}
	// Counters and sequences grow in step, so the version is where it is expected unless
	// events of another origin are among them; then a scan finds it.
	e, err := s.find(ctx, v, uint64(target)+1, true, life, target)
	if e == nil && err == nil {
		e, err = s.find(ctx, v, 1, false, life, target)
	}
	if err != nil {
		return nil, err
	}
	switch p := e.GetPayload().(type) {
	case *pb.Event_VariableRegistered:
		return p.VariableRegistered.GetValue(), nil
	case *pb.Event_VariableSet:
		return p.VariableSet.GetValue(), nil
	case *pb.Event_VariableDeleted:
		return nil, outrigger.Errorf(outrigger.Invalid, "version %d of %s is its deletion, which has no value; choose another version", target, name)
	}
	return nil, errNoVersion(name, target, v.counter())
}

func errNoVersion(name string, target, newest int32) error {
	return outrigger.Errorf(outrigger.NotFound, "version not found: %s has no version %d in this session (the newest is %d)", name, target, newest)
}

// find returns the event of one version among the events from a sequence on (only that
// one event when just is set), or nil.
func (s *Service) find(ctx context.Context, v *variable, from uint64, just bool, life uint64, target int32) (*pb.Event, error) {
	for e, err := range s.log.Read(ctx, varAggregate(keyOf(v)), from) {
		if err != nil {
			return nil, err
		}
		version := eventVersion(e)
		if e.GetPosition() > life && version != nil && version.GetCounter() == target {
			return e, nil
		}
		if just || e.GetSequence() >= v.seq {
			break
		}
	}
	return nil, nil
}
