package monitor

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

const (
	// maxStaleNodes bounds the nodes with a freshness alert to raise; one more goes
	// unnamed until there is room, and its own log and metrics have it all the same.
	maxStaleNodes = 256
	// staleEvery spaces the alerts of one node: the first names an entry, what follows
	// within this time is counted in the next.
	staleEvery = time.Minute
	// maxStaleName leaves room for the rest of the request id.
	maxStaleName = 200
)

// staleness is what nodes reported about entries they served as current and that were
// not, until alerts say so.
type staleness struct {
	mu      sync.Mutex
	pending map[string]*staleNode
	raised  map[string]time.Time // last alert by node, forgotten after staleEvery
}

type staleNode struct {
	count  uint64
	sample *pb.FreshnessViolation
}

// violated notes a delta's violations. It reports whether an alert is due.
func (s *staleness) violated(d *pb.Delta) bool {
	found := d.GetCache().GetViolations()
	if len(found) == 0 {
		return false
	}
	name, _, _ := strings.Cut(d.GetReporter(), "@")
	// Names of alerts are paths below "alert/"; those of nodes may be paths themselves.
	name = strings.ReplaceAll(cmp.Or(d.GetNode().GetId(), name), "/", "-")
	if outrigger.CheckName("node", name) != nil || len(name) > maxStaleName {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pending[name]
	if n == nil {
		if len(s.pending) >= maxStaleNodes {
			return false
		}
		if s.pending == nil {
			s.pending = map[string]*staleNode{}
		}
		n = &staleNode{}
		s.pending[name] = n
	}
	n.count += uint64(len(found)) + min(d.GetCache().GetViolationsDropped(), 1<<40)
	n.sample = found[0]
	return true
}

// due takes the nodes whose alert may be raised now.
func (s *staleness) due(now time.Time) map[string]*staleNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.raised, func(_ string, at time.Time) bool { return now.Sub(at) >= staleEvery })
	out := map[string]*staleNode{}
	for name, n := range s.pending {
		if _, lately := s.raised[name]; !lately {
			out[name] = n
			delete(s.pending, name)
		}
	}
	return out
}

// done remembers an alert, or puts back what could not be written.
func (s *staleness) done(name string, n *staleNode, now time.Time, written bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if written {
		if s.raised == nil {
			s.raised = map[string]time.Time{}
		}
		s.raised[name] = now
		return
	}
	if later := s.pending[name]; later != nil {
		later.count += n.count
	} else {
		s.pending[name] = n
	}
}

// alertStale raises the alerts that are due. Run's goroutine only.
func (m *Monitor) alertStale(ctx context.Context) {
	now := m.opts.Now()
	due := m.stale.due(now)
	for _, name := range slices.Sorted(maps.Keys(due)) {
		n := due[name]
		v := n.sample
		key := wire.Key(v.GetKey()).String()
		at := strconv.FormatUint(v.GetFoundUnixNano(), 10)
		raised := &pb.AlertRaised{Severity: "high",
			Summary: fmt.Sprintf("node %s served %d entries as current that were not, %q among them; they are repaired", name, n.count, key),
			Numbers: map[string]string{"entries": strconv.FormatUint(n.count, 10), "key": key, "age": v.GetAge(),
				"shown": wire.Dot(v.GetShown()).String(), "current": wire.Dot(v.GetCurrent()).String(), "found_unix_nano": at}}
		_, err := m.append(ctx, "monitor/freshness/"+name+"/"+at, "", []eventlog.Write{{Aggregate: "alert/freshness-" + name,
			Expect: eventlog.Any, Events: []*pb.Event{{Payload: &pb.Event_AlertRaised{AlertRaised: raised}}}}})
		if err != nil {
			m.opts.Logger.Warn("freshness alert not appended; retrying at the next look", "node", name, "error", err)
		}
		m.stale.done(name, n, now, err == nil)
	}
}
