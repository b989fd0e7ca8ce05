package node_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
)

// 1. An agent has a feed without gRPC; the origin is replaced by one that knows HTTP/2 only.
// 2. The feed goes on over gRPC, with what was missed.
func TestFeedFallsBackToGRPC(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		before := w.origin.Leans()
		w.origin.RefuseLean()
		w.net.Cut("node", "origin")
		w.origin.Put("x", "2")
		time.Sleep(time.Second)
		w.net.Heal("node", "origin")
		time.Sleep(2 * time.Second)
		w.shows("x", "2")
		if s := w.agent.Stats(); !s.FeedUp || !s.LeaseLive || w.origin.Leans() != before {
			t.Errorf("feed up %v, lease %v, %d feeds without gRPC after %d", s.FeedUp, s.LeaseLive, w.origin.Leans(), before)
		}
	})
}

// Something between agent and origin swallows requests for a feed, or cannot be dialled. The
// feed opens over gRPC in the first case; in the second there is no network to be had.
func TestFeedRequestIsSwallowed(t *testing.T) {
	for name, c := range map[string]struct {
		dial func(context.Context) (net.Conn, error)
		up   bool
	}{
		"swallowed": {func(context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			return near, nil
		}, true},
		"refused": {func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, node.Options{DialFeed: c.dial})
			defer func() { w.stop() }()
			time.Sleep(3 * time.Second)
			if s := w.agent.Stats(); s.FeedUp != c.up || s.LeaseLive != c.up {
				t.Errorf("%s: feed up %v, lease %v", name, s.FeedUp, s.LeaseLive)
			}
		})
	}
}

// Applied hears of a frame when the table shows it.
func TestAppliedFollowsTheTable(t *testing.T) {
	var watched atomic.Pointer[world]
	var seen atomic.Pointer[string]
	bubble(t, node.Options{Applied: func(f *pb.FeedFrame) {
		if w := watched.Load(); w != nil && len(f.GetChanges().GetChanges()) > 0 {
			shown := w.table("x")
			seen.Store(&shown)
		}
	}}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		watched.Store(w)
		defer watched.Store(nil)
		for _, want := range []string{"2", "3"} {
			w.origin.Put("x", want)
			synctest.Wait()
			if got := seen.Load(); got == nil || *got != want {
				t.Errorf("told of %s when the table showed %v", want, got)
			}
		}
	})
}

// A node at rest gets one frame per heartbeat.
func TestRestIsOneFramePerHeartbeat(t *testing.T) {
	var frames atomic.Int64
	bubble(t, node.Options{RepairEvery: -1, Applied: func(*pb.FeedFrame) { frames.Add(1) }}, func(t *testing.T, w *world) {
		before := frames.Load()
		time.Sleep(10 * time.Second)
		if n := frames.Load() - before; n < 90 || n > 110 {
			t.Errorf("%d frames in ten seconds of rest", n)
		}
	})
}

// counted counts for its world what an agent does with the connection of its feed.
type counted struct {
	net.Conn
	w *world
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.w.timed.Add(1)
	}
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	c.w.sent.Add(1)
	return c.Conn.Write(b)
}

// At rest a node is woken by the time once for each heartbeat. While it hears of changes,
// the heartbeats go with them and the time wakes it for hardly any; there are as many, at
// most an eighth more, and the lease holds.
func TestHeartbeatsGoWithChanges(t *testing.T) {
	t.Run("lean", func(t *testing.T) { synctest.Test(t, testHeartbeatsGoWithChanges) })
}

func testHeartbeatsGoWithChanges(t *testing.T) {
	w := newWorld(t, node.Options{RepairEvery: -1})
	defer func() { w.stop() }()
	<-w.agent.Ready()
	w.origin.Put("x", "1")
	w.read("x", "1")
	time.Sleep(time.Second)
	timed, sent := w.timed.Load(), w.sent.Load()
	time.Sleep(10 * time.Second)
	if timed, sent = w.timed.Load()-timed, w.sent.Load()-sent; timed < 95 || timed > 105 || sent < 95 || sent > 105 {
		t.Errorf("in ten seconds of rest the time woke it %d times, and it sent %d times", timed, sent)
	}
	timed, sent = w.timed.Load(), w.sent.Load()
	for i := range 1000 {
		w.origin.Put("x", strconv.Itoa(i))
		time.Sleep(10 * time.Millisecond)
		if s := w.agent.Stats(); !s.LeaseLive {
			t.Fatalf("no lease after %d changes", i)
		}
	}
	if timed, sent = w.timed.Load()-timed, w.sent.Load()-sent; timed > 5 || sent < 95 || sent > 115 {
		t.Errorf("in ten seconds of changes the time woke it %d times, and it sent %d times", timed, sent)
	}
	w.shows("x", "999")
}
