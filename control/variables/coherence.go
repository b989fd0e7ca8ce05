package variables

import (
	"context"

	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// maxChangesBytes bounds one Changes answer below gRPC's default message limit; the
// rest is asked for again from complete_to.
const maxChangesBytes = 1 << 20

// Read implements pb.CoherenceServer. All results hold at one position, as_of. Reading
// is a use of the sessions named.
func (s *Service) Read(ctx context.Context, req *pb.ReadRequest) (*pb.ReadResponse, error) {
	out, err := s.read(ctx, req)
	return reply(ctx, out, err)
}

func (s *Service) read(ctx context.Context, req *pb.ReadRequest) (*pb.ReadResponse, error) {
	if err := s.isReady(); err != nil {
		return nil, err
	}
	if n := len(req.GetKeys()); n > outrigger.MaxBatch {
		return nil, errBatch("keys", n)
	}
	keys := make([]outrigger.Key, len(req.GetKeys()))
	for i, k := range req.GetKeys() {
		keys[i] = wire.Key(k)
		if err := keys[i].Validate(); err != nil {
			return nil, err
		}
	}
	if err := s.reach(ctx, req.GetMinPosition()); err != nil {
		return nil, err
	}
	out := &pb.ReadResponse{
		Results: make([]*pb.ReadResult, len(keys)), Incarnation: s.origin.incarnation, Region: s.origin.region,
	}
	now := s.opt.Now().UnixNano()
	s.mu.RLock()
	defer s.mu.RUnlock()
	out.AsOf = s.state.applied
	for i, k := range keys {
		r := &pb.ReadResult{}
		if sess := s.state.sessions[sessionID{k.Tenant, k.Session}]; sess != nil {
			sess.touch(now)
			r.SessionExists = true
			if v := sess.vars[k.Name]; v != nil && !v.deleted {
				r.Variable = v.pb
			}
		}
		out.Results[i] = r
	}
	return out, nil
}

// reach waits a short while for the projection to get to position.
func (s *Service) reach(ctx context.Context, position uint64) error {
	if s.Applied() >= position {
		return nil
	}
	short, cancel := context.WithTimeout(ctx, minPositionWait)
	defer cancel()
	err := s.progress.wait(short, position)
	if err != nil && ctx.Err() == nil && short.Err() != nil {
		return outrigger.Errorf(outrigger.Unavailable, "min_position is %d, applied is %d after waiting %v; retry or ask the leader", position, s.Applied(), minPositionWait)
	}
	return err
}

// SessionKeys implements pb.CoherenceServer. Served are callers on this machine, who could use
// every other service as well, and those whose certificate was verified, whose connection is
// encrypted, too.
func (s *Service) SessionKeys(ctx context.Context, _ *pb.SessionKeysRequest) (*pb.SessionKeysResponse, error) {
	p, ok := peer.FromContext(ctx)
	_, verified := identity.PeerFrom(ctx)
	switch {
	case !verified && (!ok || !authz.LocalPeer(p.Addr)):
		return reply[pb.SessionKeysResponse](ctx, nil, outrigger.Errorf(outrigger.Denied, "session keys are handed out on this machine and to verified client certificates only; give every process of the mesh the same --token-key-file, or a certificate with --control-cert"))
	case s.opt.SessionKeys != nil:
		if keys := s.opt.SessionKeys(); keys != nil {
			return &pb.SessionKeysResponse{Keys: keys.Text()}, nil
		}
	}
	return reply[pb.SessionKeysResponse](ctx, nil, outrigger.Errorf(outrigger.Locked, "this control plane has no session keys to hand out"))
}

// Changes implements pb.CoherenceServer. An answer holds at most about 1 MiB; ask again
// from complete_to when that is below to.
func (s *Service) Changes(ctx context.Context, req *pb.ChangesRequest) (*pb.ChangesResponse, error) {
	out, err := s.changesBetween(req)
	return reply(ctx, out, err)
}

func (s *Service) changesBetween(req *pb.ChangesRequest) (*pb.ChangesResponse, error) {
	if err := s.isReady(); err != nil {
		return nil, err
	}
	if req.GetIncarnation() != s.origin.incarnation {
		return nil, outrigger.Errorf(outrigger.Stale, "incarnation is %x, this log is %x; flush and subscribe again", req.GetIncarnation(), s.origin.incarnation)
	}
	if req.GetFrom() > req.GetTo() {
		return nil, outrigger.Errorf(outrigger.Invalid, "from %d is above to %d", req.GetFrom(), req.GetTo())
	}
	if applied := s.Applied(); req.GetFrom() > applied {
		return nil, outrigger.Errorf(outrigger.Unavailable, "from is %d, applied is %d; retry or ask the leader", req.GetFrom(), applied)
	}
	changes, complete, err := s.ring.Load().between(req.GetFrom(), req.GetTo(), maxChangesBytes)
	if err != nil {
		return nil, err
	}
	return &pb.ChangesResponse{Changes: changes, CompleteTo: complete}, nil
}
