package adsserver

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// What is read at every change of the ledger is kept up to date by the change itself: a
// push to n nodes changes it 2n times, and reading all of it each time would be quadratic.

// tally is what the ledger counts; guarded by its lock.
type tally struct {
	kinds     map[translate.Kind]int // connected nodes
	rejecting map[string]*nodeEntry  // with a standing rejection, connected or not
	held      map[string]*nodeEntry  // sent nothing, connected or not; see withhold.go
	followed  map[*Progress]struct{}
}

func newTally() tally {
	return tally{kinds: make(map[translate.Kind]int), rejecting: make(map[string]*nodeEntry),
		held: make(map[string]*nodeEntry), followed: make(map[*Progress]struct{})}
}

// count takes a node in (by is 1) or out (-1) of what is counted by kind.
func (t *tally) count(n *NodeState, by int) {
	if !n.Connected {
		return
	}
	kind := translate.Kind(n.Node.Kind)
	if t.kinds[kind] += by; t.kinds[kind] == 0 {
		delete(t.kinds, kind)
	}
}

// changed brings the rest up to date with one node.
func (t *tally) changed(id string, e *nodeEntry) {
	if e.Nack != nil {
		t.rejecting[id] = e
	} else {
		delete(t.rejecting, id)
	}
	if e.Held != "" {
		t.held[id] = e
	} else {
		delete(t.held, id)
	}
	for p := range t.followed {
		p.look(&e.NodeState)
	}
}

// Progress is how far the sidecars are with one position.
type Progress struct {
	ledger   *ledger
	position uint64
	done     chan struct{}
	once     sync.Once

	// Guarded by the ledger's lock.
	acked, behind map[string]struct{}
}

// Follow starts to watch how far the sidecars are with a position; Close ends that. It
// costs a look at every known node, and from then on one at each node that changes.
func (s *Server) Follow(position uint64) *Progress {
	l := s.ledger
	p := &Progress{ledger: l, position: position, done: make(chan struct{}), acked: make(map[string]struct{}), behind: make(map[string]struct{})}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.nodes {
		if e.Connected || now.Sub(e.Since) < s.opt.Isolation {
			p.look(&e.NodeState)
		}
	}
	l.tally.followed[p] = struct{}{}
	p.settle()
	return p
}

// look takes a node's new state. Called with the ledger's lock held.
func (p *Progress) look(n *NodeState) {
	id := n.Node.ID
	delete(p.acked, id)
	delete(p.behind, id)
	switch {
	case !n.counts():
	case n.Acked >= p.position && n.relay():
	case n.Acked >= p.position:
		p.acked[id] = struct{}{}
	default:
		p.behind[id] = struct{}{}
	}
	p.settle()
}

func (p *Progress) settle() {
	if len(p.behind) == 0 && len(p.acked) > 0 {
		p.once.Do(func() { close(p.done) })
	}
}

// Done is closed when at least one sidecar has accepted the position and none that counts
// has not. A sidecar that left without accepting it counts until Follow is called anew
// after Options.Isolation: time alone closes nothing.
func (p *Progress) Done() <-chan struct{} { return p.done }

// Acked is how many sidecars have accepted the position.
func (p *Progress) Acked() int {
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	return len(p.acked)
}

// Close ends the watch. It may be called more than once.
func (p *Progress) Close() {
	p.ledger.mu.Lock()
	defer p.ledger.mu.Unlock()
	delete(p.ledger.tally.followed, p)
}

// Connected returns how many clients of each kind are connected.
func (s *Server) Connected() map[translate.Kind]int {
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	return maps.Clone(s.ledger.tally.kinds)
}

// Rejecting returns the nodes with a standing rejection, by node id, as Ledger does; it
// costs what it returns.
func (s *Server) Rejecting() []NodeState { return s.ledger.some(s.ledger.tally.rejecting) }

// Held returns the nodes with NodeState.Held, in the same way.
func (s *Server) Held() []NodeState { return s.ledger.some(s.ledger.tally.held) }

func (l *ledger) some(of map[string]*nodeEntry) []NodeState {
	l.mu.Lock()
	var out []NodeState
	for _, e := range of {
		out = append(out, e.NodeState)
	}
	l.mu.Unlock()
	slices.SortFunc(out, func(a, b NodeState) int { return cmp.Compare(a.Node.ID, b.Node.ID) })
	return out
}
