package node

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// A variable lies in the table as its protobuf encoding without the key, which the table
// has already.

const keyField = 2 // of outrigger.v1.Variable

// AppendVariable appends to b what the table holds of v. Errors are those of proto.Marshal.
func AppendVariable(b []byte, v *pb.Variable) ([]byte, error) {
	start := len(b)
	b, err := proto.MarshalOptions{}.MarshalAppend(b, v)
	if err != nil || v.GetKey() == nil {
		return b, err
	}
	for at := start; at < len(b); {
		field, _, n := protowire.ConsumeField(b[at:])
		if n < 0 {
			return b, protowire.ParseError(n)
		}
		if field == keyField {
			return append(b[:at], b[at+n:]...), nil
		}
		at += n
	}
	return b, nil
}

// ParseVariable reads what the table holds under id, the text form of a key. b is not
// kept. Errors are those of proto.Unmarshal.
func ParseVariable(id string, b []byte) (*pb.Variable, error) {
	v := &pb.Variable{}
	if err := proto.Unmarshal(b, v); err != nil {
		return nil, err
	}
	tenant, rest, _ := strings.Cut(id, "/")
	session, name, _ := strings.Cut(rest, "/")
	v.Key = &pb.Key{Tenant: tenant, Session: session, Name: name}
	return v, nil
}
