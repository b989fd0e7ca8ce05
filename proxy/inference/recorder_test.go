package inference

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/DataDog/sketches-go/ddsketch/pb/sketchpb"
	"google.golang.org/protobuf/proto"
)

func outcome(unit uint32, failed bool, ms int) Outcome {
	return Outcome{Model: "gpt", Version: "v1", Arm: "a", Region: "eu", WeightEpoch: 2, HasUnit: true, Unit: unit, Sample: true, Failed: failed,
		Attempts: 1, Latency: time.Duration(ms) * time.Millisecond, At: time.Unix(100, int64(unit))}
}

func decode(t *testing.T, b []byte) *ddsketch.DDSketch {
	t.Helper()
	var m sketchpb.DDSketch
	if err := proto.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	s, err := ddsketch.FromProto(&m)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Many goroutines record a known population; what is drained, whenever, adds up to it.
func TestRecorderSums(t *testing.T) {
	r := NewRecorder(RecorderOptions{})
	const writers, each = 8, 2000
	var wg sync.WaitGroup
	for g := range writers {
		wg.Go(func() {
			for i := range each {
				r.Record(outcome(uint32((g*each+i)%500), i%10 == 0, 1+i%100))
			}
		})
	}
	var requests, failures, units uint64
	var sumX, sumY, latency float64
	all, err := ddsketch.LogCollapsingLowestDenseDDSketch(sketchAccuracy, sketchBins)
	if err != nil {
		t.Fatal(err)
	}
	failed := map[uint32]bool{}
	drain := func() {
		for _, d := range r.Drain(time.Now()) {
			if d.Model != "gpt" || d.Version != "v1" || d.Arm != "a" || d.Region != "eu" || d.WeightEpoch != 2 {
				t.Fatalf("cell %v", d)
			}
			requests, failures, latency = requests+d.Requests, failures+d.Failures, latency+d.LatencySumMs
			if err := all.MergeWith(decode(t, d.LatencySketch)); err != nil {
				t.Fatal(err)
			}
			for i, u := range d.Units {
				units += uint64(u.N)
				sumX, sumY = sumX+u.SumX, sumY+u.SumY
				if i > 0 && d.Units[i-1].Unit >= u.Unit {
					t.Fatal("units are not sorted or not distinct")
				}
			}
			for _, u := range d.FailedUnits {
				failed[u] = true
			}
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			drain()
		}
	}
	drain()
	const n = writers * each
	if requests != n || failures != n/10 || units != n || sumX != n/10 || math.Abs(sumY-50.5*n) > 1 || math.Abs(latency-sumY) > 1 || all.GetCount() != n {
		t.Errorf("requests %d failures %d units %d x %v y %v latency %v sketch %v", requests, failures, units, sumX, sumY, latency, all.GetCount())
	}
	if p99, err := all.GetValueAtQuantile(0.99); err != nil || math.Abs(p99-99) > 2 {
		t.Errorf("p99 %v, %v; want 99 within 1 %%", p99, err)
	}
	if len(failed) != 50 { // units ≡ 0 mod 10
		t.Errorf("%d failed units, want 50", len(failed))
	}
	if again := r.Drain(time.Now()); len(again) != 0 {
		t.Errorf("drained twice: %v", again)
	}
	if tot := r.Totals(); len(tot) != 1 || tot[0].Requests != n || tot[0].Failures != n/10 || tot[0].Attempts != n {
		t.Errorf("totals %+v", tot)
	}
}

func TestRecorderBounds(t *testing.T) {
	r := NewRecorder(RecorderOptions{MaxCells: 16, MaxUnits: 80, MaxFailedUnits: 40})
	for i := range 1000 {
		r.Record(outcome(uint32(i), true, 1))
	}
	d := r.Drain(time.Now())
	if len(d) != 1 || d[0].Requests != 1000 || d[0].Failures != 1000 || len(d[0].Units) != 80 || d[0].UnitsDropped != 920 || len(d[0].FailedUnits) != 40 {
		t.Errorf("%d rows, %d dropped, %d failed units of %d", len(d[0].Units), d[0].UnitsDropped, len(d[0].FailedUnits), d[0].Requests)
	}
	if d[0].FirstFailureUnixNano != uint64(time.Unix(100, 0).UnixNano()) {
		t.Errorf("first failure %d", d[0].FirstFailureUnixNano)
	}
	for i := range 1000 {
		o := outcome(uint32(i), false, 1)
		o.Version = fmt.Sprint(i)
		r.Record(o)
	}
	if d := r.Drain(time.Now()); len(d) != 16 || r.CellsDropped() != 984 {
		t.Errorf("%d cells, %d dropped", len(d), r.CellsDropped())
	}
}

func TestRecorderKinds(t *testing.T) {
	r := NewRecorder(RecorderOptions{})
	cancelled := outcome(1, false, 500)
	cancelled.Cancelled = true
	retry := outcome(1, true, 500)
	retry.Sample, retry.Attempts, retry.TokensOut = false, 2, 7
	stream := outcome(2, false, 80)
	stream.TTFT = 20 * time.Millisecond
	unassigned := outcome(0, true, 40)
	unassigned.HasUnit = false
	for _, o := range []Outcome{cancelled, retry, stream, unassigned} {
		r.Record(o)
	}
	d := r.Drain(time.Now())[0]
	if d.Requests != 3 || d.Cancelled != 1 || d.Failures != 1 || d.Attempts != 5 || d.TokensOut != 7 || d.LatencySumMs != 120 || len(d.Units) != 1 || len(d.FailedUnits) != 0 {
		t.Errorf("%v", d)
	}
	if s := decode(t, d.TtftSketch); s.GetCount() != 1 {
		t.Errorf("%v ttft", s.GetCount())
	}
	if s := decode(t, d.LatencySketch); s.GetCount() != 2 {
		t.Errorf("%v latencies", s.GetCount())
	}
}

// A failure signals; success does not; a drain takes the signal with it.
func TestRecorderUrgent(t *testing.T) {
	r := NewRecorder(RecorderOptions{})
	waiting := func() bool { return len(r.urgent) > 0 }
	r.Record(outcome(1, false, 1))
	if waiting() {
		t.Error("a success is urgent")
	}
	r.Record(outcome(1, true, 1))
	r.Record(outcome(2, true, 1)) // does not block
	if !waiting() {
		t.Error("a failure is not urgent")
	}
	r.Drain(time.Now())
	if waiting() {
		t.Error("urgent with nothing to drain")
	}
	r.Record(outcome(3, true, 1))
	select {
	case <-r.Urgent():
	default:
		t.Error("no signal after a drain")
	}
	if d := r.Drain(time.Now()); !slices.Equal(d[0].FailedUnits, []uint32{3}) {
		t.Errorf("%v", d)
	}
}

func BenchmarkRecord(b *testing.B) {
	r := NewRecorder(RecorderOptions{})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := uint32(0); pb.Next(); i++ {
			r.Record(outcome(i%4096, false, 12))
		}
	})
}
