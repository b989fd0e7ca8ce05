package node_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// admin serves the agent's NodeAdmin on the world's network, as its Unix socket would.
func (w *world) admin(t *testing.T) pb.NodeAdminClient {
	t.Helper()
	l, err := w.net.Listen("node", "admin:1")
	must(t, err)
	g := grpc.NewServer()
	pb.RegisterNodeAdminServer(g, w.agent.Admin())
	go g.Serve(l)
	cc, err := origintest.Dial(w.net, "pod", "admin:1")
	must(t, err)
	stop := w.stop
	w.stop = func() {
		cc.Close()
		g.Stop()
		stop()
	}
	return pb.NewNodeAdminClient(cc)
}

func entry(t *testing.T, c pb.NodeAdminClient, session, name string) *pb.NodeEntry {
	t.Helper()
	e, err := c.GetEntry(t.Context(), &pb.GetEntryRequest{Key: &pb.Key{Session: session, Name: name}})
	must(t, err)
	return e
}

func dump(t *testing.T, c pb.NodeAdminClient, r *pb.DumpRequest) (out []string) {
	t.Helper()
	s, err := c.Dump(t.Context(), r)
	must(t, err)
	for {
		e, err := s.Recv()
		if err == io.EOF {
			slices.Sort(out)
			return out
		}
		must(t, err)
		out = append(out, fmt.Sprintf("%s/%s/%s %s", e.Key.Tenant, e.Key.Session, e.Key.Name, e.State))
	}
}

func TestAdminShowsTheTable(t *testing.T) {
	bubble(t, node.Options{RepairEvery: -1}, func(t *testing.T, w *world) {
		c := w.admin(t)
		x := w.origin.Put("x", "1")
		synctest.Wait()
		w.read("x", "1")
		if _, err := w.vars.Get(t.Context(), get("gone")); gstatus.Code(err) != codes.NotFound {
			t.Fatal(err)
		}
		e := entry(t, c, "s", "x")
		if e.State != "present" || string(e.Variable.GetValue().GetJson()) != "1" || e.AsOf < x.Version.Dot.Position ||
			e.Stamp == 0 || e.Incarnation == 0 || e.Fetching || e.LeaseRemainingMs <= 0 || e.LeaseRemainingMs > 300 {
			t.Errorf("x: %v", e)
		}
		if e := entry(t, c, "s", "gone"); e.State != "negative" || e.Variable != nil || !e.SessionExists {
			t.Errorf("gone: %v", e)
		}
		if e := entry(t, c, "s", "never"); e.State != "absent" || e.AsOf != 0 {
			t.Errorf("never: %v", e)
		}
		if _, err := c.GetEntry(t.Context(), &pb.GetEntryRequest{Key: &pb.Key{Session: "a/b", Name: "x"}}); gstatus.Code(err) != codes.InvalidArgument {
			t.Errorf("a bad key: %v", err)
		}
		for _, tt := range []struct {
			r    *pb.DumpRequest
			want []string
		}{
			{&pb.DumpRequest{}, []string{"default/s/gone negative", "default/s/x present"}},
			{&pb.DumpRequest{Tenant: "default", SessionPrefix: "s"}, []string{"default/s/gone negative", "default/s/x present"}},
			{&pb.DumpRequest{SessionPrefix: "other"}, nil},
			{&pb.DumpRequest{Tenant: "other"}, nil},
		} {
			if got := dump(t, c, tt.r); !slices.Equal(got, tt.want) {
				t.Errorf("dump of %v: %v, want %v", tt.r, got, tt.want)
			}
		}
		if got := dump(t, c, &pb.DumpRequest{Limit: 1}); len(got) != 1 {
			t.Errorf("a dump limited to 1: %v", got)
		}
		bad, err := c.Dump(t.Context(), &pb.DumpRequest{Limit: 100_001})
		must(t, err)
		if _, err := bad.Recv(); gstatus.Code(err) != codes.InvalidArgument {
			t.Errorf("a dump without bound: %v", err)
		}
		for range 2 {
			_, err := c.ReportReads(t.Context(), &pb.ReadCounts{Process: 10, Node: 5, Origin: 2, Stale: 1, Failed: 1})
			must(t, err)
		}
		s, err := c.Stat(t.Context(), &pb.NodeStatRequest{})
		must(t, err)
		if s.Node != "node-a" || s.Region != origintest.Region || !s.FeedUp || !s.LeaseLive || s.LeaseMs != 300 || s.LeaseRemainingMs <= 0 ||
			s.Reads.Process != 20 || s.Reads.Failed != 2 || s.Entries != 2 || s.Bytes == 0 || s.Fetches != 2 || s.Applied == 0 || s.Head < s.Applied {
			t.Errorf("stat: %v", s)
		}
	})
}

