package adsserver

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

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
