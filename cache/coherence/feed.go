package coherence

import (
	"slices"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/version"
)

func (s *State) connected(in Connected, now int64) {
	s.stream, s.streamOf, s.streamOld, s.pending = in.Stream, 0, false, nil
	number, shards := s.subscription(now)
	s.emit(Subscribe{Stream: in.Stream, Incarnation: s.incarnation, From: s.applied, Number: number, Shards: shards})
}

func (s *State) frame(in Frame, now int64) {
	f := in.Frame
	if in.Stream != s.stream || f == nil || f.GetKind() == nil || f.GetIncarnation() == 0 {
		return
	}
	// A stream shows one log. Another one in it, or one that may be older than what is
	// followed by now, is a reason to ask anew, not to believe.
	if s.streamOf == 0 {
		s.streamOf = f.GetIncarnation()
	}
	if s.streamOf != f.GetIncarnation() || !s.adopt(f.GetRegion(), f.GetIncarnation(), startOf(f), !s.streamOld) {
		s.stream, s.pending = 0, nil
		s.emit(Resubscribe{Stream: in.Stream})
		return
	}
	s.streamOld = false
	s.heard(f, now)
	switch k := f.GetKind().(type) {
	case *pb.FeedFrame_Changes:
		s.changes(k.Changes, now)
	case *pb.FeedFrame_Ack:
		s.acknowledged(k.Ack, now)
	case *pb.FeedFrame_Reset_:
		// A lower position than the one applied comes from a follower that is behind:
		// floors of this log stay where they are.
		s.flush(k.Reset_.GetFrom())
	case *pb.FeedFrame_Selected:
		s.selected(k.Selected, now)
	}
}

// startOf is the position at which a node that holds nothing may join through f.
func startOf(f *pb.FeedFrame) uint64 {
	switch k := f.GetKind().(type) {
	case *pb.FeedFrame_Changes:
		return k.Changes.GetPrevious()
	case *pb.FeedFrame_Ack:
		return k.Ack.GetHead()
	case *pb.FeedFrame_Reset_:
		return k.Reset_.GetFrom()
	case *pb.FeedFrame_Selected:
		return k.Selected.GetPosition()
	}
	return 0
}

// changes takes one frame of the feed: everything with previous < position ≤ through.
func (s *State) changes(c *pb.Changes, now int64) {
	previous, through := c.GetPrevious(), c.GetThrough()
	if through <= s.applied || through < previous {
		return // a duplicate, or nonsense
	}
	s.note(through)
	for _, ch := range c.GetChanges() {
		if ch.GetPosition() > s.applied {
			s.apply(ch, now)
		}
	}
	if previous > s.applied {
		s.stats.Gaps++
		s.addSpan(span{previous, through})
	} else {
		s.applied = through
	}
	s.advance(now)
	s.closeGap(now)
}

// addSpan remembers a run above the gap. The run furthest away is forgotten when there
// is no room: its changes are applied, so fetching them again costs only time.
func (s *State) addSpan(n span) {
	i, _ := slices.BinarySearchFunc(s.spans, n, func(a, b span) int {
		if a.previous < b.previous {
			return -1
		}
		return 1
	})
	s.spans = slices.Insert(s.spans, i, n)
	merged := s.spans[:1]
	for _, sp := range s.spans[1:] {
		last := &merged[len(merged)-1]
		if sp.previous <= last.through {
			last.through = max(last.through, sp.through)
		} else {
			merged = append(merged, sp)
		}
	}
	s.spans = merged[:min(len(merged), maxSpans)]
}

// advance moves the applied position over runs it now touches and renews the lease if
// that reached an acknowledged head.
func (s *State) advance(now int64) {
	for len(s.spans) > 0 && s.spans[0].previous <= s.applied {
		s.applied = max(s.applied, s.spans[0].through)
		s.spans = s.spans[1:]
	}
	s.renew(now)
}

// acknowledged takes the answer to a heartbeat. An answer the clock contradicts (sent
// in the future: the clock jumped back) or that is too old to help is dropped.
func (s *State) acknowledged(a *pb.HeartbeatAck, now int64) {
	sent := int64(a.GetSent())
	if sent <= 0 || sent > now || sent+s.opt.Lease <= now {
		return
	}
	s.note(a.GetHead())
	s.pending = append(s.pending, ack{sent: sent, received: now, head: a.GetHead()})
	if len(s.pending) > maxPending {
		s.pending = s.pending[1:]
	}
	s.renew(now)
	s.closeGap(now)
}

