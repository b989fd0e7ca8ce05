package variable

import (
	"strings"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

// Type URLs of the bridge. The second prefix is what early clients sent and servers
// still accept.
const (
	typePrefix   = "type.googleapis.com/snakepit."
	legacyPrefix = "dspex.variables/"
	binarySuffix = ".binary"
)

// valueFromAny reads a bridge value: raw JSON under a snakepit type URL, not a
// serialised message. declared is the type named elsewhere in the call, or "".
func valueFromAny(a *anypb.Any, declared string, binary []byte) (*pb.Value, error) {
	if a == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "the call carries no value")
	}
	t := declared
	if t == "" {
		t = typeOf(a.TypeUrl)
	}
	return &pb.Value{Type: t, Json: a.Value, Binary: binary}, nil
}

// typeOf reads the variable type out of a type URL; "" if it is not one of the bridge's.
func typeOf(url string) string {
	t, ok := strings.CutPrefix(url, typePrefix)
	if !ok {
		if t, ok = strings.CutPrefix(url, legacyPrefix); !ok {
			return ""
		}
	}
	return strings.TrimSuffix(t, binarySuffix)
}

func anyFromValue(v *pb.Value) *anypb.Any {
	url := typePrefix + v.GetType()
	if len(v.GetBinary()) > 0 {
		url += binarySuffix
	}
	return &anypb.Any{TypeUrl: url, Value: v.GetJson()}
}

// variableToBridge builds the bridge's form; byte slices are shared with v.
func variableToBridge(v *pb.Variable) *snakepit.Variable {
	out := &snakepit.Variable{
		Id: v.GetId(), Name: v.GetKey().GetName(), Type: v.GetValue().GetType(), Value: anyFromValue(v.GetValue()),
		ConstraintsJson: v.GetConstraintsJson(), Metadata: v.GetMetadata(), LastUpdatedAt: v.GetUpdatedAt(),
		Version: v.GetVersion().GetCounter(), BinaryValue: v.GetValue().GetBinary(),
	}
	if o := v.GetOptimization(); o != nil {
		out.OptimizationStatus = &snakepit.OptimizationStatus{Optimizing: true, OptimizerId: o.GetOptimizer(), StartedAt: o.GetStartedAt()}
	}
	if v.GetSource() == sourcePython {
		out.Source = snakepit.Variable_PYTHON
	}
	return out
}

// sourcePython is what bridge clients are; the protocol has no other client.
const sourcePython = "PYTHON"

// nameOfID returns the variable name inside an id of the form var_<name>_<n>.
func nameOfID(id string) (name string, ok bool) {
	rest, ok := strings.CutPrefix(id, "var_")
	if !ok {
		return "", false
	}
	i := strings.LastIndexByte(rest, '_')
	if i <= 0 || i == len(rest)-1 {
		return "", false
	}
	for _, c := range rest[i+1:] {
		if c < '0' || c > '9' {
			return "", false
		}
	}
	return rest[:i], true
}
