package translate

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger"
)

const (
	nodeKind   = "outrigger.kind"
	nodeLabels = "outrigger.labels"
)

// Node is the xDS form of a mesh node: id, region and zone in their own fields, kind
// and labels in metadata.
func Node(n outrigger.Node) *core.Node {
	labels := make(map[string]*structpb.Value, len(n.Labels))
	for k, v := range n.Labels {
		labels[k] = structpb.NewStringValue(v)
	}
	return &core.Node{
		Id: n.ID, UserAgentName: "outrigger",
		Locality: &core.Locality{Region: n.Region, Zone: n.Zone},
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			nodeKind:   structpb.NewStringValue(n.Kind),
			nodeLabels: structpb.NewStructValue(&structpb.Struct{Fields: labels}),
		}},
	}
}

// NodeOf is the inverse of Node. Foreign clients have the Kind their user agent shows,
// "envoy" or "grpc", and none if it is not known.
func NodeOf(n *core.Node) outrigger.Node {
	f := n.GetMetadata().GetFields()
	out := outrigger.Node{
		ID: n.GetId(), Kind: f[nodeKind].GetStringValue(),
		Region: n.GetLocality().GetRegion(), Zone: n.GetLocality().GetZone(),
	}
	if out.Kind == "" {
		out.Kind = string(kindOfAgent(n))
	}
	if labels := f[nodeLabels].GetStructValue().GetFields(); len(labels) > 0 {
		out.Labels = make(map[string]string, len(labels))
		for k, v := range labels {
			out.Labels[k] = v.GetStringValue()
		}
	}
	return out
}
