package pebble

import (
	"time"

	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Bounds of one group commit and of the commits that may be waiting for the disk.
const (
	maxGroupEvents = eventlog.MaxBatchEvents
	maxGroupBytes  = 4 << 20
	maxInFlight    = 8
)

// group is one commit: what goes to the disk and who waits for it.
type group struct {
	batch   *pebble.Batch
	last    uint64 // head after this group
	events  int
	replies []reply
	touched map[string]uint64 // last sequence per aggregate written to
	err     error             // apply failed
	begun   time.Time
}

type reply struct {
	to  *request
	res result
}

// committer orders, numbers and writes appends. build runs ahead of the disk: its state
// covers groups that are not durable yet. Nothing of it is visible outside before its
// group and all groups before are durable, refusals included, so that nobody acts on a
// state that a power loss could take back.
type committer struct {
	log       *Log
	now       func() time.Time
	clock     eventlog.Clock
	next      uint64 // position of the next event
	window    *eventlog.Window
	sequences recent
	inFlight  chan *group
	broken    error // of the first failed group; belongs to finish
}

func newCommitter(l *Log, opts Options) *committer {
	return &committer{
		log: l, now: opts.Now, window: eventlog.NewWindow(opts.Window),
		sequences: recent{limit: 1 << 16}, inFlight: make(chan *group, maxInFlight),
	}
}

// run builds and applies groups until quit, while a second goroutine waits for their
// syncs in order. It returns when both have ended.
func (c *committer) run() {
	acked := make(chan struct{})
	go func() {
		defer close(acked)
		for g := range c.inFlight {
			c.finish(g)
		}
	}()
	for {
		select {
		case r := <-c.log.queue:
			c.inFlight <- c.build(c.collect(r))
		case <-c.log.quit:
			close(c.inFlight)
			<-acked
			return
		}
	}
}

// collect takes what else is waiting, up to the bounds of a group.
func (c *committer) collect(r *request) []*request {
	reqs, events, bytes := []*request{r}, len(r.events), r.bytes
	for events < maxGroupEvents && bytes < maxGroupBytes {
		select {
		case r := <-c.log.queue:
			reqs, events, bytes = append(reqs, r), events+len(r.events), bytes+r.bytes
		default:
			return reqs
		}
	}
	return reqs
}

// build turns requests into a group and hands its batch to the store.
func (c *committer) build(reqs []*request) *group {
	g := &group{batch: c.log.store.db.NewBatch(), touched: make(map[string]uint64), begun: time.Now()}
	at := c.clock.Advance(c.now())
	for _, r := range reqs {
		if !r.state.CompareAndSwap(waiting, taken) {
			continue
		}
		g.replies = append(g.replies, reply{r, c.place(g, r, at)})
	}
	g.last = c.next - 1
	for aggregate, sequence := range g.touched {
		g.fail(g.batch.Set(sequenceKey(aggregate), number(sequence), nil))
	}
	if g.err == nil && !g.batch.Empty() {
		g.fail(c.log.store.apply(g.batch))
	}
	if g.err != nil {
		c.log.fail(g.err)
	}
	return g
}

func (g *group) fail(err error) {
	if g.err == nil {
		g.err = err
	}
}

// place decides one request and adds its events to the group.
func (c *committer) place(g *group, r *request, at time.Time) result {
	if err := c.log.failed(); err != nil {
		return result{err: err}
	}
	if r.verbatim {
		return c.placeVerbatim(g, r)
	}
	if r.id != "" {
		if o, ok := c.window.Get(r.id); ok {
			return result{outcome: o, duplicate: true}
		}
	}
	if err := c.checkExpect(r.writes); err != nil {
		return result{err: err}
	}
	o := eventlog.Outcome{First: c.next, Last: c.next + uint64(len(r.events)) - 1}
	i := 0
	for _, w := range r.writes {
		sequence, err := c.sequence(w.Aggregate)
		if err != nil {
			g.fail(err) // cannot happen: checkExpect has just read it into the cache
			return result{err: err}
		}
		for range w.Events {
			sequence++
			c.add(g, r, i, sequence, at)
			i++
		}
		if len(w.Events) > 0 {
			c.sequences.put(w.Aggregate, sequence)
			g.touched[w.Aggregate] = sequence
		}
	}
	if r.id != "" {
		c.remember(g, r.id, o)
	}
	return result{outcome: o}
}

// add stamps event i of a request and puts it into the group's batch.
func (c *committer) add(g *group, r *request, i int, sequence uint64, at time.Time) {
	e := r.events[i]
	e.Sequence, e.Position, e.Hlc, e.At = sequence, c.next, c.clock.Next(), timestamppb.New(at)
	g.fail(g.batch.Set(eventKey(e.Position), appendStamp(r.records[i], e.Sequence, e.Position, e.Hlc, at), nil))
	g.fail(g.batch.Set(indexKey(e.Aggregate, sequence), number(e.Position), nil))
	g.events++
	c.next++
}

// remember stores a request id and drops the oldest beyond the window.
func (c *committer) remember(g *group, id string, o eventlog.Outcome) {
	g.fail(g.batch.Set(requestKey(o.First), encodeRequest(id, o), nil))
	if old, evicted := c.window.Add(id, o); evicted {
		g.fail(g.batch.Delete(requestKey(old.First), nil))
	}
}

// checkExpect compares each write with the sequence its aggregate will have by then.
func (c *committer) checkExpect(writes []eventlog.Write) error {
	for i, w := range writes {
		current, err := c.sequence(w.Aggregate)
		if err != nil {
			return err
		}
		for _, earlier := range writes[:i] {
			if earlier.Aggregate == w.Aggregate {
				current += uint64(len(earlier.Events))
			}
		}
		if w.Expect != eventlog.Any && uint64(w.Expect) != current {
			return eventlog.ErrConflict(w.Aggregate, w.Expect, current)
		}
	}
	return nil
}

// sequence returns the last sequence of an aggregate, groups in flight included.
func (c *committer) sequence(aggregate string) (uint64, error) {
	if s, ok := c.sequences.get(aggregate); ok {
		return s, nil
	}
	v, err := c.log.store.get(sequenceKey(aggregate))
	if err != nil || v == nil {
		return 0, err
	}
	s, err := parseNumber("sequence of "+aggregate, v)
	if err == nil {
		c.sequences.put(aggregate, s)
	}
	return s, err
}

// restoreWindow loads the remembered request ids; ids beyond a smaller window are
// forgotten for good.
func (c *committer) restoreWindow() error {
	var drop *pebble.Batch
	err := scan(c.log.store.db, []byte{prefixRequest}, []byte{prefixRequest + 1}, func(key, value []byte) (bool, error) {
		id, o, err := decodeRequest(key, value)
		if err != nil {
			return false, err
		}
		if old, evicted := c.window.Add(id, o); evicted {
			if drop == nil {
				drop = c.log.store.db.NewBatch()
			}
			return true, drop.Delete(requestKey(old.First), nil)
		}
		return true, nil
	})
	if err != nil || drop == nil {
		return err
	}
	return outrigger.Wrap(outrigger.Unavailable, c.log.store.commit(drop, true), "shrink the window of request ids")
}

// finish waits until a group is durable, makes it visible and answers its callers. It
// sees groups in order; after the first failed one it trusts none.
func (c *committer) finish(g *group) {
	if g.err == nil && !g.batch.Empty() {
		if g.err = g.batch.SyncWait(); g.err != nil {
			c.log.fail(g.err)
		}
	}
	if c.broken != nil {
		g.err = c.broken
	}
	c.broken = g.err
	if g.err == nil && g.events > 0 {
		c.log.publish(g.last)
		c.log.metrics.commit(g.events, time.Since(g.begun))
	}
	for _, r := range g.replies {
		if g.err != nil {
			r.res = c.log.lost(r.res)
		}
		r.to.done <- r.res
	}
	if g.err == nil {
		_ = g.batch.Close() // returns the memory; reports nothing but misuse
	}
}

// lost turns the result of a request in a failed group into what is known about it: a
// refused one was not written, anything else may or may not be on the disk.
func (l *Log) lost(res result) result {
	if res.err != nil {
		return result{err: l.failed()}
	}
	return result{err: outrigger.Wrap(outrigger.Unknown, *l.failure.Load(), "event log commit failed; restart the process and repeat the append with the same request id to learn the outcome")}
}

// fail stops the log for writing. The first failure is kept.
func (l *Log) fail(err error) {
	if l.failure.CompareAndSwap(nil, &err) {
		l.logger.Error("event log stopped: a commit failed", "error", err)
	}
}

// failed returns the error of every write after a failure.
func (l *Log) failed() error {
	if p := l.failure.Load(); p != nil {
		return outrigger.Wrap(outrigger.Unavailable, *p, "event log stopped after a failed commit, nothing was written; check the disk and restart the process")
	}
	return nil
}
