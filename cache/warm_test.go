package cache_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// starting is a pod that starts now and warms up within these bounds.
func (w *world) starting(o cache.WarmUp) *cache.Store {
	return w.store(cache.Options{Table: func() *shm.Reader { return w.agent.Load().Table() }, Agent: w.dial("pod", "agent:1"),
		Origin: w.dial("pod", "origin:1"), Encoders: []cache.Encoder{encode}, WarmUp: o})
}

// What one pod of a node has read, and that something is not there, the next pod has in
// its own tier from the start, and a change reaches it there as everywhere.
func TestWarmUp(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		for i := range 100 {
			w.origin.Put(fmt.Sprint("x", i), fmt.Sprint(i))
		}
		synctest.Wait()
		for i := range 100 {
			reads(t, s, fmt.Sprint("x", i), session, fmt.Sprint(i, " origin"))
		}
		reads(t, s, "absent", session, "none origin")

		time.Sleep(300 * time.Millisecond) // the node has told the origin by now which sessions it follows, and no repair is due
		second := w.starting(cache.WarmUp{})
		off := w.starting(cache.WarmUp{Off: true})
		few := w.starting(cache.WarmUp{Entries: 7})
		small := w.starting(cache.WarmUp{Bytes: 10_000})
		time.Sleep(200 * time.Millisecond)
		if got := second.Stats().Warmed; got != 101 {
			t.Errorf("%d entries were brought, want 101", got)
		}
		w.origin.Put("x3", "changed")
		synctest.Wait()
		for i := range 100 {
			want := fmt.Sprint(i, " process")
			if i == 3 {
				want = "changed node" // a small value rides along with its change
			}
			reads(t, second, fmt.Sprint("x", i), session, want)
		}
		reads(t, second, "absent", session, "none process")

		if st := off.Stats(); st.Warmed != 0 || st.ProcessSize != 0 {
			t.Errorf("turned off: %+v", st)
		}
		reads(t, off, "x1", session, "1 node")
		if got := few.Stats().Warmed; got != 7 {
			t.Errorf("%d entries were brought, the bound is 7", got)
		}
		if st := small.Stats(); st.ProcessSize < 10_000 || st.ProcessSize > 11_000 {
			t.Errorf("%d bytes were brought, the bound is 10,000", st.ProcessSize)
		}
	})
}

// The bound on time includes the wait for a table; after it nothing is brought.
func TestWarmUpGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		table := func() *shm.Reader {
			if a := w.agent.Load(); a != nil {
				return a.Table()
			}
			return nil
		}
		o := cache.Options{Table: table, Agent: w.dial("pod", "agent:1"), Origin: w.dial("pod", "origin:1")}
		patient, late := o, o
		patient.WarmUp.Time, late.WarmUp.Time = time.Minute, time.Second
		first, second := w.store(patient), w.store(late)
		time.Sleep(2 * time.Second)
		w.startAgent()
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, w.starting(cache.WarmUp{Off: true}), "x", session, "1 origin")
		third := w.store(patient)
		time.Sleep(time.Second)
		if a, b, c := first.Stats().Warmed, second.Stats().Warmed, third.Stats().Warmed; a > 1 || b != 0 || c != 1 {
			t.Errorf("brought %d by one that waited, %d by one that gave up, %d by one that came later", a, b, c)
		}
	})
}
