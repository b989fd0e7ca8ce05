package cache_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// A key whose every read is a hit in the process tier of one pod stays in the node's table
// while others press for room. One that nobody reads any more has to go.
func TestHitsKeepAKeyInTheNodesTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.admin, w.table = true, shm.Options{Heap: true, Bytes: 64 << 10} // 224 keys
		w.startAgent()
		s, others := w.pod(), w.pod()
		const keys = 600
		for i := range keys {
			w.origin.Put(fmt.Sprint("x", i), "1")
		}
		w.origin.Put("used", "1")
		w.origin.Put("idle", "1")
		synctest.Wait()
		for _, name := range []string{"used", "idle"} {
			reads(t, s, name, session, "1 origin")
		}
		rnd := rand.New(rand.NewPCG(3, 4))
		for round := range 40 {
			for range 100 {
				if got := read(t, others, fmt.Sprint("x", rnd.IntN(keys)), session); got[:2] != "1 " {
					t.Fatal(got)
				}
			}
			for range 20 {
				// Put anew by the freshness monitor it is a hit of the table.
				if _, ok := s.Hit(key("used").String(), -1); !ok {
					if got := read(t, s, "used", session); got != "1 node" {
						t.Fatalf("round %d: the key in use is read from elsewhere: %s", round, got)
					}
				}
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		table := w.agent.Load().Table()
		if e, _ := table.Get(key("idle").String(), nil); e.State != shm.Absent {
			t.Errorf("the key nobody reads is %v: there was no pressure", e.State)
		}
		if got := read(t, s, "used", session); got != "1 process" && got != "1 node" {
			t.Errorf("the key in use is read from elsewhere: %s", got)
		}
	})
}

// The same in a table of the process's own.
func TestHitsKeepAKeyInThePrivateTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		s := w.store(cache.Options{Origin: w.dial("pod", "origin:1"), Private: true, PrivateBytes: 64 << 10})
		const keys = 600
		for i := range keys {
			w.origin.Put(fmt.Sprint("x", i), "1")
		}
		w.origin.Put("used", "1")
		time.Sleep(2 * time.Second)
		read(t, s, "used", session)
		reads(t, s, "used", session, "1 process")
		rnd := rand.New(rand.NewPCG(3, 4))
		for round := range 40 {
			for range 100 {
				read(t, s, fmt.Sprint("x", rnd.IntN(keys)), session)
			}
			for range 20 {
				// Put anew by the freshness monitor it is a hit of the table.
				if _, ok := s.Hit(key("used").String(), -1); !ok {
					if got := read(t, s, "used", session); got != "1 node" {
						t.Fatalf("round %d: the key in use is read from elsewhere: %s", round, got)
					}
				}
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
	})
}
