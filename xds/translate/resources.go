package translate

import (
	"fmt"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	runtime "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
)

// Marshal returns the deterministic bytes of one message: the same content gives the
// same bytes in every process of the same build.
func Marshal(m proto.Message) ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

// ResourceError says which resource is wrong and why; its text is what a NACK carries.
type ResourceError struct {
	TypeURL string
	Name    string
	Reason  string
}

// Error returns "Cluster model/chat/v1: reason".
func (e *ResourceError) Error() string {
	return xds.ShortType(e.TypeURL) + " " + e.Name + ": " + e.Reason
}

func bad(typeURL, name, format string, args ...any) error {
	re := &ResourceError{TypeURL: typeURL, Name: name, Reason: fmt.Sprintf(format, args...)}
	return &outrigger.Error{Kind: outrigger.Invalid, Message: "xds resource", Cause: re}
}

// Unmarshal reads one resource of a known type, checks it by the rules generated from
// its proto, and checks that it carries the name it was sent under. Unknown types and
// broken bytes give an Invalid error around a *ResourceError.
func Unmarshal(typeURL, name string, raw []byte) (proto.Message, error) {
	m := newMessage(typeURL)
	if m == nil {
		return nil, bad(typeURL, name, "unknown type URL %q", typeURL)
	}
	if err := proto.Unmarshal(raw, m); err != nil {
		return nil, bad(typeURL, name, "not decodable: %v", err)
	}
	if own, ok := NameOf(m); !ok || own != name {
		return nil, bad(typeURL, name, "the resource calls itself %q", own)
	}
	if err := validate(m); err != nil {
		return nil, bad(typeURL, name, "%v", err)
	}
	if s, ok := m.(*tls.Secret); ok {
		if err := checkSecret(s); err != nil {
			return nil, bad(typeURL, name, "%v", err)
		}
	}
	return m, nil
}

func newMessage(typeURL string) proto.Message {
	switch typeURL {
	case xds.TypeCluster:
		return &cluster.Cluster{}
	case xds.TypeEndpoint:
		return &endpoint.ClusterLoadAssignment{}
	case xds.TypeListener:
		return &listener.Listener{}
	case xds.TypeRoute:
		return &route.RouteConfiguration{}
	case xds.TypeScopedRoute:
		return &route.ScopedRouteConfiguration{}
	case xds.TypeRuntime:
		return &runtime.Runtime{}
	case xds.TypeExtension:
		return &core.TypedExtensionConfig{}
	case xds.TypeSecret:
		return &tls.Secret{}
	case xds.TypeModelPolicy:
		return &pb.ModelPolicy{}
	case xds.TypeMeshPolicy:
		return &pb.MeshPolicy{}
	}
	return nil
}

// NameOf returns the xDS resource name a message carries; false for types we do not
// publish.
func NameOf(m proto.Message) (string, bool) {
	switch m := m.(type) {
	case *endpoint.ClusterLoadAssignment:
		return m.GetClusterName(), true
	case *pb.MeshPolicy:
		return xds.MeshName, true
	case interface{ GetName() string }:
		return m.GetName(), true
	}
	return "", false
}

// ModelOf returns the model a resource belongs to; false for MeshPolicy and foreign names.
func ModelOf(typeURL, name string) (string, bool) {
	switch typeURL {
	case xds.TypeModelPolicy:
		return name, true
	case xds.TypeListener, xds.TypeRoute, xds.TypeScopedRoute:
		return strings.CutPrefix(name, modelPrefix)
	case xds.TypeCluster, xds.TypeEndpoint:
		rest, ok := strings.CutPrefix(name, modelPrefix)
		i := strings.LastIndexByte(rest, '/')
		if !ok || i <= 0 {
			return "", false
		}
		return rest[:i], true
	}
	return "", false
}

// SubjectOf returns what a resource is about: a model, and for clusters and load
// assignments one of its versions, else "". false for what no model has of its own.
func SubjectOf(typeURL, name string) (model, version string, ok bool) {
	switch typeURL {
	case xds.TypeCluster, xds.TypeEndpoint:
		if rest, aggregate := strings.CutPrefix(name, failoverPrefix); aggregate {
			name = modelPrefix + rest
		}
		if model, ok = ModelOf(typeURL, name); ok {
			version = name[strings.LastIndexByte(name, '/')+1:]
		}
		return model, version, ok
	}
	model, ok = ModelOf(typeURL, name)
	return model, "", ok
}

// ValidateAll runs the generated validation of every resource and returns the first
// violation in (push order, name) order.
func (r *Resources) ValidateAll() error {
	for _, t := range xds.Pushed() {
		for _, name := range r.Names(t) {
			if err := validate(r.Get(t, name)); err != nil {
				return bad(t, name, "%v", err)
			}
		}
	}
	return nil
}

// validateTouched is ValidateAll for what was put since the fork.
func (r *Resources) validateTouched() error {
	for _, k := range r.sortedTouched() {
		m := r.Get(k.TypeURL, k.Name)
		if m == nil {
			continue
		}
		if err := validate(m); err != nil {
			return bad(k.TypeURL, k.Name, "%v", err)
		}
	}
	return nil
}

func validate(m proto.Message) error {
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		return v.ValidateAll()
	}
	return nil // our own messages have no generated rules; Decode checks them
}
