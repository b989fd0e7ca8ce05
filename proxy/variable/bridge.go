package variable

import (
	"context"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Bridge is the snakepit bridge service. AddDependency, StartOptimization and
// StopOptimization answer UNIMPLEMENTED, as the published v0.4.3 server does.
type Bridge struct {
	snakepit.UnimplementedBridgeServiceServer
	core
}

// NewBridge returns the service; register it with snakepit.RegisterBridgeServiceServer.
func NewBridge(o Options) *Bridge { return &Bridge{core: newCore(o)} }

// caller is what a call's metadata says.
type caller struct {
	tenant      string
	consistency outrigger.Consistency
}

func callerOf(ctx context.Context) (caller, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	first := func(key string) string {
		if v := md.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	c, err := outrigger.ParseConsistency(first(outrigger.HeaderConsistency))
	return caller{tenant: wire.Tenant(first(outrigger.HeaderTenant)), consistency: c}, err
}

// writeOptions records bridge writes as the bridge does.
func (b *Bridge) writeOptions() *pb.WriteOptions {
	return &pb.WriteOptions{Actor: "bridge", Source: sourcePython, AutoCreateSession: b.o.AutoCreateSessions}
}

// Ping answers with the same message.
func (b *Bridge) Ping(_ context.Context, r *snakepit.PingRequest) (*snakepit.PingResponse, error) {
	return &snakepit.PingResponse{Message: r.Message, ServerTime: timestamppb.Now()}, nil
}

// InitializeSession creates a session; one that exists is ALREADY_EXISTS.
func (b *Bridge) InitializeSession(ctx context.Context, r *snakepit.InitializeSessionRequest) (*snakepit.InitializeSessionResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	if _, err := b.o.Authority.CreateSession(ctx, &pb.CreateSessionRequest{Tenant: c.tenant, Id: r.SessionId, Metadata: r.Metadata}); err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.InitializeSessionResponse{Success: true}, nil
}

// CleanupSession removes a session; one that is gone already is a success too.
func (b *Bridge) CleanupSession(ctx context.Context, r *snakepit.CleanupSessionRequest) (*snakepit.CleanupSessionResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out, err := b.o.Authority.DeleteSession(ctx, &pb.GetSessionRequest{Tenant: c.tenant, Id: r.SessionId})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.CleanupSessionResponse{Success: true, ResourcesCleaned: out.VariablesRemoved}, nil
}

// GetSession describes a session.
func (b *Bridge) GetSession(ctx context.Context, r *snakepit.GetSessionRequest) (*snakepit.GetSessionResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	s, err := b.o.Authority.GetSession(ctx, &pb.GetSessionRequest{Tenant: c.tenant, Id: r.SessionId})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.GetSessionResponse{SessionId: s.Id, Metadata: s.Metadata, CreatedAt: s.CreatedAt, VariableCount: s.VariableCount}, nil
}

// Heartbeat keeps a session alive.
func (b *Bridge) Heartbeat(ctx context.Context, r *snakepit.HeartbeatRequest) (*snakepit.HeartbeatResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out, err := b.o.Authority.TouchSessions(ctx, &pb.TouchSessionsRequest{Tenant: c.tenant, Ids: []string{r.SessionId}})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.HeartbeatResponse{ServerTime: timestamppb.Now(), SessionValid: len(out.Unknown) == 0}, nil
}

// RegisterVariable declares a variable.
func (b *Bridge) RegisterVariable(ctx context.Context, r *snakepit.RegisterVariableRequest) (*snakepit.RegisterVariableResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	v, err := valueFromAny(r.InitialValue, r.Type, r.InitialBinaryValue)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out, err := b.o.Authority.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Tenant: c.tenant, Session: r.SessionId, Name: r.Name},
		Value: v, ConstraintsJson: r.ConstraintsJson, Metadata: r.Metadata, Options: b.writeOptions()})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.RegisterVariableResponse{Success: true, VariableId: out.Id}, nil
}

// GetVariable reads one variable; bypass_cache reads at the authority.
func (b *Bridge) GetVariable(ctx context.Context, r *snakepit.GetVariableRequest) (*snakepit.GetVariableResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	if r.BypassCache {
		c.consistency = outrigger.Consistency{Level: outrigger.Strong}
	}
	a, err := b.read(ctx, c.tenant, r.SessionId, r.VariableIdentifier, c.consistency)
	setHeader(ctx, answerHeaders(a))
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.GetVariableResponse{Variable: variableToBridge(a.Variable), FromCache: a.Tier != outrigger.TierOrigin}, nil
}

