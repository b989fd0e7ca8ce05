package shm

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func benchTable(b *testing.B, keys, valueBytes int, o Options) (*Writer, *Reader, []string) {
	b.Helper()
	w, err := Create(o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { w.Close() })
	names := make([]string, keys)
	value := make([]byte, valueBytes)
	for i := range names {
		names[i] = fmt.Sprintf("default/session/name-%07d", i)
		if _, _, err := w.Put(names[i], Present, value); err != nil {
			b.Fatal(err)
		}
	}
	if w.Len() != keys {
		b.Fatalf("%d of %d keys fit", w.Len(), keys)
	}
	f, err := w.Descriptor()
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	r, err := Open(f)
	if err != nil {
		b.Fatal(err)
	}
	return w, r, names
}

func BenchmarkGet(b *testing.B) {
	for _, c := range []struct {
		keys, value int
		bytes       int64
	}{{1024, 200, 4 << 20}, {1024, 4096, 16 << 20}, {64, MaxValueBytes, 128 << 20}, {1_000_000, 200, 280 << 20}} {
		b.Run(fmt.Sprintf("keys=%d/value=%d", c.keys, c.value), func(b *testing.B) {
			w, r, names := benchTable(b, c.keys, c.value, Options{Bytes: c.bytes})
			buf := make([]byte, 0, c.value)
			perm := rand.New(rand.NewPCG(1, 2)).Perm(c.keys)
			order := make([]string, c.keys)
			for i, k := range perm {
				order[i] = names[k]
			}
			// The median over batches is what a busy machine leaves undisturbed.
			const batch = 64
			var took []time.Duration
			b.ReportAllocs()
			b.ResetTimer()
			start := time.Now()
			for i := range b.N {
				e, _ := r.Get(order[i%c.keys], buf)
				if e.State != Present {
					b.Fatal(e)
				}
				if i%batch == batch-1 {
					now := time.Now()
					took = append(took, now.Sub(start))
					start = now
				}
			}
			b.StopTimer()
			if slices.Sort(took); len(took) > 0 {
				b.ReportMetric(float64(took[len(took)/2])/batch, "p50-ns")
				b.ReportMetric(float64(took[len(took)*99/100])/batch, "p99-ns")
				b.ReportMetric(float64(w.Stats().TotalBytes)/(1<<20), "MiB")
			}
		})
	}
}

func BenchmarkGetAbsent(b *testing.B) {
	_, r, _ := benchTable(b, 100_000, 200, Options{})
	names := make([]string, 1024)
	for i := range names {
		names[i] = fmt.Sprint("none-", i)
	}
	b.ResetTimer()
	for i := range b.N {
		if e, _ := r.Get(names[i&1023], nil); e.State != Absent {
			b.Fatal(e)
		}
	}
}

func BenchmarkStamp(b *testing.B) {
	_, r, _ := benchTable(b, 1024, 200, Options{})
	var x uint64
	for i := range b.N {
		x ^= r.Stamp(uint32(i) & 1023)
	}
	if x == 1 {
		b.Fatal("unlikely")
	}
}

func BenchmarkPut(b *testing.B) {
	w, _, names := benchTable(b, 1024, 200, Options{Bytes: 4 << 20})
	value := make([]byte, 200)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		w.Put(names[i&1023], Present, value)
	}
}

// BenchmarkPutEvict inserts ever new keys into a full table.
func BenchmarkPutEvict(b *testing.B) {
	w, _, _ := benchTable(b, 1024, 200, Options{Bytes: 4 << 20})
	value := make([]byte, 200)
	key := []byte("default/session/name-0000000")
	b.ResetTimer()
	for i := range b.N {
		for j, n := len(key)-1, i; j > len(key)-8; j, n = j-1, n/10 {
			key[j] = byte('0' + n%10)
		}
		w.Put(string(key), Present, value)
	}
	b.ReportMetric(float64(w.Evictions())/float64(b.N), "evictions/op")
}

// BenchmarkPutFull overwrites random keys with the arena at its high-water mark, the most
// moving a Put ever has to do.
func BenchmarkPutFull(b *testing.B) {
	w, _, names := benchTable(b, 14_000, 200, Options{Bytes: 4 << 20})
	value := make([]byte, 200)
	rnd := rand.New(rand.NewPCG(1, 2))
	b.ResetTimer()
	for range b.N {
		w.Put(names[rnd.IntN(len(names))], Present, value)
	}
	s := w.Stats()
	b.ReportMetric(float64(s.Relocations)/float64(b.N), "moved/op")
	b.ReportMetric(float64(s.Evictions)/float64(b.N), "evictions/op")
}

func BenchmarkInvalidate(b *testing.B) {
	w, _, names := benchTable(b, 1024, 200, Options{Bytes: 4 << 20})
	b.ReportAllocs()
	for i := range b.N {
		w.Invalidate(names[i&1023])
	}
}
