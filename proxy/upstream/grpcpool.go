package upstream

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// GRPCPoolOptions configure NewGRPCPool. Zero fields take the defaults below.
type GRPCPoolOptions struct {
	Dial  DialFunc // replaces the network; nil = TCP
	Guard *Guard   // asked for every address dialled; nil allows all
	// DialTimeout bounds connect, default 5 s. IdleTimeout closes the connection of an
	// address without calls, default 90 s.
	DialTimeout, IdleTimeout time.Duration
	// MaxMessage bounds one message in either direction in bytes, default 100 MiB.
	MaxMessage int
	// MaxAddresses bounds the addresses remembered, default 1024; idle ones make room.
	MaxAddresses int
	// Material is asked for certificates and trust bundles of endpoints over TLS; nil = there
	// are none.
	Material func() *identity.Material
}

// GRPCPool keeps one HTTP/2 connection per address, or, over TLS, one per address and way of
// proving and verifying. When certificates rotate, calls under way end where they are. It is
// safe for concurrent use.
type GRPCPool struct {
	o    GRPCPoolOptions
	dial DialFunc

	mu    sync.Mutex // never held during I/O: a new client connects at its first call
	conns map[peerKey]*grpc.ClientConn
}

// peerKey names a connection; all but the address is zero in the clear.
type peerKey struct {
	address string
	secure  bool
	wants
	digest string
}

// NewGRPCPool returns an empty pool; it connects to nothing.
func NewGRPCPool(o GRPCPoolOptions) *GRPCPool {
	o.DialTimeout, o.IdleTimeout = orDefault(o.DialTimeout, 5*time.Second), orDefault(o.IdleTimeout, 90*time.Second)
	if o.Material == nil {
		o.Material = func() *identity.Material { return &identity.Material{} }
	}
	o.MaxMessage, o.MaxAddresses = orDefault(o.MaxMessage, 100<<20), orDefault(o.MaxAddresses, 1024)
	return &GRPCPool{o: o, dial: GuardedDial(o.Dial, o.Guard, o.DialTimeout), conns: map[peerKey]*grpc.ClientConn{}}
}

// Conn returns the connection to host:port, in the clear if t is nil, which connects when it
// is used. The error has kind Exhausted when every address remembered is in use, and
// Unavailable when what t names is not there.
func (p *GRPCPool) Conn(address string, t *policy.TLS) (grpc.ClientConnInterface, error) {
	k, how := peerKey{address: address}, []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	var m *identity.Material
	if t != nil {
		m = p.o.Material()
		digest, err := digestOf(t, m)
		if err != nil {
			return nil, err
		}
		k = peerKey{address, true, wantsOf(t), digest}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[k]; c != nil {
		return c, nil
	}
	if len(p.conns) >= p.o.MaxAddresses && !p.makeRoom() {
		return nil, outrigger.Errorf(outrigger.Exhausted, "%d addresses have gRPC connections in use, the limit is %d", len(p.conns), p.o.MaxAddresses)
	}
	if t != nil {
		how = []grpc.DialOption{grpc.WithTransportCredentials(grpcCredentials(t, m)), grpc.WithAuthority(t.Authority(address))}
	}
	c, err := grpc.NewClient("passthrough:///"+address, append(how, grpc.WithIdleTimeout(p.o.IdleTimeout),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return p.dial(ctx, "tcp", a) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(p.o.MaxMessage), grpc.MaxCallSendMsgSize(p.o.MaxMessage)), grpc.WithDisableServiceConfig(), grpc.WithNoProxy())...)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "gRPC address "+address)
	}
	p.conns[k] = c
	return c, nil
}

// makeRoom forgets one address without a connection; p.mu is held.
func (p *GRPCPool) makeRoom() bool {
	for a, c := range p.conns {
		if c.GetState() == connectivity.Idle {
			delete(p.conns, a)
			_ = c.Close() // idle: nothing can be lost
			return true
		}
	}
	return false
}

// Close ends all connections and what is in flight on them.
func (p *GRPCPool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for a, c := range p.conns {
		delete(p.conns, a)
		_ = c.Close() // fails only when closed already
	}
}
