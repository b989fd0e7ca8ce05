// Package pebble is the embedded, durable event log: one Pebble store in one directory,
// written by one committer with synced group commit.
//
//	log, err := pebble.Open("/var/lib/outrigger/log", pebble.Options{})
//	if err != nil { … }
//	defer log.Close()
//
// # Promises
//
// It keeps the contract of package eventlog. In particular an append is acknowledged,
// and seen by readers and subscribers, only after the write-ahead log holding it has
// been synced (fdatasync); what was acknowledged survives kill -9 and power loss as far
// as the disk honours the sync. Request ids are remembered for the last Options.Window
// appends that carried one (100,000 unless told), across restarts.
//
// # Overload
//
// At most Options.Queue appends wait for the committer (1,024 unless told); further
// ones wait in Append until there is room or their ctx ends. Commits coalesce what
// waits, up to about 1,000 events or 4 MiB, and up to 8 commits are in flight while the
// disk syncs, so throughput grows with the number of writers and not with the disk's
// latency.
//
// # Failure
//
// A failed write or sync stops the log: appends in flight get kind Unknown, later ones
// kind Unavailable, reads of what is durable go on; restart the process, because the
// store may keep its directory locked. Where Pebble itself cannot go on (its manifest
// cannot be written, or its write-ahead log cannot be rotated) it ends the process, after
// the cause has gone to Options.Logger; that too loses nothing acknowledged. A damaged record is reported by the read that meets it,
// with kind Internal and its position, and never skipped.
//
// Open fails with kind Unavailable while another process, or another Log of this one,
// has the directory.
//
// # Goroutines
//
// Open starts the store and the two goroutines of the committer, which Close ends. This
// is the one exception to the rule that Run owns goroutines: without them the store has
// no consistent state to run from. Reads and subscriptions run in their caller.
package pebble

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Options tunes a log; the zero value is what production uses.
type Options struct {
	// Now dates events; nil means time.Now. It is called by one goroutine at a time.
	Now func() time.Time
	// Logger gets the store's warnings and errors; nil discards them.
	Logger *slog.Logger
	// Meter gets outrigger.eventlog.events, .commits, .commit.duration (seconds) and
	// .refused; nil means none.
	Meter metric.Meter
	// Queue is the number of appends that may wait for the committer, default 1024.
	Queue int
	// Window is the number of request ids remembered, default 100,000.
	Window int
	// CacheBytes is the size of the block cache, default 64 MiB.
	CacheBytes int64

	fs vfs.FS // tests put a failing or forgetful file system here
}

func (o Options) withDefaults() Options {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Queue <= 0 {
		o.Queue = 1024
	}
	if o.Window <= 0 {
		o.Window = 100_000
	}
	if o.CacheBytes <= 0 {
		o.CacheBytes = 64 << 20
	}
	if o.fs == nil {
		o.fs = vfs.Default
	}
	return o
}

// Log implements eventlog.Log. Build it with Open.
type Log struct {
	store       *store
	incarnation uint64
	metrics     *metrics
	logger      *slog.Logger

	head    atomic.Uint64                 // position of the last durable event
	changed atomic.Pointer[chan struct{}] // closed and replaced after head moved
	failure atomic.Pointer[error]         // set once, when a commit failed

	queue    chan *request // to the committer
	quit     chan struct{} // closed by Close when nobody can queue any more
	ended    chan struct{} // closed when the committer's goroutines have ended
	stopping chan struct{} // closed by Close first: wakes subscribers
	calls    gate          // calls that use the store right now
	saving   chan struct{} // semaphore: one SaveSnapshot at a time
	close    sync.Once
	closeErr error
}

var _ eventlog.Log = (*Log)(nil)

// Open opens the log in dir, creating both if need be, and restores its state: cost is
// one replay of the write-ahead log (at most about 64 MiB) and one scan of the
// remembered request ids.
func Open(dir string, opts Options) (*Log, error) {
	return open(dir, opts, (*Log).identify)
}

