package variable

import (
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"

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

// Options configure the front ends.
type Options struct {
	Reader Reader
	// Authority takes writes and everything that is not a cached read: the node agent,
	// else the control plane.
	Authority pb.VariablesClient
	// AutoCreateSessions makes the first use of a session create it.
	AutoCreateSessions bool
	// Touched is told of every session a cached read used; the sidecar reports it so that
	// the sliding expiry moves. May be nil.
	Touched func(tenant, session string)
	// Counters, when given, count the answers; front ends may share one.
	Counters *Counters
	Logger   *slog.Logger
}

// Counters count answers to variable reads since start.
type Counters struct{ Process, Node, Origin, Stale, Errors atomic.Uint64 }

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
	if o.Counters == nil {
		o.Counters = new(Counters)
	}
	return core{o: o}
}

// read answers one variable by id or name.
func (c core) read(ctx context.Context, tenant, session, identifier string, want outrigger.Consistency) (cache.Answer, error) {
	if err := outrigger.CheckName("session", session); err != nil {
		return cache.Answer{}, err
	}
	if err := outrigger.CheckName("variable identifier", identifier); err != nil {
		return cache.Answer{}, err
	}
	if name, ok := nameOfID(identifier); ok {
		a, err := c.get(ctx, tenant, session, name, want)
		if err != nil || (a.Found && a.Variable.GetId() == identifier) {
			return a, err
		}
	}
	a, err := c.get(ctx, tenant, session, identifier, want)
	if err != nil || a.Found {
		return a, err
	}
	if !a.SessionExists {
		if err := c.ensureSession(ctx, tenant, session); err != nil {
			return a, err
		}
	}
	return a, outrigger.ErrVariableNotFound(identifier)
}

func (c core) get(ctx context.Context, tenant, session, name string, want outrigger.Consistency) (cache.Answer, error) {
	c.o.Touched(tenant, session)
	a, err := c.o.Reader.Get(ctx, cache.Request{Key: outrigger.Key{Tenant: tenant, Session: session, Name: name}, Consistency: want, Encoding: -1})
	c.o.Counters.count(a, err)
	return a, err
}

// ensureSession creates a missing session, or says that it is missing.
func (c core) ensureSession(ctx context.Context, tenant, session string) error {
	if !c.o.AutoCreateSessions {
		return outrigger.ErrSessionNotFound(session)
	}
	_, err := c.o.Authority.CreateSession(ctx, &pb.CreateSessionRequest{Tenant: tenant, Id: session, IfAbsent: true})
	return status.FromGRPC(err, nil)
}

// answerHeaders says where an answer came from.
func answerHeaders(a cache.Answer) metadata.MD {
	feed, stale := "live", ""
	if !a.FeedLive {
		feed = "down"
	}
	md := metadata.Pairs(outrigger.HeaderTier, a.Tier.String(), outrigger.HeaderFeed, feed,
		outrigger.HeaderAge, strconv.FormatInt(a.Age.Milliseconds(), 10))
	if a.Stale {
		stale = "true"
		md.Set(outrigger.HeaderStale, stale)
	}
	if a.Found {
		v := a.Variable.GetVersion()
		md.Set(outrigger.HeaderVersion, strconv.Itoa(int(v.GetCounter())))
		md.Set(outrigger.HeaderDot, wire.Dot(v.GetDot()).String())
	}
	return md
}
