// Package delivery is the operators' view of configuration delivery: what every xDS
// client of a replica was sent, what it has in force, how pushes went, and why not.
//
//	d := delivery.New(ads)
//	pb.RegisterDeliveryServer(server, d)   // behind whatever decides who may ask
//
// It keeps nothing: every answer is made from the ledger and the history of the ADS
// server when it is asked for. So it knows this replica's clients only, since they
// connected; and of pushes the newest adsserver.MaxPushes of each group, for
// adsserver.MaxPushAge.
//
// # Promises
//
//   - Bodies hold no secrets (translate.Dump). Where two bodies read the same and the
//     versions differ, the difference is in a secret.
//   - "In force" is what a client acknowledged: Envoy and gRPC clients acknowledge before
//     a resource has warmed; sidecars after it is in force. Of a rejected response nothing
//     counts as in force but what was before, although the client may have taken its good
//     resources.
//   - Answers are bounded: lists by the request's limit, bodies by maxBytes, and what was
//     left out is counted.
//
// Bad input fails with kind Invalid or NotFound. All methods may be called concurrently.
package delivery

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Bounds of answers.
const (
	maxBytes      = 32 << 20 // of bodies
	defaultNodes  = 1000
	maxNodes      = 10_000
	defaultPushes = 20
	maxChanged    = 100
)

// Source is where the answers come from; adsserver.Server is one.
type Source interface {
	Nodes() []adsserver.NodeDelivery
	Config(node string) ([]adsserver.Held, error)
	SetAt(node, push string) (id string, set []adsserver.Resource, err error)
	Pushes(only string) []adsserver.Push
	Explain(node, typeURL, name string) ([]adsserver.Explanation, error)
	Loads() (rows []adsserver.Load, refused uint64)
}

// Service implements pb.DeliveryServer. Its errors are outrigger.Errors.
type Service struct {
	pb.UnimplementedDeliveryServer
	ads Source
	now func() time.Time
}

// New returns a Service over ads; now is for the answers' clock, nil = time.Now.
func New(ads Source, now func() time.Time) *Service {
	if now == nil {
		now = time.Now
	}
	return &Service{ads: ads, now: now}
}

// XdsStatus lists nodes, those in trouble first.
func (s *Service) XdsStatus(_ context.Context, r *pb.XdsStatusRequest) (*pb.XdsStatusResponse, error) {
	limit, err := limitOf(r.GetLimit(), defaultNodes, maxNodes)
	if err != nil {
		return nil, err
	}
	out := &pb.XdsStatusResponse{Now: timestamppb.New(s.now())}
	for _, n := range s.ads.Nodes() {
		if r.GetNode() != "" && n.Node.ID != r.GetNode() || r.GetGroup() != "" && n.Group != r.GetGroup() {
			continue
		}
		if r.GetTroubled() && trouble(&n) == 0 {
			continue
		}
		out.Total++
		if n.Connected && n.Behind > 0 {
			out.Behind++
		}
		if n.Nack != nil {
			out.Rejecting++
		}
		if n.Held != "" {
			out.Held++
		}
		out.Nodes = append(out.Nodes, nodePB(&n))
	}
	if r.GetNode() != "" && len(out.Nodes) == 0 && !r.GetTroubled() {
		return nil, outrigger.Errorf(outrigger.NotFound, "node %q not found among the xDS clients of this replica", r.GetNode())
	}
	slices.SortStableFunc(out.Nodes, func(a, b *pb.XdsNode) int { return cmp.Compare(troublePB(b), troublePB(a)) })
	out.Nodes = out.Nodes[:min(limit, len(out.Nodes))]
	return out, nil
}

func trouble(n *adsserver.NodeDelivery) int {
	switch {
	case n.Held != "":
		return 4
	case n.Nack != nil:
		return 3
	case n.Connected && n.Behind > 0:
		return 2
	case !n.Connected:
		return 1
	}
	return 0
}

func troublePB(n *pb.XdsNode) int {
	switch {
	case n.Held != "":
		return 4
	case n.Nack != nil:
		return 3
	case n.Connected && n.BehindSeconds > 0:
		return 2
	case !n.Connected:
		return 1
	}
	return 0
}

func nodePB(n *adsserver.NodeDelivery) *pb.XdsNode {
	out := &pb.XdsNode{Node: wire.NodePB(n.Node), Group: n.Group, Connected: n.Connected, Since: wire.TimePB(n.Since),
		SentPosition: n.Sent, AckedPosition: n.Acked, SentPush: n.SentPush, AckedPush: n.AckedPush,
		BehindSeconds: n.Behind.Seconds(), Nack: nackPB(n.Nack), Held: n.Held}
	if n.Held != "" {
		out.HeldSince = wire.TimePB(n.HeldSince)
	}
	if n.Via != nil {
		out.Via = n.Via.ID
	}
	for _, t := range n.Types {
		out.Types = append(out.Types, &pb.XdsType{Type: t.Type, Wildcard: t.Wildcard, Names: uint32(t.Names), Sent: t.Sent, Acked: t.Acked,
			SentAt: wire.TimePB(t.SentAt), AckedAt: wire.TimePB(t.AckedAt), Unanswered: uint32(t.Unanswered), Nack: nackPB(t.Nack)})
	}
	return out
}

func nackPB(n *adsserver.Nack) *pb.XdsNack {
	if n == nil {
		return nil
	}
	return &pb.XdsNack{Type: n.Type, Resource: n.Resource, Message: n.Message, At: wire.TimePB(n.At)}
}

// limitOf applies the default and the bound of a list.
func limitOf(asked int32, usual, most int) (int, error) {
	switch {
	case asked == 0:
		return usual, nil
	case asked < 0 || int(asked) > most:
		return 0, outrigger.Errorf(outrigger.Invalid, "limit is %d; give 1 to %d, or 0 for %d", asked, most, usual)
	}
	return int(asked), nil
}

// typeURL resolves a type's last word; "" stays "".
func typeURL(word string) (string, error) {
	if word == "" {
		return "", nil
	}
	var known []string
	for _, t := range xds.Pushed() {
		short := xds.ShortType(t)
		if t == word || strings.EqualFold(short, word) {
			return t, nil
		}
		known = append(known, short)
	}
	return "", outrigger.Errorf(outrigger.Invalid, "type is %q; one of %s", word, strings.Join(known, ", "))
}

// dumper turns bodies into JSON until there are too many bytes.
type dumper struct {
	left int
}

// dump returns the JSON of a body; false when the answer is full.
func (d *dumper) dump(a *anypb.Any) (string, bool, error) {
	if a == nil {
		return "", true, nil
	}
	m, err := a.UnmarshalNew()
	if err != nil {
		return "", false, outrigger.Wrap(outrigger.Internal, err, "a resource of our own making")
	}
	raw, err := translate.Dump(m)
	if err != nil {
		return "", false, err
	}
	d.left -= len(raw)
	return string(raw), d.left >= 0, nil
}
