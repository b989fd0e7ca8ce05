package relay

import (
	"context"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/xds"
)

// Register adds the aggregated discovery service, for the pods, to a gRPC server; make that
// with adsserver.TransportOptions.
func (r *Relay) Register(s grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(s, &pods{r: r})
}

// pods is the service. The stock services of the other protocol are not implemented.
type pods struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	r *Relay
}

// DeltaAggregatedResources serves one pod. Its first words say whether the control plane is
// there; a stream of which nobody knows yet whether it is waits for that a second at most.
func (p *pods) DeltaAggregatedResources(st discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	linked, holds := p.r.await(st.Context())
	if !linked && !holds {
		return status.ToGRPC(outrigger.Errorf(outrigger.Unavailable, "this relay has not reached the control plane yet"))
	}
	word := xds.RelayCut
	if linked {
		word = xds.RelayLinked
	}
	if err := st.SendHeader(metadata.Pairs(xds.RelayHeader, word)); err != nil {
		return err
	}
	return p.r.service.DeltaAggregatedResources(st)
}

// await has the relay follow the control plane, and waits a moment for it.
func (r *Relay) await(ctx context.Context) (linked, holds bool) {
	r.first.Do(func() { close(r.wanted) })
	clock := time.NewTimer(linkPatience)
	defer clock.Stop()
	for {
		r.mu.Lock()
		linked, holds = r.linked(time.Now()), r.link.holds
		changed := r.link.changed
		r.mu.Unlock()
		if linked {
			return linked, holds
		}
		select {
		case <-changed:
		case <-clock.C:
			return linked, holds
		case <-ctx.Done():
			return linked, holds
		}
	}
}
