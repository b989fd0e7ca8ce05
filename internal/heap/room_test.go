package heap

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func TestShare(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		what                    string
		limit, used, held, want int64
	}{
		{"nothing in use", 128 * mib, 0, 0, 112 * mib},
		{"the program alone", 128 * mib, 20 * mib, 0, 92 * mib},
		{"what was taken is no other use", 128 * mib, 50 * mib, 30 * mib, 92 * mib},
		{"taken, and not yet in use", 128 * mib, 20 * mib, 30 * mib, 112 * mib},
		{"over it", 128 * mib, 200 * mib, 30 * mib, 0},
	} {
		if got := share(c.limit, c.used, c.held); got != c.want {
			t.Errorf("%s: %d, want %d", c.what, got, c.want)
		}
	}
}

// Whoever takes at the same time, it is never more than there is; what is given back is
// there for others; garbage is nobody's.
func TestRoom(t *testing.T) {
	runtime.GC()                         // what other tests left
	free := NewRoom(1 << 40).most.Load() // of what this process has left of it
	limit := (1<<40 - 1<<37 - free) + 64<<20
	limit += limit / 7 // seven eighths of it are what is in use, and 64 MiB
	r := NewRoom(limit)
	var group sync.WaitGroup
	var got atomic.Int64
	for range 8 {
		group.Go(func() {
			for range 50 {
				if r.Take(1 << 20) {
					got.Add(1)
				}
			}
		})
	}
	group.Wait()
	// The heap of the test itself moves by a little.
	if n := got.Load(); n < 48 || n > 80 || r.held.Load() != n<<20 {
		t.Fatalf("took %d MiB of about 64, %d bytes are held", n, r.held.Load())
	}
	r.Give(got.Load() << 20)
	if !r.Take(32<<20) || r.Full() {
		t.Error("no room for 32 MiB after all was given back")
	}
	r.Give(32 << 20)
	for range 512 {
		burst = make([]byte, 1<<20)
	}
	burst = nil
	r.sample()
	if r.last = r.last.Add(-collected); !r.Take(32 << 20) {
		t.Error("refused for garbage")
	}
	if r.Give(32 << 20); r.Take(1 << 40) {
		t.Error("took more than there is")
	}
}

func TestNoRoomIsNoLimit(t *testing.T) {
	var r *Room
	if !r.Take(math.MaxInt64) || r.Full() {
		t.Error("a nil Room refused")
	}
	r.Give(math.MaxInt64)
}

// Run sets the collector's limit, unless an operator has, and sets it back.
func TestRoomLimitsTheCollector(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	for env, want := range map[string]int64{"": 3 << 30, "1GiB": before} {
		t.Setenv("GOMEMLIMIT", env)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		set := make(chan int64, 1)
		r := NewRoom(4 << 30)
		ctx = &asked{Context: ctx, then: func() { set <- debug.SetMemoryLimit(-1) }}
		r.Run(ctx)
		if got := <-set; got != want {
			t.Errorf("with GOMEMLIMIT=%q the limit was %d, want %d", env, got, want)
		}
		if got := debug.SetMemoryLimit(-1); got != before {
			t.Errorf("afterwards it is %d, want %d", got, before)
		}
	}
}

// asked calls then when it is first asked whether it has ended.
type asked struct {
	context.Context
	once sync.Once
	then func()
}

func (a *asked) Done() <-chan struct{} {
	a.once.Do(a.then)
	return a.Context.Done()
}

// What the kernel says of this process's own group is what Allowed says, if it can be read here.
func TestAllowed(t *testing.T) {
	got, err := Allowed()
	if err != nil || got < 0 {
		t.Fatalf("%d, %v", got, err)
	}
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		file := ""
		switch {
		case f[1] == "memory":
			file = filepath.Join("/sys/fs/cgroup/memory", f[2], "memory.limit_in_bytes")
		case f[0] == "0":
			file = filepath.Join("/sys/fs/cgroup", f[2], "memory.max")
		default:
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			continue // of the other version, or mounted elsewhere
		}
		own, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil || own > 1<<60 {
			own = math.MaxInt64 // "max"
		}
		if got > own || got == 0 && own < math.MaxInt64 {
			t.Errorf("%d bytes are allowed, %s says %d", got, file, own)
		}
	}
}
