package variables

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Defaults of Options.
const (
	DefaultSweepEvery    = time.Minute
	DefaultSessionLimit  = 100_000
	DefaultVariableLimit = 10_000
	DefaultFeedRing      = 65_536
	DefaultFeedBytes     = 64 << 20
	DefaultSnapshotEvery = 50_000
)

// Times the protocol fixes.
const (
	watchHeartbeat  = 30 * time.Second      // idle time before a watch proves it is alive
	minPositionWait = 50 * time.Millisecond // how long Read waits for min_position
)

// Options configure New. Zero values mean the defaults.
type Options struct {
	Region string           // name in dots; required
	Now    func() time.Time // nil = time.Now
	Logger *slog.Logger     // nil = discard
	Meter  metric.Meter     // nil = no metrics

	// SweepEvery is the pause between looks for expired sessions; negative means never
	// (a replica that only follows).
	SweepEvery time.Duration
	// SessionLimit bounds the sessions of all tenants; calls in progress may exceed it
	// by their number.
	SessionLimit int
	// VariableLimit bounds the live variables of one session, in the same way. A tenth
	// of it (at least 16) is the number of tombstones a session keeps.
	VariableLimit int
	// FeedRing is the number of changes kept for feeds that lag or reconnect.
	FeedRing int
	// FeedBytes bounds the encoded size of these changes; the frames' shared encodings
	// may take as much again.
	FeedBytes int
	// SnapshotEvery is the number of events between log snapshots; negative means never.
	SnapshotEvery int
	// SessionKeys returns what is handed to processes of the mesh on this machine, asked at
	// every hand-out; nil, or a nil result = none to hand.
	SessionKeys func() *identity.Keys
	// FeedPeers says who may have a feed without gRPC (Service.Credentials), by what the
	// handshake found out; nil = whoever it let in.
	FeedPeers func(credentials.AuthInfo) error
	// Confirm returns a position that the log had reached at some instant after the call. A
	// replica that keeps a copy of another's log asks its leader; nil = this log is the
	// authority, and its head is what Confirm would return.
	Confirm func(context.Context) (position uint64, err error)
}

func (o Options) withDefaults() Options {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.SweepEvery == 0 {
		o.SweepEvery = DefaultSweepEvery
	}
	for _, d := range []struct {
		v       *int
		initial int
	}{
		{&o.SessionLimit, DefaultSessionLimit}, {&o.VariableLimit, DefaultVariableLimit},
		{&o.FeedRing, DefaultFeedRing}, {&o.FeedBytes, DefaultFeedBytes}, {&o.SnapshotEvery, DefaultSnapshotEvery},
	} {
		if *d.v == 0 {
			*d.v = d.initial
		}
	}
	return o
}

// Service is the authority. Build it with New and start it with Run.
type Service struct {
	pb.UnimplementedVariablesServer
	pb.UnimplementedCoherenceServer

	log     eventlog.Log
	opt     Options
	origin  origin
	metrics *instruments
	gates   *gates
	hub     *hub
	feeds   feeds
	leans   connections
	fanouts *fanouts

	progress progress
	ready    chan struct{} // closed by the applier when the first head is applied
	stopped  chan struct{} // closed when Run ends
	started  atomic.Bool

	mu    sync.RWMutex // guards state; the applier alone takes it for writing
	state *state

	ring atomic.Pointer[ring] // set once, before ready is closed
}

var (
	_ pb.VariablesServer = (*Service)(nil)
	_ pb.CoherenceServer = (*Service)(nil)
)

// New checks the options and builds a service; it starts nothing and reads nothing.
// Errors have kind Invalid.
func New(log eventlog.Log, opt Options) (*Service, error) {
	if log == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "variables: log is nil")
	}
	if err := outrigger.CheckName("region", opt.Region); err != nil {
		return nil, err
	}
	opt = opt.withDefaults()
	for name, v := range map[string]int{
		"SessionLimit": opt.SessionLimit, "VariableLimit": opt.VariableLimit, "FeedRing": opt.FeedRing, "FeedBytes": opt.FeedBytes,
	} {
		if v < 1 {
			return nil, outrigger.Errorf(outrigger.Invalid, "variables: %s is %d; give at least 1, or 0 for the default", name, v)
		}
	}
	s := &Service{
		log: log, opt: opt,
		origin: origin{region: opt.Region, incarnation: log.Incarnation()},
		gates:  newGates(), hub: newHub(), fanouts: newFanouts(),
		ready: make(chan struct{}), stopped: make(chan struct{}),
	}
	s.state = newState(s.origin, s.foldLimits())
	var err error
	s.metrics, err = newInstruments(opt.Meter)
	return s, err
}

