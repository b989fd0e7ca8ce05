package adsserver

import (
	"slices"
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds"
)

// A relay follows policy for the sidecars of its node and says on its own stream, in order
// with its acknowledgements, how far each of them is (outrigger.v1.RelayStanding). So the
// ledger has a line per pod that says what the pod has, although the server sends each thing
// once per node. What a pod has is said by a nonce: that of the MeshPolicy response which
// closed the push. Two pushes of the same content are one push to a relay's pods.
//
// The relay's line is there as well, and holds back what its position holds back: a pod that
// the server has not been told of yet has what the relay has, at least.

// Bounds of what one relay can make the server hold.
const (
	maxRelayed = 1024 // pods
	maxEarly   = 8    // messages before the first subscription
	maxMarks   = 256  // nonces that pods may still refer to
)

// relaying is what the stream of a relay stands for.
type relaying struct {
	// Guarded by session.mu.
	content uint64      // counts the differing sets the relay was given
	last    *generation // the newest of them; nil before the first
	marks   []mark      // newest last
	first   mark        // the first of the newest serial, which marks may have lost

	pods map[string]*relayedPod // by id; guarded by the ledger's lock
}

// mark says what a pod has that has all up to a nonce.
type mark struct {
	nonce   string
	content uint64
	gen     *generation
}

type relayedPod struct {
	stream  uint64 // of the pod at the relay
	content uint64 // what it has; 0 = not known
}

// aim notes what the relay is given next. Called with mu held.
func (r *relaying) aim(gen *generation) {
	if r == nil {
		return
	}
	if r.last == nil || !r.last.same(gen) {
		r.content++
	}
	r.last = gen
}

// mark notes the nonce that closes what the relay was given last. Called with mu held.
func (r *relaying) mark(nonce string) {
	if r == nil || r.last == nil {
		return
	}
	m := mark{nonce, r.content, r.last}
	if r.first.gen != m.gen {
		r.first = m
	}
	if len(r.marks) >= maxMarks {
		r.marks = append(r.marks[:0], r.marks[1:]...)
	}
	r.marks = append(r.marks, m)
}

// find returns what somebody has who has all up to nonce. Called with mu held.
func (r *relaying) find(nonce string) (m mark, ok bool) {
	if nonce == "" {
		return m, false
	}
	for _, x := range slices.Backward(r.marks) {
		if x.nonce == nonce {
			m, ok = x, true
			break
		}
	}
	if !ok && r.first.gen != nil && r.first.nonce == nonce {
		m, ok = r.first, true
	}
	if ok && m.content == r.content {
		m.gen = r.last // it is the same set, whatever its number
	}
	return m, ok
}

// stand takes one message of a relay about its pods. Errors end the stream.
func (s *session) stand(r *discovery.DeltaDiscoveryRequest) error {
	m := &pb.RelayStanding{}
	details := r.GetErrorDetail().GetDetails()
	if len(details) != 1 {
		return outrigger.Errorf(outrigger.Invalid, "a request of type %s has %d details; give one RelayStanding", xds.ShortType(xds.TypeRelayStanding), len(details))
	}
	if err := details[0].UnmarshalTo(m); err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "detail of a relay's request")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.introduced {
		return s.standing(m)
	}
	if len(s.early) >= maxEarly {
		return outrigger.Errorf(outrigger.Exhausted, "%d messages about pods before the first subscription; subscribe first", len(s.early))
	}
	s.early = append(s.early, m)
	return nil
}

// introduce takes what came before the node was known.
func (s *session) introduce() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.introduced = true
	early := s.early
	s.early = nil
	for _, m := range early {
		if err := s.standing(m); err != nil {
			return err
		}
	}
	return nil
}

// standing applies one message. Called with mu held.
func (s *session) standing(m *pb.RelayStanding) error {
	if s.relay == nil {
		return outrigger.Errorf(outrigger.Denied, "node %s is of kind %q and speaks for itself only; pods stand behind nodes of kind %s", s.node.ID, s.node.Kind, xds.KindRelay)
	}
	return s.srv.ledger.stand(s, m, time.Now())
}

// stand applies what a relay says about its pods. Called with the mu of s held.
func (l *ledger) stand(s *session, m *pb.RelayStanding, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.relay.pods == nil {
		return nil // the stream has ended
	}
	defer l.notify()
	for _, p := range m.GetPods() {
		id := p.GetNode().GetId()
		if id == "" || len(id) > outrigger.MaxNameBytes || id == s.node.ID {
			return outrigger.Errorf(outrigger.Invalid, "relay %s names a pod %.80q; allowed are 1..%d bytes, and not its own id", s.node.ID, id, outrigger.MaxNameBytes)
		}
		pod := s.relay.pods[id]
		if !p.GetConnected() {
			l.leave(s, id, now)
			continue
		}
		if pod == nil || pod.stream != p.GetStream() {
			if pod == nil && len(s.relay.pods) >= maxRelayed {
				return outrigger.Errorf(outrigger.Exhausted, "relay %s stands for %d pods, the limit is %d", s.node.ID, len(s.relay.pods), maxRelayed)
			}
			pod = &relayedPod{stream: p.GetStream()}
			s.relay.pods[id] = pod
			l.claim(s, wire.Node(p.GetNode()), now)
		}
		l.progress(s, id, pod, p, now)
	}
	return nil
}