// A flush is followed by a fetch, even for a key whose fetch was under way, and touches
// nothing else.
func TestAdminFlush(t *testing.T) {
	bubble(t, node.Options{RepairEvery: -1}, func(t *testing.T, w *world) {
		c := w.admin(t)
		w.origin.Put("x", "1")
		synctest.Wait() // the feed brings the value too: after the flush it would show it again
		w.read("x", "1")
		calls, _ := w.origin.Reads()
		w.read("x", "1")
		if again, _ := w.origin.Reads(); again != calls {
			t.Fatal("a read of a held key asked the origin")
		}
		flush := func(tenant, session string, want uint64) {
			t.Helper()
			r, err := c.Flush(t.Context(), &pb.FlushRequest{Tenant: tenant, Session: session})
			must(t, err)
			if r.Entries != want {
				t.Errorf("flush of %q/%q dropped %d entries, want %d", tenant, session, r.Entries, want)
			}
		}
		flush("", "other", 0)
		flush("other", "", 0)
		w.shows("x", "1")
		flush("", "s", 1)
		w.shows("x", "absent")
		w.read("x", "1")
		if again, _ := w.origin.Reads(); again != calls+1 {
			t.Errorf("%d calls after the flush, want 1", again-calls)
		}
		w.shows("x", "1")
		flush("", "", 1)
		w.shows("x", "absent")
		if s := w.agent.Stats(); !s.LeaseLive || s.Flushes != 0 {
			t.Errorf("the flush touched the feed: %+v", s)
		}
	})
}

// An entry that the origin changed without a word is found within a few samples: it is
// repaired, counted by age and reported once.
func TestFreshnessMonitor(t *testing.T) {
	bubble(t, node.Options{RepairEvery: time.Second}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		time.Sleep(3 * time.Second)
		if s := w.agent.Stats(); s.Repaired != 0 || s.Checked < 2 || len(s.Stale) != 0 {
			t.Fatalf("a correct entry: checked %d, repaired %d", s.Checked, s.Repaired)
		}
		w.agent.CacheDelta() // the lag of the write
		w.origin.Tamper("x", "7")
		time.Sleep(3 * time.Second)
		synctest.Wait()
		w.shows("x", "7")
		s := w.agent.Stats()
		if total := s.Stale["1s"] + s.Stale["5s"] + s.Stale["unknown"]; s.Repaired != 1 || total != 1 {
			t.Errorf("repaired %d, stale %v", s.Repaired, s.Stale)
		}
		d := w.agent.CacheDelta()
		if v := d.GetViolations(); len(v) != 1 || v[0].Key.GetName() != "x" || v[0].Shown.GetPosition() == 0 ||
			wire.Dot(v[0].Current) == wire.Dot(v[0].Shown) {
			t.Errorf("reported %v", d)
		}
		if again := w.agent.CacheDelta(); len(again.GetViolations()) != 0 {
			t.Errorf("reported twice: %v", again)
		}
	})
}

func TestSessionKeysOfAnAgent(t *testing.T) {
	keys := identity.NewKeys()
	bubble(t, node.Options{SessionKeys: func() *identity.Keys { return keys }}, func(t *testing.T, w *world) {
		r, err := w.coh.SessionKeys(t.Context(), &pb.SessionKeysRequest{})
		if err != nil || r.Keys != keys.Text() {
			t.Errorf("own keys: %v", err)
		}
		remote := peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 9}})
		if _, err := w.agent.SessionKeys(remote, nil); gstatus.Code(err) != codes.PermissionDenied {
			t.Errorf("another machine: %v", err)
		}
	})
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		// This origin has none to hand out, and says so.
		if _, err := w.coh.SessionKeys(t.Context(), &pb.SessionKeysRequest{}); gstatus.Code(err) != codes.Unimplemented {
			t.Errorf("asked of the origin: %v", err)
		}
	})
}
