package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// TunnelOptions bound a tunnel.
type TunnelOptions struct {
	// Idle ends the tunnel after a silence of both directions: never before one has
	// lasted Idle, at the latest when one has lasted 3×Idle (the kernel copies, so
	// progress is only seen period by period). 0 = never; TCP keep-alive still finds
	// dead peers.
	Idle time.Duration
	// Prefix are bytes already read from a (protocol sniffing); written to b first.
	Prefix []byte
}

// TunnelStats count the bytes of each direction, Prefix included.
type TunnelStats struct{ AToB, BToA int64 }

// chunk is how much is copied between two looks at the idle clock. Splice moves at most
// a pipe's worth (64 KiB to 1 MiB) per call, so 4 MiB keeps the check out of the way.
const chunk = 4 << 20

// Tunnel copies between a and b until both directions have ended, ctx is done, or the
// tunnel idles; then both connections are closed. It blocks. When a direction reaches
// its end, only the write side of the other connection is shut, so a peer that has
// finished sending still receives its answer. A connection without CloseWrite (TLS has
// it, net.Pipe does not) is closed wholly instead.
//
// Pass bare *net.TCPConn on both sides: then the kernel copies (splice). The error is
// nil for an orderly end, kind Timeout for an idle one, kind Cancelled when ctx ended,
// else kind Unavailable with the cause.
func Tunnel(ctx context.Context, a, b net.Conn, o TunnelOptions) (TunnelStats, error) {
	defer a.Close()
	defer b.Close()
	stop := context.AfterFunc(ctx, func() { a.Close(); b.Close() })
	defer stop()

	var stats TunnelStats
	if len(o.Prefix) > 0 {
		n, err := b.Write(o.Prefix)
		stats.AToB = int64(n)
		if err != nil {
			return stats, tunnelError(ctx, err)
		}
	}
	t := &tunnel{idle: o.Idle}
	var wg sync.WaitGroup
	var errA, errB error
	wg.Go(func() {
		errB = t.copy(a, b, &stats.BToA)
		if errB != nil {
			a.Close()
			b.Close()
		}
	})
	errA = t.copy(b, a, &stats.AToB)
	if errA != nil {
		a.Close()
		b.Close()
	}
	wg.Wait()
	return stats, tunnelError(ctx, t.first(errA, errB))
}

type tunnel struct {
	idle  time.Duration
	moves atomic.Uint64 // number of times either direction moved bytes
	ended atomic.Bool   // set before a connection without CloseWrite is closed wholly
	cause atomic.Pointer[error]
}

// first returns the error that ended the tunnel; the other direction's is only the echo
// of the connections being closed.
func (t *tunnel) first(a, b error) error {
	if e := t.cause.Load(); e != nil {
		return *e
	}
	return errors.Join(a, b)
}

// copy moves src to dst to the end, then shuts dst's write side.
func (t *tunnel) copy(dst, src net.Conn, moved *int64) error {
	err := t.pump(dst, src, moved)
	if err != nil {
		if t.ended.Load() {
			return nil // the echo of our own close
		}
		t.cause.CompareAndSwap(nil, &err)
		return err
	}
	if half, ok := dst.(interface{ CloseWrite() error }); ok {
		// Fails only when the peer has reset the connection; the other direction sees it.
		_ = half.CloseWrite()
		return nil
	}
	t.ended.Store(true)
	return dst.Close()
}

func (t *tunnel) pump(dst, src net.Conn, moved *int64) error {
	if t.idle <= 0 {
		n, err := io.Copy(dst, src)
		*moved += n
		return err
	}
	seen, quiet := t.moves.Load(), false
	for {
		if err := src.SetReadDeadline(time.Now().Add(t.idle)); err != nil {
			return err
		}
		n, err := io.Copy(dst, io.LimitReader(src, chunk))
		*moved += n
		if n > 0 {
			t.moves.Add(1)
		}
		switch {
		case err == nil && n < chunk:
			return nil // end of src
		case err == nil:
			quiet = false
		case errors.Is(err, os.ErrDeadlineExceeded):
			// The other direction reports its bytes at the end of its own period, so
			// one quiet period here proves nothing yet.
			now := t.moves.Load()
			if now == seen && quiet {
				return err
			}
			quiet, seen = now == seen, now
		default:
			return err
		}
	}
}

func tunnelError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return outrigger.Wrap(outrigger.Cancelled, ctx.Err(), "tunnel")
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return outrigger.Errorf(outrigger.Timeout, "tunnel: no byte moved in either direction for the idle limit")
	}
	return outrigger.Wrap(outrigger.Unavailable, err, "tunnel")
}
