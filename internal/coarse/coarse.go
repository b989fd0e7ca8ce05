// Package coarse tells the time for checks that are made on every cache hit, at a third
// of the price of the operating system's clock, and never too early.
//
// # Use
//
//	clock := node.Clock()
//	cheap := coarse.New(clock)
//	if cheap() < lease { … } // the lease holds by clock, too
//
// # What it promises
//
// A reading t taken while clock would have said p satisfies p ≤ t ≤ p + Ahead: it may be
// ahead of the clock by up to Ahead (2 ms), so that a lease checked with it ends early by
// as much, and is never behind it, however long this process or any part of it stood
// still. There is no ticker that could stall: the processor's own counter says how old
// the last look at the clock is, and a look older than Window (1 ms) is not used.
//
// # How
//
// An anchor is a look at the clock with the counter's value from just before it. A
// reading takes the counter; while it is less than Window past the anchor, the answer is
// the anchor's time plus Ahead, else the clock is asked and becomes the next anchor. The
// counter's rate is measured against the clock over at least a millisecond and then again
// with each anchor. Ahead is twice Window, so the promise holds while the true rate is at
// least half the measured one; anchors that disagree by more than an eighth (a machine moved to
// another host) make it measure anew, and until it has, readings are the clock's.
//
// The counter is the time stamp counter on amd64 and the generic timer's virtual counter
// on arm64, used on Linux when the kernel itself keeps time by them, which it does only
// while they run at one rate and agree on all cores. Elsewhere New returns the clock. A
// machine that is suspended stops the clock as well as the reading's guarantee: what
// package node says of CLOCK_MONOTONIC holds here, too.
//
// Not for a faked clock, such as that of a testing/synctest bubble: the counter is real.
//
// # Concurrency
//
// The returned function may be called from any goroutine; it allocates only when it
// renews the anchor, at most once per Window.
package coarse

import (
	"sync/atomic"
	"time"
)

const (
	// Window is the age, in counts, at which an anchor is no longer used.
	Window = time.Millisecond
	// Ahead is how far a reading may be ahead of the clock.
	Ahead = 2 * Window
)

// New returns a cheap upper bound of clock, a monotonic clock in nanoseconds, or clock
// itself where there is no counter to be trusted.
func New(clock func() int64) func() int64 {
	if !steady() {
		return clock
	}
	k := newClock(clock, counter)
	return func() int64 { // now, with the counter called directly
		a := k.last.Load()
		if counter()-a.count < a.span {
			return a.bound
		}
		return k.renew(a)
	}
}

// anchor is one look at the clock. It is immutable.
type anchor struct {
	count uint64 // the counter, read before the clock
	span  uint64 // counts in a Window; 0 = the rate is not known, do not use the anchor
	bound int64  // the clock's time plus Ahead
	at    int64  // the clock's time
	blur  uint64 // counts that the look took: at belongs to somewhere in there
}

type clock struct {
	clock func() int64
	count func() uint64
	last  atomic.Pointer[anchor]
}

func newClock(c func() int64, count func() uint64) *clock {
	k := &clock{clock: c, count: count}
	first := k.look()
	k.last.Store(&first)
	return k
}

func (k *clock) now() int64 {
	a := k.last.Load()
	// A counter that went back is far past every span, as an unsigned difference.
	if k.count()-a.count < a.span {
		return a.bound
	}
	return k.renew(a)
}

// renew asks the clock because a, the last anchor, is too old.
func (k *clock) renew(a *anchor) int64 {
	next := k.look()
	if next.follow(a) {
		kept := next                    // only what is kept goes to the heap
		k.last.CompareAndSwap(a, &kept) // of several looks at once one is enough
	}
	return next.at
}

// look asks the clock. The counter is read first, so what it has counted since is never
// less than the time since.
func (k *clock) look() anchor {
	count := k.count()
	at := k.clock()
	return anchor{count: count, at: at, bound: at + int64(Ahead), blur: k.count() - count}
}

// follow sets the rate of n, measured from the anchor before it, and reports whether n
// should take its place.
func (n *anchor) follow(a *anchor) bool {
	counts, ns := n.count-a.count, n.at-a.at
	switch {
	case int64(counts) <= 0 || ns < 0:
		return true // one of them went back: measure anew, from n
	case a.span == 0 && ns < int64(Window):
		return n.blur < a.blur // too short to measure by; but perhaps a better start
	}
	span := uint64(float64(counts) / float64(max(ns, 1)) * float64(Window))
	switch {
	case a.blur+n.blur > counts/16: // one of the looks was interrupted
		n.span = a.span
	case a.span == 0 || max(span, a.span)-min(span, a.span) <= a.span/8:
		n.span = span
	}
	return true
}
