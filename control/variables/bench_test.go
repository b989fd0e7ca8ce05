package variables_test

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
)

// A read at the origin allocates nothing: the answer is the stored message.
func TestGetAllocatesNothing(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("float", "0.7"))
	req := getReq("s", "x")
	req.Tenant = "default"
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := w.svc.Get(w.ctx, req); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("Get allocates %v objects", n)
	}
}

// BenchmarkGet is the service itself, without gRPC.
func BenchmarkGet(b *testing.B) {
	w := newWorld(b)
	w.session("s")
	for i := range 1000 {
		w.register("s", fmt.Sprint("v", i), value("float", "0.7"))
	}
	req := getReq("s", "v500")
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := w.svc.Get(w.ctx, req); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkSet is decide, append to the memory log, apply and acknowledge, without gRPC:
// one key per writer, and all writers on one key.
func BenchmarkSet(b *testing.B) {
	for _, writers := range []int{1, 128} {
		for _, hot := range []bool{false, true} {
			b.Run(fmt.Sprintf("writers=%d/hot=%v", writers, hot), func(b *testing.B) {
				w := newWorld(b)
				w.session("s")
				for i := range 256 {
					w.register("s", fmt.Sprint("v", i), value("float", "0.7"))
				}
				var next atomic.Int64
				b.ReportAllocs()
				b.SetParallelism((writers + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
				b.ResetTimer()
				b.RunParallel(func(p *testing.PB) {
					name := fmt.Sprint("v", next.Add(1)%256)
					if hot {
						name = "v0"
					}
					req := setReq("s", name, "0.5")
					for p.Next() {
						if _, err := w.svc.Set(w.ctx, req); err != nil {
							b.Fatal(err)
						}
					}
				})
			})
		}
	}
}

// BenchmarkGetGRPC adds the transport, over an in-memory connection.
func BenchmarkGetGRPC(b *testing.B) {
	w := newWorld(b)
	w.session("s")
	w.register("s", "x", value("float", "0.7"))
	req := getReq("s", "x")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.vars.Get(w.ctx, req); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFeedFanOut is one set seen by 100 feed streams: the frame is encoded once.
func BenchmarkFeedFanOut(b *testing.B) {
	w := newWorld(b)
	w.session("s")
	w.register("s", "x", value("float", "0.7"))
	nodes := make([]*node, 100)
	for i := range nodes {
		nodes[i] = w.subscribe(0, 0)
		nodes[i].recv()
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.svc.Set(w.ctx, setReq("s", "x", "0.5")); err != nil {
			b.Fatal(err)
		}
		head := w.log.Head()
		for _, n := range nodes {
			for n.recv().GetChanges().GetThrough() < head {
			}
		}
	}
	b.ReportMetric(float64(len(nodes)), "streams")
}