func (s *Service) foldLimits() foldLimits { return foldLimits{graves: max(16, s.opt.VariableLimit/10)} }

// Ready is closed when the projection has caught up with the head the log had when Run
// started; from then on calls are answered.
func (s *Service) Ready() <-chan struct{} { return s.ready }

// Applied is the position of the last event in the projection.
func (s *Service) Applied() uint64 { return s.progress.at.Load() }

// Touch moves the sliding expiry of a session forward to at, or to now if at is later.
// Unknown sessions and earlier times are ignored. It is cheap enough for every report.
func (s *Service) Touch(tenant, session string, at time.Time) {
	s.touch(sessionID{wire.Tenant(tenant), session}, at)
}

// touch reports whether the session exists.
func (s *Service) touch(id sessionID, at time.Time) bool {
	s.mu.RLock()
	sess := s.state.sessions[id]
	s.mu.RUnlock()
	if sess == nil {
		return false
	}
	sess.touch(min(at.UnixNano(), s.opt.Now().UnixNano()))
	return true
}

// Wait returns when the projection has applied a position. Its errors have kind Unavailable
// (it stopped) or are ctx's.
func (s *Service) Wait(ctx context.Context, position uint64) error {
	return s.progress.wait(ctx, position)
}

// Current returns when the projection shows everything that was acknowledged anywhere before
// the call. Its errors have kind Unavailable or are ctx's. Without Options.Confirm it returns
// nil at once.
func (s *Service) Current(ctx context.Context) error {
	if s.opt.Confirm == nil {
		return nil
	}
	position, err := s.opt.Confirm(ctx)
	if err != nil {
		return err
	}
	return s.progress.wait(ctx, position)
}

// Stats is what a status page shows.
type Stats struct {
	Region      string
	Incarnation uint64
	Applied     uint64 // last position in the projection
	Head        uint64 // last position in the log
	Ready       bool
	Sessions    int
	Variables   int // live ones, in all sessions
	Watches     int // open Watch calls
	RingFloor   uint64
	Feeds       []FeedStat // by node id, then start
}

// FeedStat describes one feed stream.
type FeedStat struct {
	Node  outrigger.Node
	Since time.Time
	Sent  uint64 // every change up to here was handed to the transport
	Reset int    // times the node was told to flush, the first subscription included
}

// Stats collects the present numbers; they need not be of one instant.
func (s *Service) Stats() Stats {
	out := Stats{
		Region: s.origin.region, Incarnation: s.origin.incarnation, Applied: s.Applied(), Head: s.log.Head(),
		Ready: s.isReady() == nil, Watches: s.hub.count(), Feeds: s.feeds.list(),
	}
	s.mu.RLock()
	out.Sessions, out.Variables = len(s.state.sessions), s.state.live
	s.mu.RUnlock()
	if r := s.ring.Load(); r != nil {
		r.mu.RLock()
		out.RingFloor = r.floor
		r.mu.RUnlock()
	}
	return out
}

// isReady says why calls cannot be answered, if they cannot.
func (s *Service) isReady() error {
	select {
	case <-s.stopped:
		return outrigger.Errorf(outrigger.Unavailable, "the variable authority has stopped; retry elsewhere")
	default:
	}
	select {
	case <-s.ready:
		return nil
	default:
		return outrigger.Errorf(outrigger.Unavailable, "the variable authority is catching up with its log (position %d of %d); retry", s.Applied(), s.log.Head())
	}
}

// reply is the server edge of every unary call: the error becomes a status, and what a
// status cannot carry goes into the trailer.
func reply[T any](ctx context.Context, answer *T, err error) (*T, error) {
	if err == nil {
		return answer, nil
	}
	if md := status.Trailer(err); md != nil {
		// Without a server transport (a direct call) there is nobody to send it to.
		_ = grpc.SetTrailer(ctx, md)
	}
	return nil, status.ToGRPC(err)
}
