package adsserver

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
)

// NodeState is one line of the push ledger: what a node was sent and what it accepted.
type NodeState struct {
	Node      outrigger.Node
	Group     string
	Connected bool
	Since     time.Time // of the last change of Connected
	// Sent is the highest position a push was started for, Acked the highest one every
	// response of which was accepted; 0 before the first.
	Sent, Acked uint64
	// Answered is the highest position every response of which was answered, by an
	// acceptance or a rejection.
	Answered uint64
	// Stream counts the node's streams, from 1.
	Stream uint64
	// Via is the relay the node is behind, nil if it is behind none. The node that a
	// configuration canary looks at is that one: all pods of a relay get the same.
	Via *outrigger.Node
	// Nack is the rejection that stands, nil if none does.
	Nack *Nack
	// Held is the first resource the node came back with that the source never had, with
	// its type, and HeldSince since when it is sent nothing for that; see Server.Know. ""
	// for all that is well.
	Held      string
	HeldSince time.Time
	// InClear: the stream can be read on its way, so the node is sent no private keys.
	InClear bool
	// sidecar: the node calls itself a sidecar or a relay, so it can say that it has a
	// position in force.
	sidecar bool
}

// relay reports whether the line is that of a relay itself.
func (n *NodeState) relay() bool { return n.Node.Kind == xds.KindRelay }

// counts reports whether the line can hold a position back at all: of a relay that is gone
// the lines of its pods do.
func (n *NodeState) counts() bool { return n.sidecar && (n.Connected || !n.relay()) }

// Nack is a rejection in the client's words.
type Nack struct {
	Type     string // type URL
	Resource string // the name the message mentions, or the only one sent; may be empty
	Message  string // at most maxNackText bytes
	At       time.Time
	Position uint64 // of the push it was part of; 0 if another replica or a relay told of it
}

// maxNackText bounds what a client can make the ledger and the log hold.
const maxNackText = 4 << 10

// ledger is who accepted what. Its lock is the innermost one and never held across
// anything that can block.
type ledger struct {
	mu        sync.Mutex
	nodes     map[string]*nodeEntry
	changed   chan struct{} // made when asked for, closed by the next change
	retention time.Duration
	tally     tally
	// gone are nodes in the order they went, some of which may be back. limit bounds it.
	gone  []departure
	limit int
}

// departure is when a node's last stream ended.
type departure struct {
	node string
	at   time.Time
}

type nodeEntry struct {
	NodeState
	owner *session // the newest stream of the node, nil once it is closed; older ones may not write
	via   *session // the relay's stream that stands for the node, then owner is nil
	last  []typeView
	// sends are the newest pushes started for the node, oldest first; at most maxSends.
	sends []send
}

// maxSends bounds what is remembered of one node's pushes.
const maxSends = 32

// send is how one push went at one node. Times are nanoseconds since 1970, 0 = not yet.
type send struct {
	serial     uint64
	sent, done int64
	nack       *Nack
	join       bool // the first sync of a stream, whose delay says nothing about the push
}

// started notes that a push is being sent.
func (e *nodeEntry) started(serial uint64, now time.Time, join bool) {
	if len(e.sends) >= maxSends {
		e.sends = append(e.sends[:0], e.sends[1:]...)
	}
	e.sends = append(e.sends, send{serial: serial, sent: now.UnixNano(), nack: e.Nack, join: join})
}

func (e *nodeEntry) sendOf(serial uint64) *send {
	for i, x := range slices.Backward(e.sends) { // a node that came back was sent the same push again
		if x.serial == serial {
			return &e.sends[i]
		}
	}
	return nil
}

// settled notes that all of a push is accepted.
func (e *nodeEntry) settled(serial uint64, now time.Time) {
	if x := e.sendOf(serial); x != nil {
		x.done, x.nack = now.UnixNano(), nil
	}
}

