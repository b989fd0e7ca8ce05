package control

import (
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// The alert is raised once a client has been held back for a while, stays while clients come
// and go, and is over when there has been none for a while.
func TestStrangersStep(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	node := func(id string, since int) adsserver.NodeState {
		return adsserver.NodeState{Node: outrigger.Node{ID: id}, Connected: true, Since: at(since), Held: "Cluster model/chat/v1", HeldSince: at(since)}
	}
	gone := func(n adsserver.NodeState, since int) adsserver.NodeState {
		n.Connected, n.Since = false, at(since)
		return n
	}
	s := &strangers{started: start}
	standing := false
	for _, step := range []struct {
		now            int
		held           []adsserver.NodeState
		raise, resolve bool
	}{
		{now: 1, held: []adsserver.NodeState{node("a", 1)}},
		{now: 3, held: []adsserver.NodeState{node("a", 1)}},
		{now: 4, held: []adsserver.NodeState{node("a", 1), node("b", 4)}, raise: true},
		{now: 5, held: []adsserver.NodeState{node("a", 1), node("b", 4)}},
		{now: 20, held: []adsserver.NodeState{node("a", 1)}}, // not more often than once a minute
		{now: 30}, // between two streams
		{now: 31, held: []adsserver.NodeState{node("a", 31)}},
		{now: 70, held: []adsserver.NodeState{node("a", 31)}, raise: true}, // one now
		{now: 80, held: []adsserver.NodeState{gone(node("a", 31), 79)}},
		{now: 139, held: []adsserver.NodeState{gone(node("a", 31), 79)}}, // gone for good
		{now: 141, held: []adsserver.NodeState{gone(node("a", 31), 79)}},
		{now: 142, held: []adsserver.NodeState{gone(node("a", 31), 79)}, resolve: true},
		{now: 143},
	} {
		raise, resolve := s.step(step.held, standing, at(step.now))
		if (raise != nil) != step.raise || resolve != step.resolve {
			t.Fatalf("at %d s: raised %v, resolved %v; want %v, %v", step.now, raise, resolve, step.raise, step.resolve)
		}
		if raise != nil {
			standing = true
			s.mine = raised{nodes: len(step.held), at: at(step.now)}
		}
		if resolve {
			standing, s.mine = false, raised{}
		}
	}

	// A replica that has just started leaves an alert alone that it knows nothing of: the
	// clients are on their way back.
	s = &strangers{started: start}
	for _, now := range []int{10, 59} {
		if _, resolve := s.step(nil, true, at(now)); resolve {
			t.Errorf("at %d s: resolved", now)
		}
	}
	if _, resolve := s.step(nil, true, at(70)); !resolve {
		t.Error("it stands for ever")
	}
}
