// Command hitratio replays a sequence of keys on a cache that is asked for each and
// given what it does not have. It prints {"percent":…}, the share of requests after the
// warm-up that the cache could answer.
//
// The sequence is a file of little-endian uint32 key numbers.
package main

import (
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strconv"

	"github.com/hashicorp/golang-lru/arc/v2"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/maypok86/otter/v2"
)

func main() {
	cache := flag.String("cache", "lru", "lru, 2q, arc or otter")
	sequence := flag.String("sequence", "", "file of key numbers")
	capacity := flag.Int("capacity", 1000, "entries the cache may hold")
	warm := flag.Int("warm", 0, "requests that are not counted")
	flag.Parse()
	if err := run(*cache, *sequence, *capacity, *warm); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(cache, sequence string, capacity, warm int) error {
	raw, err := os.ReadFile(sequence)
	if err != nil {
		return err
	}
	ask, err := open(cache, capacity)
	if err != nil {
		return err
	}
	hits, counted := 0, 0
	for i := 0; 4*i < len(raw); i++ {
		hit := ask("default/session/name-" + strconv.Itoa(int(binary.LittleEndian.Uint32(raw[4*i:]))))
		if i >= warm {
			counted++
			if hit {
				hits++
			}
		}
	}
	if counted == 0 {
		return fmt.Errorf("%d requests, all of them warm-up", len(raw)/4)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"percent": 100 * float64(hits) / float64(counted)})
}

// open returns a function that asks a cache for a key and stores it when it is not there.
func open(cache string, capacity int) (ask func(string) bool, err error) {
	type plain interface {
		Get(string) ([]byte, bool)
		Add(string, []byte)
	}
	var c plain
	switch cache {
	case "lru":
		l, e := lru.New[string, []byte](capacity)
		c, err = noResult{l}, e
	case "2q":
		c, err = lru.New2Q[string, []byte](capacity)
	case "arc":
		c, err = arc.NewARC[string, []byte](capacity)
	case "otter":
		// Its bookkeeping is asynchronous; with the caller as executor, a sequential replay
		// sees the policy and not the scheduler.
		o, e := otter.New(&otter.Options[string, []byte]{MaximumSize: capacity, Executor: func(f func()) { f() }})
		if e != nil {
			return nil, e
		}
		return func(k string) bool {
			_, ok := o.GetIfPresent(k)
			if !ok {
				o.Set(k, nil)
			}
			return ok
		}, nil
	default:
		return nil, fmt.Errorf("-cache is %q; give lru, 2q, arc or otter", cache)
	}
	return func(k string) bool {
		_, ok := c.Get(k)
		if !ok {
			c.Add(k, nil)
		}
		return ok
	}, err
}

type noResult struct{ *lru.Cache[string, []byte] }

func (c noResult) Add(k string, v []byte) { c.Cache.Add(k, v) }
