package adsclient

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/internal/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// maxDetail bounds a rejection's text; control planes keep it.
const maxDetail = 2 << 10

// stream is one ADS stream. All fields belong to the goroutine of run.
type stream struct {
	c       *Client
	server  int
	relay   bool // server is a relay; linked: it is followed only while it is not cut off
	linked  bool
	vouched bool // and the control plane was heard through it
	ads     upstream.Stream
	view    *view // what this server said so far
	started time.Time
	inSync  func() // stops the first-sync clock
	synced  bool

	// pending holds, per type, the nonces that wait for their answer: an answer means
	// "in force", so it waits until the push is complete.
	pending  map[string][]string
	answered map[string]bool // types the server answered at least once
	closing  bool            // MeshPolicy arrived: the push is complete
	touched  map[key]bool    // resources this push changed
	dirty    map[string]bool // models this push changed
	failed   map[string]error
	warming  *time.Timer

	probe  *time.Timer
	asked  time.Time // when the unanswered probe was sent, zero if none
	missed int
}

// run opens the stream, subscribes to everything and handles what comes until the
// stream or ctx ends.
func (s *stream) run(ctx context.Context, conn grpc.ClientConnInterface) error {
	var receiver sync.WaitGroup
	defer receiver.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ads, err := upstream.Open(ctx, conn)
	if err != nil {
		return err
	}
	if s.relay {
		if err := s.greeted(ads, cancel); err != nil {
			return err
		}
	}
	s.ads = ads
	s.pending, s.answered = make(map[string][]string), make(map[string]bool)
	s.touched, s.dirty, s.failed = make(map[key]bool), make(map[string]bool), make(map[string]error)
	s.warming, s.probe = pause.Stopped(), pause.Stopped()
	defer s.warming.Stop()
	defer s.probe.Stop()
	if err := s.subscribe(); err != nil {
		return err
	}
	in, ended := make(chan *discovery.DeltaDiscoveryResponse), make(chan error, 1)
	receiver.Go(func() { ended <- upstream.Receive(ctx, ads, in) })
	home := make(chan struct{})
	if s.c.opt.Relay != nil && !s.relay {
		receiver.Go(func() { s.c.watchRelay(ctx, home) })
	}
	for {
		select {
		case <-home:
			return errHome
		case err := <-ended:
			return err
		case r := <-in:
			err = s.take(r)
		case <-s.warming.C:
			err = s.commit(true)
		case <-s.probe.C:
			err = s.ask()
		}
		if err != nil {
			return err
		}
	}
}

// subscribe asks for every type, reporting what is held. Only the first request of a
// stream carries the node.
func (s *stream) subscribe() error {
	node := translate.Node(s.c.opt.Node)
	for _, typeURL := range xds.Followed() {
		err := s.send(&discovery.DeltaDiscoveryRequest{
			Node: node, TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}, InitialResourceVersions: s.view.versions(typeURL),
		})
		if err != nil {
			return err
		}
		node = nil
	}
	return nil
}

func (s *stream) send(req *discovery.DeltaDiscoveryRequest) error { return s.ads.Send(req) }

// take adds one response to the view and commits if it completes a push.
func (s *stream) take(r *discovery.DeltaDiscoveryResponse) error {
	typeURL := r.GetTypeUrl()
	if !slices.Contains(xds.Followed(), typeURL) {
		return s.reply(typeURL, r.GetNonce(), nil) // not asked for, so nothing to object to
	}
	for _, res := range r.GetResources() {
		// A wrong resource is remembered in the view and reported by commit.
		if changed, err := s.view.put(typeURL, res); changed || err != nil {
			s.touch(typeURL, res.GetName())
		}
	}
	for _, name := range r.GetRemovedResources() {
		s.view.remove(typeURL, name)
		s.touch(typeURL, name)
	}
	s.pending[typeURL] = append(s.pending[typeURL], r.GetNonce())
	s.answered[typeURL] = true
	if typeURL == xds.TypeMeshPolicy {
		s.closing = true
		if !s.asked.IsZero() && (!s.relay || r.GetControlPlane().GetIdentifier() == xds.Vouched) {
			s.heard()
		}
	}
	return s.commit(false)
}

func (s *stream) touch(typeURL, name string) {
	s.touched[key{typeURL, name}] = true
	if model, ok := translate.ModelOf(typeURL, name); ok {
		s.dirty[model] = true
	}
}

func (s *stream) contact(at time.Time) {
	s.c.update(func(st *Status) {
		if at.After(st.LastContact) {
			st.LastContact = at
		}
	})
}

// commit puts a complete push in force and answers it. A push with open references
// waits for them (warming), at most warmTimeout; with expired they count as faults of
// their models.
func (s *stream) commit(expired bool) error {
	if !s.closing || !s.whole() {
		return nil
	}
	if missing := s.view.missing(); len(missing) > 0 && !expired {
		s.c.log.Info("policy waits for resources", "first", missing[0].String(), "count", len(missing))
		s.warming.Reset(warmTimeout)
		return nil
	}
	s.warming.Stop()
	s.closing = false
	if s.outdated() {
		return nil
	}
	if len(s.touched) > 0 || !s.synced {
		s.enforce()
	}
	return s.answer()
}

