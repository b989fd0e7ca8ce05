package answers

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Node is the node tier of the cache: answers the pods of one node share through their node
// agent (package cache/shelf), which keeps them by tenant. It is asked by whoever leads a flight
// and gets what leaders were answered.
//
// What holds in the process tier holds here: the key is over the same question, so
// answers are shared between processes that put the same question with the same credentials
// to the same version and arm, with the same pins. In place of the process's own generation
// of the version stands its Stretch, which all processes name alike. A process that sees a
// stretch end has the agent end it for all of them, and neither asks for nor offers answers
// until the agent has confirmed that.
//
// Pods that put the same question at the same time read one answer along (Join): see Seat.
//
// The node tier is a bonus: an agent that is gone, slow or of another version costs
// NodeWait once a second, and questions go to the model. Answers on their way to the agent are at
// most nodeQueue, and as many in the queue of Put; what does not fit is not offered. All methods are safe for concurrent use, and
// on a nil Node do nothing.
type Node struct {
	agent pb.NodeAnswersClient
	log   *slog.Logger
	queue chan offer
	wake  chan struct{} // stretches have ended

	quiet  atomic.Int64 // unix ns; the agent is not asked before
	single atomic.Int64 // unix ns; the agent knows no flights, and is not asked again before
	hits, misses, joined, failed, stored,
	dropped atomic.Uint64

	under   sync.WaitGroup // goroutines of flights
	landing atomic.Int64   // whole answers on their way to the agent; about nodeQueue at most

	mu    sync.Mutex
	ended map[Stretch]struct{} // not yet confirmed
	lost  bool                 // more ended than can be remembered: never asked again
	over  bool                 // Run has ended: nothing more is published
}

// Limits of a Node.
const (
	NodeWait   = 50 * time.Millisecond // for one answer of the agent
	nodeRest   = time.Second           // after a failure
	nodeNone   = time.Minute           // when the agent keeps no answers
	nodeQueue  = 64
	nodeEnded  = 4096
	endAtOnce  = 1000
	putTimeout = 2 * time.Second
)

type offer struct {
	key       Key
	stretch   Stretch
	answer    *Answer
	now       time.Time
	continues func() bool
}

// Stretch names a part of a version's life, alike in every process: between two changes
// of the model's weights, at one upstream name.
type Stretch [sha256.Size]byte

// StretchOf names the stretch of a version under a policy.
func StretchOf(model, version, upstream string, weightEpoch uint64) Stretch {
	return Stretch([]byte(digest("stretch", model, version, upstream, strconv.FormatUint(weightEpoch, 10))))
}

// NewNode returns the tier behind an agent's connection; log = nil discards.
func NewNode(conn grpc.ClientConnInterface, log *slog.Logger) *Node {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Node{agent: pb.NewNodeAnswersClient(conn), log: log, queue: make(chan offer, nodeQueue), wake: make(chan struct{}, 1), ended: map[Stretch]struct{}{}}
}

// NodeStats are counts since NewNode.
type NodeStats struct {
	Hits    uint64 `json:"hits"`
	Misses  uint64 `json:"misses"`
	Joined  uint64 `json:"joined"` // read along with another pod
	Failed  uint64 `json:"failed"` // calls of the agent
	Stored  uint64 `json:"stored"`
	Dropped uint64 `json:"dropped"` // not offered: the queue was full, or the stretch over
}

// Stats returns the present counts; nil for a nil Node.
func (n *Node) Stats() *NodeStats {
	if n == nil {
		return nil
	}
	return &NodeStats{Hits: n.hits.Load(), Misses: n.misses.Load(), Joined: n.joined.Load(), Failed: n.failed.Load(), Stored: n.stored.Load(), Dropped: n.dropped.Load()}
}

// usable says whether the agent may be asked: it is not known to be of no use, and has
// confirmed every end of a stretch.
func (n *Node) usable(now time.Time) bool {
	return n != nil && now.UnixNano() >= n.quiet.Load() && !n.Waiting()
}