// rejected notes what stands rejected while a push is in force, nil for nothing.
func (e *nodeEntry) rejected(serial uint64, nack *Nack) {
	if x := e.sendOf(serial); x != nil && x.done == 0 {
		x.nack = nack
	}
}

func newLedger(retention time.Duration, limit int) *ledger {
	return &ledger{nodes: make(map[string]*nodeEntry), retention: retention, limit: limit, tally: newTally()}
}

// connect makes s the owner of its node's line. What the node accepted on an earlier
// stream does not count: it may have restarted without its disk, and proving it again
// costs one empty push.
func (l *ledger) connect(s *session, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.nodes[s.node.ID]
	if e == nil {
		e = &nodeEntry{}
		l.nodes[s.node.ID] = e
	}
	l.prune(now)
	l.tally.count(&e.NodeState, -1)
	e.owner, e.via, e.last = s, nil, nil
	if e.Group != s.group.name {
		e.sends = nil // serials count per group
	}
	e.NodeState = NodeState{Node: s.node, Group: s.group.name, Connected: true, Since: now, Stream: e.Stream + 1, InClear: !s.confidential,
		sidecar: s.node.Kind == "sidecar" || s.node.Kind == xds.KindRelay}
	l.tally.count(&e.NodeState, 1)
	l.tally.changed(s.node.ID, e)
	l.notify()
}

// record applies f to the line of s unless a newer stream has taken it over.
func (l *ledger) record(s *session, f func(*nodeEntry)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.nodes[s.node.ID]; e != nil && e.owner == s {
		l.tally.count(&e.NodeState, -1)
		f(e)
		l.tally.count(&e.NodeState, 1)
		l.tally.changed(s.node.ID, e)
		l.notify()
	}
}

// disconnect ends the line of s; last is what the node held.
func (l *ledger) disconnect(s *session, last []typeView, now time.Time) {
	l.record(s, func(e *nodeEntry) {
		e.Connected, e.Since, e.owner, e.last = false, now, nil, last
		l.gone = append(l.gone, departure{s.node.ID, now})
	})
	l.orphan(s, now)
}

// prune forgets nodes that have been gone for the retention time, and the first of those
// that are gone when there are more than limit. Called when a node connects, so the map
// grows with live nodes plus recent ones, not with history.
func (l *ledger) prune(now time.Time) {
	drop := 0
	for _, d := range l.gone {
		e := l.nodes[d.node]
		away := e != nil && !e.Connected && e.Since.Equal(d.at)
		if away && len(l.gone)-drop <= l.limit && now.Sub(d.at) <= l.retention {
			break
		}
		if away {
			delete(l.nodes, d.node)
			delete(l.tally.rejecting, d.node)
			delete(l.tally.held, d.node)
			for p := range l.tally.followed {
				p.look(&NodeState{Node: e.Node})
			}
		}
		drop++
	}
	clear(l.gone[:drop])
	l.gone = l.gone[drop:]
}

func (l *ledger) notify() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

func (l *ledger) wait() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

func (l *ledger) list() []NodeState {
	l.mu.Lock()
	out := make([]NodeState, 0, len(l.nodes))
	for _, e := range l.nodes {
		out = append(out, e.NodeState)
	}
	l.mu.Unlock()
	slices.SortFunc(out, func(a, b NodeState) int { return cmp.Compare(a.Node.ID, b.Node.ID) })
	return out
}

// verdicts sorts the sidecars that count at now into those that hold position and the rest.
func verdicts(nodes []NodeState, position uint64, isolation time.Duration, now time.Time) (acked, laggards []string) {
	for _, n := range nodes {
		switch {
		case !n.counts(), !n.Connected && now.Sub(n.Since) >= isolation:
		case n.Acked >= position && n.relay():
		case n.Acked >= position:
			acked = append(acked, n.Node.ID)
		default:
			laggards = append(laggards, n.Node.ID)
		}
	}
	return acked, laggards
}
