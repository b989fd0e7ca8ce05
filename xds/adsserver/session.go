package adsserver

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Limits of one stream: what a client can make the server hold.
const (
	maxTypes   = 64     // type URLs asked for
	maxNames   = 20_000 // names subscribed to, per type
	maxPending = 64     // responses of one type it may leave unanswered
)

// session is one ADS stream of either protocol.
//
// The stream's goroutine (the stock go-control-plane loop) calls request, build* and
// sent; Publish calls advance from another goroutine. All of them take mu, hold it for
// computation only, and hand responses over as handles in a channel with room for
// them: no lock is ever held while sending. A handle is turned into a message by the
// stream's own goroutine, so a response shows the latest subscription.
//
// Lock order: group shard (released before) → session.mu → ledger.mu.
type session struct {
	// Immutable after identify, which runs before the session is visible to others.
	srv    *Server
	ctx    context.Context // of the stream, and ended by cancel
	delta  bool
	cancel context.CancelFunc
	node   outrigger.Node
	group  *group
	// confidential: nobody between reads the stream, so that private keys may be sent on it.
	confidential bool

	// wire is the bytes of the response being sent, if other streams send the same; nil
	// if not. Only the stream's own goroutine uses it.
	wire []byte

	ending atomic.Bool // the server has ended it, see drain.go

	mu      sync.Mutex
	closed  bool
	traffic traffic
	target  *generation // the one push this stream is being given or holds
	types   map[string]*typeSub
	open    int // responses fired or sent and not yet answered
	late    int // of these, how many are not waited for any more; see hurry
	timer   *time.Timer
	acked   uint64 // serial of the last push that is settled
	pushed  bool   // the target was pushed to the open stream
	// answered is the serial of the last push that is settled but for a rejection.
	answered uint64
	// owes is the push whose retained clusters wait for this stream; see retain.go.
	owes *generation
	// drop is a push whose retained clusters nobody needs any more; the stream's
	// goroutine drops them once it holds no lock.
	drop *generation
	// waits says that nothing is sent because of what the client came back with; held is the
	// first thing of it that the source never had, "" while that is not certain. See
	// withhold.go.
	waits   bool
	held    string
	warming warming // what new clusters hold back
	parting parting // what a first response left for later
	// beats is the next heartbeat of what the stream is leased; nil = nothing is. See lease.go.
	beats         *time.Timer
	asking, asked bool // a liveness probe waits for Options.Vouch; one did before
	// relay is what a relay's stream stands for; nil for any other. early came before the
	// node was known, which introduced says.
	relay      *relaying
	introduced bool
	early      []*pb.RelayStanding
}

// typeSub is what one stream asked for, holds and was sent of one type. Guarded by
// session.mu.
type typeSub struct {
	typeURL  string
	wildcard bool
	names    map[string]struct{} // explicit names; a copy, never the stock map

	// The client holds the versions of base for what it subscribed to, or, before the
	// first answer, those it reported in over.
	base *typeState
	over map[string]string
	// claimed is the version of the type that a state-of-the-world client came back with;
	// known says that all it came back with is of this log. See withhold.go.
	claimed string
	known   bool
	// force lists names to answer whatever the client holds: new or repeated
	// subscriptions (sent, or named in removed_resources if they do not exist).
	force map[string]struct{}
	// rejected lists the resources of NACKed responses; they are sent again together
	// when one of them changes, and until that is accepted nack stands: an ACK of
	// other resources of the type proves nothing about these.
	rejected map[string]struct{}
	nack     *Nack
	// What the client said it has in force: acked, but for the names in kept (those of
	// rejected responses), which are as they were before; nil = never accepted.
	acked           *typeState
	kept            map[string]*entry
	sentAt, ackedAt time.Time

	armed    bool   // a watch is open: fire may put a handle into the channel
	fire     func() // puts the handle; never blocks
	fired    bool   // the handle is there or being built
	answered bool   // the first response of the type went out
	building response
	pending  []response // sent, unanswered, oldest first
	lastSeen string     // nonce last answered, to tell a repeated request from an ACK
	beating  bool       // the next response renews what is leased
	vouched  bool       // the next response answers a probe that was vouched for
	heardAt  time.Time  // when what is leased was last sent or renewed
}

