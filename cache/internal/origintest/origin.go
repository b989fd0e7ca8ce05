// Package origintest is a small honest origin for tests of the cache: a log in memory,
// the Variables and Coherence services over it, and switches for faults. It promises
// what the protocol asks of an origin (every read says as of which position it holds, a
// heartbeat's answer names the authoritative head) and nothing about durability.
//
// Use New with the connection of a memnet.Network, inside synctest bubbles too. All
// methods may be called concurrently.
package origintest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/feed"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Region is the origin's region.
const Region = "eu"

// Origin is the authority.
type Origin struct {
	pb.UnimplementedVariablesServer
	pb.UnimplementedCoherenceServer

	mu          sync.Mutex
	incarnation uint64
	log         []*pb.Change // what follows position base
	base        uint64
	keep        int // changes that are kept at least; 0 for all
	vars        map[outrigger.Key]*pb.Variable
	sessions    map[string]bool
	counters    map[outrigger.Key]int32
	grown       chan struct{} // closed and replaced by every change of state
	reads, keys int
	onlyGRPC    bool
	leans       int
	touched     []string
	fail        error         // answered to everything while set
	gate        chan struct{} // reads wait for it while set
	lose        int           // frames to skip
	afterWrite  func()        // called once after the next write is made, before its answer
	onPut       func(name, json string)
}

// New returns an origin with one session, "s".
func New() *Origin {
	o := &Origin{incarnation: 0xa, grown: make(chan struct{})}
	o.clear()
	return o
}

func (o *Origin) clear() {
	o.base, o.log, o.vars, o.counters = 0, nil, map[outrigger.Key]*pb.Variable{}, map[outrigger.Key]int32{}
	o.sessions = map[string]bool{outrigger.DefaultTenant + "/s": true}
}

// Serve listens at address on a host of the network until stop is called.
func (o *Origin) Serve(n *memnet.Network, host, address string) (stop func(), err error) {
	l, err := n.Listen(host, address)
	if err != nil {
		return nil, err
	}
	g := grpc.NewServer(grpc.Creds(feed.Credentials(insecure.NewCredentials(), nil, func(c net.Conn) { go o.serveFeed(c) })))
	pb.RegisterVariablesServer(g, o)
	pb.RegisterCoherenceServer(g, o)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(l) // its error is that of Stop
	}()
	return func() { g.Stop(); <-done }, nil
}

// Dial connects a host to an address. Reconnecting is quick, as tests cut often.
func Dial(n *memnet.Network, host, address string) (*grpc.ClientConn, error) {
	dial := n.Dialer(host)
	params := grpc.ConnectParams{MinConnectTimeout: time.Second}
	params.Backoff.BaseDelay, params.Backoff.MaxDelay, params.Backoff.Multiplier = 20*time.Millisecond, 200*time.Millisecond, 1.5
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(params),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return dial(ctx, a) }))
}

// Restore brings the origin back empty, as another incarnation of its log.
func (o *Origin) Restore() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.incarnation++
	o.clear()
	o.wake()
}

// Keep bounds the log: of the changes before the last n, up to as many again are kept.
// Feeds that are further behind are reset.
func (o *Origin) Keep(n int) { o.mu.Lock(); o.keep = n; o.mu.Unlock() }

// head is the position of the last change; the mutex is held.
func (o *Origin) head() uint64 { return o.base + uint64(len(o.log)) }

// Fail makes every call fail with err; nil ends that.
func (o *Origin) Fail(err error) { o.mu.Lock(); o.fail = err; o.mu.Unlock() }

// LoseFrame skips one frame of every change in each feed.
func (o *Origin) LoseFrame() { o.mu.Lock(); o.lose++; o.mu.Unlock() }

// HoldReads makes Read wait until the returned function is called.
func (o *Origin) HoldReads() (release func()) {
	g := make(chan struct{})
	o.mu.Lock()
	o.gate = g
	o.mu.Unlock()
	return func() {
		o.mu.Lock()
		o.gate = nil
		o.mu.Unlock()
		close(g)
	}
}

// AfterWrite runs do once, when the next write is made and before it is answered.
func (o *Origin) AfterWrite(do func()) { o.mu.Lock(); o.afterWrite = do; o.mu.Unlock() }

// OnPut makes do hear of every value written, in log order, while it is written.
func (o *Origin) OnPut(do func(name, json string)) { o.mu.Lock(); o.onPut = do; o.mu.Unlock() }

// Reads returns the calls of Read and the keys in them.
func (o *Origin) Reads() (calls, keys int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.reads, o.keys
}

// Touched returns the sessions TouchSessions named, sorted and without duplicates.
func (o *Origin) Touched() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	slices.Sort(o.touched)
	return slices.Compact(slices.Clone(o.touched))
}

// Put writes a variable of session "s", as another node would.
func (o *Origin) Put(name, json string) *pb.Variable {
	return o.PutWith(name, json, nil)
}

// PutWith is Put with metadata.
func (o *Origin) PutWith(name, json string, metadata map[string]string) *pb.Variable {
	return o.write(outrigger.Key{Tenant: outrigger.DefaultTenant, Session: "s", Name: name}, []byte(json), metadata)
}

// Tamper changes a value without a change in the log: what must never happen.
func (o *Origin) Tamper(name, json string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	k := outrigger.Key{Tenant: outrigger.DefaultTenant, Session: "s", Name: name}
	v := proto.CloneOf(o.vars[k])
	v.Value.Json, v.Version.Dot.Position = []byte(json), v.Version.Dot.Position-1
	o.vars[k] = v
}

