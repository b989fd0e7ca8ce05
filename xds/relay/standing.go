package relay

import (
	"fmt"
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// account is what the control plane was told about pods on one stream.
type account struct {
	told   map[string]*pb.RelayedPod // connected ones, by id
	nonces map[uint64]string         // by number of the push they closed; the newest few
	late   map[string]uint64         // laggards, by id: the number of the stream that is late
}

func newAccount() account {
	return account{told: make(map[string]*pb.RelayedPod), nonces: make(map[uint64]string), late: make(map[string]uint64)}
}

// keptNonces bounds how far back a pod can be and still be told apart from one that has
// nothing.
const keptNonces = 64

func (a *account) trim(newest uint64) {
	for n := range a.nonces {
		if n+keptNonces <= newest {
			delete(a.nonces, n)
		}
	}
}

// news lists the pods of which something else is true than was told, by id.
func (a *account) news(nodes []adsserver.NodeState) (out []*pb.RelayedPod) {
	for i := range nodes {
		n := &nodes[i]
		had := a.told[n.Node.ID]
		if !n.Connected {
			if had != nil {
				out = append(out, &pb.RelayedPod{Node: &pb.Node{Id: n.Node.ID}})
			}
			continue
		}
		p := &pb.RelayedPod{Stream: n.Stream, Connected: true, AckedNonce: a.nonces[n.Acked]}
		if n.Nack != nil {
			p.NackType, p.NackResource, p.NackMessage, p.NackedAt = n.Nack.Type, n.Nack.Resource, n.Nack.Message, timestamppb.New(n.Nack.At)
		}
		if had == nil || had.Stream != n.Stream {
			p.Node = wire.NodePB(n.Node)
		} else {
			p.Node = &pb.Node{Id: n.Node.ID} // the rest was said when the stream was new
			if same(had, p) {
				continue
			}
		}
		out = append(out, p)
	}
	return out
}

// same compares what changes while a stream lasts.
func same(a, b *pb.RelayedPod) bool {
	return a.AckedNonce == b.AckedNonce && a.NackType == b.NackType && a.NackResource == b.NackResource && a.NackMessage == b.NackMessage &&
		proto.Equal(a.NackedAt, b.NackedAt)
}

// note takes in what was sent.
func (a *account) note(sent []*pb.RelayedPod) {
	for _, p := range sent {
		if p.Connected {
			a.told[p.Node.Id] = p
		} else {
			delete(a.told, p.Node.Id)
		}
	}
}

// urgent reports whether there is news that nobody should wait for: somebody came, left or
// rejects something.
func (a *account) urgent(news []*pb.RelayedPod) bool {
	return slices.ContainsFunc(news, func(p *pb.RelayedPod) bool {
		had := a.told[p.Node.Id]
		return had == nil || !p.Connected || had.Stream != p.Stream || had.NackMessage != p.NackMessage || had.NackType != p.NackType
	})
}

// waits reports whether anybody has yet to answer a push that was made at; expired says that
// those who have not are laggards by now.
func (a *account) waits(nodes []adsserver.NodeState, number uint64, expired bool) (some bool) {
	for i := range nodes {
		n := &nodes[i]
		switch stream, late := a.late[n.Node.ID]; {
		case !n.Connected || n.Answered >= number:
			delete(a.late, n.Node.ID)
		case late && stream == n.Stream:
		case expired:
			a.late[n.Node.ID] = n.Stream
		default:
			some = true
		}
	}
	return some
}

// standing makes the request that tells news, and takes them as told.
func (u *uplink) standing(news []*pb.RelayedPod) (*discovery.DeltaDiscoveryRequest, error) {
	detail, err := anypb.New(&pb.RelayStanding{Pods: news})
	if err != nil {
		return nil, err
	}
	u.pods.note(news)
	u.dirty = time.Time{}
	return &discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRelayStanding, ErrorDetail: &rpc.Status{Details: []*anypb.Any{detail}}}, nil
}

// look compares the pods with what was told of them and answers the control plane what can be
// answered.
func (u *uplink) look(now time.Time) error {
	nodes := u.r.down.Ledger()
	late := u.push.at.Add(answerLag)
	settled := u.push.open && !u.pods.waits(nodes, u.r.cache.number, !now.Before(late))
	news := u.pods.news(nodes)
	switch {
	case len(news) == 0:
		u.dirty = time.Time{}
	case u.dirty.IsZero():
		u.dirty = now
	}
	if len(news) > 0 && (settled || u.pods.urgent(news) || !now.Before(u.dirty.Add(gather))) {
		m, err := u.standing(news)
		if err != nil {
			return err
		}
		if err := u.ads.Send(m); err != nil {
			return err
		}
	}
	if u.push.open {
		if err := u.reject(nodes); err != nil {
			return err
		}
	}
	if settled {
		u.push.open = false
		if err := u.answer(nil); err != nil {
			return err
		}
	}
	u.wake(now, late)
	return nil
}

// wake sets the time of the next look.
func (u *uplink) wake(now, late time.Time) {
	u.timer.Stop()
	next := time.Time{}
	if u.push.open {
		next = late
	}
	if due := u.dirty.Add(gather); !u.dirty.IsZero() && (next.IsZero() || due.Before(next)) {
		next = due
	}
	if !next.IsZero() {
		u.timer.Reset(max(next.Sub(now), time.Millisecond))
	}
}

// reject passes on what a pod rejects of the push that is waited for, once per pod and type.
func (u *uplink) reject(nodes []adsserver.NodeState) error {
	for i := range nodes {
		n := &nodes[i]
		if !n.Connected || n.Nack == nil || n.Nack.Position != u.r.cache.number {
			continue // the complaint of an older push would stand against what repairs it
		}
		typeURL := n.Nack.Type
		if u.push.told[typeURL] {
			continue // the control plane has one word for all of a type
		}
		u.push.told[typeURL] = true
		if len(u.pending[typeURL]) == 0 {
			typeURL = xds.TypeMeshPolicy // the cause came with an earlier push
		}
		if err := u.answer(map[string]string{typeURL: fmt.Sprintf("%s: %s", n.Node.ID, n.Nack.Message)}); err != nil {
			return err
		}
	}
	return nil
}

// answer replies to what is pending, in push order: to the types in faults with a rejection,
// and, without faults, to all with an acceptance.
func (u *uplink) answer(faults map[string]string) error {
	for _, typeURL := range xds.Followed() {
		fault, bad := faults[typeURL]
		if faults != nil && !bad {
			continue
		}
		nonces := u.pending[typeURL]
		delete(u.pending, typeURL)
		for i, nonce := range nonces {
			text := ""
			if i == len(nonces)-1 {
				text = fault
			}
			if err := u.reply(typeURL, nonce, text); err != nil {
				return err
			}
		}
	}
	return nil
}

func (u *uplink) reply(typeURL, nonce, fault string) error {
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: nonce}
	if fault != "" {
		req.ErrorDetail = &rpc.Status{Code: int32(codes.InvalidArgument), Message: fault}
		u.r.log.Warn("a pod rejected resources", "type", xds.ShortType(typeURL), "reason", fault)
	}
	return u.ads.Send(req)
}