// renew grants the lease of the newest heartbeat whose head is applied.
func (s *State) renew(now int64) {
	best := int64(0)
	for _, a := range s.pending {
		if a.head <= s.applied {
			best = max(best, a.sent)
		}
	}
	s.pending = slices.DeleteFunc(s.pending, func(a ack) bool {
		return a.sent <= best || a.sent+s.opt.Lease <= now
	})
	if until := best + s.opt.Lease; best > 0 && until > s.lease {
		s.lease = until
		s.emit(Lease{Until: until})
	}
}

// closeGap starts the fetch of what is missing: at once below a run that is already
// here, and after Patience below an acknowledged head, because the frames up to it may
// be right behind the acknowledgement.
func (s *State) closeGap(now int64) {
	if s.gap.number != 0 || now < s.gap.retryAt || s.incarnation == 0 {
		return
	}
	var to uint64
	switch {
	case len(s.spans) > 0:
		to = s.spans[0].previous
	default:
		for _, a := range s.pending {
			if a.head > s.applied && now-a.received >= s.opt.Patience {
				to = max(to, a.head)
			}
		}
	}
	if to <= s.applied {
		return
	}
	if to-s.applied > s.opt.MaxGap {
		s.flush(s.seen)
		return
	}
	s.gap = rangeFetch{number: s.next(), from: s.applied}
	s.emit(FetchRange{Range: s.gap.number, Incarnation: s.incarnation, From: s.applied, To: to})
}

func (s *State) rangeArrived(in RangeArrived, now int64) {
	if in.Range == 0 || in.Range != s.gap.number {
		return
	}
	from, to := s.gap.from, in.Response.GetCompleteTo()
	s.gap = rangeFetch{}
	if to <= from {
		s.gap.retryAt = now + s.opt.Patience // no progress: the server is behind
		return
	}
	s.note(to)
	for _, ch := range in.Response.GetChanges() {
		if ch.GetPosition() > s.applied {
			s.apply(ch, now)
		}
	}
	if from <= s.applied {
		s.applied = max(s.applied, to)
	}
	s.advance(now)
	s.closeGap(now)
}

func (s *State) rangeFailed(in RangeFailed, now int64) {
	if in.Range == 0 || in.Range != s.gap.number {
		return
	}
	s.gap = rangeFetch{retryAt: now + s.opt.Patience}
	if in.Gone {
		s.flush(s.seen)
	}
}

// apply raises floors for one change. It may run twice for one change and in any order.
func (s *State) apply(c *pb.Change, now int64) {
	s.stats.Changes++
	s.settle(c)
	p := c.GetPosition()
	key := keyOf(c.GetKey())
	switch c.GetScope() {
	case pb.Change_ALL:
		s.global = max(s.global, p)
		for e := range s.all() {
			s.raise(e, p)
		}
	case pb.Change_SESSION:
		s.raiseSession(key.Tenant, key.Session, p)
	default:
		s.applyKey(key, c, now)
	}
}

func (s *State) applyKey(key outrigger.Key, c *pb.Change, now int64) {
	p := c.GetPosition()
	e := s.find(key)
	if e == nil {
		b := &s.byKey[bucketOf(key)]
		*b = max(*b, p)
		return
	}
	if p < e.floor || e.held() != nothing && p <= e.at {
		e.floor = max(e.floor, p)
		return // older than what is known
	}
	e.floor = p
	want, exact := s.missing(key)
	if e.unasked() {
		return
	}
	switch covered := len(want) == 0 || version.Covers(contextOf(c.GetVersion()), want); {
	case !covered && exact && e.held() != nothing:
		e.at = p // an earlier write of the owner region than the one acknowledged here
	case !covered:
		s.invalidate(e)
	case c.GetDeleted():
		s.stats.Refreshed++
		s.install(e, nil, true, p, now)
	case c.GetVariable() != nil:
		s.stats.Refreshed++
		s.install(e, c.GetVariable(), true, p, now)
	default:
		s.invalidate(e)
	}
}

// raiseSession raises the floor of every key of a session, in the order they came, and
// of those to come.
func (s *State) raiseSession(tenant, session string, p uint64) {
	b := &s.bySession[sessionBucket(tenant, session)]
	*b = max(*b, p)
	for e := range s.of(tenant, session) {
		s.raise(e, p)
	}
}

func (s *State) raise(e *entry, p uint64) {
	e.floor = max(e.floor, p)
	if e.held() != nothing && p > e.at {
		s.invalidate(e)
	}
}
