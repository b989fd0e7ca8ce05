package node_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
)

// crowd is many readers over the connections of several processes.
type crowd struct {
	t     *testing.T
	conns []*grpc.ClientConn
	asked int
	ends  chan error
}

const crowdSize = 10_000

func newCrowd(t *testing.T, w *world, processes int) *crowd {
	c := &crowd{t: t, ends: make(chan error, crowdSize)}
	for range processes {
		cc, err := origintest.Dial(w.net, "pod", "agent:1")
		must(t, err)
		c.conns = append(c.conns, cc)
	}
	return c
}

// ask sends n readers for x, and returns when all wait for an answer, or have one.
func (c *crowd) ask(n int, want string) {
	for range n {
		client := pb.NewCoherenceClient(c.conns[c.asked%len(c.conns)])
		c.asked++
		go func() {
			r, err := client.Read(c.t.Context(), &pb.ReadRequest{Keys: []*pb.Key{{Session: "s", Name: "x"}}})
			if err == nil && string(r.GetResults()[0].GetVariable().GetValue().GetJson()) != want {
				err = fmt.Errorf("answered %v, want %s", r.GetResults()[0], want)
			}
			c.ends <- err
		}()
	}
	synctest.Wait()
}

// answered waits for everybody.
func (c *crowd) answered() {
	c.t.Helper()
	for range c.asked {
		must(c.t, <-c.ends)
	}
	for _, cc := range c.conns {
		must(c.t, cc.Close())
	}
}

// Ten thousand readers in sixteen processes miss the same variable at once: one read at
// the origin.
func TestStampedeOverManyConnections(t *testing.T) {
	bubble(t, node.Options{RepairEvery: -1}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		synctest.Wait()
		c := newCrowd(t, w, 16)
		release := w.origin.HoldReads()
		c.ask(crowdSize, "1")
		if st := w.agent.Stats(); st.Joined != crowdSize-1 || st.Waiting != crowdSize {
			t.Errorf("%d readers wait, %d of them for another's fetch", st.Waiting, st.Joined)
		}
		release()
		c.answered()
		if calls, keys := w.origin.Reads(); calls != 1 || keys != 1 {
			t.Errorf("%d calls for %d keys reached the origin, want one", calls, keys)
		}
	})
}

// The same while the node is held up: its heartbeats are late, so the feed lease lapses
// with the fetch under way. Some came with it, some long after it was sent, some when it
// had landed. There is still one read, because the feed proves the answer current once it
// gets through.
func TestStampedeOverALapsedLease(t *testing.T) {
	bubble(t, node.Options{RepairEvery: -1}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		synctest.Wait()
		c := newCrowd(t, w, 16)
		release := w.origin.HoldReads()
		c.ask(3000, "1")
		w.net.SetDelay("node", "origin", 450*time.Millisecond)
		time.Sleep(150 * time.Millisecond)
		w.net.SetDelay("node", "origin", 0)
		time.Sleep(200 * time.Millisecond)
		lapsed := func(waiting int) {
			t.Helper()
			if st := w.agent.Stats(); st.LeaseLive || st.Waiting != waiting {
				t.Fatalf("lease live %v with %d waiting, want a lapsed one with %d", st.LeaseLive, st.Waiting, waiting)
			}
		}
		c.ask(3000, "1")
		w.origin.Put("y", "1") // the feed itself is there
		synctest.Wait()
		lapsed(6000)
		release()
		synctest.Wait()
		lapsed(3000) // who came with the fetch has its answer
		c.ask(4000, "1")
		lapsed(7000)
		began := time.Now()
		c.answered()
		if d := time.Since(began); d > 300*time.Millisecond {
			t.Errorf("readers waited %v for the feed", d)
		}
		if calls, _ := w.origin.Reads(); calls != 1 {
			t.Errorf("%d reads reached the origin, want 1", calls)
		}
	})
}