// response remembers what went out under a nonce.
type response struct {
	nonce string
	at    time.Time // when it was sent
	late  bool      // nobody waits for its answer any more
	beat  bool      // heartbeats and nothing else
	of    uint64    // position of the push it is part of
	// What was sent, one of both: slices that other streams may share.
	names     []string
	resources []*discovery.Resource
	state     *typeState // nil if nobody publishes the type
}

// each yields the names of what was sent.
func (r *response) each(yield func(string) bool) {
	for _, name := range r.names {
		if !yield(name) {
			return
		}
	}
	for _, x := range r.resources {
		if !yield(x.GetName()) {
			return
		}
	}
}

// identify resolves the node of the first request and registers the session. Errors
// end the stream.
func (s *session) identify(n *core.Node) error {
	if s.group != nil {
		return nil
	}
	if n.GetId() == "" {
		return outrigger.Errorf(outrigger.Invalid, "node.id is empty; set it in the client's bootstrap")
	}
	if s.srv.opt.Authorise != nil {
		if err := s.srv.opt.Authorise(s.ctx, n); err != nil {
			return err
		}
	}
	node := translate.NodeOf(n)
	s.node, s.group = node, s.srv.group(s.srv.opt.Group(node))
	s.confidential = confidential(s.ctx)
	if node.Kind == xds.KindRelay {
		s.relay = &relaying{pods: make(map[string]*relayedPod)}
	}
	s.srv.ledger.connect(s, time.Now())
	s.group.add(s)
	if s.srv.draining.Load() { // after it was added: Drain sees it, or it sees Drain
		return errStopping
	}
	return s.introduce()
}

func (s *session) close() {
	if s.group != nil {
		s.group.remove(s)
		s.srv.ledger.disconnect(s, s.view(), time.Now())
	}
	s.mu.Lock()
	s.closed = true
	for _, timer := range []*time.Timer{s.timer, s.beats, s.warming.timer, s.parting.timer} {
		if timer != nil {
			timer.Stop()
		}
	}
	s.payRetention()
	s.mu.Unlock()
	s.dropRetained()
}

// typeOf returns the state of one type, made on first use.
func (s *session) typeOf(typeURL string) (*typeSub, error) {
	t := s.types[typeURL]
	if t == nil {
		if len(s.types) >= maxTypes {
			return nil, outrigger.Errorf(outrigger.Exhausted, "stream asks for more than %d resource types", maxTypes)
		}
		t = &typeSub{typeURL: typeURL}
		s.types[typeURL] = t
	}
	return t, nil
}

// arm ends the handling of a request: answer at once if something is due, else wait
// for the next push. Called with mu held.
func (s *session) arm(t *typeSub, fire func(), due bool) (cancel func(), err error) {
	t.fire, t.armed = fire, true
	waited := s.waits
	if s.target == nil {
		// nil before the first Publish: wait.
		if want := s.group.wantedBy(s.node); want != nil && !s.withholds(want) {
			s.target = want
			s.recordSent()
		}
	}
	switch {
	case t.fired:
		t.armed = false // the waiting handle will be built from the new subscription
	case s.target == nil || s.withholds(s.target):
	case waited:
		s.launchAll(s.target) // this request showed that there is no reason to wait
		if due && t.armed {
			s.launch(t)
		}
	case due || s.lacks(t, s.target) && !s.holdsBack(t):
		if len(t.pending) >= maxPending {
			return nil, outrigger.Errorf(outrigger.Exhausted, "%d responses of type %s are unanswered; acknowledge them", len(t.pending), t.typeURL)
		}
		s.launch(t)
	}
	s.advance()
	return func() {
		s.mu.Lock()
		t.armed = false
		s.mu.Unlock()
	}, nil
}

// launch puts a handle for t into the stream's channel. Called with mu held.
func (s *session) launch(t *typeSub) {
	t.armed, t.fired = false, true
	s.open++
	t.fire()
}

