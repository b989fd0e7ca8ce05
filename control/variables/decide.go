package variables

import (
	"math"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// The decisions: pure functions from what is known about one variable and a request to
// the event that carries it out, or to the error the caller gets.

// stampLayout is the form of updated_at in metadata, always UTC.
const stampLayout = time.RFC3339Nano

// maxIdentifierBytes admits ids, which are a little longer than the name inside them.
const maxIdentifierBytes = outrigger.MaxNameBytes + 32

// author says who writes, how and when; its strings have been checked.
type author struct {
	actor, source, requestID string
	now                      time.Time
	optimizations            []string // ids of those the writer holds
}

// newAuthor checks the options. Unset source reads "API", unset actor the source.
func newAuthor(o *pb.WriteOptions, now time.Time) (author, error) {
	for _, f := range []struct{ name, value string }{
		{"options.actor", o.GetActor()}, {"options.source", o.GetSource()}, {"options.request_id", o.GetRequestId()},
	} {
		if len(f.value) > outrigger.MaxNameBytes {
			return author{}, outrigger.Errorf(outrigger.Invalid, "%s is %d bytes long, the limit is %d; shorten it", f.name, len(f.value), outrigger.MaxNameBytes)
		}
	}
	if n := len(o.GetOptimizationIds()); n > outrigger.MaxBatch {
		return author{}, errBatch("options.optimization_ids", n)
	}
	a := author{actor: o.GetActor(), source: o.GetSource(), requestID: o.GetRequestId(), now: now, optimizations: o.GetOptimizationIds()}
	if a.source == "" {
		a.source = "API"
	}
	if a.actor == "" {
		a.actor = a.source
	}
	return a, nil
}

func (a author) event() *pb.Event {
	return &pb.Event{Actor: a.actor, Source: a.source, RequestId: a.requestID, Schema: 1}
}

// stamps are the metadata every write carries; they win over what the caller sent.
func (a author) stamps(caller map[string]string) map[string]string {
	out := make(map[string]string, len(caller)+2)
	for k, v := range caller {
		out[k] = v
	}
	out["source"] = a.source
	out["updated_at"] = a.now.UTC().Format(stampLayout)
	return out
}

func checkIdentifier(s string) error {
	if len(s) > outrigger.MaxNameBytes && len(s) <= maxIdentifierBytes && utf8.ValidString(s) {
		return nil // can only be an id; one that does not exist is simply not found
	}
	return outrigger.CheckName("identifier", s)
}

// checkMetadata applies the limits to one map, called field in errors.
func checkMetadata(field string, m map[string]string) error {
	if len(m) > outrigger.MaxMetadataPairs {
		return outrigger.Errorf(outrigger.Exhausted, "%s has %d pairs, the limit is %d; remove some", field, len(m), outrigger.MaxMetadataPairs)
	}
	size := 0
	for k, v := range m {
		if k == "" {
			return outrigger.Errorf(outrigger.Invalid, "%s has an empty key", field)
		}
		size += len(k) + len(v)
	}
	if size > outrigger.MaxMetadataBytes {
		return outrigger.Errorf(outrigger.Exhausted, "%s is %d bytes, the limit is %d; store a reference instead", field, size, outrigger.MaxMetadataBytes)
	}
	return nil
}

// checkConsistency refuses a declared consistency that readers could not follow. Empty
// takes an earlier declaration back.
func checkConsistency(m map[string]string) error {
	if _, err := outrigger.ParseConsistency(m[outrigger.MetadataConsistency]); err != nil {
		return outrigger.Errorf(outrigger.Invalid, "metadata %s: %s", outrigger.MetadataConsistency, err)
	}
	return nil
}

// nextVersion is the version that follows before (nil: the first, counter 0). Its
// position is left to the log.
func nextVersion(o origin, before *pb.Version) (*pb.Version, error) {
	v := &pb.Version{Dot: &pb.Dot{Region: o.region, Incarnation: o.incarnation}, Context: before.GetContext()}
	if before == nil {
		return v, nil
	}
	if before.GetCounter() == math.MaxInt32 {
		return nil, outrigger.Errorf(outrigger.Exhausted, "the variable has used all %d versions; register another name", math.MaxInt32)
	}
	v.Counter = before.GetCounter() + 1
	return v, nil
}

// checked parses a value and applies the constraints.
func checked(t outrigger.Type, v *pb.Value, c outrigger.Constraints) (*pb.Value, error) {
	parsed, err := outrigger.ParseValue(t, v.GetJson(), v.GetBinary())
	if err != nil {
		return nil, err
	}
	if err := c.Check(parsed); err != nil {
		return nil, err
	}
	return &pb.Value{Type: string(parsed.Type), Json: parsed.JSON, Binary: parsed.Binary}, nil
}

// decideRegister returns the event that registers name with the given id. before is the
// version of its tombstone, or nil.
func decideRegister(o origin, before *pb.Version, id string, req *pb.RegisterRequest, a author) (*pb.Event, error) {
	c, err := outrigger.ParseConstraints(req.GetConstraintsJson())
	if err != nil {
		return nil, err
	}
	t := outrigger.Type(req.GetValue().GetType())
	value, err := checked(t, req.GetValue(), c)
	if err != nil {
		return nil, err
	}
	if err := c.ValidateFor(t); err != nil {
		return nil, err
	}
	if err := checkConsistency(req.GetMetadata()); err != nil {
		return nil, err
	}
	md := a.stamps(req.GetMetadata())
	md["created_by"] = a.actor
	if err := checkMetadata("metadata (with the stamps source, updated_at, created_by)", md); err != nil {
		return nil, err
	}
	version, err := nextVersion(o, before)
	if err != nil {
		return nil, err
	}
	e := a.event()
	e.Payload = &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{
		Id: id, Value: value, ConstraintsJson: c.JSON(), Metadata: md, Version: version,
	}}
	return e, nil
}

