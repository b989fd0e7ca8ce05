package variables

import (
	"cmp"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	wirefeed "github.com/outrigger-mesh/outrigger/cache/feed"
)

const (
	// leanBatch is how many bytes are gathered for one write at most, but for the last
	// frame, which may begin below it.
	leanBatch = 64 << 10
	// byeTime bounds the telling of why a feed ends.
	byeTime = time.Second
	// leanKeep is the largest buffer a feed keeps when it is empty.
	leanKeep = 16 << 10
)

// Credentials are inner, for a gRPC server that serves feeds without gRPC on its port as
// well (package cache/feed). What inner refuses is refused. Connections of feeds end with
// Run, not with the server.
func (s *Service) Credentials(inner credentials.TransportCredentials) credentials.TransportCredentials {
	return wirefeed.Credentials(inner, s.opt.FeedPeers, func(conn net.Conn) {
		if !s.leans.begin(conn) {
			conn.Close()
			return
		}
		go func() {
			defer s.leans.end(conn)
			s.serveLean(conn)
		}()
	})
}

// connections are those of the feeds without gRPC. They end with Run.
type connections struct {
	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
	ended  sync.WaitGroup
}

// maxLean bounds the connections of feeds, those that have not said yet what they want
// included.
const maxLean = 1 << 16

// begin reports whether conn may be served; end must follow then.
func (c *connections) begin(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || len(c.open) >= maxLean {
		return false
	}
	if c.open == nil {
		c.open = map[net.Conn]struct{}{}
	}
	c.open[conn] = struct{}{}
	c.ended.Add(1)
	return true
}

func (c *connections) end(conn net.Conn) {
	conn.Close()
	c.mu.Lock()
	delete(c.open, conn)
	c.mu.Unlock()
	c.ended.Done()
}

// close ends all of them and waits for that; there will be no more.
func (c *connections) close() {
	c.mu.Lock()
	c.closed = true
	for conn := range c.open {
		conn.Close()
	}
	c.mu.Unlock()
	c.ended.Wait()
}

// lean is one feed without gRPC. Whoever has something for it (the goroutine that reads
// its connection, a fan-out that was told of changes) takes the mutex, appends frames to
// out and writes them, as far as the connection takes them without waiting. What it does
// not take is left to a goroutine that waits, and until that is done nothing is added but
// what was asked: the cursor stays, and what is missed meanwhile is sent coalesced.
type lean struct {
	feed
	conn   *wirefeed.Server
	fanout *fanout
	queued bool // with fanout; guarded by its mutex
	heard  atomic.Int64
	proofs proofs

	mu       sync.Mutex // guards the feed and everything below
	started  bool       // subscribe was answered
	buf      []byte
	draining bool // a goroutine writes buf; nobody else touches it
	waits    bool // for the answer to a heartbeat, the newest sent at
	sent     uint64
	selects  []*pb.Select   // those that wait for it
	broken   error          // why the feed ends; nothing is sent after that
	drains   sync.WaitGroup // that goroutine
}

// serveLean serves one connection until it ends.
func (s *Service) serveLean(conn net.Conn) {
	c, err := wirefeed.Accept(conn, s.isReady)
	if err != nil {
		s.opt.Logger.Info("feed refused", "peer", conn.RemoteAddr(), "error", err)
		return
	}
	f := &lean{conn: c, fanout: s.fanouts.pick()}
	f.out, f.rouse = (*leanSink)(f), func() { f.fanout.push(f) }
	f.heard.Store(time.Now().UnixNano())
	stop := f.watch()
	defer stop()
	err = endOf(f.serve(s))
	f.mu.Lock()
	f.broken = cmp.Or(f.broken, err, io.EOF)
	f.mu.Unlock()
	if err == nil {
		conn.Close()
	}
	limit := time.AfterFunc(byeTime, func() { conn.Close() })
	f.drains.Wait()
	if err != nil {
		// The connection ends either way; a client that has gone need not hear why.
		_, _ = conn.Write(wirefeed.AppendEnd(nil, err))
	}
	limit.Stop()
	conn.Close()
}

// watch ends the connection when nothing was heard from the client for MaxSilence.
func (f *lean) watch() (stop func()) {
	var t *time.Timer
	ready := make(chan struct{})
	t = time.AfterFunc(wirefeed.MaxSilence, func() {
		<-ready
		silent := time.Duration(time.Now().UnixNano() - f.heard.Load())
		if silent >= wirefeed.MaxSilence {
			f.conn.Conn.Close()
			return
		}
		t.Reset(wirefeed.MaxSilence - max(0, silent))
	})
	close(ready)
	return func() { t.Stop() }
}

func (f *lean) serve(s *Service) error {
	first, err := f.conn.Recv()
	if err != nil {
		return err
	}
	sub := first.GetSubscribe()
	if err := s.proven(context.Background()); err != nil {
		return err
	}
	if err := f.open(s, sub); err != nil {
		return err
	}
	err = f.locked(func() error {
		f.started = true
		return f.start(sub)
	})
	for err == nil {
		var req *pb.FeedRequest
		if req, err = f.conn.Recv(); err == nil {
			f.heard.Store(time.Now().UnixNano())
			if req.GetHeartbeat() != nil && s.opt.Confirm != nil {
				f.proofs.ask(s, func() { f.beat(req) })
				continue
			}
			err = f.locked(func() error { return f.take(req) })
		}
	}
	err = f.why(err)
	f.close(endOf(err))
	return err
}

