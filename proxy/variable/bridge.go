package variable

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Bridge is the snakepit bridge service. What the published v0.4.3 server has no handler
// for (WatchVariables, AddDependency, StartOptimization, StopOptimization, history and
// rollback) is served as its designs describe it. A writer that holds an optimisation says
// so by the call's metadata key "optimization_id" or the header x-outrigger-optimization,
// several ids separated by commas.
type Bridge struct {
	snakepit.UnimplementedBridgeServiceServer
	core
}

// NewBridge returns the service; register it with snakepit.RegisterBridgeServiceServer.
func NewBridge(o Options) *Bridge { return &Bridge{core: newCore(o)} }

// caller is what a call's metadata says.
type caller struct {
	tenant        string
	consistency   outrigger.Consistency
	explicit      bool   // consistency was asked for
	token         string // session token, as brought
	explain       bool
	optimizations []string // ids of those it holds
}

// strong makes the caller one that asked for strong reads.
func (c *caller) strong() {
	c.consistency, c.explicit = outrigger.Consistency{Level: outrigger.Strong}, true
}

func callerOf(ctx context.Context) (caller, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	first := func(key string) string {
		if v := md.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	level := first(outrigger.HeaderConsistency)
	c, err := outrigger.ParseConsistency(level)
	return caller{tenant: wire.Tenant(first(outrigger.HeaderTenant)), consistency: c, explicit: level != "",
		token: first(outrigger.HeaderToken), explain: first(outrigger.HeaderExplain) == "true",
		optimizations: listed(md.Get(outrigger.HeaderOptimization)...)}, err
}

// listed splits lists of ids at commas.
func listed(lists ...string) (ids []string) {
	for _, list := range lists {
		for id := range strings.SplitSeq(list, ",") {
			if id = strings.TrimSpace(id); id != "" {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// writeOptions records bridge writes as the bridge does.
func (b *Bridge) writeOptions(c caller) *pb.WriteOptions {
	return &pb.WriteOptions{Actor: "bridge", Source: sourcePython, AutoCreateSession: b.o.AutoCreateSessions, OptimizationIds: c.optimizations}
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
	setHeader(ctx, authorityHeaders(nil))
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
	setHeader(ctx, b.wrote(c, r.SessionId, out, nil))
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
	setHeader(ctx, authorityHeaders(nil))
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
	setHeader(ctx, authorityHeaders(nil))
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
		Value: v, ConstraintsJson: r.ConstraintsJson, Metadata: r.Metadata, Options: b.writeOptions(c)})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, b.wrote(c, r.SessionId, out, out.Version))
	return &snakepit.RegisterVariableResponse{Success: true, VariableId: out.Id}, nil
}

// GetVariable reads one variable; bypass_cache reads at the authority.
func (b *Bridge) GetVariable(ctx context.Context, r *snakepit.GetVariableRequest) (*snakepit.GetVariableResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	if r.BypassCache {
		c.strong()
	}
	want, token := b.o.Tokens.request(c, r.SessionId)
	a, err := b.read(ctx, c.tenant, r.SessionId, r.VariableIdentifier, want)
	setHeader(ctx, b.shown(answerHeaders(a), c, r.SessionId, a, token, a.Seen))
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.GetVariableResponse{Variable: variableToBridge(a.Variable), FromCache: a.Tier != outrigger.TierOrigin}, nil
}

// GetVariables reads many; what does not exist is listed, not an error. Metadata is
// always included.
func (b *Bridge) GetVariables(ctx context.Context, r *snakepit.BatchGetVariablesRequest) (*snakepit.BatchGetVariablesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	if r.BypassCache {
		c.strong()
	}
	want, token := b.o.Tokens.request(c, r.SessionId)
	got, err := b.readMany(ctx, c.tenant, r.SessionId, "variable_identifiers", r.VariableIdentifiers, want)
	setHeader(ctx, b.shown(answerHeaders(got.worst), c, r.SessionId, got.worst, token, got.seen...))
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out := &snakepit.BatchGetVariablesResponse{Variables: make(map[string]*snakepit.Variable, len(got.variables)), MissingVariables: got.missing}
	for id, v := range got.variables {
		out.Variables[id] = variableToBridge(v)
	}
	return out, nil
}

const expectedKey = "expected_version"

// expectedVersion: the wire field cannot tell 0 from unset, so 0 means no check; the
// metadata key "expected_version" states any version, 0 included.
func expectedVersion(field int32, md map[string]string) (*int32, map[string]string, error) {
	text, ok := md[expectedKey]
	if !ok {
		if field < 0 {
			return nil, nil, outrigger.Errorf(outrigger.Invalid, "expected_version is %d; give a version, or 0 for no check", field)
		}
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
		if k != expectedKey {
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
	md = c.underOptimization(md)
	var trailer metadata.MD
	out, err := b.o.Authority.Set(ctx, &pb.SetRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier,
		Value: untyped(v), ExpectedVersion: expected, Metadata: md, Options: b.writeOptions(c)}, grpc.Trailer(&trailer))
	if err == nil {
		setHeader(ctx, b.wrote(c, r.SessionId, out, out.Version))
		return &snakepit.SetVariableResponse{Success: true, NewVersion: out.Version.GetCounter()}, nil
	}
	err = status.FromGRPC(err, trailer)
	var e *outrigger.Error
	if errors.As(err, &e) && e.Kind == outrigger.Conflict {
		setHeader(ctx, authorityHeaders(nil))
		return &snakepit.SetVariableResponse{ErrorMessage: e.Message, NewVersion: e.Current}, nil
	}
	return nil, status.ToGRPC(err)
}

// untyped drops the client's guess of the type: the declared one decides. The Python
// client sends an integer 1 for a float variable, for example.
func untyped(v *pb.Value) *pb.Value { return &pb.Value{Json: v.Json, Binary: v.Binary} }

// SetVariables writes many, all or nothing when atomic. Values that break a constraint
// are reported by identifier; a variable that does not exist refuses the whole call.
func (b *Bridge) SetVariables(ctx context.Context, r *snakepit.BatchSetVariablesRequest) (*snakepit.BatchSetVariablesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	md := c.underOptimization(r.Metadata)
	req := &pb.BatchSetRequest{Tenant: c.tenant, Session: r.SessionId, Atomic: r.Atomic, Metadata: md, Options: b.writeOptions(c)}
	if req.Items, err = itemsOf(r); err != nil {
		return nil, status.ToGRPC(err)
	}
	if len(req.Items) == 0 {
		return b.setNothing(ctx, c.tenant, r.SessionId)
	}
	got, err := b.o.Authority.BatchSet(ctx, req)
	if err != nil {
		err = status.FromGRPC(err, nil)
		if outrigger.IsKind(err, outrigger.NotFound) && err.Error() != outrigger.ErrSessionNotFound(r.SessionId).Error() {
			// Inside a batch the bridge reports an unknown variable as a bad argument.
			err = outrigger.Errorf(outrigger.Invalid, "%s", err.Error())
		}
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, b.wrote(c, r.SessionId, got, nil))
	out := &snakepit.BatchSetVariablesResponse{Success: len(got.Errors) == 0, Errors: map[string]string{}, NewVersions: map[string]int32{}}
	for id, e := range got.Errors {
		out.Errors[id] = e.Message
	}
	for id, v := range got.Variables {
		out.NewVersions[id] = v.Version.GetCounter()
	}
	return out, nil
}

// itemsOf reads the updates in the order of their identifiers, so that equal calls write
// equal events.
func itemsOf(r *snakepit.BatchSetVariablesRequest) ([]*pb.SetItem, error) {
	if _, ok := r.Metadata[expectedKey]; ok {
		return nil, outrigger.Errorf(outrigger.Invalid, "metadata expected_version is about one variable; use SetVariable")
	}
	for id := range r.BinaryUpdates {
		if r.Updates[id] == nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "binary_updates has %q, updates has not; give the value that describes the binary part", id)
		}
	}
	items := make([]*pb.SetItem, 0, len(r.Updates))
	for _, id := range slices.Sorted(maps.Keys(r.Updates)) {
		v, err := valueFromAny(r.Updates[id], "", r.BinaryUpdates[id])
		if err != nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "updates[%q]: %s", id, err)
		}
		items = append(items, &pb.SetItem{Identifier: id, Value: untyped(v)})
	}
	return items, nil
}

