package adsserver

import (
	"context"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	deltasrv "github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	sotwsrv "github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/xds"
)

// ads is the gRPC service. Every stream gets its own stock go-control-plane server with
// its session as ConfigWatcher and callbacks, which ties each watch to its stream; the
// stock server is a few words, so this costs nothing.
type ads struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	srv *Server
}

// namedOnly are the types an empty subscription does not mean "everything" for: the
// legacy wildcard exists for LDS, CDS and scoped routes alone.
func namedOnly() []string {
	return []string{xds.TypeSecret, xds.TypeEndpoint, xds.TypeRoute, xds.TypeModelPolicy, xds.TypeMeshPolicy, xds.TypeRuntime, xds.TypeExtension}
}

// DeltaAggregatedResources serves sidecars and Envoys.
func (a *ads) DeltaAggregatedResources(st discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	s, err := a.srv.open(st.Context(), true)
	if err != nil {
		return status.ToGRPC(err)
	}
	defer a.srv.done(s)
	w := &watcher{s}
	srv := deltasrv.NewServer(s.ctx, w, deltaCallbacks{s}, deltasrv.DeactivateLegacyWildcardForTypes(namedOnly()))
	return s.outcome(srv.DeltaStreamHandler(deltaStream{st, s}, ""))
}

// StreamAggregatedResources serves gRPC clients. Ordered: one channel per stream, so
// the responses of a push leave in the order they were fired.
func (a *ads) StreamAggregatedResources(st discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	s, err := a.srv.open(st.Context(), false)
	if err != nil {
		return status.ToGRPC(err)
	}
	defer a.srv.done(s)
	w := &watcher{s}
	srv := sotwsrv.NewServer(s.ctx, w, sotwCallbacks{s}, sotwsrv.WithOrderedADS(), sotwsrv.DeactivateLegacyWildcardForTypes(namedOnly()))
	return s.outcome(srv.StreamHandler(st, ""))
}

// watcher is the cache.ConfigWatcher of one stream.
type watcher struct{ s *session }

// CreateDeltaWatch handles one delta request: its answer to an earlier response, its
// change of subscription, and what is due now.
func (w *watcher) CreateDeltaWatch(req *cache.DeltaRequest, sub cache.Subscription, out chan cache.DeltaResponse) (func(), error) {
	s := w.s
	if err := s.identify(req.GetNode()); err != nil {
		return nil, err
	}
	defer s.dropRetained()
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.types[req.GetTypeUrl()] == nil
	t, err := s.typeOf(req.GetTypeUrl())
	if err != nil {
		return nil, err
	}
	if nonce := req.GetResponseNonce(); nonce != "" {
		s.answer(t, nonce, req.GetErrorDetail())
	}
	subscribe := req.GetResourceNamesSubscribe()
	if !first && s.probed(req) {
		subscribe = nil // the answer comes by itself
	}
	s.traffic.resumed = s.traffic.resumed || first && len(req.GetInitialResourceVersions()) > 0
	due, err := t.subscribeDelta(sub, first, subscribe, req.GetResourceNamesUnsubscribe(), req.GetInitialResourceVersions())
	if err != nil {
		return nil, err
	}
	// At most one handle per type is in the channel (fired), its capacity is twenty and
	// the stock loop empties it before every request, so this never blocks.
	cancel, err := s.arm(t, func() { out <- &deltaHandle{s: s, t: t} }, due)
	if err == nil && s.held != "" && s.srv.opt.SendAway {
		return cancel, outrigger.Errorf(outrigger.Locked, "%s is not known here, and only a control plane can tell whether it was removed; ask it", s.held)
	}
	return cancel, err
}

// CreateWatch handles one state-of-the-world request.
func (w *watcher) CreateWatch(req *cache.Request, sub cache.Subscription, out chan cache.Response) (func(), error) {
	s := w.s
	if err := s.identify(req.GetNode()); err != nil {
		return nil, err
	}
	defer s.dropRetained()
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.types[req.GetTypeUrl()] == nil
	t, err := s.typeOf(req.GetTypeUrl())
	if err != nil {
		return nil, err
	}
	if t.fired {
		// The ordered stock loop threw the waiting handle away before calling us.
		t.fired = false
		s.open--
	}
	nonce := req.GetResponseNonce()
	if first && nonce == "" {
		t.claimed = req.GetVersionInfo()
		s.traffic.resumed = s.traffic.resumed || t.claimed != ""
	}
	repeated := nonce != "" && nonce == t.lastSeen && req.GetErrorDetail() == nil
	if nonce != "" {
		s.answer(t, nonce, req.GetErrorDetail())
	}
	due, err := t.subscribeSotw(sub, first, repeated)
	if err != nil {
		return nil, err
	}
	due = due && s.canAnswerSotw(t)
	return s.arm(t, func() { out <- &sotwHandle{s: s, t: t, req: req} }, due)
}

