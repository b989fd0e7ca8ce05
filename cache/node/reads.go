package node

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// strongAttempts bounds the reads made for one strong read while the log is replaced.
const strongAttempts = 3

// Read answers from the table, or by one fetch per key for all who ask (see the package
// comment). min_position refers to the log of this node's region.
func (a *Agent) Read(ctx context.Context, req *pb.ReadRequest) (*pb.ReadResponse, error) {
	keys := make([]outrigger.Key, len(req.GetKeys()))
	for i, k := range req.GetKeys() {
		keys[i] = wire.Key(k)
		if err := keys[i].Validate(); err != nil {
			return nil, status.ToGRPC(err)
		}
	}
	if len(keys) > outrigger.MaxBatch {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Exhausted, "keys has %d entries, the limit is %d; split the call", len(keys), outrigger.MaxBatch))
	}
	out, err := a.read(ctx, keys, req.GetMinPosition())
	return out, status.ToGRPC(err)
}

func (a *Agent) read(ctx context.Context, keys []outrigger.Key, minimum uint64) (*pb.ReadResponse, error) {
	if len(keys) == 0 {
		return &pb.ReadResponse{}, nil
	}
	for i, k := range keys {
		a.touched.add(k)
		if i > 0 && k.Tenant == keys[i-1].Tenant {
			continue
		}
		if _, err := a.use(k.Tenant); err != nil {
			a.o.Logger.Warn("no table for a tenant, its reads are answered without", "tenant", k.Tenant, "error", err)
		}
	}
	if level := metadata.ValueFromIncomingContext(ctx, outrigger.HeaderConsistency); len(level) > 0 {
		c, err := outrigger.ParseConsistency(level[0])
		if err != nil {
			return nil, err
		}
		if c.Level == outrigger.Strong {
			return a.readStrong(ctx, keys, minimum)
		}
	}
	p := &pendingRead{results: make([]*pb.ReadResult, len(keys)), left: len(keys), done: make(chan struct{})}
	ins := make([]coherence.Input, len(keys))
	a.mu.Lock()
	first := a.lastWaiter + 1
	for i, k := range keys {
		a.lastWaiter++
		a.waiters[a.lastWaiter] = waiting{read: p, index: i}
		ins[i] = coherence.Read{Key: k, Waiter: a.lastWaiter, Min: minimum}
	}
	region, _, _ := a.state.Position()
	a.run(ins...)
	a.mu.Unlock()

	select {
	case <-p.done:
	case <-ctx.Done():
		a.mu.Lock()
		for i := range keys {
			delete(a.waiters, first+coherence.Waiter(i))
		}
		a.mu.Unlock()
		return nil, ctx.Err()
	}
	if p.err != nil {
		return nil, p.err
	}
	return &pb.ReadResponse{Results: p.results, AsOf: p.asOf, Incarnation: p.incarnation, Region: region}, nil
}

// readStrong asks the origin, always, and lets the table learn from the answer.
func (a *Agent) readStrong(ctx context.Context, keys []outrigger.Key, minimum uint64) (*pb.ReadResponse, error) {
	req := &pb.ReadRequest{MinPosition: minimum}
	for _, k := range keys {
		req.Keys = append(req.Keys, wire.KeyPB(k))
	}
	for range strongAttempts {
		began := a.begin()
		resp, err := a.coh.Read(relay(ctx), req)
		switch {
		case err != nil && ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			return nil, originError(err)
		}
		if len(resp.GetResults()) != len(keys) {
			return nil, outrigger.Errorf(outrigger.Internal, "the origin answered %d of %d keys", len(resp.GetResults()), len(keys))
		}
		if a.offer(keys, resp, began) {
			return resp, nil
		}
		req.MinPosition = 0 // it was a position of the other log
	}
	return nil, outrigger.Errorf(outrigger.Unavailable, "the log was replaced while it was being read; retry")
}

// offer teaches the table what a strong read saw; false when the answer may be of a log
// that has been replaced.
func (a *Agent) offer(keys []outrigger.Key, resp *pb.ReadResponse, began uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.state.Current(resp.GetIncarnation(), began) {
		return false
	}
	ins := make([]coherence.Input, len(keys))
	for i, k := range keys {
		ins[i] = coherence.Offered{Key: k, Began: began, Result: resp.Results[i],
			AsOf: resp.GetAsOf(), Incarnation: resp.GetIncarnation(), Region: resp.GetRegion()}
	}
	a.run(ins...)
	return true
}