// beat takes a heartbeat that was proven to deserve its answer.
func (f *lean) beat(req *pb.FeedRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken != nil || !f.started {
		return
	}
	err := f.take(req)
	if err == nil && !f.draining {
		err = f.pump()
	}
	f.breaks(err)
}

// why is the reason the feed ends for, of which the end of the reading may be a consequence.
func (f *lean) why(read error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return cmp.Or(f.broken, read)
}

// locked runs do, sends what it and the log have for the node, and returns why the feed
// ends. Only the goroutine that reads calls it.
func (f *lean) locked(do func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken == nil {
		f.broken = do()
	}
	if f.broken == nil && f.started && !f.draining {
		f.broken = f.pump()
	}
	return f.broken
}

// take takes one request.
func (f *lean) take(req *pb.FeedRequest) error {
	sel, hb := req.GetSelect(), req.GetHeartbeat()
	switch {
	case hb != nil && f.draining:
		f.waits, f.sent = true, hb.GetSent() // the newest answer is worth the longest lease
	case hb != nil:
		return f.ack(hb.GetSent())
	case sel == nil || f.sel == nil:
		return errTurn()
	case f.draining && len(f.selects) == selectQueue:
		return errSelects()
	default:
		if err := checkSelect(sel); err != nil {
			return err
		}
		if !f.draining {
			return f.choose(sel)
		}
		f.selects = append(f.selects, sel)
	}
	return nil
}

// pump sends what waits in the ring, gathered for one write.
func (f *lean) pump() error {
	for more := true; more && len(f.buf) < leanBatch; {
		var err error
		if more, err = f.next(); err != nil {
			return err
		}
	}
	return f.flush()
}

// flush writes what was gathered.
func (f *lean) flush() error {
	if len(f.buf) == 0 {
		return nil
	}
	n := 0
	if f.conn.Socket != nil {
		var err error
		if n, err = f.conn.Socket.TryWrite(f.buf); err != nil {
			return err
		}
	}
	if n == len(f.buf) {
		f.buf = emptied(f.buf)
		return nil
	}
	f.draining = true
	f.drains.Add(1)
	go f.drain(n)
	return nil
}

// emptied is buf for the next use.
func emptied(buf []byte) []byte {
	if cap(buf) > leanKeep {
		return nil
	}
	return buf[:0]
}

// drain writes buf from position n on, however long that takes, and then what has come up
// meanwhile.
func (f *lean) drain(n int) {
	defer f.drains.Done()
	_, err := f.conn.Conn.Write(f.buf[n:])
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buf, f.draining = emptied(f.buf), false
	if f.broken != nil {
		return // it is being ended
	}
	if err == nil {
		err = f.caughtUp()
	}
	f.breaks(err)
}

// breaks ends the feed, if err is one, from outside the goroutine that reads: it ends the
// reading, and that the feed, whose client is told why.
func (f *lean) breaks(err error) {
	if f.broken = err; err != nil && f.conn.Conn.SetReadDeadline(time.Unix(1, 0)) != nil {
		f.conn.Conn.Close()
	}
}

// caughtUp answers what was asked while the connection was full, and goes on.
func (f *lean) caughtUp() error {
	for _, sel := range f.selects {
		if err := f.choose(sel); err != nil {
			return err
		}
	}
	f.selects = f.selects[:0]
	if f.waits {
		f.waits = false
		if err := f.ack(f.sent); err != nil {
			return err
		}
	}
	return f.pump()
}

// changed sends what the log has for the node; a fan-out calls it.
func (f *lean) changed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken == nil && f.started && !f.draining {
		f.breaks(f.pump())
	}
}

// leanSink gathers frames in the buffer of its feed.
type leanSink lean

func (l *leanSink) send(m *pb.FeedFrame) (err error) {
	l.buf, err = wirefeed.AppendMessage(l.buf, m)
	return err
}

func (l *leanSink) sendFrame(f *frame, o origin) error {
	raw, err := f.bytes(o)
	if err != nil {
		return err
	}
	buf, at := wirefeed.Begin(l.buf)
	l.buf = append(buf, raw...)
	wirefeed.End(l.buf, at)
	return nil
}

func (l *leanSink) sendPieces(o origin, previous, through uint64, pieces [][]byte) error {
	buf, at := wirefeed.Begin(l.buf)
	l.buf = assemble(buf, o, previous, through, pieces)
	wirefeed.End(l.buf, at)
	return nil
}

func (l *leanSink) sendAck(o origin, selective bool, sent, head uint64) error {
	buf, at := wirefeed.Begin(l.buf)
	l.buf = acknowledge(buf, o, selective, sent, head)
	wirefeed.End(l.buf, at)
	return nil
}
