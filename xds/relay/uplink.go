package relay

import (
	"context"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/internal/upstream"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// uplink is one stream to the control plane. All fields belong to the goroutine of run.
type uplink struct {
	r      *Relay
	ads    upstream.Stream
	inSync func() // stops the first-sync clock
	synced bool

	pending  map[string][]string // nonces that wait for their answer, by type
	answered map[string]bool     // types the server answered at least once
	closing  bool                // MeshPolicy arrived: the push is complete
	nonce    string              // of the newest MeshPolicy response
	changed  bool                // what arrived since the last complete push

	push  push // the newest complete one
	pods  account
	dirty time.Time // since when something about pods is untold; zero = nothing is
	timer *time.Timer

	inFlight []waiter  // probes of pods that ours will answer
	asked    time.Time // when it was sent, zero if none is out
	next     time.Time // when the next one may be sent
	probe    *time.Timer
}

// push is what the pods have been given last.
type push struct {
	at   time.Time
	open bool // it is not answered yet
	told map[string]bool
}

// follow runs one stream.
func (r *Relay) follow(ctx context.Context, dial Dialer) (synced bool, err error) {
	u := &uplink{r: r, pending: make(map[string][]string), answered: make(map[string]bool),
		pods: newAccount(), timer: pause.Stopped(), probe: pause.Stopped()}
	err = upstream.Follow(ctx, dial, func(ctx context.Context, conn grpc.ClientConnInterface, inSync func()) error {
		u.inSync = inSync
		return u.run(ctx, conn)
	})
	return u.synced, err
}

var errProbe = outrigger.Errorf(outrigger.Unavailable, "no answer to a liveness probe")

func (u *uplink) run(ctx context.Context, conn grpc.ClientConnInterface) error {
	var receiver sync.WaitGroup
	defer receiver.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer u.end()
	ads, err := upstream.Open(ctx, conn)
	if err != nil {
		return err
	}
	u.ads = ads
	if err := u.subscribe(); err != nil {
		return err
	}
	in, ended := make(chan *discovery.DeltaDiscoveryResponse), make(chan error, 1)
	receiver.Go(func() { ended <- upstream.Receive(ctx, ads, in) })
	for {
		changed := u.r.down.Changed()
		if err := u.look(time.Now()); err != nil {
			return err
		}
		select {
		case err := <-ended:
			return err
		case r := <-in:
			err = u.take(r)
		case <-changed:
		case <-u.timer.C:
		case <-u.r.probes:
			err = u.ask(time.Now())
		case <-u.probe.C:
			err = u.ask(time.Now())
		}
		if err != nil {
			return err
		}
	}
}

// end leaves what outlives the stream as the next one needs it.
func (u *uplink) end() {
	u.timer.Stop()
	u.probe.Stop()
	r := u.r
	r.mu.Lock()
	defer r.mu.Unlock()
	r.link.synced, r.link.asked = false, time.Time{}
	r.waiting = append(living(u.inFlight), r.waiting...)
}

// subscribe tells who stands behind the relay, then asks for every type, reporting what is
// held.
func (u *uplink) subscribe() error {
	node := translate.Node(u.r.opt.Node)
	first, err := u.standing(u.pods.news(u.r.down.Ledger()))
	if err != nil {
		return err
	}
	first.Node = node
	if err := u.ads.Send(first); err != nil {
		return err
	}
	for _, typeURL := range xds.Followed() {
		err := u.ads.Send(&discovery.DeltaDiscoveryRequest{
			Node: node, TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}, InitialResourceVersions: u.r.cache.versions(typeURL),
		})
		if err != nil {
			return err
		}
		node = nil
	}
	return nil
}

