package adsserver

import (
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// Sidecar reports whether the node can say that all of a policy position is in force there,
// so that Acked counts it.
func (n NodeState) Sidecar() bool { return n.sidecar }

// Remote is the line of a node that another replica serves.
func Remote(node outrigger.Node, sidecar, connected bool, since time.Time, acked uint64, nack *Nack) NodeState {
	return NodeState{Node: node, Group: node.Kind, Connected: connected, Since: since, Acked: acked, Nack: nack, sidecar: sidecar}
}

// Tally sorts the sidecars among nodes as Acked does those of the ledger.
func (s *Server) Tally(nodes []NodeState, position uint64, now time.Time) (acked, laggards []string) {
	return verdicts(nodes, position, s.opt.Isolation, now)
}
