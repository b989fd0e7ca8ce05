package shm

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// versioned fills b with one word that names the key and the version.
func versioned(b []byte, key int, version uint64) []byte {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(key)<<48|version)
	}
	return b
}

// whole checks that b is all of one version of key and returns the version.
func whole(b []byte, key int) (version uint64, ok bool) {
	first := binary.LittleEndian.Uint64(b)
	for i := 8; i+8 <= len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:]) != first {
			return 0, false
		}
	}
	return first & (1<<48 - 1), first>>48 == uint64(key)
}

// uncheckedGet is what Get would be without its checks: the positive control. It lets
// others run half-way through the copy, as a busy machine would.
func (r *Reader) uncheckedGet(key string, dst []byte) []byte {
	h := Hash(key)
	for i, n := r.geo.home(h), 0; n < window; i, n = r.geo.after(i), n+1 {
		if atomic.LoadUint64(&r.index[i*slotWords+slotHash]) != h {
			continue
		}
		pos := atomic.LoadUint64(&r.index[i*slotWords+slotLocation]) % r.geo.arenaWords
		from := r.arena[min(pos+recordHeader+words(len(key)), r.geo.arenaWords-words(len(dst))):]
		half := len(dst) / 16 * 8
		copySum(dst[:half], from[:half/8])
		runtime.Gosched()
		copySum(dst[half:], from[half/8:words(len(dst))])
		return dst
	}
	return nil
}

// Readers race a writer at full speed on an arena of a few records, so that the ring is
// lapped while they copy. On the heap, because the race detector ignores mapped memory.
func TestNoTornReads(t *testing.T) {
	const keys, valueBytes, readers = 4, 400, 2
	w, err := Create(Options{Bytes: 4096, Slots: 256, Heap: true})
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, keys)
	value := make([]byte, valueBytes)
	put := func(i int, version uint64) {
		if _, _, err := w.Put(names[i], Present, versioned(value, i, version)); err != nil {
			t.Error(err)
		}
	}
	for i := range names {
		names[i] = fmt.Sprint("key-", i)
		put(i, 0)
	}
	want := 200_000
	if raceEnabled {
		want = 20_000
	}
	var done, torn atomic.Int32
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			defer done.Add(1)
			readChecked(t, w.Reader(), names, valueBytes, want)
		})
	}
	wg.Go(func() {
		defer done.Add(1)
		r := w.Reader()
		buf := make([]byte, valueBytes)
		for i := 0; i < want || torn.Load() == 0 && i < 100*want; i++ {
			if got := r.uncheckedGet(names[i%keys], buf); got != nil {
				if _, ok := whole(got, i%keys); !ok {
					torn.Add(1)
				}
			}
		}
	})
	for version := uint64(1); done.Load() < readers+1; version++ {
		put(int(version*2654435761>>8%keys), version)
		if version%1024 == 0 {
			runtime.Gosched() // on one processor readers need a turn
		}
	}
	wg.Wait()
	if torn.Load() == 0 {
		t.Error("the unchecked control saw no torn value, so this test proves nothing")
	}
}

// readChecked makes n successful reads and fails on a torn, mixed or older value.
func readChecked(t *testing.T, r *Reader, names []string, valueBytes, n int) {
	last := make([]uint64, len(names))
	buf := make([]byte, 0, valueBytes)
	hits := 0
	for i := 0; hits < n && i < 1000*n; i++ {
		k := i % len(names)
		e, got := r.Get(names[k], buf)
		if e.State == Absent {
			continue
		}
		hits++
		version, ok := whole(got, k)
		if !ok || version < last[k] {
			t.Errorf("%s: torn, mixed or older value after version %d: % x…", names[k], last[k], got[:24])
			return
		}
		last[k] = version
	}
	if hits < n || r.Corrupt() != 0 {
		t.Errorf("%d hits of %d wanted, %d corrupt", hits, n, r.Corrupt())
	}
}
