package inference

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Copies of requests for shadow versions. They are made of requests that were read whole
// anyway, wait in a queue of their own, and are sent by goroutines of their own: what
// becomes of a copy, and how many there are, is nothing that the caller can notice.

// Defaults and bounds of copies.
const (
	DefaultShadows = 64       // under way at one time
	shadowQueue    = 256      // waiting
	shadowBytes    = 32 << 20 // of bodies waiting and under way
	MaxShadowBody  = 1 << 20  // of a request that is copied
)

// HeaderShadow on a request, with the value "off", forbids copies of it; on a copy it says
// "copy", so that a server can leave out what must not happen twice.
const HeaderShadow = "x-outrigger-shadow"

const hdrShadow = "X-Outrigger-Shadow"

// ShadowStats count copies since the start.
type ShadowStats struct {
	Sent     uint64 `json:"sent"`    // answered, whatever the answer
	Dropped  uint64 `json:"dropped"` // for want of room
	Skipped  uint64 `json:"skipped"` // not safe to make twice, or too large
	Waiting  int    `json:"waiting"` // now
	InFlight int64  `json:"in_flight"`
}

// shadows is the queue and what works it off.
type shadows struct {
	limit int
	queue chan *call
	bytes atomic.Int64 // of bodies held

	sent, dropped, skipped atomic.Uint64
	inflight               atomic.Int64
}

func newShadows(limit int) *shadows {
	if limit <= 0 {
		return nil
	}
	return &shadows{limit: limit, queue: make(chan *call, shadowQueue)}
}

func (s *shadows) stats() *ShadowStats {
	if s == nil {
		return nil
	}
	return &ShadowStats{Sent: s.sent.Load(), Dropped: s.dropped.Load(), Skipped: s.skipped.Load(), Waiting: len(s.queue), InFlight: s.inflight.Load()}
}

// RunShadows sends copies of requests until ctx ends, which ends those under way, too.
// Before it runs, copies wait and then are dropped. Call it once.
func (h *Handler) RunShadows(ctx context.Context) error {
	s := h.shadows
	if s == nil {
		return nil
	}
	var all sync.WaitGroup
	defer all.Wait()
	room := make(chan struct{}, s.limit)
	for {
		select {
		case <-ctx.Done():
			return nil
		case room <- struct{}{}:
		}
		select {
		case <-ctx.Done():
			return nil
		case c := <-s.queue:
			all.Go(func() {
				defer func() { <-room }()
				c.copyOut(ctx)
			})
		}
	}
}

// shadowed reports whether any version is to get a copy of the call.
func (c *call) shadowed() bool {
	if len(c.assign.Model.Shadows) == 0 || c.h.shadows == nil || !c.assign.HasUnit || !policy.Assigned(c.assign.Arm) {
		return false
	}
	for i := range c.assign.Model.Shadows {
		if c.assign.Model.Shadows[i].Mirrors(c.assign.Bucket) {
			return true
		}
	}
	return false
}

// twice reports whether the request may be made twice: it asks for an answer and leaves
// nothing behind. Sequences have a state, OpenAI's responses are stored, and a client's own
// retry has had its copy.
func (c *call) twice() bool {
	return c.rpc == nil && !c.api.Get && !c.api.Meta && !c.api.Named && c.env.Sequence == "" && !c.again && len(c.body) <= MaxShadowBody &&
		first(c.r.Header, hdrShadow) != "off"
}

// copyToShadows queues copies of the call, or counts why there are none. It never waits.
func (c *call) copyToShadows() {
	if !c.shadowed() {
		return
	}
	s := c.h.shadows
	if !c.twice() {
		s.skipped.Add(1)
		c.h.metrics.shadow("skipped")
		return
	}
	for i := range c.assign.Model.Shadows {
		sh := &c.assign.Model.Shadows[i]
		v := usable(c.assign.Model, sh.Version)
		if !sh.Mirrors(c.assign.Bucket) || v == nil {
			continue
		}
		if s.bytes.Add(int64(len(c.body))) > shadowBytes || !s.offer(c.shadowOf(v)) {
			s.bytes.Add(-int64(len(c.body)))
			s.dropped.Add(1)
			c.h.metrics.shadow("dropped")
		}
	}
}

func (s *shadows) offer(c *call) bool {
	select {
	case s.queue <- c:
		return true
	default:
		return false
	}
}

// shadowOf is the call as the shadow gets it. The body is shared: nobody writes to it. The
// head is not: it belongs to the connection.
func (c *call) shadowOf(v *policy.Version) *call {
	r := c.r.Clone(context.Background())
	r.Body = http.NoBody
	return &call{h: c.h, w: nobody{header: http.Header{}}, r: r, api: c.api, path: c.path, policy: c.policy, status: c.status, plan: c.plan, model: c.model,
		body: c.body, asked: c.asked, env: c.env, streams: c.streams, timeout: c.timeout, settled: true,
		assign: Assignment{Model: c.assign.Model, Version: v, Arm: policy.ArmShadow}}
}

// copyOut sends a copy once and accounts for it.
func (c *call) copyOut(ctx context.Context) {
	s := c.h.shadows
	s.inflight.Add(1)
	defer s.inflight.Add(-1)
	defer s.bytes.Add(-int64(len(c.body)))
	defer c.release()
	ctx, cancel := context.WithTimeout(ctx, c.limit())
	defer cancel()
	c.start, c.region = c.h.now(), c.h.o.Region
	c.r = c.r.WithContext(ctx)
	end, entered := c.serveBy(ctx, 1)
	if !entered {
		s.dropped.Add(1)
		c.h.metrics.shadow("dropped")
		return
	}
	if end.verdict == tryNext && c.held == nil {
		end.failed = true // nobody answered
	}
	s.sent.Add(1)
	c.h.metrics.shadow("sent")
	c.account(end)
}

// nobody reads the answer to a copy.
type nobody struct{ header http.Header }

func (n nobody) Header() http.Header         { return n.header }
func (n nobody) WriteHeader(int)             {}
func (n nobody) Write(p []byte) (int, error) { return len(p), nil }

// Flush implements http.Flusher.
func (n nobody) Flush() {}