// setHeader adds response metadata; it fails only when the call is over already.
func setHeader(ctx context.Context, md metadata.MD) {
	if err := grpc.SetHeader(ctx, md); err != nil {
		return
	}
}

// GetVariables reads many; what does not exist is listed, not an error.
func (b *Bridge) GetVariables(ctx context.Context, r *snakepit.BatchGetVariablesRequest) (*snakepit.BatchGetVariablesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	if n := len(r.VariableIdentifiers); n > outrigger.MaxBatch {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Exhausted, "variable_identifiers has %d entries, the limit is %d; split the call", n, outrigger.MaxBatch))
	}
	if r.BypassCache {
		c.consistency = outrigger.Consistency{Level: outrigger.Strong}
	}
	out := &snakepit.BatchGetVariablesResponse{Variables: map[string]*snakepit.Variable{}}
	worst := newWorst()
	for _, id := range r.VariableIdentifiers {
		a, err := b.read(ctx, c.tenant, r.SessionId, id, c.consistency)
		if outrigger.IsKind(err, outrigger.NotFound) && !sessionMissing(err, r.SessionId) {
			out.MissingVariables = append(out.MissingVariables, id)
			continue
		}
		if err != nil {
			return nil, status.ToGRPC(err)
		}
		worst.add(a)
		out.Variables[id] = variableToBridge(a.Variable)
	}
	setHeader(ctx, answerHeaders(worst.Answer))
	return out, nil
}

func sessionMissing(err error, session string) bool {
	return err.Error() == outrigger.ErrSessionNotFound(session).Error()
}

// expectedVersion: the wire field cannot tell 0 from unset, so 0 means no check; the
// metadata key "expected_version" states any version, 0 included.
func expectedVersion(field int32, md map[string]string) (*int32, map[string]string, error) {
	text, ok := md["expected_version"]
	if !ok {
		if field > 0 {
			return &field, md, nil
		}
		return nil, md, nil
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 0 {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "metadata expected_version is %q; give a version from 0", text)
	}
	v := int32(n)
	rest := make(map[string]string, len(md))
	for k, x := range md {
		if k != "expected_version" {
			rest[k] = x
		}
	}
	return &v, rest, nil
}

// SetVariable writes one variable. A failed compare-and-set is in-band: success=false,
// the text begins "version_mismatch", new_version is the present one.
func (b *Bridge) SetVariable(ctx context.Context, r *snakepit.SetVariableRequest) (*snakepit.SetVariableResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	v, err := valueFromAny(r.Value, "", r.BinaryValue)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	expected, md, err := expectedVersion(r.ExpectedVersion, r.Metadata)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	var trailer metadata.MD
	out, err := b.o.Authority.Set(ctx, &pb.SetRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier,
		Value: untyped(v), ExpectedVersion: expected, Metadata: md, Options: b.writeOptions()}, grpc.Trailer(&trailer))
	if err == nil {
		return &snakepit.SetVariableResponse{Success: true, NewVersion: out.Version.GetCounter()}, nil
	}
	err = status.FromGRPC(err, trailer)
	if e, ok := err.(*outrigger.Error); ok && e.Kind == outrigger.Conflict {
		return &snakepit.SetVariableResponse{ErrorMessage: e.Message, NewVersion: e.Current}, nil
	}
	return nil, status.ToGRPC(err)
}

// untyped drops the client's guess of the type: the declared one decides. The Python
// client sends an integer 1 for a float variable, for example.
func untyped(v *pb.Value) *pb.Value { return &pb.Value{Json: v.Json, Binary: v.Binary} }

// SetVariables writes many, all or nothing when atomic.
func (b *Bridge) SetVariables(ctx context.Context, r *snakepit.BatchSetVariablesRequest) (*snakepit.BatchSetVariablesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	req := &pb.BatchSetRequest{Tenant: c.tenant, Session: r.SessionId, Atomic: r.Atomic, Metadata: r.Metadata, Options: b.writeOptions()}
	for id, a := range r.Updates {
		v, err := valueFromAny(a, "", r.BinaryUpdates[id])
		if err != nil {
			return nil, status.ToGRPC(outrigger.Wrap(outrigger.Invalid, err, "update of "+id))
		}
		req.Items = append(req.Items, &pb.SetItem{Identifier: id, Value: untyped(v)})
	}
	got, err := b.o.Authority.BatchSet(ctx, req)
	if err != nil {
		err = status.FromGRPC(err, nil)
		if outrigger.IsKind(err, outrigger.NotFound) && !sessionMissing(err, r.SessionId) {
			// Inside a batch the bridge reports an unknown variable as a bad argument.
			err = outrigger.Errorf(outrigger.Invalid, "%s", err.Error())
		}
		return nil, status.ToGRPC(err)
	}
	out := &snakepit.BatchSetVariablesResponse{Success: len(got.Errors) == 0, Errors: map[string]string{}, NewVersions: map[string]int32{}}
	for id, e := range got.Errors {
		out.Errors[id] = e.Message
	}
	for id, v := range got.Variables {
		out.NewVersions[id] = v.Version.GetCounter()
	}
	return out, nil
}

