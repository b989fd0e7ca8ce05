package adsserver

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/xds"
)

// Nearly every delta response is one of two: all of a type, or its last change. They
// differ between streams in the nonce alone, and the fields of a protobuf message may
// come in any order (https://protobuf.dev/programming-guides/encoding/#order). So all but
// the nonce is marshalled once and the same bytes are queued on every connection: a
// thousand streams that synchronise at once hold one copy, not a thousand.

// TransportOptions are what a gRPC server has to be made with so that the streams of
// Register share marshalled bytes. Without them everything works and each stream makes
// its own copy. They set the codec of the whole server: protobuf, as by default.
func TransportOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(protocodec.Name)})}
}

// packed is a response together with the bytes of all of it but the nonce. To any other
// codec it is the response.
type packed struct {
	*discovery.DeltaDiscoveryResponse
	shared []byte
}

// codec is gRPC's protobuf codec, which it wraps, but for packed.
type codec struct{ encoding.CodecV2 }

// Marshal returns buffers that nobody may write to.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	p, ok := v.(*packed)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	nonce := protowire.AppendTag(nil, nonceField, protowire.BytesType)
	nonce = protowire.AppendString(nonce, p.GetNonce())
	return mem.BufferSlice{mem.SliceBuffer(p.shared), mem.SliceBuffer(nonce)}, nil
}

// nonceField is the number of DeltaDiscoveryResponse.nonce.
const nonceField = 5

// wireOf marshals a response that has no nonce yet; nil if that fails, which sending it
// in the ordinary way will report.
func wireOf(r *discovery.DeltaDiscoveryResponse) []byte {
	raw, err := proto.Marshal(r)
	if err != nil {
		return nil
	}
	return raw
}

// deltaStream sends the responses of a session as the stock server hands them over.
type deltaStream struct {
	discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	s *session
}

// Recv takes what a relay says about its pods for itself, before anything that the relay
// sends after it.
func (d deltaStream) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	for {
		r, err := d.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Recv()
		if err != nil || r.GetTypeUrl() != xds.TypeRelayStanding {
			return r, err
		}
		if err := d.s.stand(r); err != nil {
			d.s.srv.log.Warn("a relay's stream is ended", "error", err)
			return nil, err
		}
	}
}

// Send is called by the goroutine that built the response, right after it did.
func (d deltaStream) Send(r *discovery.DeltaDiscoveryResponse) error {
	shared := d.s.wire
	d.s.wire = nil
	if shared == nil {
		return d.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Send(r)
	}
	return d.SendMsg(&packed{r, shared})
}
