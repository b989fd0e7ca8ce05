package control

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

func TestCanaryStep(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	node := func(sent, acked uint64) adsserver.NodeState {
		return adsserver.NodeState{Node: outrigger.Node{ID: "n"}, Connected: true, Since: at(-60), Sent: sent, Acked: acked}
	}
	away := func(n adsserver.NodeState, since int) adsserver.NodeState {
		n.Connected, n.Since = false, at(since)
		return n
	}
	nacked := func(n adsserver.NodeState, when int) adsserver.NodeState {
		n.Nack = &adsserver.Nack{Type: xds.TypeCluster, Resource: "model/chat/v1", Message: "no such thing", At: at(when)}
		return n
	}
	for name, c := range map[string]struct {
		policy   uint64 // 0 = 20
		accepted int    // since when all have it; 0 = they have not
		now      int
		nodes    []adsserver.NodeState
		rolled   bool
		anew     bool
		want     string // "", widened, rolled back
		says     string
	}{
		"nothing to try":                       {policy: 10, now: 100, nodes: []adsserver.NodeState{nacked(node(10, 0), 1)}, says: "no policy change yet"},
		"the same again":                       {policy: 10, anew: true, now: 1, nodes: []adsserver.NodeState{nacked(node(10, 0), 1)}, want: "rolled back", says: "no such thing"},
		"nobody is there":                      {now: 1000, says: "none of the chosen"},
		"not accepted yet":                     {now: 19, nodes: []adsserver.NodeState{node(20, 10)}, says: "n has not accepted"},
		"not accepted in time":                 {now: 20, nodes: []adsserver.NodeState{node(20, 10)}, want: "rolled back", says: "within 20s"},
		"owes an answer to an earlier one":     {now: 20, nodes: []adsserver.NodeState{node(10, 9)}, want: "rolled back", says: "within 20s"},
		"accepted, within the dwell":           {accepted: 2, now: 11, nodes: []adsserver.NodeState{node(20, 20)}, says: "1 clients have the policy"},
		"accepted for the dwell":               {accepted: 2, now: 12, nodes: []adsserver.NodeState{node(20, 20), node(21, 21)}, want: "widened", says: "2 clients"},
		"accepted, not remembered since when":  {now: 50, nodes: []adsserver.NodeState{node(20, 20)}, says: "1 clients have the policy"},
		"one of two is behind":                 {accepted: 2, now: 12, nodes: []adsserver.NodeState{node(20, 20), node(20, 10)}, says: "not accepted"},
		"rejected":                             {now: 1, nodes: []adsserver.NodeState{node(20, 20), nacked(node(20, 10), 1)}, want: "rolled back", says: "no such thing"},
		"rejected, at another replica":         {now: 1, nodes: []adsserver.NodeState{nacked(node(0, 9), 1)}, want: "rolled back", says: "no such thing"},
		"cut off, at another replica":          {now: 15, nodes: []adsserver.NodeState{away(node(0, 20), 5)}, want: "rolled back", says: "cut off"},
		"a rejection from before the canary":   {accepted: 2, now: 12, nodes: []adsserver.NodeState{nacked(node(20, 20), -1)}, want: "widened"},
		"rejected something it had been given": {now: 1, nodes: []adsserver.NodeState{nacked(node(10, 9), 1)}, says: "not accepted"},
		"cut off, within its lease":            {accepted: 2, now: 14, nodes: []adsserver.NodeState{node(20, 20), away(node(20, 20), 5)}, says: "cut off"},
		"cut off for its lease":                {accepted: 2, now: 15, nodes: []adsserver.NodeState{node(20, 20), away(node(20, 20), 5)}, want: "rolled back", says: "cut off for 10s"},
		"left before it was sent it":           {accepted: 2, now: 15, nodes: []adsserver.NodeState{node(20, 20), away(node(10, 10), 0)}, want: "widened"},
		"rolled back already":                  {rolled: true, now: 15, nodes: []adsserver.NodeState{node(20, 20)}, says: "as it was"},
	} {
		t.Run(name, func(t *testing.T) {
			canary := &facts.Canary{Started: 10, StartedAt: start, Dwell: 10 * time.Second, Patience: 20 * time.Second, RolledBack: c.rolled, Anew: c.anew, Reason: "as it was"}
			v := canaryView{policy: c.policy, since: start, lease: 10 * time.Second, chosen: c.nodes}
			if v.policy == 0 {
				v.policy = 20
			}
			if c.accepted != 0 {
				v.accepted = at(c.accepted)
			}
			end, waits := canaryStep(canary, v, at(c.now))
			got, says := "", waits
			if end != nil {
				got, says = "rolled back", end.GetReason()
				if end.GetWidened() {
					got = "widened"
				}
				if end.GetPolicy() != v.policy {
					t.Errorf("ends policy %d, want %d", end.GetPolicy(), v.policy)
				}
			}
			if got != c.want || !strings.Contains(says, c.says) {
				t.Errorf("%q: %s; want %q: %s", got, says, c.want, c.says)
			}
		})
	}
}

// The share is kept, the choice is stable, and every canary draws anew.
func TestCanaryChooses(t *testing.T) {
	first, second := &facts.Canary{Share: 500, Started: 1}, &facts.Canary{Share: 500, Started: 2}
	const nodes = 20_000
	n, both := 0, 0
	for i := range nodes {
		node := outrigger.Node{ID: fmt.Sprint("node-", i), Kind: "sidecar"}
		a, b := first.Chooses(node), second.Chooses(node)
		if a != first.Chooses(node) {
			t.Fatal("not stable")
		}
		if a {
			n++
			if b {
				both++
			}
		}
	}
	if share := float64(n) / nodes; math.Abs(share-0.05) > 0.006 {
		t.Errorf("%.4f of the nodes are chosen, want 0.05", share)
	}
	if both > n/5 {
		t.Errorf("%d of %d are chosen again by the next canary", both, n)
	}
	all := &facts.Canary{Share: experiments.Buckets, Kinds: []string{"envoy"}, Nodes: []string{"named"}}
	for id, want := range map[string]bool{"x": false, "named": true} {
		if got := all.Chooses(outrigger.Node{ID: id, Kind: "sidecar"}); got != want {
			t.Errorf("sidecar %s is chosen: %v, want %v", id, got, want)
		}
	}
	if !all.Chooses(outrigger.Node{ID: "x", Kind: "envoy"}) {
		t.Error("an Envoy is not chosen among all Envoys")
	}
}