// whole: there was an answer for every type a policy is made of. Control planes that know
// nothing of secrets do not answer for these.
func (s *stream) whole() bool {
	for _, typeURL := range xds.Types() {
		if !s.answered[typeURL] {
			return false
		}
	}
	return true
}

// secretsTouched reports whether this push changed secrets.
func (s *stream) secretsTouched() bool {
	for k := range s.touched {
		if k.typeURL == xds.TypeSecret {
			return true
		}
	}
	return false
}

// enforce assembles the view and swaps the policy in.
func (s *stream) enforce() {
	prev, moved := s.c.policy.Load(), s.c.status.Load().Live
	a := assemble(s.view, prev, s.c.good, func(model string) bool { return s.dirty[model] || s.failed[model] != nil })
	s.failed = a.failed
	heard := time.Now()
	if !s.synced {
		heard = s.started // the first answers prove no more than that the request was heard
	}
	if !s.relay {
		s.contact(heard)
	}
	state := func(st *Status) {
		st.Live, st.Server, st.Relayed, st.LastNack = true, s.server, s.relay, describe(s.failed)
		switch {
		case s.relay && !s.vouched:
			st.Live = moved // a client that comes from a live stream has heard the control plane
			if a.policy != nil && st.Source != SourceADS {
				st.Source = SourceRelay
			}
		case a.policy != nil:
			st.Source = SourceADS
		}
	}
	if a.policy != nil && (!s.synced || s.secretsTouched()) {
		s.c.equip(a.good)
	}
	switch {
	case a.policy == nil:
		s.c.update(state) // the mesh part is unusable: everything stays as it is
	case same(prev, a.policy, len(s.touched) == 0):
		s.c.good = a.good
		s.c.update(state)
	default:
		s.c.good = a.good
		s.c.enforce(a.policy, state)
		s.c.metrics.commit()
	}
	if a.policy != nil {
		s.c.save(a.good)
	}
	if !s.synced {
		s.synced = true
		s.inSync()
		s.c.log.Info("in sync with control plane", "server", s.server, "relay", s.relay, "position", s.c.Status().Position)
	}
	s.pace()
	if s.relay && !s.vouched {
		s.probe.Reset(0)
	}
}

// same reports whether next says what prev says. untouched is the cheap proof; a new
// position the cheap refutation.
func same(prev, next *policy.Policy, untouched bool) bool {
	return prev != nil && (untouched || prev.Position == next.Position && policy.Equal(prev, next))
}

// answer acknowledges or rejects everything pending, in push order.
func (s *stream) answer() error {
	faults := make(map[string]error) // by the type to reject
	if len(s.touched) > 0 {
		for _, name := range slices.Sorted(maps.Keys(s.failed)) {
			k := blame(s.failed[name])
			if !s.touched[k] || len(s.pending[k.typeURL]) == 0 {
				k.typeURL = xds.TypeMeshPolicy // the cause is older than this push
			}
			faults[k.typeURL] = s.failed[name]
		}
		for k, err := range s.view.broken {
			if s.touched[k] && faults[k.typeURL] == nil {
				faults[k.typeURL] = err // of no model: harmless, but the server should know
			}
		}
	}
	s.touched, s.dirty = make(map[key]bool), make(map[string]bool)
	for _, typeURL := range xds.Followed() {
		nonces := s.pending[typeURL]
		delete(s.pending, typeURL)
		for i, nonce := range nonces {
			var fault error
			if i == len(nonces)-1 {
				fault = faults[typeURL]
			}
			if err := s.reply(typeURL, nonce, fault); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *stream) reply(typeURL, nonce string, fault error) error {
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: nonce}
	if fault != nil {
		text := describe(s.failed)
		if text == "" || typeURL == xds.TypeSecret { // which no model's failure explains
			text = clip(fault.Error())
		}
		req.ErrorDetail = &rpc.Status{Code: int32(codes.InvalidArgument), Message: text}
		s.c.metrics.nack()
		s.c.log.Error("rejected resources; their models keep the last good state", "type", typeURL, "reason", text)
	}
	return s.send(req)
}

// describe lists the faults of all models, sorted, within maxDetail bytes.
func describe(failed map[string]error) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(failed)) {
		parts = append(parts, failed[name].Error())
	}
	return clip(strings.Join(parts, "; "))
}

func clip(text string) string {
	if len(text) <= maxDetail {
		return text
	}
	return strings.ToValidUTF8(text[:maxDetail], "") + "…"
}

// pace sets the time of the next probe: four per shortest dead-man lease.
func (s *stream) pace() {
	every := probeIdle
	if p := s.c.policy.Load(); p != nil {
		for i := range p.Models {
			if d := p.Models[i].DeadMan; d > 0 {
				every = min(every, d/4)
			}
		}
	}
	s.probe.Reset(max(every, probeLeast))
}

// ask probes the server by subscribing again to a name it has sent already.
func (s *stream) ask() error {
	s.pace()
	if !s.asked.IsZero() {
		if s.missed++; s.missed >= probesMissed {
			return errProbe
		}
		return nil
	}
	s.asked = time.Now()
	return s.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeMeshPolicy, ResourceNamesSubscribe: []string{xds.MeshName}})
}