// open is Open with the store's identity established by identify.
func open(dir string, opts Options, identify func(*Log) error) (*Log, error) {
	opts = opts.withDefaults()
	m, err := newMetrics(opts.Meter)
	if err != nil {
		return nil, err
	}
	st, err := openStore(dir, opts)
	if err != nil {
		return nil, err
	}
	l := &Log{
		store: st, metrics: m, logger: opts.Logger,
		queue: make(chan *request, opts.Queue), quit: make(chan struct{}), ended: make(chan struct{}),
		stopping: make(chan struct{}), saving: make(chan struct{}, 1),
	}
	l.changed.Store(new(make(chan struct{})))
	c, err := l.restore(opts, identify)
	if err != nil {
		return nil, closeAfter(st, err)
	}
	go func() {
		defer close(l.ended)
		c.run()
	}()
	return l, nil
}

// restore reads the incarnation (creating it in a new store), the last event and the
// remembered request ids, and builds the committer that continues from there.
func (l *Log) restore(opts Options, identify func(*Log) error) (*committer, error) {
	if err := identify(l); err != nil {
		return nil, err
	}
	last, err := l.store.lastEvent()
	if err != nil {
		return nil, err
	}
	c := newCommitter(l, opts)
	c.clock.Resume(last)
	c.next = last.GetPosition() + 1
	if err := c.restoreWindow(); err != nil {
		return nil, err
	}
	l.head.Store(last.GetPosition())
	return c, nil
}

// identify loads the incarnation. Only an entirely empty store gets a new one: a store
// with keys but without identity is somebody else's and must not be written to.
func (l *Log) identify() error {
	v, err := l.store.get(metaKey)
	if err != nil {
		return err
	}
	if v == nil {
		empty, err := l.store.empty()
		if err != nil {
			return err
		}
		if !empty {
			return errForeign()
		}
		v = append([]byte{layoutVersion}, newIncarnation()...)
		if err := l.store.set(metaKey, v); err != nil {
			return err
		}
	}
	if len(v) == 10 && v[0] == layoutVersion && v[9] == copyMark {
		return outrigger.Errorf(outrigger.Invalid, "directory holds a copy of another log; follow that log with it, or promote it")
	}
	if len(v) != 9 || v[0] != layoutVersion {
		return errLayout(v)
	}
	l.incarnation = binary.BigEndian.Uint64(v[1:])
	return nil
}

func errForeign() error {
	return outrigger.Errorf(outrigger.Invalid, "directory holds a Pebble store that is not an event log; choose another directory")
}

func errLayout(v []byte) error {
	return outrigger.Errorf(outrigger.Invalid, "event log has layout %x; this program reads layout %d", v, layoutVersion)
}

// newIncarnation draws 8 random bytes, not all zero. crypto/rand.Read never fails.
func newIncarnation() []byte {
	b := make([]byte, 8)
	for binary.BigEndian.Uint64(b) == 0 {
		_, _ = rand.Read(b)
	}
	return b
}

// Head implements eventlog.Reader; it is one atomic load.
func (l *Log) Head() uint64 { return l.head.Load() }

// Incarnation implements eventlog.Reader.
func (l *Log) Incarnation() uint64 { return l.incarnation }

// Close implements eventlog.Log: no new calls, in-flight appends are committed, then
// the store is closed. It waits for the disk.
func (l *Log) Close() error {
	l.close.Do(func() {
		l.calls.shut()
		close(l.stopping)
		l.calls.wait()
		close(l.quit)
		<-l.ended
		l.closeErr = l.store.close()
	})
	return l.closeErr
}

// publish makes everything up to head visible and wakes the waiting subscribers. The
// order matters: who loads the new channel must see the new head.
func (l *Log) publish(head uint64) {
	l.head.Store(head)
	close(*l.changed.Swap(new(make(chan struct{}))))
}

// enter admits a call that uses the store; leave must follow. It fails after Close.
func (l *Log) enter(ctx context.Context) error {
	if ctx.Err() != nil {
		return eventlog.ErrRead(ctx)
	}
	if !l.calls.enter() {
		return eventlog.ErrClosed()
	}
	return nil
}

// gate counts the calls inside and can be shut: a WaitGroup that refuses late comers.
type gate struct {
	mu     sync.Mutex
	closed bool
	inside sync.WaitGroup
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.inside.Add(1)
	}
	return !g.closed
}

func (g *gate) leave() { g.inside.Done() }

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

func (g *gate) wait() { g.inside.Wait() }
