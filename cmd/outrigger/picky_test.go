//go:build !dataplane

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// picky is a sidecar for scripts that accepts every resource but one: the policy of a
// model that has more than a number of versions, as an older release would that knows a
// smaller limit. Our own sidecar accepts all that our control plane publishes, so it
// cannot show what a rejection looks like.
//
//	picky -control unix:c.sock -node node-b/pod -model chat -most 1
func picky() {
	control := flag.String("control", "", "control plane")
	node := flag.String("node", "", "node id")
	model := flag.String("model", "", "model")
	most := flag.Int("most", 0, "versions it takes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := beg(ctx, *control, outrigger.Node{ID: *node, Kind: "sidecar", Region: "eu"}, *model, *most)
	stopped := ctx.Err() != nil
	stop()
	if err != nil && !stopped {
		fmt.Fprintln(os.Stderr, "picky:", err)
		os.Exit(1)
	}
}

func beg(ctx context.Context, control string, node outrigger.Node, model string, most int) error {
	conn, err := grpc.NewClient(control, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	st, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for _, typeURL := range xds.Types() {
		err := st.Send(&discovery.DeltaDiscoveryRequest{Node: translate.Node(node), TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}})
		if err != nil {
			return err
		}
	}
	for {
		r, err := st.Recv()
		if err != nil {
			return err
		}
		answer := &discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
		for _, res := range r.GetResources() {
			var p pb.ModelPolicy
			if res.GetResource().UnmarshalTo(&p) == nil && p.GetName() == model && len(p.GetVersions()) > most {
				answer.ErrorDetail = &rpc.Status{Message: fmt.Sprintf("ModelPolicy %s: %d versions, at most %d are understood", model, len(p.GetVersions()), most)}
			}
		}
		if err := st.Send(answer); err != nil {
			return err
		}
	}
}
