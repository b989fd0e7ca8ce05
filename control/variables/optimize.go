package variables

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// StaleAfter is how long an optimisation lock refuses others after its holder last gave a
// sign: a start, a renewal, or a write under it. From then on it refuses nobody, and the
// sweep ends it.
const StaleAfter = 5 * time.Minute

// errLockedText is what bridge clients find in the error of a write that meets a lock.
const errLockedText = "variable_locked_for_optimization"

// Reasons of an OptimizationStopped event.
const (
	reasonStopped = "stopped" // by its holder
	reasonForced  = "forced"  // by somebody else
	reasonStale   = "stale"   // by the sweep
)

// stale reports whether a lock has lapsed at now; a missing one has.
func stale(o *pb.Optimization, now time.Time) bool {
	return o == nil || !now.Before(o.GetRenewedAt().AsTime().Add(StaleAfter))
}

// optimizationID names the lock that the event at a position took on a variable. n is the
// number in the variable's id, which no other variable of the session has, so an id tells
// which variable it was about.
func optimizationID(n int, position uint64) string {
	return "opt_" + strconv.Itoa(n) + "_" + strconv.FormatUint(position, 10)
}

// concerns reports whether an optimisation id is of a lock of v.
func concerns(id string, v *variable) bool {
	rest, ok := strings.CutPrefix(id, "opt_")
	n, _, found := strings.Cut(rest, "_")
	return ok && found && n == strconv.Itoa(idNumber(v.pb.GetId(), v.pb.GetKey().GetName()))
}

// holds returns the optimisation of v under which a writes, "" if there is none, or the
// error of a write that must not happen: somebody else holds the lock, or the writer's own
// has ended and it does not know yet.
func (a author) holds(v *variable) (string, error) {
	lock, name := v.pb.GetOptimization(), v.pb.GetKey().GetName()
	for _, id := range a.optimizations {
		if id == lock.GetId() {
			return id, nil
		}
		if concerns(id, v) {
			return "", outrigger.Errorf(outrigger.Locked, "optimization %s of %s has ended; start another one before writing under it", id, name)
		}
	}
	if stale(lock, a.now) {
		return "", nil
	}
	return "", errLocked(name, lock)
}

func errLocked(name string, lock *pb.Optimization) error {
	return outrigger.Errorf(outrigger.Locked, "%s: lock_held_by %q on %s since %s; write with its optimization id, stop it, or wait until it is stale, %v after its last sign",
		errLockedText, lock.GetOptimizer(), name, lock.GetStartedAt().AsTime().UTC().Format(time.RFC3339), StaleAfter)
}

// decideStart returns the event that locks v for an optimiser or renews its lock.
func decideStart(v *variable, req *pb.StartOptimizationRequest, a author) (*pb.Event, error) {
	if err := outrigger.CheckName("optimizer", req.GetOptimizer()); err != nil {
		return nil, err
	}
	if err := checkMetadata("config", req.GetConfig()); err != nil {
		return nil, err
	}
	var priority int64
	if text, given := req.GetConfig()["priority"]; given {
		var err error
		if priority, err = strconv.ParseInt(text, 10, 32); err != nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "config priority is %q; give a whole number of 32 bits", text)
		}
	}
	policy := req.GetConfig()["on_conflict"]
	if policy != "" && policy != "abort" && policy != "preempt" {
		return nil, outrigger.Errorf(outrigger.Invalid, "config on_conflict is %q; give abort or preempt", policy)
	}
	started := &pb.OptimizationStarted{Optimizer: req.GetOptimizer(), Config: req.GetConfig(), Priority: int32(priority)}
	switch lock := v.pb.GetOptimization(); {
	case stale(lock, a.now):
	case lock.GetOptimizer() == req.GetOptimizer():
		started.Renews = lock.GetId()
	case policy == "preempt" && int32(priority) > lock.GetPriority():
	default:
		return nil, errLocked(v.pb.GetKey().GetName(), lock)
	}
	e := a.event()
	e.Payload = &pb.Event_OptimizationStarted{OptimizationStarted: started}
	return e, nil
}

// decideStop returns the event that releases the lock of v. A stale lock is still one.
func decideStop(v *variable, force bool, a author) (*pb.Event, error) {
	lock, name := v.pb.GetOptimization(), v.pb.GetKey().GetName()
	if lock == nil {
		return nil, outrigger.Errorf(outrigger.NotFound, "optimization not found: %s is not being optimised", name)
	}
	id, err := a.holds(v)
	if err != nil && !force {
		return nil, err
	}
	stopped := &pb.OptimizationStopped{OptimizationId: lock.GetId(), Reason: reasonForced}
	if id != "" {
		stopped.Reason = reasonStopped
	}
	e := a.event()
	e.Payload = &pb.Event_OptimizationStopped{OptimizationStopped: stopped}
	return e, nil
}