// ListVariables lists by pattern ("*" matches any run of characters, anchored).
func (b *Bridge) ListVariables(ctx context.Context, r *snakepit.ListVariablesRequest) (*snakepit.ListVariablesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	got, err := b.o.Authority.List(ctx, &pb.ListRequest{Tenant: c.tenant, Session: r.SessionId, Pattern: r.Pattern})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out := &snakepit.ListVariablesResponse{}
	for _, v := range got.Variables {
		out.Variables = append(out.Variables, variableToBridge(v))
	}
	return out, nil
}

// DeleteVariable removes one variable.
func (b *Bridge) DeleteVariable(ctx context.Context, r *snakepit.DeleteVariableRequest) (*snakepit.DeleteVariableResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	if _, err := b.o.Authority.Delete(ctx, &pb.GetRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier, Options: b.writeOptions()}); err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.DeleteVariableResponse{Success: true}, nil
}

// updateTypes are the bridge's words for watch events.
var updateTypes = map[pb.WatchEvent_Type]string{
	pb.WatchEvent_INITIAL:   "initial_value",
	pb.WatchEvent_CHANGED:   "value_change",
	pb.WatchEvent_DELETED:   "value_change",
	pb.WatchEvent_HEARTBEAT: "heartbeat",
}

// WatchVariables sends the present values (if asked), then every change. A deletion
// arrives as a value_change without a value and with update_metadata deleted=true.
func (b *Bridge) WatchVariables(r *snakepit.WatchVariablesRequest, stream grpc.ServerStreamingServer[snakepit.VariableUpdate]) error {
	c, err := callerOf(stream.Context())
	if err != nil {
		return status.ToGRPC(err)
	}
	events, err := b.o.Authority.Watch(stream.Context(), &pb.WatchRequest{Tenant: c.tenant, Session: r.SessionId,
		Identifiers: r.VariableIdentifiers, IncludeInitial: r.IncludeInitialValues})
	if err != nil {
		return status.ToGRPC(err)
	}
	for {
		ev, err := events.Recv()
		if err != nil {
			return status.ToGRPC(err)
		}
		if err := stream.Send(updateOf(ev)); err != nil {
			return err
		}
	}
}

func updateOf(ev *pb.WatchEvent) *snakepit.VariableUpdate {
	out := &snakepit.VariableUpdate{UpdateType: updateTypes[ev.Type], Timestamp: ev.At, UpdateSource: ev.Actor}
	if ev.Type == pb.WatchEvent_HEARTBEAT {
		return out
	}
	out.VariableId = ev.Variable.GetId()
	if ev.Type == pb.WatchEvent_DELETED {
		out.UpdateMetadata = map[string]string{"deleted": "true"}
		return out
	}
	out.Variable = variableToBridge(ev.Variable)
	return out
}

// defaultHistory is how many versions the bridge's history returns unasked.
const defaultHistory = 50

// GetVariableHistory lists earlier versions, newest first.
func (b *Bridge) GetVariableHistory(ctx context.Context, r *snakepit.GetVariableHistoryRequest) (*snakepit.GetVariableHistoryResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	limit := r.Limit
	if limit <= 0 {
		limit = defaultHistory
	}
	got, err := b.o.Authority.History(ctx, &pb.HistoryRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier, Limit: limit})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out := &snakepit.GetVariableHistoryResponse{}
	for _, e := range got.Entries {
		if e.Deleted {
			continue // the bridge has no form for "there was none"
		}
		out.Entries = append(out.Entries, &snakepit.VariableHistoryEntry{Version: e.Version.GetCounter(), Value: anyFromValue(e.Value),
			Timestamp: e.At, ChangedBy: e.Actor, Metadata: e.Metadata})
	}
	return out, nil
}

// RollbackVariable writes an earlier version's value as a new version.
func (b *Bridge) RollbackVariable(ctx context.Context, r *snakepit.RollbackVariableRequest) (*snakepit.RollbackVariableResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	v, err := b.o.Authority.Rollback(ctx, &pb.RollbackRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier,
		TargetVersion: r.TargetVersion, Options: b.writeOptions()})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.RollbackVariableResponse{Success: true, Variable: variableToBridge(v)}, nil
}
