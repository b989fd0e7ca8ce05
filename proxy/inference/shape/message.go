package shape

import (
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/outrigger-mesh/outrigger"
)

// Calls of inference.GRPCInferenceService that name a model, all in fields 1 (name) and 2
// (version) of their request.
var (
	grpcInfer  = API{Family: OIP, Operation: "infer", Idempotent: true, Tensors: true}
	grpcStream = API{Family: OIP, Operation: "infer", Streaming: Always, Tensors: true}
	grpcMeta   = API{Family: OIP, Operation: "metadata", Idempotent: true, Meta: true}
)

// MatchGRPC finds the API of a full gRPC method name. Calls that are about the server
// (ServerLive, ServerReady, ServerMetadata), or load and unload models, are none.
func MatchGRPC(method string) (*API, bool) {
	switch method {
	case "/inference.GRPCInferenceService/ModelInfer":
		return &grpcInfer, true
	case "/inference.GRPCInferenceService/ModelStreamInfer":
		return &grpcStream, true
	case "/inference.GRPCInferenceService/ModelReady", "/inference.GRPCInferenceService/ModelMetadata",
		"/inference.GRPCInferenceService/ModelConfig", "/inference.GRPCInferenceService/ModelStatistics":
		return &grpcMeta, true
	}
	return nil, false
}

// Names is what routing needs from a request message of the Open Inference Protocol over
// gRPC. No tensor is looked at.
type Names struct {
	Model, Version string // fields 1 and 2; of several, the last, as protobuf has it
	// SubUser and Sequence are the parameters "user_id" and "sequence_id" (field 4 of
	// ModelInferRequest), as Envelope has them.
	SubUser, Sequence string

	keep [][]byte // the message without fields 1 and 2
}

const (
	fieldName       = 1
	fieldVersion    = 2
	fieldParameters = 4
)

// ScanNames reads the top level of a request message. params says that field 4 holds
// parameters, as in ModelInferRequest. Errors have kind Invalid and are safe to show.
func ScanNames(message []byte, params bool) (Names, error) {
	var n Names
	from, at := 0, 0 // message[from:at] is to be kept
	for at < len(message) {
		num, typ, size := protowire.ConsumeField(message[at:])
		if size < 0 {
			return Names{}, outrigger.Errorf(outrigger.Invalid, "request message is not valid protobuf at byte %d", at)
		}
		field := message[at : at+size]
		switch {
		case typ != protowire.BytesType:
		case num == fieldName || num == fieldVersion:
			if num == fieldName {
				n.Model = string(valueOf(field))
			} else {
				n.Version = string(valueOf(field))
			}
			if from < at {
				n.keep = append(n.keep, message[from:at])
			}
			from = at + size
		case num == fieldParameters && params:
			if err := n.parameter(valueOf(field)); err != nil {
				return Names{}, err
			}
		}
		at += size
	}
	if from < at {
		n.keep = append(n.keep, message[from:at])
	}
	return n, nil
}

// valueOf returns the bytes of a valid length-delimited field.
func valueOf(field []byte) []byte {
	_, _, tag := protowire.ConsumeTag(field)
	v, _ := protowire.ConsumeBytes(field[tag:])
	return v
}

// parameter reads one entry of map<string, InferParameter>.
func (n *Names) parameter(entry []byte) error {
	key, value := "", ""
	err := fields(entry, func(num protowire.Number, typ protowire.Type, v []byte, _ uint64) error {
		switch {
		case num == 1 && typ == protowire.BytesType:
			key = string(v)
		case num == 2 && typ == protowire.BytesType:
			return fields(v, func(num protowire.Number, typ protowire.Type, v []byte, i uint64) error {
				switch {
				case num == 3 && typ == protowire.BytesType:
					value = string(v)
				case num == 2 && typ == protowire.VarintType:
					value = strconv.FormatInt(int64(i), 10)
				case num == 5 && typ == protowire.VarintType:
					value = strconv.FormatUint(i, 10)
				}
				return nil
			})
		}
		return nil
	})
	switch key {
	case "user_id":
		n.SubUser = value
	case "sequence_id":
		n.Sequence = value
	}
	return err
}

// fields visits the fields of a message: v holds length-delimited values, i varints.
func fields(b []byte, visit func(num protowire.Number, typ protowire.Type, v []byte, i uint64) error) error {
	for len(b) > 0 {
		num, typ, size := protowire.ConsumeField(b)
		if size < 0 {
			return outrigger.Errorf(outrigger.Invalid, "a parameter of the request is not valid protobuf")
		}
		var v []byte
		var i uint64
		switch typ {
		case protowire.BytesType:
			v = valueOf(b[:size])
		case protowire.VarintType:
			_, _, tag := protowire.ConsumeTag(b)
			i, _ = protowire.ConsumeVarint(b[tag:])
		}
		if err := visit(num, typ, v, i); err != nil {
			return err
		}
		b = b[size:]
	}
	return nil
}

// Rewrite returns the message with the name and version that upstream says (see
// SplitUpstream), which come first now; every other byte is as it was and in its order.
// With an empty upstream the caller's name is kept and its version dropped.
func (n *Names) Rewrite(upstream string) Parts {
	name, version := SplitUpstream(upstream)
	if upstream == "" {
		name = n.Model
	}
	head := protowire.AppendTag(nil, fieldName, protowire.BytesType)
	head = protowire.AppendString(head, name)
	if version != "" {
		head = protowire.AppendTag(head, fieldVersion, protowire.BytesType)
		head = protowire.AppendString(head, version)
	}
	p := Parts{head}
	switch len(n.keep) {
	case 0:
	case 1, 2:
		copy(p[1:], n.keep)
	default: // names between other fields: no writer does that
		for _, k := range n.keep {
			p[1] = append(p[1], k...)
		}
	}
	return p
}
