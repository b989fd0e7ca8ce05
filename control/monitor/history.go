package monitor

import (
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

// A model's past is kept in two rings: by the minute for six hours and by ten minutes for
// three days, some 19 kB. The oldest slot is being left, so a ring has one more.
const (
	fineSlot   = time.Minute
	fineSlots  = 6*60 + 1
	roughSlot  = 10 * time.Minute
	roughSlots = 3*24*6 + 1
	maxPasts   = 1024 // models; those without requests for three days make room
)

type past struct {
	fine  [fineSlots]pastSlot
	rough [roughSlots]pastSlot
	seen  time.Time
}

type pastSlot struct {
	of int64
	alerting.Spent
}

func (p *past) add(requests, failures uint64, now time.Time) {
	put := func(ring []pastSlot, slot time.Duration) {
		n := now.UnixNano() / int64(slot)
		s := &ring[n%int64(len(ring))]
		if s.of != n {
			*s = pastSlot{of: n}
		}
		s.Requests, s.Failures = s.Requests+requests, s.Failures+failures
	}
	put(p.fine[:], fineSlot)
	put(p.rough[:], roughSlot)
	p.seen = now
}

func (p *past) sum(window time.Duration, now time.Time) (out alerting.Spent) {
	ring, slot := p.fine[:], fineSlot
	if window > (fineSlots-1)*fineSlot {
		ring, slot = p.rough[:], roughSlot
	}
	n := now.UnixNano() / int64(slot)
	oldest := n - int64(window/slot)
	for i := range ring {
		if s := &ring[i]; s.of > oldest && s.of <= n {
			out.Requests, out.Failures = out.Requests+s.Requests, out.Failures+s.Failures
		}
	}
	return out
}

// remember adds an outcome to its model's past. c.mu is held.
func (c *counts) remember(o outcome, now time.Time) {
	if o.key.shadow || o.delta.GetRequests() == 0 {
		return
	}
	p := c.pasts[o.key.model]
	if p == nil {
		if len(c.pasts) >= maxPasts {
			for name, old := range c.pasts {
				if now.Sub(old.seen) > roughSlots*roughSlot {
					delete(c.pasts, name)
				}
			}
		}
		if len(c.pasts) >= maxPasts {
			return
		}
		p = &past{}
		c.pasts[o.key.model] = p
	}
	ended := o.delta.GetRequests() - o.delta.GetCancelled()
	p.add(ended, min(o.delta.GetFailures(), ended), now)
}

// Spent is what a model's requests came to in a window of up to three days: all versions
// together, copies and cancelled requests apart, requests and not units. It is whole minutes
// (ten of them for windows beyond six hours) of what this replica was told since it started.
func (m *Monitor) Spent(model string, window time.Duration) alerting.Spent {
	now := m.opts.Now()
	m.counts.mu.Lock()
	defer m.counts.mu.Unlock()
	if p := m.counts.pasts[model]; p != nil {
		return p.sum(window, now)
	}
	return alerting.Spent{}
}
