package variables

import (
	"context"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// BatchSet implements pb.VariablesServer. Whatever is valid goes into one append; with
// atomic set, anything invalid means that nothing is written. Errors of single items
// come back in the answer, by identifier as asked.
func (s *Service) BatchSet(ctx context.Context, req *pb.BatchSetRequest) (*pb.BatchSetResponse, error) {
	start := s.opt.Now()
	out, err := s.batchSet(ctx, req)
	s.done(ctx, "batch_set", start, err)
	return reply(ctx, out, err)
}

func (s *Service) batchSet(ctx context.Context, req *pb.BatchSetRequest) (*pb.BatchSetResponse, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	a, err := newAuthor(req.GetOptions(), s.opt.Now())
	if err != nil {
		return nil, err
	}
	b := batch{s: s, id: id, req: req, author: a}
	if err := b.check(); err != nil {
		return nil, err
	}
	aggregates := make([]string, len(b.identifiers))
	for i, x := range b.identifiers {
		aggregates[i] = varAggregate(s.resolve(id, x))
	}
	leave, err := s.gates.enter(ctx, aggregates...)
	if err != nil {
		return nil, err
	}
	defer leave()
	app, err := s.commit(ctx, scoped(id, a.requestID), b.decide)
	if err != nil {
		return nil, err
	}
	if app.Duplicate {
		return b.repeated(ctx, app)
	}
	return b.answer(ctx, app)
}

// batch is one BatchSet call on its way.
type batch struct {
	s           *Service
	id          sessionID
	req         *pb.BatchSetRequest
	author      author
	identifiers []string

	// Of the last decision.
	before []*variable // by item
	errors map[string]*pb.ItemError
}

func (b *batch) check() error {
	items := b.req.GetItems()
	if len(items) == 0 {
		return outrigger.Errorf(outrigger.Invalid, "items is empty; give 1 to %d", outrigger.MaxBatch)
	}
	if len(items) > outrigger.MaxBatch {
		return errBatch("items", len(items))
	}
	for _, it := range items {
		if err := checkIdentifier(it.GetIdentifier()); err != nil {
			return err
		}
		if it.ExpectedVersion != nil && *it.ExpectedVersion < 0 {
			return errExpected(*it.ExpectedVersion)
		}
		b.identifiers = append(b.identifiers, it.GetIdentifier())
	}
	return nil
}

func (b *batch) decide(floors) ([]eventlog.Write, error) {
	v, vars, err := b.s.see(b.id, b.identifiers...)
	if err != nil {
		return nil, missing(b.id, b.identifiers[0], b.req.GetOptions())
	}
	if err := b.distinct(vars); err != nil {
		return nil, err
	}
	b.before, b.errors = vars, make(map[string]*pb.ItemError)
	writes := []eventlog.Write{v.guard(b.id)}
	for i, it := range b.req.GetItems() {
		in := setInput{value: it.GetValue(), expected: it.ExpectedVersion, metadata: b.req.GetMetadata()}
		e, err := decideSet(b.s.origin, vars[i], in, b.author)
		if err != nil {
			b.errors[it.GetIdentifier()] = itemError(err)
			continue
		}
		writes = append(writes, eventlog.Write{
			Aggregate: varAggregate(keyOf(vars[i])), Expect: int64(vars[i].seq), Events: []*pb.Event{e},
		})
	}
	if len(writes) == 1 || b.req.GetAtomic() && len(b.errors) > 0 {
		return nil, nil
	}
	return writes, nil
}

// distinct refuses unknown identifiers and two that mean the same variable.
func (b *batch) distinct(vars []*variable) error {
	seen := make(map[string]string, len(vars))
	for i, v := range vars {
		if v == nil {
			return outrigger.ErrVariableNotFound(b.identifiers[i])
		}
		if first, twice := seen[v.pb.GetId()]; twice {
			return outrigger.Errorf(outrigger.Invalid, "items %q and %q are the same variable; name it once", first, b.identifiers[i])
		}
		seen[v.pb.GetId()] = b.identifiers[i]
	}
	return nil
}

func itemError(err error) *pb.ItemError {
	out := &pb.ItemError{Kind: outrigger.KindOf(err).String(), Message: err.Error()}
	if e, ok := err.(*outrigger.Error); ok {
		out.CurrentVersion = e.Current
	}
	return out
}

// answer builds the response from the stored events, which are in item order.
func (b *batch) answer(ctx context.Context, app eventlog.Appended) (*pb.BatchSetResponse, error) {
	out := &pb.BatchSetResponse{Variables: make(map[string]*pb.Variable, len(app.Events)), Errors: b.errors}
	events := app.Events
	for i, x := range b.identifiers {
		if len(events) == 0 || events[0].GetAggregate() != varAggregate(keyOf(b.before[i])) {
			continue
		}
		v, err := b.s.after(ctx, b.before[i], events[0], false)
		if err != nil {
			return nil, err
		}
		out.Variables[x] = v.pb
		events = events[1:]
	}
	return out, nil
}

// repeated answers a request id that was seen before: what was written then, and for
// the other items that they were not.
func (b *batch) repeated(ctx context.Context, app eventlog.Appended) (*pb.BatchSetResponse, error) {
	written := make(map[string]*pb.Variable, 2*len(app.Events))
	for _, e := range app.Events {
		if e.GetVariableSet() == nil {
			return nil, errReused(b.author.requestID)
		}
		v, err := b.s.after(ctx, nil, e, true)
		if err != nil {
			return nil, err
		}
		written[v.pb.GetKey().GetName()], written[v.pb.GetId()] = v.pb, v.pb
	}
	out := &pb.BatchSetResponse{Variables: make(map[string]*pb.Variable), Errors: make(map[string]*pb.ItemError)}
	for _, x := range b.identifiers {
		if v := written[x]; v != nil {
			out.Variables[x] = v
			continue
		}
		out.Errors[x] = &pb.ItemError{Kind: outrigger.Invalid.String(), Message: "the item was refused when this request_id was first used; send it with a new one"}
	}
	if len(out.Variables) == 0 {
		return nil, errReused(b.author.requestID)
	}
	return out, nil
}
