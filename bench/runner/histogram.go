package main

import "math/bits"

// histogram counts values of 0 to 2^63-1 in log-linear buckets: exact below 128, within
// 1/64 above. The zero value is empty.
type histogram struct {
	counts [64 * 58]uint32
	total  uint64
}

// bucketOf keeps the seven leading bits of v.
func bucketOf(v uint64) int {
	shift := max(0, bits.Len64(v)-7)
	return shift*64 + int(v>>shift)
}

// upperBound is the largest value of a bucket.
func upperBound(bucket int) uint64 {
	if bucket < 128 {
		return uint64(bucket)
	}
	shift := bucket/64 - 1
	return uint64(bucket-shift*64+1)<<shift - 1
}

// record counts one value; a negative one counts as 0.
func (h *histogram) record(v int64) {
	h.counts[bucketOf(uint64(max(0, v)))]++
	h.total++
}

// quantile returns an upper bound of the q-quantile, 0 ≤ q ≤ 1; 0 for no values.
func (h *histogram) quantile(q float64) uint64 {
	rank := uint64(q * float64(h.total))
	var seen uint64
	for i, n := range h.counts {
		if seen += uint64(n); n > 0 && (seen > rank || seen == h.total) {
			return upperBound(i)
		}
	}
	return 0
}
