package translate

import (
	"bytes"
	"encoding/json"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacconfig "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	lua "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Redacted stands in dumps where a secret was.
const Redacted = "redacted"

// Dump returns a resource as JSON for people, without what must not be shown: fields that
// Envoy's API marks as sensitive (keys, passwords), header values that open a model, and
// the salts of the bucket rule (whoever knows one can choose a user name that lands in an
// arm of their liking), also those inside the Lua script. The message is not modified.
// The same content gives the same bytes in one build. Errors have kind Internal.
func Dump(m proto.Message) (json.RawMessage, error) {
	shown := proto.Clone(m)
	if err := redact(shown.ProtoReflect()); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "dump")
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(shown)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "dump")
	}
	var out bytes.Buffer // protojson's spacing is random on purpose
	if err := json.Compact(&out, raw); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "dump")
	}
	return out.Bytes(), nil
}

// redact blanks the secrets of m and of everything inside it, packed messages included.
func redact(m protoreflect.Message) error {
	switch x := m.Interface().(type) {
	case *anypb.Any:
		return redactAny(x)
	case *pb.ModelPolicy:
		x.Salt = Redacted
	case *lua.Lua:
		if src := x.GetDefaultSourceCode(); src.GetInlineString() != "" {
			shown := "-- " + Redacted + "\n"
			if strings.HasSuffix(src.GetInlineString(), assignSource) {
				shown += assignSource
			}
			src.Specifier = &core.DataSource_InlineString{InlineString: shown}
		}
	case *rbacconfig.Principal:
		if h := x.GetHeader().GetStringMatch(); h != nil {
			h.MatchPattern = &matcher.StringMatcher_Exact{Exact: Redacted}
		}
	}
	var failed error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case sensitive(f):
			blank(m, f)
		case f.IsMap() && f.MapValue().Message() != nil:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				failed = redact(v.Message())
				return failed == nil
			})
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				if failed = redact(v.List().Get(i).Message()); failed != nil {
					break
				}
			}
		case !f.IsMap() && f.Message() != nil:
			failed = redact(v.Message())
		}
		return failed == nil
	})
	return failed
}

// redactAny repacks a message of a known type; what nobody here can read is left out.
func redactAny(a *anypb.Any) error {
	inner, err := a.UnmarshalNew()
	if err != nil {
		a.Reset()
		return nil
	}
	if err := redact(inner.ProtoReflect()); err != nil {
		return err
	}
	return anypb.MarshalFrom(a, inner, proto.MarshalOptions{Deterministic: true})
}

// RedactAny is a copy of a packed resource with the secrets blanked as in Dump. Errors have
// kind Internal.
func RedactAny(a *anypb.Any) (*anypb.Any, error) {
	out := &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: a.GetValue()}
	if err := redactAny(out); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "redact")
	}
	return out, nil
}

// blank says that there is a secret without saying which.
func blank(m protoreflect.Message, f protoreflect.FieldDescriptor) {
	switch {
	case f.IsList(), f.IsMap():
		m.Clear(f)
	case f.Kind() == protoreflect.StringKind:
		m.Set(f, protoreflect.ValueOfString(Redacted))
	case f.Kind() == protoreflect.BytesKind:
		m.Set(f, protoreflect.ValueOfBytes([]byte(Redacted)))
	default:
		m.Clear(f)
	}
}

// sensitive reads the annotation udpa.annotations.sensitive
// (https://github.com/cncf/xds/blob/main/udpa/annotations/sensitive.proto).
func sensitive(f protoreflect.FieldDescriptor) (yes bool) {
	f.Options().ProtoReflect().Range(func(o protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if o.FullName() == "udpa.annotations.sensitive" {
			yes = v.Bool()
		}
		return !yes
	})
	return yes
}