// setInput is one value for one variable.
type setInput struct {
	value        *pb.Value
	expected     *int32
	metadata     map[string]string
	rolledBackTo *int32
}

// decideSet returns the event that gives v, which is live, a new value.
func decideSet(o origin, v *variable, in setInput, a author) (*pb.Event, error) {
	optimization, err := a.holds(v)
	if err != nil {
		return nil, err
	}
	if in.expected != nil && *in.expected != v.counter() {
		return nil, outrigger.ErrVersionMismatch(v.counter())
	}
	declared := outrigger.Type(v.pb.GetValue().GetType())
	if t := outrigger.Type(in.value.GetType()); t != "" && t != declared {
		return nil, outrigger.Errorf(outrigger.Invalid, "variable %s has type %s, which a set cannot change to %q; delete and register it again", v.pb.GetKey().GetName(), declared, t)
	}
	value, err := checked(declared, in.value, v.constraints)
	if err != nil {
		return nil, err
	}
	if err := checkConsistency(in.metadata); err != nil {
		return nil, err
	}
	md := a.stamps(in.metadata)
	if err := checkMetadata("metadata (merged with what the variable has)", merged(v.pb.GetMetadata(), md)); err != nil {
		return nil, err
	}
	version, err := nextVersion(o, v.pb.GetVersion())
	if err != nil {
		return nil, err
	}
	e := a.event()
	e.Payload = &pb.Event_VariableSet{VariableSet: &pb.VariableSet{
		Value: value, Metadata: md, Version: version, RolledBackTo: in.rolledBackTo, OptimizationId: optimization,
	}}
	return e, nil
}

// decideDelete returns the event that deletes v, which is live.
func decideDelete(o origin, v *variable, a author) (*pb.Event, error) {
	if _, err := a.holds(v); err != nil {
		return nil, err
	}
	version, err := nextVersion(o, v.pb.GetVersion())
	if err != nil {
		return nil, err
	}
	e := a.event()
	e.Payload = &pb.Event_VariableDeleted{VariableDeleted: &pb.VariableDeleted{Version: version}}
	return e, nil
}
