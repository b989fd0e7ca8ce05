package node

import (
	"context"
	"maps"
	"net"
	"os"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// MaxTenants is how many tenants one agent keeps apart.
const MaxTenants = 256

// overflowID is what the kernel shows of users and groups that the agent's user namespace
// does not know (user_namespaces(7)): of everybody in it, so of nobody in particular.
const overflowID = 65534

// Access says whose variables each user of this machine may reach through an agent. Who a
// process is, the kernel says (SO_PEERCRED, unix(7)): the effective user and group it had
// when it connected to one of the agent's Unix sockets. Nothing a process sends counts.
//
//   - A user or group with a tenant reaches that tenant's table, keys and sessions, and
//     nobody else's. A user's tenant counts before that of its group.
//   - The agent's own user and root, unless they have a tenant, are operators: they may
//     make every call, for any tenant, and are given no table.
//   - Everybody else, and every peer whose user cannot be told, may do nothing.
//
// An Access may be used concurrently and belongs to one agent.
type Access struct {
	users, groups map[uint32]string
	operators     []uint32
	tenants       []string
	denied        atomic.Uint64
}

// NewAccess takes tenants by user and by group id. Errors have kind Invalid.
func NewAccess(users, groups map[uint32]string) (*Access, error) {
	a := &Access{users: maps.Clone(users), groups: maps.Clone(groups), operators: []uint32{0, uint32(os.Geteuid())}}
	for _, of := range []map[uint32]string{users, groups} {
		for id, tenant := range of {
			if err := outrigger.CheckName("tenant", tenant); err != nil {
				return nil, err
			}
			if id == overflowID || id == ^uint32(0) {
				return nil, outrigger.Errorf(outrigger.Invalid, "user or group %d stands for every one the kernel cannot name; give tenant %s a user of its own", id, tenant)
			}
			a.tenants = append(a.tenants, tenant)
		}
	}
	slices.Sort(a.tenants)
	a.tenants = slices.Compact(a.tenants)
	if n := len(a.tenants); n == 0 || n > MaxTenants {
		return nil, outrigger.Errorf(outrigger.Invalid, "users and groups are given for %d tenants; give 1 to %d", n, MaxTenants)
	}
	return a, nil
}

// Tenants returns those that somebody may reach, in order.
func (a *Access) Tenants() []string { return slices.Clone(a.tenants) }

// serves reports whether a tenant has a table.
func (a *Access) serves(tenant string) bool {
	_, ok := slices.BinarySearch(a.tenants, tenant)
	return ok
}

// count is how many tables there can be; one without an Access.
func (a *Access) count() int {
	if a == nil {
		return 1
	}
	return len(a.tenants)
}

// user is who connected, as the kernel says.
type user struct{ uid, gid uint32 }

// judge returns the tenant a user is bound to, "" for an operator. The error has kind
// Denied.
func (a *Access) judge(u user) (tenant string, err error) {
	if t, ok := a.users[u.uid]; ok {
		return t, nil
	}
	if t, ok := a.groups[u.gid]; ok {
		return t, nil
	}
	if slices.Contains(a.operators, u.uid) {
		return "", nil
	}
	return "", outrigger.Errorf(outrigger.Denied, "user %d with group %d has no tenant at this node agent; its --tenant-users say who has", u.uid, u.gid)
}

// Caller returns the tenant of whoever makes a call, for services that keep something of
// their own for each tenant. The error has kind Denied: the caller is unknown, of no tenant,
// or an operator, who has none.
func (a *Access) Caller(ctx context.Context) (string, error) {
	if tenant := a.tenantOf(ctx); tenant != "" {
		return tenant, nil
	}
	return "", outrigger.Errorf(outrigger.Denied, "the caller has no tenant at this node agent, so nothing is kept for it; its --tenant-users say who has")
}

// tenantOf returns the tenant of whoever makes a call, "" when there is none or it cannot be
// told.
func (a *Access) tenantOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if u, ok := p.AuthInfo.(user); ok {
			tenant, _ := a.judge(u)
			return tenant
		}
	}
	return ""
}

// tableFor returns the tenant whose table the process behind c is given. The error has
// kind Denied.
func (a *Access) tableFor(c net.Conn) (string, error) {
	u, err := peerUser(c)
	if err == nil {
		var tenant string
		if tenant, err = a.judge(u); err == nil && tenant != "" {
			return tenant, nil
		}
		if err == nil {
			err = outrigger.Errorf(outrigger.Denied, "user %d operates this node agent and has no tenant, so no table is its own; give it one with --tenant-users", u.uid)
		}
	}
	a.denied.Add(1)
	return "", err
}

// ServerOptions make a gRPC server on a Unix socket that carries the agent's services one
// that answers each process within its tenant (see Access and BindTenant) and refuses the
// others with PERMISSION_DENIED before the agent sees the call. On any other kind of
// socket it refuses everybody.
func (a *Access) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(peerCredentials{}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			allow, err := a.admit(ctx)
			if err == nil {
				err = allow(req)
			}
			if err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			allow, err := a.admit(s.Context())
			if err != nil {
				return err
			}
			return next(srv, tenantStream{s, allow})
		}),
	}
}

// admit returns what judges the messages of a call; the errors of both are gRPC's.
func (a *Access) admit(ctx context.Context) (func(any) error, error) {
	var tenant string
	var err error = outrigger.Errorf(outrigger.Denied, "the caller's user is unknown: it did not come through a Unix socket of this machine")
	if p, ok := peer.FromContext(ctx); ok {
		if u, ok := p.AuthInfo.(user); ok {
			tenant, err = a.judge(u)
		}
	}
	if err != nil {
		a.denied.Add(1)
		return nil, status.ToGRPC(err)
	}
	if tenant == "" {
		return func(any) error { return nil }, nil
	}
	return func(req any) error {
		err := withinTenant(tenant, req)
		if err != nil {
			a.denied.Add(1)
		}
		return status.ToGRPC(err)
	}, nil
}

// AuthType implements credentials.AuthInfo.
func (user) AuthType() string { return "unix peer" }

// peerCredentials tell who connected; the connection is used as it is.
type peerCredentials struct{}

// ServerHandshake never refuses: admit does, with words.
func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, err := peerUser(c)
	if err != nil {
		return c, nil, nil
	}
	return c, u, nil
}

// ClientHandshake is not for servers.
func (peerCredentials) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, nil, outrigger.Errorf(outrigger.Internal, "credentials of the node agent's server were given to a client")
}

// Info implements credentials.TransportCredentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix peer"}
}

// Clone implements credentials.TransportCredentials.
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

// OverrideServerName implements credentials.TransportCredentials; there is no name.
func (peerCredentials) OverrideServerName(string) error { return nil }