// foldOptimization applies the events of a lock to a live variable. The counter stays,
// since the value does; the dot moves, so that every cache takes the new record.
func foldOptimization(o origin, old *variable, e *pb.Event, lock *pb.Optimization) *variable {
	next := &pb.Variable{
		Id: old.pb.GetId(), Key: old.pb.GetKey(), Value: old.pb.GetValue(), ConstraintsJson: old.pb.GetConstraintsJson(),
		Metadata: old.pb.GetMetadata(), Source: old.pb.GetSource(),
		Version:   fillVersion(o, e, &pb.Version{Counter: old.counter()}, old.pb.GetVersion()),
		CreatedAt: old.pb.GetCreatedAt(), UpdatedAt: old.pb.GetUpdatedAt(), Optimization: lock,
	}
	return &variable{pb: next, constraints: old.constraints, seq: e.GetSequence(), position: e.GetPosition()}
}

// started is the lock after an OptimizationStarted.
func started(old *variable, e *pb.Event, p *pb.OptimizationStarted) *pb.Optimization {
	lock := &pb.Optimization{
		Id:        optimizationID(idNumber(old.pb.GetId(), old.pb.GetKey().GetName()), e.GetPosition()),
		Optimizer: p.GetOptimizer(), Priority: p.GetPriority(), StartedAt: e.GetAt(), RenewedAt: e.GetAt(),
	}
	if before := old.pb.GetOptimization(); before != nil && before.GetId() == p.GetRenews() {
		lock.Id, lock.StartedAt = before.GetId(), before.GetStartedAt()
	}
	return lock
}

// optimizationAfter is the lock after a set: renewed when the set was part of it, ended
// when it was not, which only a stale one allows.
func optimizationAfter(lock *pb.Optimization, e *pb.Event, id string) *pb.Optimization {
	if lock == nil || lock.GetId() != id {
		return nil
	}
	return &pb.Optimization{
		Id: lock.GetId(), Optimizer: lock.GetOptimizer(), Priority: lock.GetPriority(),
		StartedAt: lock.GetStartedAt(), RenewedAt: e.GetAt(),
	}
}

// StartOptimization implements pb.VariablesServer.
func (s *Service) StartOptimization(ctx context.Context, req *pb.StartOptimizationRequest) (*pb.Variable, error) {
	start := s.opt.Now()
	c := change{s: s, tenant: req.GetTenant(), session: req.GetSession(), identifier: req.GetIdentifier(), options: req.GetOptions()}
	c.mine = func(e *pb.Event) bool { return e.GetOptimizationStarted() != nil }
	v, err := c.run(ctx, func(v *variable, _ view, a author) (*pb.Event, error) { return decideStart(v, req, a) })
	s.done(ctx, "start_optimization", start, err)
	if err != nil {
		return reply[pb.Variable](ctx, nil, err)
	}
	return v.pb, nil
}

// StopOptimization implements pb.VariablesServer.
func (s *Service) StopOptimization(ctx context.Context, req *pb.StopOptimizationRequest) (*pb.Variable, error) {
	start := s.opt.Now()
	c := change{s: s, tenant: req.GetTenant(), session: req.GetSession(), identifier: req.GetIdentifier(), options: req.GetOptions()}
	c.mine = func(e *pb.Event) bool { return e.GetOptimizationStopped() != nil }
	v, err := c.run(ctx, func(v *variable, _ view, a author) (*pb.Event, error) { return decideStop(v, req.GetForce(), a) })
	s.done(ctx, "stop_optimization", start, err)
	if err != nil {
		return reply[pb.Variable](ctx, nil, err)
	}
	return v.pb, nil
}

// release ends the locks of one scan that are stale still. A lock that was renewed or
// stopped meanwhile has moved its variable's sequence, which refuses the append.
func (s *Service) release(ctx context.Context, locked []*variable) {
	for _, v := range locked {
		id := sessionID{wire.Tenant(v.pb.GetKey().GetTenant()), v.pb.GetKey().GetSession()}
		_, err := s.commit(ctx, "", releasing(s, id, v))
		if err != nil && !outrigger.IsKind(err, outrigger.NotFound) && ctx.Err() == nil {
			s.opt.Logger.Warn("a stale optimisation lock was not released; the next sweep tries again", "variable", v.pb.GetKey().GetName(), "error", err)
		}
	}
}

// releasing decides anew on the variable as it is when the sweep gets to it.
func releasing(s *Service, id sessionID, locked *variable) decision {
	return func(floors) ([]eventlog.Write, error) {
		w, vars, err := s.see(id, locked.pb.GetId())
		if err != nil {
			return nil, err
		}
		v := vars[0]
		if v == nil || v.pb.GetOptimization().GetId() != locked.pb.GetOptimization().GetId() || !stale(v.pb.GetOptimization(), s.opt.Now()) {
			return nil, nil
		}
		e := author{actor: "outrigger", source: "sweep"}.event()
		e.Payload = &pb.Event_OptimizationStopped{OptimizationStopped: &pb.OptimizationStopped{
			OptimizationId: v.pb.GetOptimization().GetId(), Reason: reasonStale,
		}}
		return []eventlog.Write{w.guard(id), {Aggregate: varAggregate(keyOf(v)), Expect: int64(v.seq), Events: []*pb.Event{e}}}, nil
	}
}