func (a *Agent) begin() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.Begin()
}

// relayed are the request headers the origin should see as well.
var relayed = [...]string{outrigger.HeaderConsistency, outrigger.HeaderToken, "traceparent", "tracestate"}

// relay returns ctx with those headers of the incoming call going out.
func relay(ctx context.Context) context.Context {
	for _, h := range relayed {
		for _, v := range metadata.ValueFromIncomingContext(ctx, h) {
			ctx = metadata.AppendToOutgoingContext(ctx, h, v)
		}
	}
	return ctx
}

// NameOfID returns the variable name inside an id ("var_<name>_<n>"). An id names the
// variable of that name if its Variable.ID says so, and nothing otherwise, because ids
// are made from names.
func NameOfID(identifier string) (name string, ok bool) {
	rest, ok := strings.CutPrefix(identifier, "var_")
	i := strings.LastIndexByte(rest, '_')
	if !ok || i <= 0 || i == len(rest)-1 {
		return "", false
	}
	for _, c := range rest[i+1:] {
		if c < '0' || c > '9' {
			return "", false
		}
	}
	return rest[:i], true
}

// Get reads one variable by id or name; ids are tried first.
func (a *Agent) Get(ctx context.Context, r *pb.GetRequest) (*pb.Variable, error) {
	found, err := a.find(ctx, r.GetTenant(), r.GetSession(), []string{r.GetIdentifier()})
	switch {
	case err != nil:
		return nil, status.ToGRPC(err)
	case found[0].GetVariable() != nil:
		return found[0].GetVariable(), nil
	case !found[0].GetSessionExists():
		return nil, status.ToGRPC(outrigger.ErrSessionNotFound(r.GetSession()))
	}
	return nil, status.ToGRPC(outrigger.ErrVariableNotFound(r.GetIdentifier()))
}

// BatchGet reads many variables of a session.
func (a *Agent) BatchGet(ctx context.Context, r *pb.BatchGetRequest) (*pb.BatchGetResponse, error) {
	ids := r.GetIdentifiers()
	found, err := a.find(ctx, r.GetTenant(), r.GetSession(), ids)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	out := &pb.BatchGetResponse{Variables: map[string]*pb.Variable{}}
	for i, id := range ids {
		switch v := found[i].GetVariable(); {
		case v != nil:
			out.Variables[id] = v
		case !found[i].GetSessionExists():
			return nil, status.ToGRPC(outrigger.ErrSessionNotFound(r.GetSession()))
		default:
			out.Missing = append(out.Missing, id)
		}
	}
	return out, nil
}

// find reads identifiers of one session. Each that looks like an id is read under the
// name inside it as well.
func (a *Agent) find(ctx context.Context, tenant, session string, ids []string) ([]*pb.ReadResult, error) {
	if len(ids) > outrigger.MaxBatch {
		return nil, outrigger.Errorf(outrigger.Exhausted, "identifiers has %d entries, the limit is %d; split the call", len(ids), outrigger.MaxBatch)
	}
	var keys []outrigger.Key
	for _, id := range ids {
		k := outrigger.Key{Tenant: wire.Tenant(tenant), Session: session, Name: id}
		if err := k.Validate(); err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	idOf := map[int]int{} // index into ids → index of the key read under the inner name
	for i, id := range ids {
		if name, ok := NameOfID(id); ok {
			idOf[i] = len(keys)
			keys = append(keys, outrigger.Key{Tenant: wire.Tenant(tenant), Session: session, Name: name})
		}
	}
	resp, err := a.read(ctx, keys, 0)
	if err != nil {
		return nil, err
	}
	out := resp.GetResults()[:len(ids):len(ids)]
	for i, k := range idOf {
		if r := resp.GetResults()[k]; r.GetVariable().GetId() == ids[i] {
			out[i] = r
		}
	}
	return out, nil
}

// Changes forwards to the origin.
func (a *Agent) Changes(ctx context.Context, r *pb.ChangesRequest) (*pb.ChangesResponse, error) {
	return a.coh.Changes(relay(ctx), r)
}
