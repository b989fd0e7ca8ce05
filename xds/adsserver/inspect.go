package adsserver

import (
	"cmp"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// What this file answers is for people and programs that ask where a configuration is
// live: it is computed when asked, from what streams and history keep anyway.

// TypeDelivery is how one resource type stands at one node.
type TypeDelivery struct {
	Type        string // type URL
	Wildcard    bool   // it follows all resources of the type
	Names       int    // it asked for by name
	Sent, Acked string // versions of the type, "" before the first
	SentAt      time.Time
	AckedAt     time.Time
	Unanswered  int   // responses sent and not answered
	Nack        *Nack // the rejection that stands, nil if none does
}

// NodeDelivery is how everything stands at one node.
type NodeDelivery struct {
	NodeState
	// SentPush and AckedPush are the ids of the newest push started and settled; "" if
	// there is none or it is no longer remembered.
	SentPush, AckedPush string
	// Behind is how long the node has not had what its group has; 0 = it has it.
	Behind time.Duration
	Types  []TypeDelivery // in push order
}

// typeView is a typeSub as it was at one moment.
type typeView struct {
	typeURL         string
	wildcard        bool
	names           map[string]struct{}
	sent, acked     *typeState
	sentAt, ackedAt time.Time
	kept            map[string]*entry
	rejected        map[string]struct{}
	unanswered      int
	nack            *Nack
}

func (v *typeView) covers(name string) bool {
	_, named := v.names[name]
	return v.wildcard || named
}

// held is what the client said it has in force of a name, nil for nothing.
func (v *typeView) held(name string) *entry {
	if e, exception := v.kept[name]; exception {
		return e
	}
	if !v.covers(name) {
		return nil
	}
	return v.acked.entry(name)
}

// view copies what the stream asked for, was sent and accepted, in push order.
func (s *session) view() []typeView {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []typeView
	for _, t := range s.types {
		v := typeView{typeURL: t.typeURL, wildcard: t.wildcard, names: t.names, acked: t.acked, sentAt: t.sentAt, ackedAt: t.ackedAt,
			unanswered: len(t.pending), nack: t.nack}
		// The maps below are changed in place; names is replaced as a whole.
		v.kept, v.rejected = cloneMap(t.kept), cloneMap(t.rejected)
		if t.answered {
			v.sent = t.base
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b typeView) int {
		return cmp.Or(cmp.Compare(rank(a.typeURL), rank(b.typeURL)), cmp.Compare(a.typeURL, b.typeURL))
	})
	return out
}

func cloneMap[V any](m map[string]V) map[string]V {
	if m == nil {
		return nil
	}
	out := make(map[string]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// rank orders types as pushes do, unknown ones last.
func rank(typeURL string) int {
	if i := slices.Index(xds.Pushed(), typeURL); i >= 0 {
		return i
	}
	return len(xds.Pushed())
}

// line is one node of the ledger with what it holds.
type line struct {
	NodeState
	sends []send
	types []typeView
}

// lines copies the ledger, by node id; keep selects. Sessions are locked one by one and
// after the ledger has been let go.
func (s *Server) lines(keep func(NodeState) bool) []line {
	l := s.ledger
	l.mu.Lock()
	var out []line
	var owners []*session
	for _, e := range l.nodes {
		if keep(e.NodeState) {
			out = append(out, line{NodeState: e.NodeState, sends: slices.Clone(e.sends), types: e.last})
			owners = append(owners, l.viewOf(e))
		}
	}
	l.mu.Unlock()
	for i, owner := range owners {
		if owner != nil {
			out[i].types = owner.view()
		}
	}
	slices.SortFunc(out, func(a, b line) int { return cmp.Compare(a.Node.ID, b.Node.ID) })
	return out
}

func (s *Server) line(node string) (line, error) {
	found := s.lines(func(n NodeState) bool { return n.Node.ID == node })
	if len(found) == 0 {
		return line{}, outrigger.Errorf(outrigger.NotFound, "node %q not found among the xDS clients of this replica; it never connected or left over %v ago", node, s.ledger.retention)
	}
	return found[0], nil
}

// Nodes returns how everything stands at every known node, by node id.
func (s *Server) Nodes() []NodeDelivery {
	now := time.Now()
	pushes := make(map[string][]pushRecord)
	var out []NodeDelivery
	for _, l := range s.lines(func(NodeState) bool { return true }) {
		if _, ok := pushes[l.Group]; !ok {
			_, pushes[l.Group] = s.group(l.Group).snapshot()
		}
		out = append(out, l.delivery(pushes[l.Group], now))
	}
	return out
}

func (l *line) delivery(pushes []pushRecord, now time.Time) NodeDelivery {
	out := NodeDelivery{NodeState: l.NodeState}
	var done uint64
	for _, x := range l.sends {
		if x.done != 0 {
			done = x.serial
		}
	}
	var missed time.Time // when the oldest push it lacks was made
	for _, p := range pushes {
		if n := len(l.sends); n > 0 && l.sends[n-1].serial == p.serial {
			out.SentPush = p.id
		}
		if p.serial == done {
			out.AckedPush = p.id
		}
		if p.serial > done {
			missed = p.at
		}
	}
	if !missed.IsZero() {
		if l.Connected && missed.Before(l.Since) {
			missed = l.Since // nobody can be behind before they came
		}
		out.Behind = now.Sub(missed)
	}
	for i := range l.types {
		v := &l.types[i]
		t := TypeDelivery{Type: v.typeURL, Wildcard: v.wildcard, Names: len(v.names), SentAt: v.sentAt, AckedAt: v.ackedAt, Unanswered: v.unanswered, Nack: v.nack}
		if v.sent != nil {
			t.Sent = v.sent.version
		}
		if v.acked != nil {
			t.Acked = v.acked.version
		}
		out.Types = append(out.Types, t)
	}
	return out
}

// Held is one resource at one node: what its group should have and what it has.
type Held struct {
	ResourceID
	Verdict string // one of the Verdict words
	// Wanted, Sent and Version are versions: of the group, of the last response, in
	// force at the node. "" = none.
	Wanted, Sent, Version string
	Body                  *anypb.Any // what is in force; nil = nothing
	Nack                  *Nack      // the rejection that stands, if the resource was part of it
}

// Verdicts on a resource at a node.
const (
	VerdictLive         = "live"         // what the group should have is in force
	VerdictPending      = "pending"      // sent, not answered
	VerdictWaiting      = "waiting"      // not sent: the node owes an answer to an earlier push
	VerdictWithheld     = "withheld"     // a private key, and the node's stream can be read on its way
	VerdictRejected     = "rejected"     // part of a response the node rejected
	VerdictRemoving     = "removing"     // no longer wanted, still held
	VerdictUnsubscribed = "unsubscribed" // the node did not ask for it
	VerdictAbsent       = "absent"       // nobody publishes it
	VerdictDisconnected = "disconnected" // the node is gone; what it held last is shown
)

func (l *line) held(current *generation, v *typeView, name string) Held {
	h := Held{ResourceID: ResourceID{v.typeURL, name}}
	var want *typeState
	if current != nil {
		want = current.types[v.typeURL]
	}
	h.Wanted, h.Sent = want.versionOf(name), v.sent.versionOf(name)
	if e := v.held(name); e != nil {
		h.Version, h.Body = e.version, e.any
	}
	_, rejected := v.rejected[name]
	_, kept := v.kept[name]
	if rejected || kept {
		h.Nack = v.nack
	}
	switch {
	case !l.Connected:
		h.Verdict = VerdictDisconnected
	case h.Wanted == "" && h.Version == "":
		h.Verdict = VerdictAbsent
	case !v.covers(name):
		h.Verdict, h.Sent = VerdictUnsubscribed, ""
	case h.Wanted == h.Version:
		h.Verdict = VerdictLive
	case l.InClear && translate.Confidential(v.typeURL, name):
		h.Verdict = VerdictWithheld
	case rejected:
		h.Verdict = VerdictRejected
	case h.Wanted == "":
		h.Verdict = VerdictRemoving
	case v.unanswered > 0 && h.Sent == h.Wanted:
		h.Verdict = VerdictPending
	default:
		h.Verdict = VerdictWaiting
	}
	return h
}

// Config returns every resource a node follows: what it has in force and what it should
// have, by push order and name. The error has kind NotFound.
func (s *Server) Config(node string) ([]Held, error) {
	l, err := s.line(node)
	if err != nil {
		return nil, err
	}
	if err := l.knowable(); err != nil {
		return nil, err
	}
	return l.config(s.group(l.Group).wantedBy(l.Decisive())), nil
}

// config is Config of one line.
func (l *line) config(current *generation) (out []Held) {
	for i := range l.types {
		v := &l.types[i]
		names := make(map[string]struct{})
		for _, st := range []*typeState{v.acked, v.sent, current.typeOf(v.typeURL)} {
			if st == nil {
				continue
			}
			for _, name := range st.names {
				if v.covers(name) {
					names[name] = struct{}{}
				}
			}
		}
		for name := range v.names {
			if name != xds.Wildcard {
				names[name] = struct{}{}
			}
		}
		for name := range names {
			out = append(out, l.held(current, v, name))
		}
	}
	slices.SortFunc(out, func(a, b Held) int {
		return cmp.Or(cmp.Compare(rank(a.Type), rank(b.Type)), cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// Resource is one resource of a set.
type Resource struct {
	ResourceID
	Version string
	Body    *anypb.Any
}

// SetAt returns what a node's group served as of a push, given by its id or position, and
// the id of the push; by push order and name. "" is the newest. The error has kind
// NotFound and names what is remembered.
func (s *Server) SetAt(node, push string) (id string, out []Resource, err error) {
	l, err := s.line(node)
	if err != nil {
		return "", nil, err
	}
	current, pushes := s.group(l.Group).snapshot()
	if current == nil {
		return "", nil, outrigger.Errorf(outrigger.NotFound, "group %q: no push found, nothing was published yet", l.Group)
	}
	p, ok := pushes[0], true
	if push != "" {
		p, ok = find(pushes, push)
	}
	if !ok {
		return "", nil, outrigger.Errorf(outrigger.NotFound, "push %q not found; of group %q those from %s to %s are remembered", push, l.Group, pushes[len(pushes)-1].id, pushes[0].id)
	}
	for r, e := range stateAt(current, pushes, p.serial) {
		out = append(out, Resource{ResourceID{r.typeURL, r.name}, e.version, e.any})
	}
	slices.SortFunc(out, func(a, b Resource) int {
		return cmp.Or(cmp.Compare(rank(a.Type), rank(b.Type)), cmp.Compare(a.Name, b.Name))
	})
	return p.id, out, nil
}
