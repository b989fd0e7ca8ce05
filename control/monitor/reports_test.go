package monitor

import (
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/DataDog/sketches-go/ddsketch/pb/sketchpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func sketchOf(t *testing.T, values ...float64) []byte {
	t.Helper()
	s, err := ddsketch.NewDefaultDDSketch(accuracy)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range values {
		if err := s.Add(v); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := proto.Marshal(s.ToProto())
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func upTo(n int) (out []float64) {
	for i := range n {
		out = append(out, float64(i+1))
	}
	return out
}

func near(got, want float64) bool { return math.Abs(got-want) <= .011*want }

func TestDeltasAreCountedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.monitor()
		one := &pb.Delta{Reporter: "a", Sequence: 1, Node: &pb.Node{Id: "n1"},
			Outcomes: []*pb.OutcomeDelta{{Model: "m", Version: "v", Region: "eu", WeightEpoch: 7, Requests: 100, Failures: 3, Cancelled: 2,
				Attempts: 104, TokensIn: 5, TokensOut: 9, LatencySketch: sketchOf(t, upTo(100)...), TtftSketch: sketchOf(t, 10), FailedUnits: []uint32{1, 2}}},
			Cache: &pb.CacheDelta{HitsProcess: 4, HitsNode: 3, HitsOrigin: 2, StaleServed: 1, InvalidationLagSketch: sketchOf(t, upTo(10)...)}}
		other := proto.CloneOf(one)
		other.Reporter, other.Outcomes[0].Region = "b", "us"
		late := proto.CloneOf(one)
		late.Sequence = 5 // 2 to 4 went to another replica
		old := proto.CloneOf(one)
		old.Sequence = 4
		for _, d := range []*pb.Delta{one, one, other, late, one, old, late} {
			ingest(t, m, d)
		}
		got := m.VersionStats("m", "v")
		if got.Window != got.Lifetime {
			t.Errorf("window %+v differs from lifetime %+v", got.Window, got.Lifetime)
		}
		l := got.Lifetime
		if l.Requests != 300 || l.Failures != 9 || l.Cancelled != 6 || l.Attempts != 312 || l.TokensIn != 15 || l.TokensOut != 27 {
			t.Errorf("three deltas counted as %+v", l)
		}
		if !near(l.P50, 50) || !near(l.P99, 99) || !near(l.TTFTP50, 10) {
			t.Errorf("quantiles %+v", l)
		}
		if p := l.PB(); p.Requests != 300 || p.P99Ms != l.P99 || p.TokensOut != 27 {
			t.Errorf("PB %v", p)
		}
		cells := m.Cells()
		if len(cells) != 2 || cells[0].Region != "eu" || cells[0].Lifetime.Requests != 200 || cells[0].WeightEpoch != 7 || cells[0].FailedUnits != 2 || cells[1].Region != "us" {
			t.Errorf("cells %+v", cells)
		}
		if c := m.CacheStats(); c.HitsProcess != 12 || c.HitsNode != 9 || c.HitsOrigin != 6 || c.StaleServed != 3 || !near(c.InvalidationLagP50Ms, 5) {
			t.Errorf("cache %v", c)
		}
		if n := m.NodeCacheStats(); len(n) != 1 || n["n1"].HitsNode != 9 {
			t.Errorf("node caches %v", n)
		}
		seen := m.NodesSeen()
		if len(seen) != 2 || seen[0].Reporter != "a" || seen[0].Sequence != 5 || seen[0].Node.GetId() != "n1" || !seen[0].At.Equal(time.Now()) {
			t.Errorf("nodes %+v", seen)
		}
		time.Sleep(time.Minute)
		if got := m.VersionStats("m", "v"); got.Window != (Totals{}) || got.Lifetime != l {
			t.Errorf("a minute later: %+v", got)
		}
		if got := m.VersionStats("m", "other"); got != (Stats{}) {
			t.Errorf("unknown version: %+v", got)
		}
	})
}

func TestFailedUnitsAreDistinctWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newWorld(t).monitor(func(o *Options) { o.MaxUnits = 4 })
		seq := uint64(0)
		add := func(want uint64, failures uint64, units ...uint32) {
			t.Helper()
			seq++
			ingest(t, m, &pb.Delta{Reporter: "a", Sequence: seq, Outcomes: []*pb.OutcomeDelta{
				{Model: "m", Version: "v", Requests: 1000, Failures: failures, FailedUnits: units}}})
			if got := m.Cells()[0].FailedUnits; got != want {
				t.Errorf("delta %d: %d distinct failed units, want %d", seq, got, want)
			}
		}
		add(2, 9, 1, 2)
		time.Sleep(50 * time.Second)
		add(3, 2, 2, 3)
		time.Sleep(15 * time.Second) // 1 and 2 were counted 65 s ago, 3 was 15 s ago
		add(4, 2, 1, 3)
		time.Sleep(10 * time.Minute)
		add(7, 3, 1, 2, 3)
		add(12, 5)             // no units named: one by one
		add(13, 1, 4)          // fills the memory
		add(14, 1, 5)          // beyond it: counted,
		add(15, 1, 5)          // and counted again
		add(15, 4, 1, 2, 3, 4) // the remembered ones are not
	})
}

func TestRefusedAndDroppedInput(t *testing.T) {
	m := newWorld(t).monitor(func(o *Options) { o.MaxReporters, o.MaxCells = 2, 2 })
	ctx := context.Background()
	for name, d := range map[string]*pb.Delta{"no reporter": {Sequence: 1}, "no sequence": {Reporter: "a"}} {
		if err := m.Ingest(ctx, d); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want kind invalid", name, err)
		}
	}
	good := &pb.OutcomeDelta{Model: "m", Version: "v", Region: "eu", Requests: 10}
	ingest(t, m, &pb.Delta{Reporter: "a", Sequence: 1, Outcomes: []*pb.OutcomeDelta{
		{Version: "v", Requests: 1}, {Model: "m", Requests: 1}, {Model: "m", Version: "v", Region: "e\n", Requests: 1},
		{Model: "m", Version: "v", Region: "eu", Requests: 1, Failures: 2}, {Model: "m", Version: "v", Region: "eu", Requests: 1 << 50},
		good, {Model: "m", Version: "v", Region: "eu", Requests: 10, LatencySketch: []byte("nonsense")}}})
	if got := m.VersionStats("m", "v").Lifetime; got != (Totals{Requests: 20}) {
		t.Errorf("counted %+v, want the 20 requests that make sense", got)
	}
	ingest(t, m, &pb.Delta{Reporter: "b", Sequence: 1, Outcomes: []*pb.OutcomeDelta{
		{Model: "m", Version: "v2", Requests: 1}, {Model: "m", Version: "v3", Requests: 1}, good}})
	if n, got := len(m.Cells()), m.VersionStats("m", "v").Lifetime.Requests; n != 2 || got != 30 {
		t.Errorf("%d cells, %d requests; want 2 (the limit) and 30", n, got)
	}
	if err := m.Ingest(ctx, &pb.Delta{Reporter: "c", Sequence: 1}); !outrigger.IsKind(err, outrigger.Exhausted) {
		t.Errorf("third reporter of two: %v, want kind exhausted", err)
	}
}

// Silent reporters and cells make room; a version's totals never fall.
func TestSilentOnesMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newWorld(t).monitor(func(o *Options) { o.MaxReporters, o.MaxCells = 2, 2 })
		for i := range 10 {
			ingest(t, m, &pb.Delta{Reporter: fmt.Sprint("r", i), Sequence: 1, Node: &pb.Node{Id: fmt.Sprint("n", i)},
				Outcomes: []*pb.OutcomeDelta{{Model: "m", Version: "v", WeightEpoch: uint64(i + 1), Requests: 1}},
				Cache:    &pb.CacheDelta{HitsNode: 1}})
			time.Sleep(reporterIdle)
		}
		if n := len(m.NodesSeen()); n > 2 {
			t.Errorf("%d reporters remembered, limit 2", n)
		}
		if n := len(m.Cells()); n > 2 {
			t.Errorf("%d cells remembered, limit 2", n)
		}
		if a, b := m.VersionStats("m", "v").Lifetime.Requests, m.CacheStats().HitsNode; a != 10 || b != 10 {
			t.Errorf("%d requests and %d hits, want 10 each", a, b)
		}
		if n := len(m.NodeCacheStats()); n > 2 {
			t.Errorf("%d nodes remembered, limit 2", n)
		}
	})
}

func TestTouchedSessionsAreHandedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		m := newWorld(t).monitor(func(o *Options) {
			o.Touch = func(tenant, session string, at time.Time) {
				got = append(got, fmt.Sprintf("%s|%s|%v", tenant, session, time.Since(at)))
			}
		})
		d := &pb.Delta{Reporter: "a", Sequence: 1, WindowEndUnixNano: uint64(time.Now().Add(-time.Second).UnixNano()),
			Cache: &pb.CacheDelta{TouchedSessions: []string{"t/s", "broken", "/x", "t/"}}}
		ingest(t, m, d)
		ingest(t, m, d)
		ingest(t, m, &pb.Delta{Reporter: "a", Sequence: 2, WindowEndUnixNano: uint64(time.Now().Add(time.Hour).UnixNano()),
			Cache: &pb.CacheDelta{TouchedSessions: []string{"t/ahead"}}})
		if want := []string{"t|s|1s", "t|ahead|0s"}; !slices.Equal(got, want) {
			t.Errorf("touched %q, want %q", got, want)
		}
	})
}

func TestPushAcknowledgesOverGRPC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newWorld(t).monitor()
		lis := bufconn.Listen(1 << 16)
		srv := grpc.NewServer()
		pb.RegisterReportsServer(srv, m)
		served := make(chan error, 1)
		go func() { served <- srv.Serve(lis) }()
		conn, err := grpc.NewClient("passthrough:///bufnet", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := pb.NewReportsClient(conn).Push(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, seq := range []uint64{1, 2, 2, 1} {
			if err := stream.Send(&pb.Delta{Reporter: "a", Sequence: seq, Outcomes: []*pb.OutcomeDelta{{Model: "m", Version: "v", Requests: 1}}}); err != nil {
				t.Fatal(err)
			}
			ack, err := stream.Recv()
			if err != nil || ack.GetSequence() != seq {
				t.Fatalf("ack %v, %v; want %d", ack, err, seq)
			}
		}
		if n := m.VersionStats("m", "v").Lifetime.Requests; n != 2 {
			t.Errorf("%d requests counted, want 2", n)
		}
		if err := stream.Send(&pb.Delta{Reporter: "a"}); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); gstatus.Code(err) != codes.InvalidArgument {
			t.Errorf("sequence 0 answered %v, want InvalidArgument", err)
		}
		conn.Close()
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// Whatever arrives as a sketch is refused or gives finite quantiles and bounded memory.
func FuzzDecodeSketch(f *testing.F) {
	seed := func(s *sketchpb.DDSketch) {
		raw, err := proto.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	good, err := ddsketch.NewDefaultDDSketch(accuracy)
	if err != nil {
		f.Fatal(err)
	}
	for _, v := range []float64{0, .001, 1, 3e9} {
		if err := good.Add(v); err != nil {
			f.Fatal(err)
		}
	}
	seed(good.ToProto())
	m := good.ToProto().GetMapping()
	seed(&sketchpb.DDSketch{Mapping: m, PositiveValues: &sketchpb.Store{BinCounts: map[int32]float64{math.MaxInt32: 1, math.MinInt32: 1}}})
	seed(&sketchpb.DDSketch{Mapping: m, PositiveValues: &sketchpb.Store{BinCounts: map[int32]float64{0: math.NaN()}}})
	seed(&sketchpb.DDSketch{Mapping: m, PositiveValues: &sketchpb.Store{ContiguousBinCounts: []float64{-1}}})
	seed(&sketchpb.DDSketch{Mapping: m, ZeroCount: math.Inf(1)})
	seed(&sketchpb.DDSketch{Mapping: m, NegativeValues: &sketchpb.Store{BinCounts: map[int32]float64{1: 1}}})
	seed(&sketchpb.DDSketch{Mapping: &sketchpb.IndexMapping{Gamma: 1.5}})
	seed(&sketchpb.DDSketch{})
	f.Add([]byte("nonsense"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := decodeSketch(raw)
		if err != nil {
			if !outrigger.IsKind(err, outrigger.Invalid) || s != nil {
				t.Fatalf("%v, sketch %v; want kind invalid and nil", err, s)
			}
			return
		}
		var sum sketch
		merge(&sum, s)
		merge(&sum, s)
		for _, q := range []float64{0, .5, .99, 1} {
			if x := quantile(sum, q); math.IsNaN(x) || x < 0 || x > 1.02*maxValue {
				t.Fatalf("quantile %v is %v", q, x)
			}
		}
	})
}

func TestNewChecksItsOptions(t *testing.T) {
	w := newWorld(t)
	for name, o := range map[string]Options{
		"no log": {Rollouts: w, Ledger: w}, "no rollouts": {Log: w, Ledger: w}, "no ledger": {Log: w, Rollouts: w},
		"negative bound": {Log: w, Rollouts: w, Ledger: w, MaxCells: -1},
	} {
		if _, err := New(o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want kind invalid", name, err)
		}
	}
}
