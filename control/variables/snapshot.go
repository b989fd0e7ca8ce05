package variables

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// snapshotName is the projection's name in the log's snapshot store.
const snapshotName = "variables"

// snapshotFormat is the first byte of an encoded state. A snapshot of another format is
// ignored and the log replayed from its beginning.
const snapshotFormat = 1

// Field numbers of the encoding (protobuf wire format, unknown fields are skipped).
const (
	fRegion, fIncarnation, fApplied, fSession = 1, 2, 3, 4

	// of a session
	fBase, fCreatedPos, fSessionSeq, fLastID, fLastPos, fFloor, fGrave, fVariable, fDependency = 1, 2, 3, 4, 5, 6, 7, 8, 9

	// of a variable and of a grave
	fBody, fSeq, fPosition, fDeleted, fName = 1, 2, 3, 4, 5
)

// frozen is a cheap copy of the state that stays as it is while the state moves on:
// variables are immutable, so pointers suffice.
type frozen struct {
	origin   origin
	applied  uint64
	sessions []frozenSession
}

type frozenSession struct {
	base                                    *pb.Session
	createdPos, seq, lastID, lastPos, floor uint64
	graves                                  []grave
	vars                                    []*variable
	deps                                    dependencies
}

// freeze is called by the applier between events; it needs no lock.
func (st *state) freeze() frozen {
	f := frozen{origin: st.origin, applied: st.applied, sessions: make([]frozenSession, 0, len(st.sessions))}
	for _, s := range st.sessions {
		f.sessions = append(f.sessions, frozenSession{
			base: &pb.Session{
				Tenant: s.id.tenant, Id: s.id.name, Ttl: durationpb.New(s.ttl), Metadata: s.metadata,
				CreatedAt: timestamppb.New(s.createdAt), LastUsedAt: timestamppb.New(s.lastAt),
			},
			createdPos: s.createdPos, seq: s.seq, lastID: uint64(s.lastID), lastPos: s.lastPos, floor: s.floor,
			graves: slices.Clone(s.graves), vars: slices.Collect(maps.Values(s.vars)), deps: s.deps,
		})
	}
	return f
}

// encode is deterministic: equal states give equal bytes. It sorts f in place.
func (f frozen) encode() ([]byte, error) {
	slices.SortFunc(f.sessions, func(a, b frozenSession) int {
		return cmp.Or(cmp.Compare(a.base.GetTenant(), b.base.GetTenant()), cmp.Compare(a.base.GetId(), b.base.GetId()))
	})
	out := []byte{snapshotFormat}
	out = protowire.AppendTag(out, fRegion, protowire.BytesType)
	out = protowire.AppendString(out, f.origin.region)
	out = appendUint(out, fIncarnation, f.origin.incarnation)
	out = appendUint(out, fApplied, f.applied)
	for _, s := range f.sessions {
		b, err := s.encode()
		if err != nil {
			return nil, err
		}
		out = appendBytes(out, fSession, b)
	}
	return out, nil
}

func (s frozenSession) encode() ([]byte, error) {
	base, err := proto.MarshalOptions{Deterministic: true}.Marshal(s.base)
	if err != nil {
		return nil, err
	}
	out := appendBytes(nil, fBase, base)
	out = appendUint(out, fCreatedPos, s.createdPos)
	out = appendUint(out, fSessionSeq, s.seq)
	out = appendUint(out, fLastID, s.lastID)
	out = appendUint(out, fLastPos, s.lastPos)
	out = appendUint(out, fFloor, s.floor)
	for _, g := range s.graves {
		out = appendBytes(out, fGrave, appendUint(appendBytes(nil, fName, []byte(g.name)), fPosition, g.position))
	}
	slices.SortFunc(s.vars, func(a, b *variable) int { return cmp.Compare(a.pb.GetKey().GetName(), b.pb.GetKey().GetName()) })
	for _, v := range s.vars {
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(v.pb)
		if err != nil {
			return nil, err
		}
		b := appendUint(appendUint(appendBytes(nil, fBody, body), fSeq, v.seq), fPosition, v.position)
		if v.deleted {
			b = appendUint(b, fDeleted, 1)
		}
		out = appendBytes(out, fVariable, b)
	}
	for _, d := range s.deps.message("").GetDependencies() {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(d)
		if err != nil {
			return nil, err
		}
		out = appendBytes(out, fDependency, b)
	}
	return out, nil
}