// Waiting says whether stretches have ended that the agent has not confirmed.
func (n *Node) Waiting() bool {
	if n == nil {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lost || len(n.ended) > 0
}

// rest notes that a call failed.
func (n *Node) rest(ctx context.Context, err error, now time.Time) {
	if ctx.Err() != nil {
		return // the caller left
	}
	n.failed.Add(1)
	pause := nodeRest
	if gstatus.Code(err) == codes.Unimplemented {
		pause = nodeNone
	}
	n.quiet.Store(now.Add(pause).UnixNano())
	n.log.Debug("the node agent gave no answer from its memory", "error", err)
}

// Get returns the answer kept under key, nil if there is none younger than maxAge (< 0 = no
// such limit) or the agent does not say so in NodeWait.
func (n *Node) Get(ctx context.Context, key Key, stretch Stretch, now time.Time, maxAge time.Duration) *Answer {
	if !n.usable(now) {
		return nil
	}
	asked, cancel := context.WithTimeout(ctx, NodeWait)
	defer cancel()
	r, err := n.agent.GetAnswer(asked, &pb.GetAnswerRequest{Key: []byte(key), Stretch: stretch[:]})
	if err != nil {
		n.rest(ctx, err, now)
		return nil
	}
	a := answerOf(r.GetAnswer(), now)
	if a == nil || maxAge >= 0 && now.Sub(a.Stored) > maxAge || !n.usable(now) { // a stretch may have ended meanwhile
		n.misses.Add(1)
		return nil
	}
	n.hits.Add(1)
	return a
}

// Put offers an answer, which must not be modified afterwards. continues is asked before it
// leaves: false if the stretch is over.
func (n *Node) Put(key Key, stretch Stretch, a *Answer, now time.Time, continues func() bool) {
	if n == nil || a == nil {
		return
	}
	select {
	case n.queue <- offer{key, stretch, a, now, continues}:
	default:
		n.dropped.Add(1)
	}
}

// End says that stretches are over. The agent is not used before it knows.
func (n *Node) End(stretches ...Stretch) {
	if n == nil || len(stretches) == 0 {
		return
	}
	n.mu.Lock()
	for _, s := range stretches {
		if len(n.ended) >= nodeEnded {
			n.lost = true
			break
		}
		n.ended[s] = struct{}{}
	}
	n.mu.Unlock()
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Run tells the agent what has ended and what was answered, until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	if n == nil {
		<-ctx.Done()
		return nil
	}
	defer n.finish()
	again := time.NewTicker(nodeRest)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.wake:
			n.tellEnds(ctx)
		case <-again.C:
			n.tellEnds(ctx) // what failed
		case o := <-n.queue:
			n.tellEnds(ctx)
			n.put(ctx, o)
		}
	}
}

// begin counts a goroutine that publishes; false after Run has ended.
func (n *Node) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.over {
		n.under.Add(1)
	}
	return !n.over
}

// ending says whether Run has ended.
func (n *Node) ending() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.over
}

// finish waits for what is being published: by then the calls that lead have ended, or
// are cut by whoever serves them.
func (n *Node) finish() {
	n.mu.Lock()
	n.over = true
	n.mu.Unlock()
	n.under.Wait()
}

// tellEnds has the agent end what has ended here.
func (n *Node) tellEnds(ctx context.Context) {
	n.mu.Lock()
	var some []Stretch
	r := &pb.EndStretchRequest{}
	for s := range n.ended {
		if len(some) == endAtOnce {
			break
		}
		some = append(some, s)
		r.Stretches = append(r.Stretches, s[:])
	}
	n.mu.Unlock()
	if len(some) == 0 {
		return
	}
	asked, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	if _, err := n.agent.EndStretch(asked, r); err != nil {
		if ctx.Err() == nil {
			n.failed.Add(1)
			n.log.Debug("the node agent does not know yet that stretches have ended", "error", err)
		}
		return
	}
	n.mu.Lock()
	for _, s := range some {
		delete(n.ended, s)
	}
	more := len(n.ended) > 0
	n.mu.Unlock()
	if more {
		select {
		case n.wake <- struct{}{}:
		default:
		}
	}
}

func (n *Node) put(ctx context.Context, o offer) {
	if !n.usable(o.now) || !o.continues() {
		n.dropped.Add(1)
		return
	}
	a := &pb.NodeAnswer{Header: fieldsOf(o.answer.Header), Body: o.answer.Body,
		AgeMs: o.now.Sub(o.answer.Stored).Milliseconds(), TtlMs: o.answer.Expiry.Sub(o.now).Milliseconds()}
	if a.TtlMs < 1 {
		n.dropped.Add(1)
		return
	}
	asked, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	r, err := n.agent.PutAnswer(asked, &pb.PutAnswerRequest{Key: []byte(o.key), Stretch: o.stretch[:], Answer: a})
	switch {
	case err != nil:
		n.rest(ctx, err, o.now)
	case r.GetKept():
		n.stored.Add(1)
	default:
		n.dropped.Add(1)
	}
}
