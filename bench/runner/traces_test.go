package main

import (
	"bytes"
	"compress/gzip"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestRecordedTraces(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := recordedTraces(dir); err == nil {
		t.Error("a directory without files is accepted")
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write([]byte("7\n18446744073709551615\n\n7\r\n"))
	z.Close()
	write("b.trace.gz", packed.Bytes())
	write("a.txt", []byte("5\n5\n9\n"))
	write(".hidden", []byte("no numbers"))
	got, err := recordedTraces(dir)
	if err != nil || len(got) != 2 || got[0].name != "recorded trace a, 3 requests for 2 keys" || got[1].keys != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	for i, want := range [][]uint32{{0, 0, 1}, {0, 1, 0}} {
		if keys, err := got[i].make(nil); err != nil || !slices.Equal(keys, want) {
			t.Errorf("%s: %v, %v, want %v", got[i].name, keys, err, want)
		}
	}
	for _, bad := range []string{"1\nx\n", "1 2\n", "-1\n", "18446744073709551616\n", ""} {
		write("c", []byte(bad))
		if _, err := recordedTraces(dir); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// optimal is as good as trying everything.
func TestOptimal(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		requests := make([]uint32, 10)
		for i := range requests {
			requests[i] = uint32(rnd.IntN(4))
		}
		for _, capacity := range []int{1, 2, 3} {
			want := 10 * float64(best(requests, 0, capacity))
			if got := optimal(requests, capacity, 0); math.Abs(got-want) > 1e-9 {
				t.Fatalf("%v with room for %d: %v %%, all possibilities give %v", requests, capacity, got, want)
			}
		}
	}
	if got := optimal([]uint32{1, 1, 2, 1}, 1, 2); got != 50 {
		t.Errorf("%v %% after the warm-up, want 50", got)
	}
}

// best tries every eviction, and none, at every miss; held is a set of bits.
func best(requests []uint32, held uint32, capacity int) int {
	if len(requests) == 0 {
		return 0
	}
	k, rest := uint32(1)<<requests[0], requests[1:]
	if held&k != 0 {
		return 1 + best(rest, held, capacity)
	}
	most := best(rest, held, capacity)
	ones := 0
	for b := uint32(1); b < 16; b <<= 1 {
		if held&b != 0 {
			ones++
			most = max(most, best(rest, held&^b|k, capacity))
		}
	}
	if ones < capacity {
		most = max(most, best(rest, held|k, capacity))
	}
	return most
}