// canAnswerSotw: nonexistence of a name can only be said for LDS and CDS, by absence;
// for other types silence is the protocol's answer. Called with mu held.
func (s *session) canAnswerSotw(t *typeSub) bool {
	g := s.target
	if g == nil {
		g = s.group.wantedBy(s.node)
	}
	if g == nil || s.stateOf(g, t.typeURL) == nil {
		return false
	}
	if t.wildcard || fullState(t.typeURL) {
		return true
	}
	for name := range t.force {
		if s.stateOf(g, t.typeURL).entries[name] != nil {
			return true
		}
	}
	return false
}

// deltaHandle is a response that is computed when the stream's goroutine sends it.
type deltaHandle struct {
	s *session
	t *typeSub
}

// GetDeltaDiscoveryResponse is called exactly once per handle by the stock server.
func (h *deltaHandle) GetDeltaDiscoveryResponse() (*discovery.DeltaDiscoveryResponse, error) {
	return h.s.buildDelta(h.t), nil
}

// GetDeltaRequest returns what the stock server reads of the request whose watch fired:
// its type. The request itself, with the versions a client came back with, is not kept.
func (h *deltaHandle) GetDeltaRequest() *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: h.t.typeURL}
}

// GetSystemVersion is part of the interface and unused by the stock server.
func (h *deltaHandle) GetSystemVersion() (string, error) { return "", nil }

// GetResponseVersion is part of the interface and unused by the stock server.
func (h *deltaHandle) GetResponseVersion() string { return "" }

// GetNextVersionMap returns a fresh map: the stock server writes into it, and the
// session keeps its own, exact account.
func (h *deltaHandle) GetNextVersionMap() map[string]string { return map[string]string{} }

// GetReturnedResources is GetNextVersionMap under its new name.
func (h *deltaHandle) GetReturnedResources() map[string]string { return map[string]string{} }

// GetContext returns the stream's context.
func (h *deltaHandle) GetContext() context.Context { return h.s.ctx }

// sotwHandle is deltaHandle for the state of the world.
type sotwHandle struct {
	s   *session
	t   *typeSub
	req *discovery.DiscoveryRequest
}

// GetDiscoveryResponse is called exactly once per handle by the stock server.
func (h *sotwHandle) GetDiscoveryResponse() (*discovery.DiscoveryResponse, error) {
	return h.s.buildSotw(h.t), nil
}

// GetRequest returns the request whose watch fired.
func (h *sotwHandle) GetRequest() *discovery.DiscoveryRequest { return h.req }

// GetVersion is part of the interface and unused by the stock server.
func (h *sotwHandle) GetVersion() (string, error) { return "", nil }

// GetResponseVersion is part of the interface and unused by the stock server.
func (h *sotwHandle) GetResponseVersion() string { return "" }

// GetReturnedResources returns a fresh map: the stock server deletes from it.
func (h *sotwHandle) GetReturnedResources() map[string]string { return map[string]string{} }

// GetContext returns the stream's context.
func (h *sotwHandle) GetContext() context.Context { return h.s.ctx }

type deltaCallbacks struct{ s *session }

func (deltaCallbacks) OnDeltaStreamOpen(context.Context, int64, string) error { return nil }
func (deltaCallbacks) OnDeltaStreamClosed(int64, *core.Node)                  {}
func (c deltaCallbacks) OnStreamDeltaRequest(_ int64, req *discovery.DeltaDiscoveryRequest) error {
	return checkType(req.GetTypeUrl())
}
func (c deltaCallbacks) OnStreamDeltaResponse(_ int64, _ *discovery.DeltaDiscoveryRequest, resp *discovery.DeltaDiscoveryResponse) {
	if c.s.sent(resp.GetTypeUrl(), resp.GetNonce()) {
		c.s.srv.metrics.heartbeat(c.s.ctx)
		return
	}
	c.s.srv.metrics.response(c.s.ctx, resp.GetTypeUrl(), len(resp.GetResources()))
}

type sotwCallbacks struct{ s *session }

func (sotwCallbacks) OnStreamOpen(context.Context, int64, string) error { return nil }
func (sotwCallbacks) OnStreamClosed(int64, *core.Node)                  {}
func (c sotwCallbacks) OnStreamRequest(_ int64, req *discovery.DiscoveryRequest) error {
	return checkType(req.GetTypeUrl())
}
func (c sotwCallbacks) OnStreamResponse(_ context.Context, _ int64, _ *discovery.DiscoveryRequest, resp *discovery.DiscoveryResponse) {
	c.s.sent(resp.GetTypeUrl(), resp.GetNonce())
	c.s.srv.metrics.response(c.s.ctx, resp.GetTypeUrl(), len(resp.GetResources()))
}

func checkType(typeURL string) error {
	if typeURL == "" || len(typeURL) > outrigger.MaxNameBytes {
		return outrigger.Errorf(outrigger.Invalid, "type_url is %d bytes long, allowed is 1..%d; an aggregated stream names the type in every request", len(typeURL), outrigger.MaxNameBytes)
	}
	return nil
}
