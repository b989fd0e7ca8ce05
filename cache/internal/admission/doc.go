// Package admission holds what the cache tiers decide by, when there is more to keep than
// room: how often keys were asked for lately (Sketch), and how much room newcomers deserve
// (Steer). The process tier (cache/tier) has one of each in every shard, the node tier
// (cache/shm) one of each in every table.
//
// Both are told hashes and know no keys: hashes that collide are one key to them, which
// costs hits and nothing else. They know no time, draw no numbers and never fail; the same
// calls give the same answers. Their size follows the number of entries they are told of, by
// Grow, at most 16 bytes for each in the sketch and 16 in what steers. A zero value is not
// ready for use; copies share memory. Neither is safe for concurrent use: the owner's mutex
// guards them.
package admission

import "math/bits"

// fold multiplies to 128 bits and folds them, as wyhash does.
func fold(x, y uint64) uint64 {
	hi, lo := bits.Mul64(x, y)
	return hi ^ lo
}
