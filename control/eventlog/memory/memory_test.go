package memory_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/eventlogtest"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// A subscriber waits durably (the bubble can advance), wakes on the commit, and events
// carry the bubble's clock.
func TestInsideSynctestBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := memory.New(memory.WithIncarnation(7))
		if l.Incarnation() != 7 {
			t.Fatalf("incarnation %d, want 7", l.Incarnation())
		}
		ctx, cancel := context.WithCancel(t.Context())
		var got []*outriggerv1.Event
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for e, err := range l.Subscribe(ctx, 0) {
				if err != nil {
					t.Errorf("subscribe: %v", err)
					return
				}
				got = append(got, e)
			}
		}()
		start := time.Now()
		time.Sleep(time.Minute) // only possible because the subscriber is durably blocked
		if _, err := l.Append(ctx, "", eventlog.Write{Aggregate: "a", Expect: 0, Events: []*outriggerv1.Event{{Actor: "x"}}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(got) != 1 || !got[0].GetAt().AsTime().Equal(start.Add(time.Minute)) {
			t.Fatalf("subscriber saw %v, want one event dated %v", got, start.Add(time.Minute))
		}
		cancel()
		<-ended
	})
}

func TestConformance(t *testing.T) {
	eventlogtest.Run(t, func(*testing.T) eventlog.Log { return memory.New() })
}
