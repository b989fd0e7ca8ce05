package shm

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/cespare/xxhash/v2"
)

// FuzzOperations drives the model test with scripts of two bytes per step.
func FuzzOperations(f *testing.F) {
	f.Add([]byte("\x00\x01\x10\x01\x20\x01\x30\x01"))
	f.Add([]byte("\x01\xff\x02\xff\x03\xff\x04\xff\x05\xff\x31\xff\x22\xff"))
	f.Fuzz(func(t *testing.T, script []byte) {
		const keys = 16
		o := newOracle(t, Options{Heap: true, Bytes: 4096, Slots: 256})
		for len(script) >= 2 {
			op, arg := script[0], script[1]
			script = script[2:]
			key := fmt.Sprintf("key-%d", op%keys)
			switch op / keys {
			case 0, 1, 2, 3, 4, 5, 6, 7, 8:
				o.put(key, State(1+arg%3), make([]byte, int(arg)*3))
			case 9, 10:
				o.invalidate(key)
			case 11, 12:
				o.w.Remove(key)
				o.kill(key)
			case 13:
				o.w.Touch(Hash(key))
			default:
				o.check(key)
			}
		}
		o.checkAll(keys)
	})
}

// FuzzForeignTable gives a reader arbitrary index and arena words under a valid header:
// it may find anything, but must not fault, hang or return a value that fails its checksum.
func FuzzForeignTable(f *testing.F) {
	f.Add([]byte{}, uint64(1))
	f.Add([]byte("\x05\x00\x00\x00\x00\x00\x00\x00"), uint64(1<<63))
	w, err := create(Options{Heap: true, Bytes: 4096, Slots: 256}, 1)
	if err != nil {
		f.Fatal(err)
	}
	if _, _, err := w.Put("key", Present, []byte("value")); err != nil {
		f.Fatal(err)
	}
	image := make([]byte, len(w.mem.words)*8)
	copySum(image, w.mem.words)
	f.Add(image[pageBytes:], uint64(5))
	f.Fuzz(func(t *testing.T, body []byte, intent uint64) {
		mem := heapMemory(w.geo.totalWords())
		writeIdentity(mem.words, w.geo)
		mem.words[hdrIntent] = intent
		for i := headerWords; i < len(mem.words) && len(body) >= 8; i++ {
			mem.words[i] = binary.LittleEndian.Uint64(body)
			body = body[8:]
		}
		r, err := newReader(mem)
		if err != nil {
			t.Fatal(err)
		}
		// Every slot claims to be the key, so that every slot is followed.
		for i := range r.geo.slots {
			atomic.StoreUint64(&r.index[i*slotWords+slotHash], Hash("key"))
		}
		e, got := r.Get("key", nil)
		if e.State == Absent {
			return
		}
		loc := r.index[uint64(e.Slot)*slotWords+slotLocation] % r.geo.arenaWords
		rec := r.arena[loc:]
		var scratch []byte
		if checksum(rec[recMeta], rec[recStamp], Hash("key"), sumBytes(got, &scratch)) != rec[recSum] {
			t.Fatalf("returned %q with xxhash %#x against its checksum", got, xxhash.Sum64(got))
		}
	})
}
