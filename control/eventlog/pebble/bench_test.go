package pebble

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// benchEvent carries a 200-byte value, the size the engine comparison used.
func benchEvent() *outriggerv1.Event {
	return &outriggerv1.Event{Actor: "bench", Schema: 1, Payload: &outriggerv1.Event_VariableSet{VariableSet: &outriggerv1.VariableSet{
		Value: &outriggerv1.Value{Type: "string", Json: []byte(`"` + strings.Repeat("v", 198) + `"`)},
	}}}
}

// BenchmarkAppend is one durable event per append, spread over 1,000 aggregates.
func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 16, 128} {
		for _, ids := range []bool{false, true} {
			b.Run(fmt.Sprintf("writers=%d/ids=%v", writers, ids), func(b *testing.B) {
				l := mustOpen(b, b.TempDir(), Options{})
				e := benchEvent()
				var n atomic.Int64
				var wg sync.WaitGroup
				b.ReportAllocs()
				b.ResetTimer()
				for range writers {
					wg.Go(func() {
						for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
							id := ""
							if ids {
								id = fmt.Sprintf("5f0c2a4e-request-%012d", i)
							}
							_, err := l.Append(b.Context(), id, eventlog.Write{Aggregate: fmt.Sprintf("var/default/s/%d", i%1000), Expect: eventlog.Any, Events: []*outriggerv1.Event{e}})
							if err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
				if err := l.Close(); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkReadAll is the cost per event of replaying a log of 50,000.
func BenchmarkReadAll(b *testing.B) {
	l := mustOpen(b, b.TempDir(), Options{})
	const events = 50_000
	w := eventlog.Write{Expect: eventlog.Any}
	for range 500 {
		w.Events = append(w.Events, benchEvent())
	}
	for i := range events / len(w.Events) {
		w.Aggregate = fmt.Sprintf("var/default/s/%d", i%10)
		if _, err := l.Append(b.Context(), "", w); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for range b.N {
		n := 0
		for _, err := range l.ReadAll(b.Context(), 1) {
			if err != nil {
				b.Fatal(err)
			}
			n++
		}
		if n != events {
			b.Fatalf("read %d events", n)
		}
	}
	b.ReportMetric(b.Elapsed().Seconds()*1e9/float64(b.N)/events, "ns/event")
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
}
