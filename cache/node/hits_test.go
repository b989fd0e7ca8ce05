package node

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

func TestAllowance(t *testing.T) {
	var a allowance
	now := int64(time.Hour)
	for i, step := range []struct {
		after time.Duration
		n     int
		want  int
	}{
		{0, 4096, 4096}, {0, maxHits, maxHits - 4096}, {0, 1, 0}, {time.Microsecond, 5, 0}, // not one yet, and not forgotten
		{499999 * time.Microsecond, maxHits, maxHits / 2}, {time.Hour, 2 * maxHits, maxHits}, {-time.Minute, 1, 0}, {0, -3, 0},
	} {
		now += int64(step.after)
		if got := a.take(step.n, now); got != step.want {
			t.Errorf("step %d: %d of %d count, want %d", i, got, step.n, step.want)
		}
	}
}

// A report counts in the table its sender is given, whatever it holds, at a bounded rate.
func TestReportedHits(t *testing.T) {
	acc, err := NewAccess(map[uint32]string{4001: "acme", 4002: "umbra"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := int64(time.Hour)
	a, err := New(Options{Node: outrigger.Node{ID: "n"}, Origin: &grpc.ClientConn{}, Access: acc,
		Table: shm.Options{Heap: true, Bytes: 128 << 10}, Clock: func() int64 { return now }})
	if err != nil {
		t.Fatal(err)
	}
	for _, tenant := range []string{"acme", "umbra"} {
		if _, err := a.use(tenant); err != nil {
			t.Fatal(err)
		}
	}
	used := func(tenant string) int { return a.tables.Load().of(tenant).hits.used }
	report := func(uid uint32, n int) {
		t.Helper()
		ctx := peer.NewContext(context.Background(), &peer.Peer{AuthInfo: user{uid: uid, gid: 1}})
		if _, err := a.Admin().ReportReads(ctx, &pb.ReadCounts{Touched: make([]uint64, n), TouchWeight: 1 << 31}); err != nil {
			t.Fatal(err)
		}
	}
	report(4001, 10)
	report(0, 10)    // the operator has no table
	report(4999, 10) // nobody
	if _, err := a.Admin().ReportReads(context.Background(), &pb.ReadCounts{Touched: []uint64{1}}); err != nil {
		t.Fatal(err)
	}
	if used("acme") != 10 || used("umbra") != 0 {
		t.Errorf("acme's ten count %d in its table and %d in umbra's", used("acme"), used("umbra"))
	}
	report(4002, 2*shm.MaxSamples)
	if used("umbra") != shm.MaxSamples {
		t.Errorf("%d of one report count, the limit is %d", used("umbra"), shm.MaxSamples)
	}
	for range 100 {
		report(4002, shm.MaxSamples)
	}
	if used("umbra") != maxHits || used("acme") != 10 {
		t.Errorf("%d count within a moment, the limit is %d; %d in the other table", used("umbra"), maxHits, used("acme"))
	}
}