// setNothing answers an empty batch, which is a success in a session that exists.
func (b *Bridge) setNothing(ctx context.Context, tenant, session string) (*snakepit.BatchSetVariablesResponse, error) {
	_, err := b.o.Authority.GetSession(ctx, &pb.GetSessionRequest{Tenant: tenant, Id: session})
	if err = status.FromGRPC(err, nil); outrigger.IsKind(err, outrigger.NotFound) {
		err = b.ensureSession(ctx, tenant, session)
	}
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, authorityHeaders(nil))
	return &snakepit.BatchSetVariablesResponse{Success: true}, nil
}

// ListVariables lists by pattern ("*" matches any run of characters, anchored).
func (b *Bridge) ListVariables(ctx context.Context, r *snakepit.ListVariablesRequest) (*snakepit.ListVariablesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	got, err := b.o.Authority.List(ctx, &pb.ListRequest{Tenant: c.tenant, Session: r.SessionId, Pattern: r.Pattern})
	if err = status.FromGRPC(err, nil); outrigger.IsKind(err, outrigger.NotFound) {
		err = b.ensureSession(ctx, c.tenant, r.SessionId) // a new session has none
	}
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, b.wrote(c, r.SessionId, got, nil))
	out := &snakepit.ListVariablesResponse{}
	for _, v := range got.GetVariables() {
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
	out, err := b.o.Authority.Delete(ctx, &pb.GetRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier, Options: b.writeOptions(c)})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, b.wrote(c, r.SessionId, out, out.GetVersion()))
	return &snakepit.DeleteVariableResponse{Success: true}, nil
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
	setHeader(ctx, authorityHeaders(nil))
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
		TargetVersion: r.TargetVersion, Options: b.writeOptions(c)})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, b.wrote(c, r.SessionId, v, v.Version))
	return &snakepit.RollbackVariableResponse{Success: true, Variable: variableToBridge(v)}, nil
}
