package adsserver

import (
	"cmp"
	"slices"
	"time"
)

// Delivery is how one push went at one node.
type Delivery struct {
	Node string
	// Outcome is one of the Outcome words.
	Outcome string
	Sent    time.Time     // zero if it was not started
	Latency time.Duration // from Publish (of a first sync: from its start) to the last ACK; 0 = not accepted
	Nack    *Nack         // of OutcomeNacked
	Lagging bool          // the node is there and has neither this push nor a newer one
}

// Outcomes of a Delivery.
const (
	OutcomeAcked      = "acked"
	OutcomeNacked     = "nacked"
	OutcomeSuperseded = "superseded" // it got a newer push instead
	OutcomeGone       = "gone"       // it left before it answered
	OutcomeSent       = "sent"       // it has not answered all of it
	OutcomeWaiting    = "waiting"    // it owes an answer to an earlier push
)

// Push is one set that was handed to a group.
type Push struct {
	ID, Group string
	Position  uint64
	At        time.Time
	Resources int          // in the whole set
	First     bool         // the first of this process: nothing to compare with
	Changed   []ResourceID // what it changed, added or removed
	Nodes     []Delivery   // by node id
}

// ResourceID names one resource.
type ResourceID struct{ Type, Name string }

// Pushes returns the remembered pushes, the newest first: of one group, or of all (only is "").
func (s *Server) Pushes(only string) []Push {
	s.mu.Lock()
	var groups []*group
	for name, g := range s.groups {
		if only == "" || only == name {
			groups = append(groups, g)
		}
	}
	s.mu.Unlock()
	lines := s.lines(func(n NodeState) bool { return only == "" || n.Group == only })
	var out []Push
	for _, g := range groups {
		_, pushes := g.snapshot()
		for _, r := range pushes {
			p := Push{ID: r.id, Group: g.name, Position: r.position, At: r.at, Resources: r.size, First: r.first}
			for _, c := range r.changes {
				p.Changed = append(p.Changed, ResourceID{c.typeURL, c.name})
			}
			for i := range lines {
				if l := &lines[i]; l.Group == g.name {
					if d, ok := l.of(r); ok {
						p.Nodes = append(p.Nodes, d)
					}
				}
			}
			out = append(out, p)
		}
	}
	slices.SortStableFunc(out, func(a, b Push) int { return cmp.Or(b.At.Compare(a.At), cmp.Compare(a.Group, b.Group)) })
	return out
}

// of says how a push went at the node; false if it was not meant for it.
func (l *line) of(r pushRecord) (Delivery, bool) {
	d := Delivery{Node: l.Node.ID}
	newer := false
	for _, x := range slices.Backward(l.sends) {
		if x.serial != r.serial {
			newer = newer || x.serial > r.serial && x.done != 0
			continue
		}
		d.Sent = time.Unix(0, x.sent)
		switch {
		case x.done != 0:
			d.Outcome = OutcomeAcked
			from := r.at
			if x.join {
				from = d.Sent
			}
			d.Latency = max(time.Unix(0, x.done).Sub(from), 1)
		case x.nack != nil:
			d.Outcome, d.Nack = OutcomeNacked, x.nack
		case newer:
			d.Outcome = OutcomeSuperseded
		case !l.Connected:
			d.Outcome = OutcomeGone
		default:
			d.Outcome = OutcomeSent
		}
		d.Lagging = x.done == 0 && !newer && l.Connected
		return d, true
	}
	switch {
	case !l.Connected || l.Since.After(r.at):
		return d, false
	case newer:
		d.Outcome = OutcomeSuperseded
	case len(l.sends) > 0 && l.sends[0].serial > r.serial:
		return d, false // longer ago than is remembered
	default:
		d.Outcome, d.Lagging = OutcomeWaiting, true
	}
	return d, true
}