// advance starts the newest push if the previous one is answered, or has been waited for long
// enough. Called with mu held.
func (s *session) advance() {
	if s.closed || s.open > s.late {
		s.hurry()
		return
	}
	for _, t := range s.types {
		if !t.armed && !t.overdue() {
			return // its request is being handled and will call advance; order is kept
		}
	}
	if !s.warmed() {
		return
	}
	latest := s.group.wantedBy(s.node)
	if latest != nil && latest != s.target && !s.withholds(latest) {
		s.pushed = s.target != nil // not the first sync, whose delay says nothing
		s.target = latest
		s.recordSent()
		s.rewarm(latest)
		s.warm(latest)
		s.launchAll(latest)
		s.closePush()
	}
	if s.part(); s.open == 0 && !s.waits && !s.warming.holds && s.parting.names == nil {
		s.settle()
	}
}

// launchAll answers what waits for g, in push order. Called with mu held.
func (s *session) launchAll(g *generation) {
	for _, typeURL := range xds.Pushed() {
		if t := s.types[typeURL]; t != nil && t.armed && s.lacks(t, g) && !s.holdsBack(t) {
			s.launch(t)
		}
	}
}

// answerPatience is how long a newer push waits for the answers to an older one. Waiting lets a
// rejection of clusters stop what would refer to them; it must not let one response that a
// client never answers keep all types from it for ever. The order of the stream still is the
// order in which the client sees things.
const answerPatience = 2 * time.Second

// hurry makes sure that a newer push does not wait for ever. Called with mu held.
func (s *session) hurry() {
	if s.closed || s.timer != nil || s.target == nil {
		return
	}
	if latest := s.group.wantedBy(s.node); latest == nil || latest == s.target {
		return // nothing waits; the next push asks again
	}
	s.timer = time.AfterFunc(answerPatience, s.writeOff)
}

// overdue: the client has not answered what was sent last, and is not waited for; it asks
// again when it does.
func (t *typeSub) overdue() bool {
	return len(t.pending) > 0 && t.pending[len(t.pending)-1].late
}

// writeOff stops waiting for answers that are overdue, and goes on.
func (s *session) writeOff() {
	s.mu.Lock()
	s.timer = nil
	if now := time.Now(); !s.closed {
		for _, t := range s.types {
			for i := range t.pending {
				if r := &t.pending[i]; !r.late && now.Sub(r.at) >= answerPatience {
					r.late = true
					s.late++
				}
			}
		}
		s.advance()
	}
	s.mu.Unlock()
	s.dropRetained()
}

// closePush makes MeshPolicy the last response of every push on streams that follow
// it, even of one that left it unchanged: it is the mark that the set is complete.
func (s *session) closePush() {
	t := s.types[xds.TypeMeshPolicy]
	if s.open > s.late && s.delta && t != nil && t.armed && t.answered {
		t.demand(xds.MeshName)
		s.launch(t)
	}
}

// demand forces an answer for a name.
func (t *typeSub) demand(name string) {
	if t.force == nil {
		t.force = make(map[string]struct{})
	}
	t.force[name] = struct{}{}
}

// settle records the position of a push that is fully answered, if nothing in it
// stands rejected. Called with mu held.
func (s *session) settle() {
	if s.target == nil {
		return
	}
	if s.node.Kind == "sidecar" || s.node.Kind == xds.KindRelay {
		if mesh := s.types[xds.TypeMeshPolicy]; mesh == nil || !mesh.answered {
			return // it has not asked for everything yet
		}
	}
	for _, t := range s.types {
		if t.nack != nil {
			s.answerAll()
			return
		}
	}
	s.payRetention()
	if s.acked == s.target.serial {
		return
	}
	s.acked = s.target.serial
	if s.pushed {
		s.srv.metrics.settled(s.ctx, time.Since(s.target.at))
	}
	gen := s.target
	s.srv.ledger.record(s, func(e *nodeEntry) {
		e.Acked, e.Answered = gen.position, gen.position
		e.settled(gen.serial, time.Now())
		s.srv.ledger.carry(s, gen, time.Now())
	})
}

