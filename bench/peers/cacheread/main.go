// Command cacheread measures reads of in-process caches: 1024 keys, 200-byte values,
// all hits, one cache per run. It prints {"ns1":…,"ns2":…}: wall time per read with one
// goroutine and with two.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/maypok86/otter/v2"
)

const keyCount = 1024 // a power of two: pick shifts

func main() {
	cache := flag.String("cache", "lru", "lru, 2q or otter")
	slice := flag.Duration("slice", 300*time.Millisecond, "how long to measure each number of goroutines")
	flag.Parse()
	if err := run(*cache, *slice); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(cache string, slice time.Duration) error {
	keys := make([]string, keyCount)
	for i := range keys {
		keys[i] = fmt.Sprintf("default/session/name-%04d", i)
	}
	// Each cache gets its own loop, so that no interface call is charged to it.
	var loop func(from uint32, until time.Time) int
	switch cache {
	case "lru":
		c, err := lru.New[string, []byte](4 * keyCount)
		if err != nil {
			return err
		}
		for _, k := range keys {
			c.Add(k, make([]byte, 200))
		}
		loop = func(i uint32, until time.Time) int {
			return spin(until, func() (hits int) {
				for range batch {
					i++
					if v, ok := c.Get(keys[pick(i)]); ok && len(v) == 200 {
						hits++
					}
				}
				return hits
			})
		}
	case "2q":
		c, err := lru.New2Q[string, []byte](4 * keyCount)
		if err != nil {
			return err
		}
		for _, k := range keys {
			c.Add(k, make([]byte, 200))
		}
		loop = func(i uint32, until time.Time) int {
			return spin(until, func() (hits int) {
				for range batch {
					i++
					if v, ok := c.Get(keys[pick(i)]); ok && len(v) == 200 {
						hits++
					}
				}
				return hits
			})
		}
	case "otter":
		c, err := otter.New(&otter.Options[string, []byte]{MaximumSize: 4 * keyCount})
		if err != nil {
			return err
		}
		for _, k := range keys {
			c.Set(k, make([]byte, 200))
		}
		loop = func(i uint32, until time.Time) int {
			return spin(until, func() (hits int) {
				for range batch {
					i++
					if v, ok := c.GetIfPresent(keys[pick(i)]); ok && len(v) == 200 {
						hits++
					}
				}
				return hits
			})
		}
	default:
		return fmt.Errorf("-cache is %q; give lru, 2q or otter", cache)
	}
	measure(1, slice/4, loop) // warm up
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"ns1": measure(1, slice, loop), "ns2": measure(2, slice, loop)})
}

const batch = 512 // reads between two looks at the clock

// pick spreads consecutive numbers over the keys without a division.
func pick(i uint32) uint32 { return i * 2654435761 >> 22 }

// spin runs batches until the time is over and returns the number of reads.
func spin(until time.Time, one func() (hits int)) int {
	n := 0
	for time.Now().Before(until) {
		if one() != batch {
			panic("a read missed; every key was put and there is room for all")
		}
		n += batch
	}
	return n
}

// measure returns wall nanoseconds per read with g goroutines.
func measure(g int, slice time.Duration, loop func(uint32, time.Time) int) float64 {
	counts := make([]int, g)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range g {
		wg.Go(func() { counts[i] = loop(uint32(i)*511, start.Add(slice)) })
	}
	wg.Wait()
	wall := time.Since(start)
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(wall) / float64(total)
}
