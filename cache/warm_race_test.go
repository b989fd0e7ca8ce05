package cache

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// filled is a table of that many keys, and how to change one.
type filled struct {
	w      *shm.Writer
	ids    []string
	latest []atomic.Int64 // the version of each key that was complete
}

func fill(t *testing.T, keys int, o shm.Options) *filled {
	t.Helper()
	w, err := shm.Create(o)
	if err != nil {
		t.Fatal(err)
	}
	f := &filled{w: w, ids: make([]string, keys), latest: make([]atomic.Int64, keys)}
	for i := range f.ids {
		f.ids[i] = outrigger.Key{Tenant: "default", Session: "s", Name: fmt.Sprint("name-", i)}.String()
		f.put(t, i, 1)
	}
	return f
}

func (f *filled) put(t *testing.T, i int, version int64) {
	b, err := node.AppendVariable(nil, &pb.Variable{Value: &pb.Value{Json: strconv.AppendInt(nil, version, 10)}})
	if err != nil {
		t.Error(err)
	}
	if _, _, err = f.w.Put(f.ids[i], shm.Present, b); err != nil {
		t.Error(err)
	}
	f.latest[i].Store(version)
}

// store is one over the table, with nobody to ask.
func (f *filled) store(t *testing.T, w WarmUp) *Store {
	t.Helper()
	r := f.w.Reader()
	s, err := New(Options{Origin: &grpc.ClientConn{}, Table: func() *shm.Reader { return r }, Lease: time.Hour, WarmUp: w})
	if err != nil {
		t.Fatal(err)
	}
	f.w.SetLease(s.clock() + int64(time.Hour)) // a store trusts only what was proved after it began
	return s
}

// Keys change, are invalidated and evicted while one process after the other warms up and
// reads. None is ever answered with anything older than what was complete before the read.
func TestWarmUpNeverServesStale(t *testing.T) {
	const keys, starts = 16, 3000
	f := fill(t, keys, shm.Options{Heap: true, Bytes: 4096, Slots: 256})
	turn := make(chan struct{}, 1) // to write some more: with a writer that never rests, no copy lives to be read
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := int64(2); ; n++ {
			if n%256 == 0 {
				if _, more := <-turn; !more {
					return
				}
			}
			i := int(n*7) % keys
			if n%3 == 0 {
				f.w.Invalidate(f.ids[i])
			}
			f.put(t, i, n)
		}
	})
	warmed, hits := uint64(0), 0
	for range starts {
		select {
		case turn <- struct{}{}:
		default:
		}
		s := f.store(t, WarmUp{})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.warmUp(ctx) })
		look := func() {
			for n := range 20 * keys {
				i := n % keys
				least := f.latest[i].Load()
				h, ok := s.Hit(f.ids[i], -1)
				if !ok {
					continue
				}
				hits++
				got, err := strconv.ParseInt(string(h.Variable.GetValue().GetJson()), 10, 64)
				if name := strings.TrimPrefix(f.ids[i], "default/s/"); err != nil || got < least || h.Variable.GetKey().GetName() != name {
					t.Fatalf("%s: version %d of %s (%v), while %d was complete", f.ids[i], got, h.Variable.GetKey().GetName(), err, least)
				}
			}
		}
		look()
		running.Wait()
		look()
		cancel()
		warmed += s.Stats().Warmed
	}
	close(turn)
	writer.Wait()
	t.Logf("%d starts brought %d entries; %d hits", starts, warmed, hits)
	if warmed == 0 || hits == 0 {
		t.Error("nothing was brought, or nothing of it was read")
	}
}

// With room for a part only, it is the newest that are brought.
func TestWarmUpBringsTheNewest(t *testing.T) {
	const keys, room = 2000, 200
	f := fill(t, keys, shm.Options{Heap: true, Bytes: 256 << 10, Slots: 4000})
	s := f.store(t, WarmUp{Entries: room})
	s.warmUp(t.Context())
	newest := 0
	for _, id := range f.ids[keys-2*room:] {
		if s.tier.Peek(id) != nil {
			newest++
		}
	}
	if got := s.Stats().Warmed; got != room || newest != room {
		t.Errorf("%d entries were brought, %d of them of the %d newest", got, newest, 2*room)
	}
}

// What is there already keeps its place and its value, whatever the bounds.
func TestWarmUpDisplacesNothing(t *testing.T) {
	f := fill(t, 1000, shm.Options{Heap: true, Bytes: 256 << 10})
	r := f.w.Reader()
	s, err := New(Options{Origin: &grpc.ClientConn{}, Table: func() *shm.Reader { return r }, Lease: time.Hour,
		ProcessBytes: 64 << 10, WarmUp: WarmUp{Bytes: 1 << 40}})
	if err != nil {
		t.Fatal(err)
	}
	f.w.SetLease(s.clock() + int64(time.Hour))
	mine := &entry{known: 1}
	s.tier.Put(f.ids[900], mine)
	s.warmUp(t.Context())
	st := s.Stats()
	if s.tier.Peek(f.ids[900]) != mine || st.Process.Evictions != 0 || st.Warmed == 0 || st.Warmed >= 900 {
		t.Errorf("%+v, or an entry of a reader was displaced", st)
	}
}
