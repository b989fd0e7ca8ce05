package algorithms

import "math/bits"

// joeKuo holds the primitive polynomials and initial direction numbers of dimensions 2
// to 32 of "new-joe-kuo-6.21201" (Joe and Kuo, Constructing Sobol sequences with better
// two-dimensional projections, SIAM J. Sci. Comput. 30, 2008): degree, coefficients, m.
var joeKuo = [...][]uint32{
	{1, 0, 1}, {2, 1, 1, 3}, {3, 1, 1, 3, 1}, {3, 2, 1, 1, 1}, {4, 1, 1, 1, 3, 3}, {4, 4, 1, 3, 5, 13},
	{5, 2, 1, 1, 5, 5, 17}, {5, 4, 1, 1, 5, 5, 5}, {5, 7, 1, 1, 7, 11, 19}, {5, 11, 1, 1, 5, 1, 1},
	{5, 13, 1, 1, 1, 3, 11}, {5, 14, 1, 3, 5, 5, 31}, {6, 1, 1, 3, 3, 9, 7, 49}, {6, 13, 1, 1, 1, 15, 21, 21},
	{6, 16, 1, 3, 1, 13, 27, 49}, {6, 19, 1, 1, 1, 15, 7, 5}, {6, 22, 1, 3, 1, 15, 13, 25}, {6, 25, 1, 1, 5, 5, 19, 61},
	{7, 1, 1, 3, 7, 11, 23, 15, 103}, {7, 4, 1, 3, 7, 13, 13, 15, 69}, {7, 7, 1, 1, 3, 13, 7, 35, 63},
	{7, 8, 1, 3, 5, 9, 1, 25, 53}, {7, 14, 1, 3, 1, 13, 9, 35, 107}, {7, 19, 1, 3, 1, 5, 27, 61, 31},
	{7, 21, 1, 1, 5, 11, 19, 41, 61}, {7, 28, 1, 3, 5, 3, 3, 13, 69}, {7, 31, 1, 1, 7, 13, 1, 19, 1},
	{7, 32, 1, 3, 7, 5, 13, 19, 59}, {7, 37, 1, 1, 3, 9, 25, 29, 41}, {7, 41, 1, 3, 5, 13, 23, 1, 55},
	{7, 42, 1, 3, 7, 3, 13, 59, 17},
}

// sobolBits is coordinate j (from 0) of Sobol point i as a 32-bit fraction, unscrambled,
// in the plain (not Gray-code) order. j must be at most len(joeKuo).
func sobolBits(i uint32, j int) uint32 {
	if j == 0 {
		return bits.Reverse32(i)
	}
	row := joeKuo[j-1]
	s, a, m := int(row[0]), row[1], row[2:]
	var v [32]uint32
	var x uint32
	for k := 0; k < 32 && i>>k != 0; k++ {
		if k < s {
			v[k] = m[k] << (31 - k)
		} else {
			v[k] = v[k-s] ^ v[k-s]>>s
			for l := 1; l < s; l++ {
				if a>>(s-1-l)&1 == 1 {
					v[k] ^= v[k-l]
				}
			}
		}
		if i>>k&1 == 1 {
			x ^= v[k]
		}
	}
	return x
}

// owen scrambles the digits of x in nested order (Owen 1995) by the hash of Laine and
// Karras with the constants of Burley, Practical Hash-based Owen Scrambling, JCGT 2020:
// equidistribution is kept and every seed gives another, unbiased, sequence.
func owen(x, seed uint32) uint32 {
	x = bits.Reverse32(x)
	x += seed
	x ^= x * 0x6c50b47c
	x ^= x * 0xb82f1e52
	x ^= x * 0xc7afe638
	x ^= x * 0x8d22f6e6
	return bits.Reverse32(x)
}

// mix is the finaliser of splitmix64 (Steele, Lea and Flood 2014).
func mix(z uint64) uint64 {
	z += 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// sobolPoint is point i of the scrambled sequence in d dimensions. Coordinates past the
// table are hashes, that is, independent uniform numbers.
func sobolPoint(seed uint64, i, d int) []float64 {
	u := make([]float64, d)
	for j := range u {
		h := mix(seed ^ mix(uint64(j)))
		if j <= len(joeKuo) {
			u[j] = (float64(owen(sobolBits(uint32(i), j), uint32(h))) + 0.5) / (1 << 32)
			continue
		}
		u[j] = float64(mix(h^uint64(i))>>11) / (1 << 53)
	}
	return u
}
