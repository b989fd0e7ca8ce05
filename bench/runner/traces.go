package main

import (
	"bufio"
	"compress/gzip"
	"container/heap"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxTrace bounds how many requests of a recorded trace are replayed.
const maxTrace = 4_000_000

// recordedTraces are the files of a directory, in the order of their names: requests as
// decimal numbers of keys, 0 to 2^64-1, one a line; empty lines are passed over. A name
// that ends in .gz is a gzip file of that; what comes before the first dot of the name is
// the trace's. Directories and hidden files are passed over; anything else is an error.
func recordedTraces(dir string) ([]keySequence, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("-traces: %w", err)
	}
	var out []keySequence
	for _, f := range entries {
		if f.IsDir() || strings.HasPrefix(f.Name(), ".") {
			continue
		}
		requests, keys, err := readTrace(filepath.Join(dir, f.Name()))
		if err != nil {
			return nil, fmt.Errorf("-traces: %s: %w", f.Name(), err)
		}
		name, _, _ := strings.Cut(f.Name(), ".")
		out = append(out, keySequence{name: fmt.Sprintf("recorded trace %s, %d requests for %d keys", name, len(requests), keys),
			keys: keys, percents: []int{5, 10, 20}, make: func(*rand.Rand) ([]uint32, error) { return requests, nil }})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("-traces: %s holds no file", dir)
	}
	return out, nil
}

// readTrace numbers the keys of a file from 0, in the order they come.
func readTrace(path string) (requests []uint32, keys int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	var in io.Reader = f
	if strings.HasSuffix(path, ".gz") {
		if in, err = gzip.NewReader(f); err != nil {
			return nil, 0, err
		}
	}
	numbers := map[uint64]uint32{}
	lines := bufio.NewScanner(in)
	for line := 1; lines.Scan() && len(requests) < maxTrace; line++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" {
			continue
		}
		key, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return nil, 0, fmt.Errorf("line %d: %w", line, err)
		}
		n, known := numbers[key]
		if !known {
			n = uint32(len(numbers))
			numbers[key] = n
		}
		requests = append(requests, n)
	}
	if err := lines.Err(); err != nil {
		return nil, 0, err
	}
	if len(requests) == 0 {
		return nil, 0, fmt.Errorf("no requests")
	}
	return requests, len(numbers), nil
}

// optimal is the share of requests after the warm-up that a cache which knows the future
// answers, in per cent: of what it has and the newcomer it drops what is needed last
// (Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
// Journal 1966; that the newcomer itself may be dropped suits caches that can refuse).
func optimal(requests []uint32, capacity, warm int) float64 {
	const never = int(^uint(0) >> 1)
	next := make([]int, len(requests))
	last := map[uint32]int{}
	for i := len(requests) - 1; i >= 0; i-- {
		next[i] = never
		if n, ok := last[requests[i]]; ok {
			next[i] = n
		}
		last[requests[i]] = i
	}
	held := map[uint32]int{} // when it is needed next
	var due needs            // with entries that are not true any more
	hits := 0
	for i, k := range requests {
		if _, ok := held[k]; ok && i >= warm {
			hits++
		}
		if next[i] == never {
			delete(held, k)
			continue
		}
		held[k] = next[i]
		heap.Push(&due, need{k, next[i]})
		for len(held) > capacity {
			if n := heap.Pop(&due).(need); held[n.key] == n.at {
				delete(held, n.key)
			}
		}
	}
	return 100 * float64(hits) / float64(len(requests)-warm)
}

// need is when a key is needed next; needs is a heap of them, the latest first.
type need struct {
	key uint32
	at  int
}

type needs []need

func (n needs) Len() int           { return len(n) }
func (n needs) Less(i, j int) bool { return n[i].at > n[j].at }
func (n needs) Swap(i, j int)      { n[i], n[j] = n[j], n[i] }
func (n *needs) Push(x any)        { *n = append(*n, x.(need)) }
func (n *needs) Pop() any {
	x := (*n)[len(*n)-1]
	*n = (*n)[:len(*n)-1]
	return x
}
