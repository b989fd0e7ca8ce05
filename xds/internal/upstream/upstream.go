// Package upstream is what all who follow a control plane by delta ADS (the client of a sidecar,
// the relay of a node) do in the same way: open one stream, give it up when its first sync does
// not come, and pause before the next one. What is said on the stream is theirs.
//
// Nothing here is retried, and nothing runs after a function has returned. A Backoff belongs to
// one goroutine; the functions may be called concurrently.
package upstream

import (
	"context"
	"errors"
	"io"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// Dialer connects to one control plane replica. The closer is closed when the stream over the
// connection has ended; it may be nil. ctx bounds the dialling only.
type Dialer = func(ctx context.Context) (grpc.ClientConnInterface, io.Closer, error)

// Stream is one delta ADS stream.
type Stream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// SyncTimeout bounds dialling, opening and the first sync together.
const SyncTimeout = 15 * time.Second

// maxMessage, in bytes, lifts gRPC's 4 MB default: the first sync holds everything.
const maxMessage = 64 << 20

var errSync = outrigger.Errorf(outrigger.Timeout, "no first sync within %v", SyncTimeout)

// Follow dials, has run follow one stream over the connection, and closes it. run calls inSync
// when the first sync is there; unless it does so within SyncTimeout, its context ends. The error
// is that of dialling, or why run's context ended, or else run's; with that of closing.
func Follow(ctx context.Context, dial Dialer, run func(ctx context.Context, conn grpc.ClientConnInterface, inSync func()) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	clock := time.AfterFunc(SyncTimeout, func() { cancel(errSync) })
	defer clock.Stop()
	conn, closer, err := dial(ctx)
	if err != nil {
		return err
	}
	err = run(ctx, conn, func() { clock.Stop() })
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if closer != nil {
		err = errors.Join(err, closer.Close())
	}
	return err
}

// Open opens a stream that ends with ctx.
func Open(ctx context.Context, conn grpc.ClientConnInterface) (Stream, error) {
	return discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
}

// Receive hands over what comes on s until it or ctx ends, and returns why.
func Receive(ctx context.Context, s Stream, in chan<- *discovery.DeltaDiscoveryResponse) error {
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		select {
		case in <- r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Pauses between rounds over the servers.
const (
	backoffFirst = 100 * time.Millisecond
	backoffMost  = 10 * time.Second
)

// Backoff is the pauses between rounds: 100 ms at first, each 8/5 of the one before, 10 s at the
// most, longer or shorter by up to a fifth. The zero value is at the beginning.
type Backoff struct{ next time.Duration }

// Reset goes back to the beginning, for a stream that got in sync.
func (b *Backoff) Reset() { b.next = 0 }

// Wait pauses, and reports whether ctx goes on.
func (b *Backoff) Wait(ctx context.Context) bool {
	d := max(b.next, backoffFirst)
	b.next = min(d*8/5, backoffMost)
	return pause.For(ctx, pause.About(d))
}
