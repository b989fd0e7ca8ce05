package cache

import (
	"context"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

const (
	// attachRetry is short, because an agent that restarts is back in well under a second.
	attachRetry = 100 * time.Millisecond
	// privateAfter is how long the node's agent must be away before this process follows
	// the feed by itself, and back before it stops: a restart should cost the control
	// plane no extra stream per pod.
	privateAfter = time.Second
	superviseGap = 100 * time.Millisecond
	// deniedRetry is how often a process without a table asks whether it has one now.
	deniedRetry = time.Second
)

// Run attaches to the agent's table, warms the process tier up from it, runs the private
// agent when one is needed and tells agents what was read, until ctx ends; it returns nil
// when everything it started has ended.
func (s *Store) Run(ctx context.Context) error {
	var loops sync.WaitGroup
	if s.o.TablePath != "" {
		loops.Go(func() { s.attach(ctx) })
	}
	if s.o.Private {
		loops.Go(func() { s.supervise(ctx) })
	}
	if s.agent != nil || s.o.Private {
		loops.Go(func() { s.reportReads(ctx) })
	}
	if !s.o.WarmUp.Off && (s.o.TablePath != "" || s.o.Table != nil) {
		loops.Go(func() { s.warmUp(ctx) })
	}
	<-ctx.Done()
	loops.Wait()
	return nil
}

// attach keeps the process attached to the agent's table.
func (s *Store) attach(ctx context.Context) {
	for denied := false; ctx.Err() == nil; {
		at, err := node.Attach(ctx, s.o.TablePath)
		if outrigger.IsKind(err, outrigger.Denied) {
			if !denied {
				s.o.Logger.Warn("not attached to the node's table", "error", err)
			}
			denied = true
			pause.For(ctx, deniedRetry)
			continue
		}
		if err != nil {
			s.o.Logger.Debug("not attached to the node's table", "error", err)
			pause.For(ctx, attachRetry)
			continue
		}
		denied = false
		s.attached.Store(&view{reader: at.Reader, lease: int64(at.Lease)})
		s.socketUp.Store(true)
		s.o.Logger.Info("attached to the node's table", "generation", at.Reader.Generation())
		select {
		case <-at.Gone:
			s.o.Logger.Warn("the node's table is gone")
		case <-ctx.Done():
		}
		s.socketUp.Store(false)
		// The agent's lease has some time left, and another agent may take writes already.
		s.raiseFence()
		at.Close()
	}
}

// nodeUp reports whether the node's agent seems to be there. That its feed is down is no
// reason to doubt it: the control plane would not answer this process either.
func (s *Store) nodeUp() bool {
	switch {
	case s.o.TablePath != "":
		return s.socketUp.Load()
	case s.o.Table != nil:
		r := s.o.Table()
		return r != nil && !r.Closed()
	}
	return false
}

// Era changes whenever another table comes into use. Within one, reads through this Store
// see what was read and written through it before; Request.After carries that on.
func (s *Store) Era() uint64 { return s.era.Load() }

// current returns the table to use, and fences when that is another one than before.
func (s *Store) current() *view {
	now := s.view.Load()
	if s.wanted(now) == now {
		return now
	}
	s.switching.Lock()
	defer s.switching.Unlock()
	now = s.view.Load()
	next := s.wanted(now)
	if next != now {
		if now != nil {
			s.raiseFence()
		}
		s.view.Store(next)
		s.era.Add(1)
	}
	return next
}

// wanted is the table that should be in use, given the one that is: the node's, unless
// that is away and this process's own is fresh. A table that is away stays, without a
// lease, for its last known values.
func (s *Store) wanted(now *view) *view {
	own := s.private.Load()
	up := s.nodeUp()
	if own != nil && !up && (own.view == now || own.view.reader.Lease() > s.clock()) {
		return own.view
	}
	switch {
	case s.o.Table != nil && up:
		if r := s.o.Table(); r != nil && (now == nil || now.reader != r) {
			return &view{reader: r, lease: int64(s.o.Lease)}
		}
	case s.o.TablePath != "":
		if at := s.attached.Load(); at != nil && (up || now == nil || own == nil) {
			return at
		}
	}
	return now
}

// peers lists whom to ask, in order.
func (s *Store) peers() []*peer {
	out := make([]*peer, 0, 3)
	if own := s.private.Load(); own != nil && !s.nodeUp() {
		out = append(out, own.peer)
	}
	if s.agent != nil {
		out = append(out, s.agent)
	}
	if s.origin != nil {
		out = append(out, s.origin)
	}
	return out
}

// keeps reports whether p keeps the table in use, so that the table is at least as new
// as p's answers.
func (s *Store) keeps(p *peer) bool {
	v, own := s.view.Load(), s.private.Load()
	if own != nil && (v == own.view || p == own.peer) {
		return v == own.view && p == own.peer
	}
	return p == s.agent
}

// private is an agent in this process, over a heap table.
type private struct {
	view *view
	peer *peer
	stop func()
}

// supervise starts the private agent when the node has none for a while (at once, when
// none is configured) and stops it when the node's has been back for a while.
func (s *Store) supervise(ctx context.Context) {
	configured := s.o.TablePath != "" || s.o.Table != nil
	since, wasUp := s.clock(), s.nodeUp()
	t := time.NewTicker(superviseGap)
	defer t.Stop()
	for {
		up, now := s.nodeUp(), s.clock()
		if up != wasUp {
			since, wasUp = now, up
		}
		settled := !configured || now-since >= int64(privateAfter)
		switch own := s.private.Load(); {
		case own == nil && !up && settled:
			s.startPrivate(ctx)
		case own != nil && up && settled:
			s.stopPrivate(own)
			s.o.Logger.Info("the node's agent is back; the private one has stopped")
		}
		select {
		case <-ctx.Done():
			if own := s.private.Load(); own != nil {
				s.stopPrivate(own)
			}
			return
		case <-t.C:
		}
	}
}

func (s *Store) startPrivate(ctx context.Context) {
	self := s.o.Node
	self.Kind = "agent"
	a, err := node.New(node.Options{Node: self, Origin: s.o.Origin, Table: shm.Options{Heap: true, Bytes: s.o.PrivateBytes},
		Lease: s.o.Lease, Heartbeat: s.o.Lease / 3, Clock: s.o.Clock, Logger: s.o.Logger})
	if err != nil {
		s.o.Logger.Error("no private agent", "error", err)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := a.Run(ctx); err != nil {
			s.o.Logger.Error("private agent", "error", err)
		}
	}()
	cc := &inProcess{variables: a, coherence: a, admin: a.Admin(), streams: s.o.Origin}
	s.private.Store(&private{
		view: &view{reader: a.Table(), lease: int64(a.Lease())},
		peer: &peer{name: "private agent", cc: cc, coh: pb.NewCoherenceClient(cc)},
		stop: func() { cancel(); <-ended },
	})
	s.o.Logger.Info("no agent on this node; a private one runs")
}

// stopPrivate takes the private agent out of use before it ends.
func (s *Store) stopPrivate(own *private) {
	s.private.Store(nil)
	s.current()
	own.stop()
}