// answerAll records that the target is answered, rejections included. Called with mu held.
func (s *session) answerAll() {
	if s.answered == s.target.serial {
		return
	}
	s.answered = s.target.serial
	position := s.target.position
	s.srv.ledger.record(s, func(e *nodeEntry) { e.Answered = position })
}

func (s *session) recordSent() {
	gen := s.target
	s.relay.aim(gen)
	s.srv.ledger.record(s, func(e *nodeEntry) {
		e.Sent = gen.position
		e.started(gen.serial, time.Now(), !s.pushed)
		s.srv.ledger.passedOn(s, gen, time.Now())
	})
}

// built finishes the making of a response; sent adds the nonce the stock server chose, and
// says whether it was heartbeats only.
func (s *session) built(t *typeSub, r response) {
	t.base, t.over, t.force = r.state, nil, nil
	t.fired, t.answered = false, true
	if t.building = r; s.target != nil {
		t.building.of = s.target.position
	}
}

func (s *session) sent(typeURL, nonce string) (beat bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[typeURL]
	if t == nil {
		return false // cannot be: a response is built from its typeSub
	}
	now := time.Now()
	t.building.nonce, t.building.at = nonce, now
	if !t.building.beat {
		t.sentAt = now
	}
	if len(t.building.state.leased()) > 0 {
		t.heardAt = now
		s.keepAlive(t)
	}
	beat = t.building.beat
	if typeURL == xds.TypeMeshPolicy {
		s.relay.mark(nonce)
	}
	t.pending = append(t.pending, t.building)
	t.building = response{}
	return beat
}

// answer processes the nonce of a request: an ACK, or with detail a NACK, of that
// response and, by order of the stream, an ACK of the older ones. Called with mu held.
func (s *session) answer(t *typeSub, nonce string, detail *status.Status) {
	for i, r := range t.pending {
		if r.nonce != nonce {
			continue
		}
		s.open -= i + 1
		for _, answered := range t.pending[:i+1] {
			if answered.late {
				s.late--
			}
		}
		t.pending = slices.Delete(t.pending, 0, i+1) // which clears what it frees
		t.lastSeen = nonce
		if r.beat {
			s.beaten(t, detail != nil)
			return
		}
		if detail != nil {
			s.reject(t, r, detail.GetMessage())
			return
		}
		t.acked, t.ackedAt = r.state, time.Now()
		if t.nack != nil && len(t.rejected) == 0 {
			t.nack, t.kept = nil, nil // what was rejected went out again, changed, and is accepted
			s.recordNack()
		}
		return
	}
}

func (s *session) reject(t *typeSub, r response, message string) {
	message = clipNack(message)
	if t.rejected == nil {
		t.rejected = make(map[string]struct{})
	}
	if t.kept == nil {
		t.kept = make(map[string]*entry)
	}
	for name := range r.each {
		t.rejected[name] = struct{}{}
		if _, before := t.kept[name]; !before {
			t.kept[name] = t.acked.entry(name)
		}
	}
	t.nack = &Nack{Type: t.typeURL, Resource: blamed(slices.Collect(r.each), message), Message: message, At: time.Now(), Position: r.of}
	s.recordNack()
	s.srv.metrics.nacked(s.ctx, t.typeURL)
	s.srv.log.Warn("client rejected resources", "node", s.node.ID, "type", t.typeURL,
		"resource", t.nack.Resource, "position", s.target.position, "reason", message)
}

// recordNack shows the first standing rejection in push order.
func (s *session) recordNack() {
	var standing *Nack
	for _, typeURL := range xds.Pushed() {
		if t := s.types[typeURL]; t != nil && t.nack != nil {
			standing = t.nack
			break
		}
	}
	serial := uint64(0)
	if s.target != nil {
		serial = s.target.serial
	}
	s.srv.ledger.record(s, func(e *nodeEntry) { e.Nack = standing; e.rejected(serial, standing) })
}

// blamed guesses the resource a free-text rejection is about: the only one sent, or the
// longest name the text holds.
func blamed(names []string, message string) string {
	if len(names) == 1 {
		return names[0]
	}
	best := ""
	for _, name := range names {
		if len(name) > len(best) && strings.Contains(message, name) {
			best = name
		}
	}
	return best
}
