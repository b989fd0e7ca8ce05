package node

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

func TestAccess(t *testing.T) {
	me := uint32(os.Geteuid())
	a, err := NewAccess(map[uint32]string{4001: "acme", 4002: "umbra", 4003: "acme"}, map[uint32]string{5002: "umbra", 5003: "zeta"})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(a.Tenants(), " "); got != "acme umbra zeta" || a.count() != 3 {
		t.Errorf("tenants %q, %d", got, a.count())
	}
	for _, tt := range []struct {
		name   string
		u      user
		tenant string
		denied bool
	}{
		{"a user", user{4001, 4001}, "acme", false},
		{"another of the same tenant", user{4003, 1}, "acme", false},
		{"by group", user{6000, 5003}, "zeta", false},
		{"the user counts before the group", user{4001, 5002}, "acme", false},
		{"nobody's", user{4004, 4004}, "", true},
		{"a group with the number of a user", user{4004, 4001}, "", true},
		{"a user with the number of a group", user{5002, 1}, "", true},
		{"root", user{0, 0}, "", false},
		{"the agent's own user", user{me, 77}, "", false},
		{"root's group alone", user{4004, 0}, "", true},
		{"one the kernel cannot name", user{overflowID, overflowID}, "", true},
	} {
		tenant, err := a.judge(tt.u)
		if outrigger.IsKind(err, outrigger.Denied) != tt.denied || (err != nil) != tt.denied || tenant != tt.tenant {
			t.Errorf("%s: %q, %v", tt.name, tenant, err)
		}
	}
	own, err := NewAccess(map[uint32]string{0: "acme", me: "acme"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if tenant, err := own.judge(user{0, 0}); tenant != "acme" || err != nil {
		t.Errorf("root with a tenant is %q, %v", tenant, err)
	}
	many := map[uint32]string{}
	for i := range uint32(MaxTenants + 1) {
		many[i] = "t" + strings.Repeat("x", int(i%7)) + string(rune('a'+i%26)) + string(rune('a'+i/26))
	}
	for name, users := range map[string]map[uint32]string{
		"nobody": {}, "a bad name": {1: "a/b"}, "no name": {1: ""}, "overflow": {overflowID: "acme"}, "no user": {^uint32(0): "acme"}, "too many": many,
	} {
		if _, err := NewAccess(users, nil); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is not known to come from a user of this machine is refused, whatever else is known.
func TestAdmitNobodyKnown(t *testing.T) {
	a, err := NewAccess(map[uint32]string{4001: "acme"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, ctx := range map[string]context.Context{
		"no peer":          t.Context(),
		"no credentials":   peer.NewContext(t.Context(), &peer.Peer{Addr: &net.UnixAddr{Name: "@", Net: "unix"}}),
		"a stranger":       peer.NewContext(t.Context(), &peer.Peer{AuthInfo: user{4002, 4002}}),
		"over the network": peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}),
	} {
		if _, err := a.admit(ctx); gstatus.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	if a.denied.Load() != 4 {
		t.Errorf("%d refusals are counted", a.denied.Load())
	}
	allow, err := a.admit(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: user{4001, 1}}))
	if err != nil {
		t.Fatal(err)
	}
	if err := allow(&pb.FlushRequest{Tenant: "acme"}); err != nil {
		t.Error(err)
	}
	if err := allow(&pb.FlushRequest{Tenant: "umbra"}); gstatus.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	if allow, err = a.admit(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: user{0, 0}})); err != nil || allow(&pb.FlushRequest{}) != nil {
		t.Error("root may not operate the agent")
	}
}

// The options refuse on a socket that does not say who connected.
func TestServerOptionsOffUnixSockets(t *testing.T) {
	a, err := NewAccess(map[uint32]string{uint32(os.Geteuid()): "acme"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(a.ServerOptions()...)
	pb.RegisterCoherenceServer(g, pb.UnimplementedCoherenceServer{})
	go g.Serve(l)
	defer g.Stop()
	cc, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if _, err = pb.NewCoherenceClient(cc).Read(t.Context(), &pb.ReadRequest{}); gstatus.Code(err) != codes.PermissionDenied {
		t.Errorf("over TCP: %v", err)
	}
	if _, err = pb.NewCoherenceClient(cc).Changes(t.Context(), &pb.ChangesRequest{}); gstatus.Code(err) != codes.PermissionDenied {
		t.Errorf("over TCP: %v", err)
	}
}

func TestIdle(t *testing.T) {
	for _, tt := range []struct {
		attached  int
		used, now int64
		want      bool
	}{{0, 100, 159, false}, {0, 100, 160, true}, {1, 100, 1000, false}, {0, 1000, 100, false}} {
		if got := idle(tt.attached, tt.used, tt.now, 60*time.Nanosecond); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestShare(t *testing.T) {
	whole := shm.Options{Bytes: 12 << 20, Slots: 9000, Heap: true}
	if got := share(whole, 1); got != whole {
		t.Errorf("one of one gets %+v", got)
	}
	if got := share(whole, 3); got.Bytes != 4<<20 || got.Slots != 3000 || !got.Heap {
		t.Errorf("one of three gets %+v", got)
	}
	// What shm gives to who asks for nothing in particular is divided as well.
	one, err := shm.Options{}.Capacity()
	if err != nil {
		t.Fatal(err)
	}
	half, err := share(shm.Options{}, 2).Capacity()
	if err != nil || half > one/2+1 || half < one/2-1 {
		t.Errorf("a half has room for %d keys, the whole for %d: %v", half, one, err)
	}
}
