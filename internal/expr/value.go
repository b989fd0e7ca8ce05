package expr

import (
	"fmt"
	"reflect"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"

	"github.com/outrigger-mesh/outrigger"
)

// metric is a Measure as CEL sees it: it can be compared, and the comparison may be
// unknown.
type metric struct{ m Measure }

var metricType = types.NewObjectType("outrigger.metric", traits.ComparerType)

// Compare implements traits.Comparer: 1 if certainly greater, -1 if certainly less, 0 if
// certainly equal, unknown otherwise.
func (a metric) Compare(other ref.Val) ref.Val {
	var b Measure
	switch v := other.(type) {
	case metric:
		b = v.m
	case types.Double:
		b = Exactly(float64(v))
	case types.Int:
		b = Exactly(float64(v))
	case types.Uint:
		b = Exactly(float64(v))
	default:
		return types.MaybeNoSuchOverloadErr(other)
	}
	switch {
	case !a.m.Known || !b.Known:
		return types.NewUnknown(0, nil)
	case a.m.Low > b.High:
		return types.IntOne
	case a.m.High < b.Low:
		return types.IntNegOne
	case a.m.Low == a.m.High && b.Low == b.High:
		return types.IntZero
	}
	return types.NewUnknown(0, nil)
}

// ConvertToNative implements ref.Val; a metric stays within expressions.
func (a metric) ConvertToNative(t reflect.Type) (any, error) {
	return nil, fmt.Errorf("a metric is not a %v", t)
}

// ConvertToType implements ref.Val.
func (a metric) ConvertToType(t ref.Type) ref.Val {
	return types.NewErr("a metric cannot become a %s", t.TypeName())
}

// Equal implements ref.Val. Compile admits no equality of metrics; CEL wants the method.
func (a metric) Equal(other ref.Val) ref.Val {
	b, ok := other.(metric)
	return types.Bool(ok && a.m == b.m)
}

// Type implements ref.Val.
func (a metric) Type() ref.Type { return metricType }

// Value implements ref.Val.
func (a metric) Value() any { return a.m }

func boolValue(m Measure) ref.Val {
	switch {
	case !m.Known:
	case m.Low >= 1:
		return types.True
	case m.High <= 0:
		return types.False
	}
	return types.NewUnknown(0, nil)
}

func truth(source string, out ref.Val, err error) (Truth, error) {
	switch {
	case err != nil:
		return Unknown, outrigger.Errorf(outrigger.Invalid, "condition %q: %v", source, err)
	case types.IsUnknown(out):
		return Unknown, nil
	case out == types.True:
		return True, nil
	case out == types.False:
		return False, nil
	}
	return Unknown, outrigger.Errorf(outrigger.Invalid, "condition %q gives %v, neither true nor false", source, out)
}