// small is the largest value that rides along with its change.
const small = 64

func (o *Origin) write(k outrigger.Key, json []byte, metadata map[string]string) *pb.Variable {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.onPut != nil {
		o.onPut(k.Name, string(json))
	}
	counter, again := o.counters[k]
	if again {
		counter++
	}
	o.counters[k] = counter
	p := o.head() + 1
	v := &pb.Variable{Id: fmt.Sprintf("var_%s_%d", k.Name, 1), Key: wire.KeyPB(k), Value: &pb.Value{Type: "integer", Json: json}, Metadata: metadata,
		Version: &pb.Version{Counter: counter, Dot: &pb.Dot{Region: Region, Incarnation: o.incarnation, Position: p}}}
	o.vars[k] = v
	c := &pb.Change{Key: v.Key, Version: v.Version}
	if len(json) <= small {
		c.Variable = v
	}
	o.append(c)
	return v
}

func (o *Origin) append(c *pb.Change) {
	c.Position, c.CommittedUnixNano = o.head()+1, uint64(time.Now().UnixNano())
	o.log = append(o.log, c)
	if over := len(o.log) - o.keep; o.keep > 0 && over >= o.keep {
		o.log, o.base = slices.Clone(o.log[over:]), o.base+uint64(over)
	}
	o.wake()
}

func (o *Origin) wake() {
	close(o.grown)
	o.grown = make(chan struct{})
}

func (o *Origin) failing() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.fail
}

// answered ends a write.
func (o *Origin) answered() {
	o.mu.Lock()
	do := o.afterWrite
	o.afterWrite = nil
	o.mu.Unlock()
	if do != nil {
		do()
	}
}

// Read implements pb.CoherenceServer.
func (o *Origin) Read(ctx context.Context, r *pb.ReadRequest) (*pb.ReadResponse, error) {
	o.mu.Lock()
	gate := o.gate
	o.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reads, o.keys = o.reads+1, o.keys+len(r.GetKeys())
	if o.fail != nil {
		return nil, status.ToGRPC(o.fail)
	}
	head := o.head()
	if r.GetMinPosition() > head {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Unavailable, "min_position is %d, applied is %d", r.GetMinPosition(), head))
	}
	out := &pb.ReadResponse{Incarnation: o.incarnation, AsOf: head, Region: Region}
	for _, k := range r.GetKeys() {
		k := wire.Key(k)
		out.Results = append(out.Results, &pb.ReadResult{Variable: o.vars[k], SessionExists: o.sessions[k.Tenant+"/"+k.Session]})
	}
	return out, nil
}

// Changes implements pb.CoherenceServer.
func (o *Origin) Changes(_ context.Context, r *pb.ChangesRequest) (*pb.ChangesResponse, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	head := o.head()
	if r.GetIncarnation() != o.incarnation || r.GetFrom() > head || r.GetFrom() < o.base {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Stale, "not kept"))
	}
	to := min(r.GetTo(), head)
	return &pb.ChangesResponse{Changes: slices.Clone(o.log[r.GetFrom()-o.base : max(to, r.GetFrom())-o.base]), CompleteTo: to}, nil
}

// Feed implements pb.CoherenceServer.
func (o *Origin) Feed(stream grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]) error {
	if err := o.failing(); err != nil {
		return status.ToGRPC(err)
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	beats, ended := make(chan uint64, 16), make(chan error, 1)
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			beats <- r.GetHeartbeat().GetSent()
		}
	}()
	err = o.feed(stream, first.GetSubscribe(), beats, ended)
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (o *Origin) feed(stream grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame], s *pb.Subscribe, beats chan uint64, ended chan error) error {
	o.mu.Lock()
	incarnation, sent, lost := o.incarnation, s.GetFrom(), o.lose
	f := &pb.FeedFrame{Incarnation: incarnation, Region: Region}
	if s.GetIncarnation() != incarnation || sent > o.head() || sent < o.base {
		sent = o.head()
		f.Kind = &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: sent}}
	} else {
		f.Kind = &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: sent, Through: sent}}
	}
	o.mu.Unlock()
	for {
		if err := stream.Send(f); err != nil {
			return err
		}
		o.mu.Lock()
		for f = nil; f == nil; {
			if o.incarnation != incarnation || o.fail != nil {
				o.mu.Unlock()
				return status.ToGRPC(outrigger.Errorf(outrigger.Unavailable, "this log is closed"))
			}
			grown, head := o.grown, o.head()
			if sent < o.base {
				sent = head
				f = &pb.FeedFrame{Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: sent, Reason: "too far behind"}}}
				break
			}
			if sent < head {
				changes := &pb.Changes{Previous: sent, Through: head, Changes: slices.Clone(o.log[sent-o.base:])}
				sent = head
				if lost < o.lose {
					lost++
					continue
				}
				f = &pb.FeedFrame{Kind: &pb.FeedFrame_Changes{Changes: changes}}
				break
			}
			o.mu.Unlock()
			select {
			case at := <-beats:
				f = &pb.FeedFrame{Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: at, Head: head}}}
			case <-grown:
			case err := <-ended:
				return err
			case <-stream.Context().Done():
				return stream.Context().Err()
			}
			o.mu.Lock()
		}
		o.mu.Unlock()
		f.Incarnation, f.Region = incarnation, Region
	}
}
