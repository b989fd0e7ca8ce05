package cache_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// socketAgent is an agent as a process of its own would be: shared memory, Unix sockets.
type socketAgent struct {
	dir  string
	stop func()
}

func startSocketAgent(t *testing.T, dir string, n *memnet.Network) *socketAgent {
	t.Helper()
	cc, err := origintest.Dial(n, "node", "origin:1")
	must(t, err)
	a, err := node.New(node.Options{Node: outrigger.Node{ID: "n"}, Origin: cc, Table: shm.Options{Bytes: 1 << 20}})
	must(t, err)
	table, err := net.Listen("unix", filepath.Join(dir, "table"))
	must(t, err)
	rpc, err := net.Listen("unix", filepath.Join(dir, "agent"))
	must(t, err)
	g := grpc.NewServer()
	pb.RegisterVariablesServer(g, a)
	pb.RegisterCoherenceServer(g, a)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 3)
	go func() { ended <- a.Run(ctx) }()
	go func() { ended <- a.ServeTable(ctx, table) }()
	go func() { ended <- g.Serve(rpc) }()
	<-a.Ready()
	return &socketAgent{dir: dir, stop: func() {
		g.Stop()
		cancel()
		for range 3 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		cc.Close()
	}}
}

// eventually reads until an answer comes from a tier.
func eventually(t *testing.T, s *cache.Store, name, json string, from outrigger.Tier) {
	t.Helper()
	poll, limit := time.NewTicker(5*time.Millisecond), time.NewTimer(time.Minute)
	defer poll.Stop()
	defer limit.Stop()
	var got string
	for {
		a, err := s.Get(t.Context(), cache.Request{Key: key(name), Encoding: -1})
		if err == nil && string(a.Variable.GetValue().GetJson()) != json {
			t.Fatalf("%s = %s, want %s", name, a.Variable.GetValue().GetJson(), json)
		}
		if err == nil && a.Tier == from {
			return
		}
		got = a.Tier.String()
		select {
		case <-poll.C:
		case <-limit.C:
			t.Fatalf("%s still comes from tier %s (%v), want %s", name, got, err, from)
		}
	}
}

// The process attaches, survives the agent, and attaches to the next one by itself.
func TestAttachAndReattach(t *testing.T) {
	n, o, dir := memnet.New(), origintest.New(), t.TempDir()
	stopOrigin, err := o.Serve(n, "origin", "origin:1")
	must(t, err)
	defer stopOrigin()
	direct, err := origintest.Dial(n, "pod", "origin:1")
	must(t, err)
	defer direct.Close()
	rpc, err := grpc.NewClient("unix:"+filepath.Join(dir, "agent"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer rpc.Close()
	s, err := cache.New(cache.Options{TablePath: filepath.Join(dir, "table"), Agent: rpc, Origin: direct})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- s.Run(ctx) }()
	defer func() {
		cancel()
		must(t, <-ran)
	}()

	o.Put("x", "1")
	eventually(t, s, "x", "1", outrigger.TierOrigin) // no agent yet
	agent := startSocketAgent(t, dir, n)
	eventually(t, s, "x", "1", outrigger.TierProcess)
	must(t, set(s, "x", "2"))
	eventually(t, s, "x", "2", outrigger.TierProcess)
	agent.stop()
	// The first try may meet the broken connection, and then says that it does not know.
	for err := set(s, "x", "3"); err != nil; err = set(s, "x", "3") {
		if gstatus.Code(err) != codes.Unknown {
			t.Fatal(err)
		}
	}
	eventually(t, s, "x", "3", outrigger.TierOrigin)
	agent = startSocketAgent(t, dir, n)
	defer agent.stop()
	eventually(t, s, "x", "3", outrigger.TierProcess)
	if st := s.Stats(); !st.Attached || st.Private {
		t.Errorf("stats %+v", st)
	}
}
