package node_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

func access(t *testing.T, users map[uint32]string) *node.Access {
	t.Helper()
	a, err := node.NewAccess(users, nil)
	must(t, err)
	return a
}

// put writes x of session s of a tenant at the origin.
func put(t *testing.T, o *origintest.Origin, tenant, json string) {
	t.Helper()
	_, err := o.Register(t.Context(), &pb.RegisterRequest{Key: &pb.Key{Tenant: tenant, Session: "s", Name: "x"}, Value: &pb.Value{Json: []byte(json)}})
	must(t, err)
}

// get1 reads it through an agent.
func get1(t *testing.T, vars pb.VariablesClient, tenant string) (string, error) {
	v, err := vars.Get(t.Context(), &pb.GetRequest{Tenant: tenant, Session: "s", Identifier: "x"})
	return string(v.GetValue().GetJson()), err
}

// tenantWorld is an agent with real sockets and memory whose users are given.
func tenantWorld(t *testing.T, users map[uint32]string, limit int) (a *node.Agent, o *origintest.Origin, dir string) {
	t.Helper()
	n := memnet.New()
	o = origintest.New()
	stopOrigin, err := o.Serve(n, "origin", "origin:1")
	must(t, err)
	cc, err := origintest.Dial(n, "node", "origin:1")
	must(t, err)
	acc := access(t, users)
	a, err = node.New(node.Options{Node: outrigger.Node{ID: "n", Region: origintest.Region}, Origin: cc, Table: shm.Options{Bytes: 2 << 20},
		Access: acc, MaxSidecars: limit, TableIdle: time.Second, RepairEvery: -1})
	must(t, err)
	dir = t.TempDir()
	tl, err := net.Listen("unix", filepath.Join(dir, "table"))
	must(t, err)
	gl, err := net.Listen("unix", filepath.Join(dir, "agent"))
	must(t, err)
	g := grpc.NewServer(acc.ServerOptions()...)
	pb.RegisterVariablesServer(g, a)
	pb.RegisterCoherenceServer(g, a)
	pb.RegisterNodeAdminServer(g, a.Admin())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 3)
	go func() { ended <- a.Run(ctx) }()
	go func() { ended <- a.ServeTable(ctx, tl) }()
	go func() { ended <- g.Serve(gl) }()
	t.Cleanup(func() {
		g.Stop()
		cancel()
		for range 3 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		cc.Close()
		stopOrigin()
	})
	wait(t, "the feed lease", a.Ready())
	return a, o, dir
}

func dialAgent(t *testing.T, dir string) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+filepath.Join(dir, "agent"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { cc.Close() })
	return cc
}

// A process gets the table of its user's tenant, and what it asks for is judged by the
// same; TestTenantProcesses of cmd/outrigger does this with processes of several users.
func TestTenantOfAProcess(t *testing.T) {
	me := uint32(os.Geteuid())
	a, o, dir := tenantWorld(t, map[uint32]string{me: "acme", me + 1: "umbra"}, 8)
	put(t, o, "acme", "1")
	put(t, o, "umbra", "2")
	vars := pb.NewVariablesClient(dialAgent(t, dir))
	if got, err := get1(t, vars, "acme"); got != "1" || err != nil {
		t.Errorf("its own is %q, %v", got, err)
	}
	if _, err := get1(t, vars, "umbra"); gstatus.Code(err) != codes.PermissionDenied {
		t.Errorf("another's: %v", err)
	}
	// umbra's table comes into being, here by a read within the agent.
	_, err := a.Get(t.Context(), &pb.GetRequest{Tenant: "umbra", Session: "s", Identifier: "x"})
	must(t, err)
	at := attach(t, filepath.Join(dir, "table"))
	for id, want := range map[string]shm.State{"acme/s/x": shm.Present, "umbra/s/x": shm.Absent} {
		if e, _ := at.Reader.Get(id, nil); e.State != want {
			t.Errorf("the table handed over has %s %v, want %v", id, e.State, want)
		}
	}
	if s := a.Stats(); s.Tables != 2 || s.Denied != 1 {
		t.Errorf("%d tables, %d calls denied", s.Tables, s.Denied)
	}
	// Who is attached keeps its table; the one of nobody goes.
	until(t, "the end of the idle table", func() bool { return a.Stats().Tables == 1 })
	select {
	case <-at.Gone:
		t.Fatal("a table was retired that somebody was attached to")
	default:
	}
	put(t, o, "acme", "11")
	until(t, "the change", func() bool {
		e, b := at.Reader.Get("acme/s/x", nil)
		return e.State == shm.Present && strings.Contains(string(b), "11")
	})
	// It detaches, its table goes as well, and it comes back to a new one.
	old := at.Reader.Generation()
	must(t, at.Close())
	until(t, "the end of the other table", func() bool { return a.Stats().Tables == 0 })
	if !at.Reader.Closed() {
		t.Error("the retired table does not say so")
	}
	again := attach(t, filepath.Join(dir, "table"))
	if got, err := get1(t, vars, "acme"); got != "11" || err != nil {
		t.Errorf("in the new table it reads %q, %v", got, err)
	}
	if e, _ := again.Reader.Get("acme/s/x", nil); e.State != shm.Present || again.Reader.Generation() == old {
		t.Errorf("the new table has acme/s/x %v, generation %d after %d", e.State, again.Reader.Generation(), old)
	}
}

// until polls what has no event of its own.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	poll, limit := time.NewTicker(5*time.Millisecond), time.NewTimer(time.Minute)
	defer poll.Stop()
	defer limit.Stop()
	for !ok() {
		select {
		case <-poll.C:
		case <-limit.C:
			t.Fatalf("%s does not happen", what)
		}
	}
}

// A user without a tenant is told so, at both sockets; one tenant's processes cannot take
// the room of another's.
func TestAttachDenied(t *testing.T) {
	me := uint32(os.Geteuid())
	a, _, dir := tenantWorld(t, map[uint32]string{me + 1: "acme"}, 8)
	_, err := node.Attach(t.Context(), filepath.Join(dir, "table"))
	if !outrigger.IsKind(err, outrigger.Denied) || !strings.Contains(err.Error(), "--tenant-users") {
		t.Errorf("got %v, want kind Denied and what to do", err)
	}
	if s := a.Stats(); s.Denied != 1 || s.Tables != 0 || s.Sidecars != 0 {
		t.Errorf("%d denied, %d tables, %d sidecars", s.Denied, s.Tables, s.Sidecars)
	}
	// This process is the agent's user: it operates it.
	if _, err := pb.NewNodeAdminClient(dialAgent(t, dir)).Flush(t.Context(), &pb.FlushRequest{}); err != nil {
		t.Errorf("the operator: %v", err)
	}
	_, _, shared := tenantWorld(t, map[uint32]string{me: "acme", me + 1: "umbra"}, 4)
	for range 2 {
		attach(t, filepath.Join(shared, "table"))
	}
	if _, err := node.Attach(t.Context(), filepath.Join(shared, "table")); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("a third of two: %v", err)
	}
}
