package tier

import (
	"fmt"
	"sync/atomic"
	"testing"

	lru "github.com/hashicorp/golang-lru/v2"
)

type store interface {
	Get(string) ([]byte, bool)
	Put(string, []byte)
}

type ours struct{ *Cache[[]byte] }

func (o ours) Put(k string, v []byte) { o.Cache.Put(k, &v) }

func (o ours) Get(k string) ([]byte, bool) {
	if p := o.Cache.Get(k); p != nil {
		return *p, true
	}
	return nil, false
}

type plainLRU struct{ *lru.Cache[string, []byte] }

func (o plainLRU) Put(k string, v []byte) { o.Add(k, v) }

type plain2Q struct {
	*lru.TwoQueueCache[string, []byte]
}

func (o plain2Q) Put(k string, v []byte) { o.Add(k, v) }

func stores(t testing.TB, entries int) map[string]store {
	l, err := lru.New[string, []byte](entries)
	if err != nil {
		t.Fatal(err)
	}
	q, err := lru.New2Q[string, []byte](entries)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]store{
		"tier":           ours{mustNew(t, Options[[]byte]{Bytes: 1 << 30, Entries: entries})},
		"golang-lru-LRU": plainLRU{l},
		"golang-lru-2Q":  plain2Q{q},
	}
}

func names(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("tenant/session/name-%04d", i)
	}
	return out
}

// BenchmarkGet reads 1024 keys of 200 bytes; run with -cpu 1,2.
func BenchmarkGet(b *testing.B) {
	keys := names(1024)
	all := stores(b, 4096)
	for _, name := range []string{"tier", "golang-lru-LRU", "golang-lru-2Q"} {
		for _, writes := range []int{0, 1} {
			b.Run(fmt.Sprintf("%s/writes=%d%%", name, writes), func(b *testing.B) {
				s := all[name]
				for _, k := range keys {
					s.Put(k, make([]byte, 200))
				}
				value := make([]byte, 200)
				var start atomic.Uint32
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					i := start.Add(511)
					for pb.Next() {
						i++
						k := keys[i*2654435761>>22]
						if writes > 0 && i%100 == 0 {
							s.Put(k, value)
						} else if _, ok := s.Get(k); !ok {
							b.Error("miss")
						}
					}
				})
			})
		}
	}
}

func BenchmarkPutEvict(b *testing.B) {
	keys := names(1 << 16)
	c := mustNew(b, Options[[]byte]{Entries: 4096})
	value := make([]byte, 200)
	b.ReportAllocs()
	for i := range b.N {
		c.Put(keys[i&(1<<16-1)], &value)
	}
}