func appendUint(b []byte, field protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}

func appendBytes(b []byte, field protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), v)
}

// errOtherLog says that a snapshot belongs to another log or region.
var errOtherLog = errors.New("snapshot is of another log or region")

// decodeState is the inverse of encode; it keeps nothing of raw.
func decodeState(raw []byte, o origin, l foldLimits) (*state, error) {
	if len(raw) == 0 || raw[0] != snapshotFormat {
		return nil, errors.New("snapshot has an unknown format")
	}
	st := newState(o, l)
	var found origin
	err := fields(raw[1:], func(num protowire.Number, n uint64, b []byte) error {
		switch num {
		case fRegion:
			found.region = string(b)
		case fIncarnation:
			found.incarnation = n
		case fApplied:
			st.applied = n
		case fSession:
			return decodeSession(st, b)
		}
		return nil
	})
	if err == nil && found != o {
		err = errOtherLog
	}
	if err != nil {
		return nil, err
	}
	return st, nil
}

func decodeSession(st *state, raw []byte) error {
	s := &session{vars: make(map[string]*variable), ids: make(map[string]string)}
	var base pb.Session
	err := fields(raw, func(num protowire.Number, n uint64, b []byte) error {
		switch num {
		case fBase:
			return proto.Unmarshal(b, &base)
		case fCreatedPos:
			s.createdPos = n
		case fSessionSeq:
			s.seq = n
		case fLastID:
			s.lastID = int(n)
		case fLastPos:
			s.lastPos = n
		case fFloor:
			s.floor = n
		case fGrave:
			g, err := decodeGrave(b)
			s.graves = append(s.graves, g)
			return err
		case fVariable:
			return decodeVariable(s, b)
		case fDependency:
			var d pb.Dependency
			if err := proto.Unmarshal(b, &d); err != nil {
				return err
			}
			if s.deps == nil {
				s.deps = make(dependencies)
			}
			s.deps[edge{d.GetFrom(), d.GetTo()}] = d.GetType() // nobody else has the map yet
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.id = sessionID{base.GetTenant(), base.GetId()}
	s.ttl, s.metadata = base.GetTtl().AsDuration(), base.GetMetadata()
	s.createdAt, s.lastAt = base.GetCreatedAt().AsTime(), base.GetLastUsedAt().AsTime()
	st.sessions[s.id] = s
	st.live += s.live
	for _, v := range s.vars {
		st.noteLock(v)
	}
	return s.id.check()
}

func decodeGrave(raw []byte) (g grave, err error) {
	err = fields(raw, func(num protowire.Number, n uint64, b []byte) error {
		switch num {
		case fName:
			g.name = string(b)
		case fPosition:
			g.position = n
		}
		return nil
	})
	return g, err
}

func decodeVariable(s *session, raw []byte) error {
	v := &variable{pb: &pb.Variable{}}
	err := fields(raw, func(num protowire.Number, n uint64, b []byte) error {
		switch num {
		case fBody:
			return proto.Unmarshal(b, v.pb)
		case fSeq:
			v.seq = n
		case fPosition:
			v.position = n
		case fDeleted:
			v.deleted = n == 1
		}
		return nil
	})
	if err != nil {
		return err
	}
	name := v.pb.GetKey().GetName()
	if c, cerr := outrigger.ParseConstraints(v.pb.GetConstraintsJson()); cerr == nil {
		v.constraints = c
	}
	if s.vars[name] != nil || !v.deleted && !s.mayUse(v.pb.GetId(), name) {
		return fmt.Errorf("snapshot holds variable %q (id %q) twice", name, v.pb.GetId())
	}
	s.vars[name] = v
	if !v.deleted {
		s.ids[v.pb.GetId()] = name
		s.live++
	}
	return nil
}

// fields calls visit for every varint and bytes field of a message.
func fields(raw []byte, visit func(num protowire.Number, n uint64, b []byte) error) error {
	for len(raw) > 0 {
		num, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		var v uint64
		var b []byte
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(raw)
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(raw)
		default:
			n = protowire.ConsumeFieldValue(num, typ, raw)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		if err := visit(num, v, b); err != nil {
			return err
		}
	}
	return nil
}
