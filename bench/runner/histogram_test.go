package main

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// Buckets tile the whole range in order, and none is wider than 1/64 of its values.
func TestHistogramBuckets(t *testing.T) {
	last := bucketOf(math.MaxInt64)
	if last != len(histogram{}.counts)-1 {
		t.Errorf("the largest value falls into bucket %d of %d", last, len(histogram{}.counts))
	}
	next := uint64(0)
	for b := range last + 1 {
		if bucketOf(next) != b || bucketOf(upperBound(b)) != b {
			t.Fatalf("bucket %d is said to hold %d to %d, which fall into %d and %d", b, next, upperBound(b), bucketOf(next), bucketOf(upperBound(b)))
		}
		if width := upperBound(b) - next; width > next/64 {
			t.Fatalf("bucket %d is %d wide at %d", b, width, next)
		}
		next = upperBound(b) + 1
	}
}

func TestHistogramQuantiles(t *testing.T) {
	var h histogram
	if h.quantile(0.5) != 0 {
		t.Error("an empty histogram has a median")
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	var all []uint64
	for range 10_000 {
		v := uint64(math.Exp(rnd.Float64() * 20))
		all = append(all, v)
		h.record(int64(v))
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999} {
		exact := all[int(q*float64(len(all)))]
		if got := h.quantile(q); got < exact || float64(got) > float64(exact)*(1+1.0/64)+1 {
			t.Errorf("quantile %v is %d, exact %d", q, got, exact)
		}
	}
	if top := all[len(all)-1]; h.quantile(1) != upperBound(bucketOf(top)) {
		t.Errorf("the highest value is %d, exact %d", h.quantile(1), top)
	}
	h.record(-5)
	if h.quantile(0) != 0 {
		t.Error("a negative value was not counted as 0")
	}
}