// claim makes s the stream that stands for a node: the newest that says so is right.
func (l *ledger) claim(s *session, node outrigger.Node, now time.Time) {
	e := l.nodes[node.ID]
	if e == nil {
		e = &nodeEntry{}
		l.nodes[node.ID] = e
	}
	l.prune(now)
	l.tally.count(&e.NodeState, -1)
	if e.Group != s.group.name {
		e.sends = nil // serials count per group
	}
	node.Kind = "sidecar"
	e.owner, e.via, e.last = nil, s, nil
	e.NodeState = NodeState{Node: node, Group: s.group.name, Connected: true, Since: now, Stream: e.Stream + 1, Via: &s.node, sidecar: true}
	if gen := s.relay.last; gen != nil {
		e.Sent = gen.position
		e.started(gen.serial, now, true)
	}
	l.tally.count(&e.NodeState, 1)
	l.tally.changed(node.ID, e)
}

// progress notes how far a pod is, unless somebody else stands for it by now.
func (l *ledger) progress(s *session, id string, pod *relayedPod, p *pb.RelayedPod, now time.Time) {
	e := l.nodes[id]
	if e == nil || e.via != s {
		return
	}
	e.Nack = nil
	if p.GetNackType() != "" {
		e.Nack = &Nack{Type: p.GetNackType(), Resource: p.GetNackResource(), Message: clipNack(p.GetNackMessage()), At: p.GetNackedAt().AsTime()}
	}
	if m, ok := s.relay.find(p.GetAckedNonce()); ok {
		pod.content = m.content
		e.has(m.gen, now)
	}
	if gen := s.relay.last; gen != nil {
		e.rejected(gen.serial, e.Nack)
	}
	l.tally.changed(id, e)
}

// has notes that a node has all of a push.
func (e *nodeEntry) has(gen *generation, now time.Time) {
	e.Acked, e.Answered = gen.position, gen.position
	if x := e.sendOf(gen.serial); x != nil && x.done == 0 {
		e.settled(gen.serial, now)
	}
}

// leave ends what s says about a node. Called with the lock held.
func (l *ledger) leave(s *session, id string, now time.Time) {
	delete(s.relay.pods, id)
	e := l.nodes[id]
	if e == nil || e.via != s {
		return
	}
	l.tally.count(&e.NodeState, -1)
	e.Connected, e.Since, e.via = false, now, nil
	l.gone = append(l.gone, departure{id, now})
	l.tally.changed(id, e)
}

// orphan ends what s says about anybody.
func (l *ledger) orphan(s *session, now time.Time) {
	if s.relay == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for id := range s.relay.pods {
		l.leave(s, id, now)
	}
	s.relay.pods = nil // and from now on it stands for nobody
	l.notify()
}

// passedOn notes that a push is on its way to the pods of a relay. Called with the lock and
// the mu of s held.
func (l *ledger) passedOn(s *session, gen *generation, now time.Time) {
	if s.relay == nil {
		return
	}
	for id := range s.relay.pods {
		if e := l.nodes[id]; e != nil && e.via == s {
			e.Sent = gen.position
			e.started(gen.serial, now, false)
		}
	}
}

// carry notes that the pods of a relay which have the content of a push have that push.
// Called with the lock and the mu of s held.
func (l *ledger) carry(s *session, gen *generation, now time.Time) {
	if s.relay == nil {
		return
	}
	for id, pod := range s.relay.pods {
		if e := l.nodes[id]; e != nil && e.via == s && pod.content == s.relay.content {
			e.has(gen, now)
			l.tally.changed(id, e)
		}
	}
}

// viewOf is the stream whose view shows what a node holds; nil if none does. A relay's view
// is that of its pods that have what the relay has. Called with the lock held.
func (l *ledger) viewOf(e *nodeEntry) *session {
	if e.via == nil {
		return e.owner
	}
	r := l.nodes[e.via.node.ID]
	if r == nil || r.owner != e.via || e.Nack != nil || r.Nack != nil || e.lastDone() == 0 || e.lastDone() != r.lastDone() {
		return nil
	}
	return e.via
}

// lastDone is the serial of the newest push that is settled, 0 for none.
func (e *nodeEntry) lastDone() uint64 {
	for _, x := range slices.Backward(e.sends) {
		if x.done != 0 {
			return x.serial
		}
	}
	return 0
}

// Decisive is the node whose name and labels decide what this one is sent: the relay it is
// behind, or the node itself.
func (n *NodeState) Decisive() outrigger.Node {
	if n.Via != nil {
		return *n.Via
	}
	return n.Node
}

// knowable says why it is not known resource by resource what a pod behind a relay holds.
func (l *line) knowable() error {
	if l.Via == nil || !l.Connected || len(l.types) > 0 {
		return nil
	}
	return outrigger.Errorf(outrigger.Unavailable, "node %s is behind relay %s and does not have what the relay has; what it holds is known again once it has. Ask about %s", l.Node.ID, l.Via.ID, l.Via.ID)
}

func clipNack(message string) string {
	if len(message) > maxNackText {
		return strings.ToValidUTF8(message[:maxNackText], "")
	}
	return message
}

// probed reports whether a request is a liveness probe that Options.Vouch is to answer, and
// has it do so. Called with mu held.
func (s *session) probed(r *discovery.DeltaDiscoveryRequest) bool {
	vouch := s.srv.opt.Vouch
	if vouch == nil || r.GetTypeUrl() != xds.TypeMeshPolicy || r.GetResponseNonce() != "" || !slices.Contains(r.GetResourceNamesSubscribe(), xds.MeshName) {
		return false
	}
	if !s.asking {
		first := !s.asked
		s.asking, s.asked = true, true
		vouch(s.ctx, first, s.vouched)
	}
	return true
}

// vouched answers the probe that waits.
func (s *session) vouched() {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[xds.TypeMeshPolicy]
	if s.asking = false; s.closed || s.target == nil || t == nil {
		return
	}
	t.demand(xds.MeshName)
	if t.vouched = true; t.armed {
		s.launch(t)
	}
}
