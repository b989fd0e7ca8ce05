// Package replicate lets several control replicas serve one log: the leader owns it, and
// followers keep a durable copy that they tail.
//
//	leader, err := replicate.NewLeader(replicate.LeaderOptions{Log: log})
//	pb.RegisterReplicationServer(guarded, leader)      // administrators only
//
//	f, err := replicate.Open(ctx, replicate.FollowerOptions{Conn: conn, Name: "eu-2", Store: open})
//	go f.Run(ctx)                                      // f is an eventlog.Log
//
// # Promises
//
// A follower's log holds the leader's events under the leader's positions, so its
// projections, its feed and its compiled policy are the leader's as of some position: a
// client may move between replicas and goes on where it was.
//
// Append on a follower is an append on the leader: all or nothing, checked against the
// leader's sequences, and durable there when it returns. It returns when the copy has the
// events too, so whoever wrote through a follower reads there what was written.
//
// Confirm answers how far the leader's log was at an instant after Confirm was called. What
// a follower answers as current (reads of variables, the answer to a feed's heartbeat) it
// confirms first, so a read through a follower is as fresh as one at the leader. Confirms
// that wait together share one question to the leader.
//
// Replication is asynchronous: what the leader acknowledged and no follower has yet is lost
// with the leader's disk. A copy can be promoted to a log of its own
// (control/eventlog/pebble.Promote), which then is another log: incarnations differ, caches
// start anew. Nothing is promoted by itself.
//
// # Failure
//
// Leader away: reads of the copy, policy and status go on; Append and Confirm fail with kind
// Unavailable at once (nothing was sent), or Unknown when the leader went away with the
// request under way, after it was repeated for RetryFor under the same request id. The link
// is made again with pauses from 100 ms to 3 s. Silence says for how long nothing was heard
// from the leader, which bounds how long decisions of the leader may have been missed.
//
// A leader whose log is another one, or is shorter than the copy, ends Run with kind Conflict:
// its operator must say which of the two is right.
//
// Bad input is refused by the leader as by any log. Overload: a leader serves MaxFollowers;
// a shipment is bounded, a slow follower is fed from storage and costs no memory.
//
// All methods may be called concurrently; Run may be called once.
package replicate

import (
	"context"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Bounds of the protocol.
const (
	// MaxFollowers is how many replicas one leader feeds.
	MaxFollowers = 16
	// MaxStandingNodes is how many nodes one follower may stand for.
	MaxStandingNodes = 20_000
	// RetryFor is how long an append is repeated whose answer was lost.
	RetryFor = 2 * time.Second
	// confirmLimit bounds one question to the leader, confirmPause is between two.
	confirmLimit = time.Second
	confirmPause = time.Millisecond
	// A shipment holds at most so many events, and stops growing at so many bytes.
	shipmentEvents = 512
	shipmentBytes  = 1 << 20
)

// Store is a durable copy of a log; control/eventlog/pebble.Copy is one.
type Store interface {
	eventlog.Log
	// Ingest stores events that continue the copy, as they are, all or nothing.
	Ingest(ctx context.Context, events []*pb.Event) error
}
