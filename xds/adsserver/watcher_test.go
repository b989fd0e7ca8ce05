package adsserver

import (
	"context"
	"fmt"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

func publishModel(t testing.TB, srv *Server, position uint64, requests uint32) {
	t.Helper()
	p := &policy.Policy{Position: position, Models: []policy.Model{{
		Name: "chat", Salt: "s", Unit: experiments.UnitUser, MaxAttempts: 1,
		Arms:     []policy.Arm{{Name: "only", Version: "v1", Ranges: []experiments.Range{{End: experiments.Buckets}}}},
		Versions: []policy.Version{{Name: "v1", MaxRequests: requests}},
	}}}
	res, err := translate.Encode(p, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Publish(DefaultGroup, res, position); err != nil {
		t.Fatal(err)
	}
}

// publishVersions publishes one model of these versions; all buckets go to the first.
func publishVersions(t testing.TB, srv *Server, position uint64, names ...string) {
	t.Helper()
	m := policy.Model{Name: "chat", Salt: "s", Unit: experiments.UnitUser, MaxAttempts: 1,
		Arms: []policy.Arm{{Name: "only", Version: names[0], Ranges: []experiments.Range{{End: experiments.Buckets}}}}}
	for _, name := range names {
		m.Versions = append(m.Versions, policy.Version{Name: name})
	}
	res, err := translate.Encode(&policy.Policy{Position: position, Models: []policy.Model{m}}, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Publish(DefaultGroup, res, position); err != nil {
		t.Fatal(err)
	}
}

// The ordered stock loop throws a waiting response away when a request of its type
// arrives first (processAllExcept). The stream must not wait for it forever. The stock
// loop is played by hand here, because that race cannot be forced from outside:
//
//  1. the client holds version 1; version 2 is published, its handle enters the channel
//  2. a request arrives first: the loop cancels the watch and empties the channel
//  3. the loop asks again: the response must come now
func TestSotwHandleDroppedByTheStockLoop(t *testing.T) {
	srv := New(Options{})
	publishModel(t, srv, 1, 1)
	s, err := srv.open(context.Background(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.done(s)
	w, ch := &watcher{s}, make(chan cache.Response, 10)
	const name = "model/chat/v1"
	req := &discovery.DiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNames: []string{name}, Node: &core.Node{Id: "g"}}
	sub := stream.NewSotwSubscription(req.GetResourceNames(), true)
	send := func() string {
		t.Helper()
		select {
		case r := <-ch:
			msg, err := r.GetDiscoveryResponse()
			if err != nil {
				t.Fatal(err)
			}
			msg.Nonce = msg.GetVersionInfo()
			s.sent(xds.TypeCluster, msg.GetNonce())
			return msg.GetNonce()
		default:
			t.Fatal("no response")
			return ""
		}
	}
	if _, err := w.CreateWatch(req, sub, ch); err != nil {
		t.Fatal(err)
	}
	ack := &discovery.DiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNames: []string{name}, Node: req.Node, ResponseNonce: send()}
	cancel, err := w.CreateWatch(ack, sub, ch)
	if err != nil {
		t.Fatal(err)
	}

	publishModel(t, srv, 2, 2)
	cancel()
	if len(ch) != 1 {
		t.Fatalf("%d handles waiting, want 1", len(ch))
	}
	<-ch
	if _, err := w.CreateWatch(ack, sub, ch); err != nil {
		t.Fatal(err)
	}
	second := send()
	done := &discovery.DiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNames: []string{name}, Node: req.Node, ResponseNonce: second}
	if _, err := w.CreateWatch(done, sub, ch); err != nil {
		t.Fatal(err)
	}
	if n := srv.Ledger()[0]; n.Acked != 2 || len(ch) != 0 {
		t.Fatalf("ledger %+v, %d handles left", n, len(ch))
	}
}

// A push that finds a request of some type half handled (its watch cancelled, not yet
// renewed) waits for it, so that the order of types and the closing MeshPolicy hold.
func TestPushWaitsForAHalfHandledRequest(t *testing.T) {
	srv := New(Options{})
	publishModel(t, srv, 1, 1)
	s, err := srv.open(context.Background(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.done(s)
	w, ch := &watcher{s}, make(chan cache.DeltaResponse, 20)
	node := &core.Node{Id: "n"}
	cancels := map[string]func(){}
	request := func(typeURL, nonce string) {
		t.Helper()
		sub := stream.NewDeltaSubscription([]string{"*"}, nil, nil, true)
		cancel, err := w.CreateDeltaWatch(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, Node: node, ResponseNonce: nonce}, sub, ch)
		if err != nil {
			t.Fatal(err)
		}
		cancels[typeURL] = cancel
	}
	drain := func() (types []string) {
		for len(ch) > 0 {
			h := <-ch
			msg, err := h.GetDeltaDiscoveryResponse()
			if err != nil {
				t.Fatal(err)
			}
			s.sent(msg.GetTypeUrl(), "n"+msg.GetTypeUrl())
			types = append(types, msg.GetTypeUrl())
		}
		return types
	}
	for _, typeURL := range []string{xds.TypeCluster, xds.TypeMeshPolicy} {
		request(typeURL, "")
	}
	for _, typeURL := range drain() {
		request(typeURL, "n"+typeURL)
	}
	cancels[xds.TypeCluster]()
	publishModel(t, srv, 2, 2)
	if got := drain(); len(got) != 0 {
		t.Fatalf("pushed %v into a half handled request", got)
	}
	request(xds.TypeCluster, "")
	if got := drain(); len(got) != 2 || got[0] != xds.TypeCluster || got[1] != xds.TypeMeshPolicy {
		t.Fatalf("pushed %v, want Cluster then MeshPolicy", got)
	}
}

// Telling a stream about a push that does not concern it costs no allocation: with
// thousands of streams this is the inner loop of Publish.
func TestAdvanceAllocations(t *testing.T) {
	srv := New(Options{})
	publishModel(t, srv, 1, 1)
	s, err := srv.open(context.Background(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.done(s)
	w, ch := &watcher{s}, make(chan cache.DeltaResponse, 20)
	sub := stream.NewDeltaSubscription([]string{"other"}, nil, nil, true)
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: []string{"other"}, Node: &core.Node{Id: "n"}}
	if _, err := w.CreateDeltaWatch(req, sub, ch); err != nil {
		t.Fatal(err)
	}
	if _, err := (<-ch).GetDeltaDiscoveryResponse(); err != nil {
		t.Fatal(err)
	}
	s.sent(xds.TypeCluster, "1")
	req.ResponseNonce, req.ResourceNamesSubscribe = "1", nil
	if _, err := w.CreateDeltaWatch(req, sub, ch); err != nil {
		t.Fatal(err)
	}
	gens := []*generation{s.target, nil}
	publishModel(t, srv, 2, 2)
	gens[1] = s.target
	i := 0
	if n := testing.AllocsPerRun(100, func() {
		s.group.current.Store(gens[i%2])
		i++
		s.mu.Lock()
		s.advance()
		s.mu.Unlock()
	}); n > 2 { // the position closures of the ledger
		t.Errorf("%v allocations per stream and push, want at most 2", n)
	}
	if len(ch) != 0 {
		t.Error("a push reached a stream it does not concern")
	}
}

// A change of one node costs the same whatever the number of nodes, also while somebody
// follows a position.
func TestLedgerChangeAllocations(t *testing.T) {
	srv := New(Options{})
	publishModel(t, srv, 1, 1)
	sessions := make([]*session, 500)
	for i := range sessions {
		s, err := srv.open(context.Background(), true)
		if err != nil {
			t.Fatal(err)
		}
		defer srv.done(s)
		if err := s.identify(&core.Node{Id: fmt.Sprint("n", i)}); err != nil {
			t.Fatal(err)
		}
		sessions[i] = s
	}
	p := srv.Follow(1)
	defer p.Close()
	position := uint64(0)
	if n := testing.AllocsPerRun(100, func() {
		position++
		srv.ledger.record(sessions[position%500], func(e *nodeEntry) { e.Acked = position })
	}); n > 1 {
		t.Errorf("%v allocations per change of a node, want at most 1", n)
	}
}
