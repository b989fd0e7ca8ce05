package variable

import (
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Reader answers reads from the nearest tier; *cache.Store is one.
type Reader interface {
	Get(ctx context.Context, r cache.Request) (cache.Answer, error)
}

// Options configure the front ends. Reader and Authority are required.
type Options struct {
	Reader Reader
	// Authority takes writes and everything that is not a cached read: the node agent,
	// else the control plane.
	Authority pb.VariablesClient
	// AutoCreateSessions makes the first use of a session create it.
	AutoCreateSessions bool
	// Touched is told of every session a read used, if it exists; the sidecar reports it
	// so that the sliding expiry moves. Called concurrently; it must not block. May be nil.
	Touched func(tenant, session string)
	// Render, when above 0, has every read render the cache's encoder of index Render-1, so
	// that Fast finds its answer next time.
	Render int
	// Tokens gives out and takes session tokens; front ends of one sidecar share one. Nil =
	// tokens of this front end alone.
	Tokens *Tokens
	// Counters, when given, count the answers; front ends may share one.
	Counters *Counters
	// Draining is closed when the sidecar takes no more calls: open watches, which would
	// last for ever, then end with UNAVAILABLE. Nil = never.
	Draining <-chan struct{}
	Logger   *slog.Logger
}

// Counters count since start. Reads: one per variable asked for, also when the answer is
// that there is none, by the tier that answered; Stale of them were marked so. Writes: one
// per call that sets, registers, deletes or rolls back variables, however many, by whether
// the authority said that it was done.
type Counters struct {
	Process, Node, Origin, Stale, Errors atomic.Uint64
	Writes, WriteErrors                  atomic.Uint64
}

func (c *Counters) count(a cache.Answer, err error) {
	switch {
	case err != nil:
		c.Errors.Add(1)
		return
	case a.Tier == outrigger.TierProcess:
		c.Process.Add(1)
	case a.Tier == outrigger.TierNode:
		c.Node.Add(1)
	default:
		c.Origin.Add(1)
	}
	if a.Stale {
		c.Stale.Add(1)
	}
}

// core is what both front ends share.
type core struct{ o Options }

func newCore(o Options) core {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Touched == nil {
		o.Touched = func(string, string) {}
	}
	if o.Tokens == nil {
		o.Tokens = NewTokens(TokenOptions{Logger: o.Logger})
	}
	if o.Counters == nil {
		o.Counters = new(Counters)
	}
	return core{o: o}
}

// read answers one variable by id or name. What does not exist is an error, but the
// answer still says who knows that.
func (c core) read(ctx context.Context, tenant, session, identifier string, want cache.Request) (cache.Answer, error) {
	a, err := c.look(ctx, tenant, session, identifier, want)
	var missing error
	if err == nil && !a.Found && !a.SessionExists {
		start := time.Now()
		missing = c.ensureSession(ctx, tenant, session)
		a.Age += time.Since(start) // the variable may have been made meanwhile
		if bound := a.Consistency; missing == nil && bound.Level == outrigger.Bounded && a.Age > bound.MaxAge {
			// The session took longer to make than the answer may be old.
			a, err = c.look(ctx, tenant, session, identifier, want)
		}
	}
	c.o.Counters.count(a, err)
	switch {
	case err != nil:
		return a, err
	case missing != nil:
		return a, missing
	case !a.Found:
		return a, outrigger.ErrVariableNotFound(identifier)
	}
	return a, nil
}

// look finds out what an identifier names; that it names nothing is no error. Counting is
// the caller's: a read may look twice.
func (c core) look(ctx context.Context, tenant, session, identifier string, want cache.Request) (cache.Answer, error) {
	a, err := c.resolve(ctx, tenant, session, identifier, want)
	if err == nil && (a.Found || a.SessionExists) {
		c.o.Touched(tenant, session)
	}
	return a, err
}

// resolve tries the identifier as an id first, then as a name. The answer then rests on
// both look-ups, so it is no better than the worse of them.
func (c core) resolve(ctx context.Context, tenant, session, identifier string, want cache.Request) (cache.Answer, error) {
	if err := checkIdentifier(session, identifier); err != nil {
		return cache.Answer{}, err
	}
	name, ok := nameOfID(identifier)
	if !ok {
		return c.get(ctx, tenant, session, identifier, want)
	}
	asID, err := c.get(ctx, tenant, session, name, want)
	if err != nil || asID.Found && asID.Variable.GetId() == identifier {
		return asID, err
	}
	a, err := c.get(ctx, tenant, session, identifier, want)
	if err == nil {
		a.Tier, a.Age = max(a.Tier, asID.Tier), max(a.Age, asID.Age)
		a.FeedLive, a.Stale = a.FeedLive && asID.FeedLive, a.Stale || asID.Stale
	}
	return a, err
}

func checkIdentifier(session, identifier string) error {
	if err := outrigger.CheckName("session", session); err != nil {
		return err
	}
	return outrigger.CheckName("variable identifier", identifier)
}

func (c core) get(ctx context.Context, tenant, session, name string, want cache.Request) (cache.Answer, error) {
	want.Key, want.Encoding = outrigger.Key{Tenant: tenant, Session: session, Name: name}, c.o.Render-1
	return c.o.Reader.Get(ctx, want)
}

// ensureSession creates a missing session, or says that it is missing.
func (c core) ensureSession(ctx context.Context, tenant, session string) error {
	if !c.o.AutoCreateSessions {
		return outrigger.ErrSessionNotFound(session)
	}
	_, err := c.o.Authority.CreateSession(ctx, &pb.CreateSessionRequest{Tenant: tenant, Id: session, IfAbsent: true})
	return status.FromGRPC(err, nil)
}

// answerHeaders says where an answer came from. An answer of nobody (a refused request,
// or silence) says only that.
func answerHeaders(a cache.Answer) metadata.MD {
	if a.Tier == outrigger.TierNone {
		return metadata.Pairs(outrigger.HeaderTier, a.Tier.String())
	}
	feed := "live"
	if !a.FeedLive {
		feed = "down"
	}
	md := metadata.Pairs(outrigger.HeaderTier, a.Tier.String(), outrigger.HeaderFeed, feed,
		outrigger.HeaderAge, strconv.FormatInt(milliseconds(a.Age), 10))
	if a.Stale {
		md.Set(outrigger.HeaderStale, "true")
	}
	if a.Found {
		setVersion(md, a.Variable.GetVersion())
	}
	return md
}

func setVersion(md metadata.MD, v *pb.Version) {
	md.Set(outrigger.HeaderVersion, strconv.Itoa(int(v.GetCounter())))
	md.Set(outrigger.HeaderDot, wire.Dot(v.GetDot()).String())
}

// authorityHeaders marks what the authority answered, with the version of the one
// variable concerned, if there is one.
func authorityHeaders(v *pb.Version) metadata.MD {
	md := metadata.Pairs(outrigger.HeaderTier, outrigger.TierOrigin.String())
	if v != nil {
		setVersion(md, v)
	}
	return md
}

// fromGRPC is status.FromGRPC for errors without a trailer.
func fromGRPC(err error) error { return status.FromGRPC(err, nil) }

// setHeader adds response metadata; it fails only when the call is over already.
func setHeader(ctx context.Context, md metadata.MD) { _ = grpc.SetHeader(ctx, md) }