// take adds one response to the cache, and gives the pods what it completes.
func (u *uplink) take(r *discovery.DeltaDiscoveryResponse) error {
	typeURL := r.GetTypeUrl()
	if !followed(typeURL) {
		return u.reply(typeURL, r.GetNonce(), "") // not asked for, so nothing to object to
	}
	changed, err := u.r.cache.take(r)
	if err != nil {
		return err
	}
	u.changed = u.changed || changed
	u.pending[typeURL] = append(u.pending[typeURL], r.GetNonce())
	u.answered[typeURL] = true
	if typeURL == xds.TypeMeshPolicy {
		u.closing, u.nonce = true, r.GetNonce()
		u.proven()
	}
	if u.closing && u.whole() {
		u.closing = false
		return u.complete(time.Now())
	}
	return nil
}

// whole: there was an answer for every type a policy is made of. Control planes that know
// nothing of secrets do not answer for these.
func (u *uplink) whole() bool {
	for _, typeURL := range xds.Types() {
		if !u.answered[typeURL] {
			return false
		}
	}
	return true
}

// complete gives the pods a push. One that changes nothing is not for them, but tells which
// nonce stands for what they have.
func (u *uplink) complete(now time.Time) error {
	r := u.r
	if u.changed || !r.cache.holds() {
		r.cache.number++
		r.remember()
		if err := r.down.PublishRaw(adsserver.DefaultGroup, r.cache.types, r.cache.number); err != nil {
			return err
		}
		u.push = push{at: now, open: true, told: make(map[string]bool)}
	}
	if u.changed || !u.synced {
		u.pods.nonces[r.cache.number] = u.nonce
		u.pods.trim(r.cache.number)
	}
	u.changed = false
	if !u.synced {
		u.synced = true
		u.inSync()
		u.probe.Reset(0) // for those that wait
		r.log.Info("relay is in sync with the control plane")
	}
	r.mu.Lock()
	r.link.holds = true
	if !r.link.synced {
		r.link.synced = true
		close(r.link.changed)
		r.link.changed = make(chan struct{})
	}
	r.mu.Unlock()
	if !u.push.open {
		return u.answer(nil)
	}
	return nil
}

// ask sends a probe for all that wait, if it is time.
func (u *uplink) ask(now time.Time) error {
	u.probe.Stop()
	if !u.asked.IsZero() {
		if left := u.asked.Add(2 * u.r.patience()).Sub(now); left > 0 {
			u.probe.Reset(left)
			return nil
		}
		return errProbe
	}
	r := u.r
	r.mu.Lock()
	due := len(r.waiting) > 0 && u.synced && (r.urgent || !now.Before(u.next))
	if due {
		u.inFlight, r.waiting, r.urgent = living(r.waiting), nil, false
		r.link.asked = now
	} else if len(r.waiting) > 0 && u.synced {
		u.probe.Reset(u.next.Sub(now))
	}
	r.mu.Unlock()
	if !due {
		return nil
	}
	u.asked, u.next = now, now.Add(r.cache.pace())
	u.probe.Reset(2 * r.patience())
	return u.ads.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeMeshPolicy, ResourceNamesSubscribe: []string{xds.MeshName}})
}

// patience is half of what a probe may take.
func (r *Relay) patience() time.Duration { return max(r.cache.pace(), time.Second/2) }

// proven passes on that the control plane has answered.
func (u *uplink) proven() {
	if u.asked.IsZero() {
		return
	}
	u.asked = time.Time{}
	u.probe.Reset(0) // for those that have come since
	r := u.r
	r.mu.Lock()
	r.link.asked = time.Time{}
	r.mu.Unlock()
	for _, w := range u.inFlight {
		w.answer()
	}
	u.inFlight = nil
}

// remember notes what the control plane has had.
func (r *Relay) remember() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.had) > maxHad {
		clear(r.had) // what is there now is filled in; holders of older things are sent to the control plane
	}
	for typeURL, set := range r.cache.types {
		for name := range set {
			if model, version, ok := translate.SubjectOf(typeURL, name); ok {
				for _, k := range [][2]string{{}, {model, ""}, {model, version}} {
					r.had[k] = struct{}{}
				}
			}
		}
	}
}

// maxHad bounds what is remembered of models and versions that are no more.
const maxHad = 100_000
