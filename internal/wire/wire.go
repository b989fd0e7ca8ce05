// Package wire converts between the vocabulary (package outrigger) and the messages
// of api/outrigger/v1. Conversions allocate new values and share byte slices, which
// both sides treat as immutable.
package wire

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Key converts; an empty tenant becomes the default tenant.
func Key(k *pb.Key) outrigger.Key {
	return outrigger.Key{Tenant: Tenant(k.GetTenant()), Session: k.GetSession(), Name: k.GetName()}
}

// Tenant returns t, or the default tenant for "".
func Tenant(t string) string {
	if t == "" {
		return outrigger.DefaultTenant
	}
	return t
}

// KeyPB is the inverse of Key.
func KeyPB(k outrigger.Key) *pb.Key {
	return &pb.Key{Tenant: k.Tenant, Session: k.Session, Name: k.Name}
}

// Value converts without validating.
func Value(v *pb.Value) outrigger.Value {
	return outrigger.Value{Type: outrigger.Type(v.GetType()), JSON: v.GetJson(), Binary: v.GetBinary()}
}

// ValuePB is the inverse of Value.
func ValuePB(v outrigger.Value) *pb.Value {
	return &pb.Value{Type: string(v.Type), Json: v.JSON, Binary: v.Binary}
}

// Dot converts.
func Dot(d *pb.Dot) outrigger.Dot {
	return outrigger.Dot{Region: d.GetRegion(), Incarnation: d.GetIncarnation(), Position: d.GetPosition()}
}

// DotPB is the inverse of Dot.
func DotPB(d outrigger.Dot) *pb.Dot {
	return &pb.Dot{Region: d.Region, Incarnation: d.Incarnation, Position: d.Position}
}

// Version converts. Should a message break the rule and name a region twice, the higher
// position counts: it was seen.
func Version(v *pb.Version) outrigger.Version {
	out := outrigger.Version{Counter: v.GetCounter(), Dot: Dot(v.GetDot()), HLC: v.GetHlc()}
	if n := len(v.GetContext()); n > 0 {
		out.Context = make(map[string]uint64, n)
		for _, e := range v.GetContext() {
			out.Context[e.GetRegion()] = max(out.Context[e.GetRegion()], e.GetPosition())
		}
	}
	return out
}

// VersionPB is the inverse of Version; context entries are sorted by region.
func VersionPB(v outrigger.Version) *pb.Version {
	out := &pb.Version{Counter: v.Counter, Dot: DotPB(v.Dot), Hlc: v.HLC}
	for _, r := range slices.Sorted(maps.Keys(v.Context)) {
		out.Context = append(out.Context, &pb.ContextEntry{Region: r, Position: v.Context[r]})
	}
	return out
}

// Variable converts; constraints that do not parse are dropped, because the authority
// checked them at registration.
func Variable(v *pb.Variable) outrigger.Variable {
	c, err := outrigger.ParseConstraints(v.GetConstraintsJson())
	if err != nil {
		c = outrigger.Constraints{}
	}
	return outrigger.Variable{
		ID: v.GetId(), Key: Key(v.GetKey()), Value: Value(v.GetValue()), Constraints: c,
		Metadata: v.GetMetadata(), Source: v.GetSource(), Version: Version(v.GetVersion()),
		CreatedAt: Time(v.GetCreatedAt()), UpdatedAt: Time(v.GetUpdatedAt()),
	}
}

// VariablePB is the inverse of Variable.
func VariablePB(v outrigger.Variable) *pb.Variable {
	return &pb.Variable{
		Id: v.ID, Key: KeyPB(v.Key), Value: ValuePB(v.Value), ConstraintsJson: v.Constraints.JSON(),
		Metadata: v.Metadata, Source: v.Source, Version: VersionPB(v.Version),
		CreatedAt: TimePB(v.CreatedAt), UpdatedAt: TimePB(v.UpdatedAt),
	}
}

// Session converts.
func Session(s *pb.Session) outrigger.Session {
	return outrigger.Session{
		Tenant: Tenant(s.GetTenant()), ID: s.GetId(), TTL: s.GetTtl().AsDuration(), Metadata: s.GetMetadata(),
		CreatedAt: Time(s.GetCreatedAt()), LastUsedAt: Time(s.GetLastUsedAt()), Variables: int(s.GetVariableCount()),
	}
}

// SessionPB is the inverse of Session.
func SessionPB(s outrigger.Session) *pb.Session {
	return &pb.Session{
		Tenant: s.Tenant, Id: s.ID, Ttl: durationpb.New(s.TTL), Metadata: s.Metadata,
		CreatedAt: TimePB(s.CreatedAt), LastUsedAt: TimePB(s.LastUsedAt), VariableCount: int32(s.Variables),
	}
}

// Node converts.
func Node(n *pb.Node) outrigger.Node {
	return outrigger.Node{ID: n.GetId(), Kind: n.GetKind(), Region: n.GetRegion(), Zone: n.GetZone(), Labels: n.GetLabels()}
}

// NodePB is the inverse of Node.
func NodePB(n outrigger.Node) *pb.Node {
	return &pb.Node{Id: n.ID, Kind: n.Kind, Region: n.Region, Zone: n.Zone, Labels: n.Labels}
}

// Time converts; unset becomes the zero time.
func Time(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// TimePB is the inverse of Time.
func TimePB(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
