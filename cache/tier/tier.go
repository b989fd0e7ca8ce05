// Package tier is the process tier: a bounded, sharded in-memory cache whose hits take no
// lock. It keeps values of any type V, by pointer, under string keys; package cache stores
// there ready-to-send bytes together with the slot and stamp of the node tier that prove
// them current. This package proves nothing: it returns what was put last.
//
// # How it works
//
// Each shard has two golang-lru lists, recent and frequent, and a sketch that estimates how
// often keys were asked for lately (4-bit counters, halved from time to time). A new entry
// is recent. Recent entries have a share of the room; the oldest beyond that becomes
// frequent if it was used meanwhile, or if it was asked for at least twice more often than
// the oldest frequent entry, which then leaves; else it leaves itself. A hit merely counts up
// to two uses on the entry; they are honoured, and told the sketch, when the entry comes up
// for eviction: a used frequent one gets another round for each use.
//
// The share is between half a per cent (one entry at least) and 80 and begins with the least, where scans and
// loops do no harm. It grows with every key that is asked for again soon after it left the
// recent entries, and shrinks, twice as fast, with those that left the frequent ones. When
// the former outnumber the latter for long, other keys have become the popular ones, and the
// sketch starts over: else the counts of the old ones would keep the new ones out.
//
// The lists are those of S3-FIFO (Yang et al., "FIFO Queues are All You Need for Cache
// Eviction", SOSP 2023), the admission is TinyLFU's (Einziger, Friedman and Manes, "TinyLFU:
// A Highly Efficient Cache Admission Policy", ACM ToS 2017), and the share is steered as in
// ARC (see cache/internal/admission). All of it is decided when something is put; there is no parameter to set.
// On skewed loads, with scans, and when popularity shifts, the hit ratio is that of the best of
// otter, 2Q and ARC or above; bench/results has the figures. What it does worst is a load
// on which recency is everything, where first-in first-out is up to four points below LRU.
//
// Readers find entries through an index of atomic pointers and hash tags that only the
// shard's mutex holder modifies.
//
// # Promises
//
//   - Get allocates nothing and waits for nobody.
//   - Each shard's share of Bytes and Entries is never exceeded, not even for a moment, so
//     neither are the totals. An entry larger than a shard's share is not stored, and an
//     older value of its key is removed.
//   - What Put stored is seen by every Get that begins after Put returned, until it is
//     replaced, removed or evicted; what Remove or Purge removed is never seen again.
//
// All methods may be called from any goroutine. Nothing runs in the background.
package tier

import (
	"math/bits"
	"unsafe"

	"github.com/outrigger-mesh/outrigger"
)

// Defaults and the fixed price of an entry.
const (
	DefaultBytes = 64 << 20
	MaxShards    = 256

	// Overhead is what every entry is charged besides its key, Size and the value's own
	// width: index slot, list element and map cell in golang-lru, and its part of the sketch
	// and of what steers the share.
	Overhead = 288

	meanEntry = 512 // bytes assumed when Entries is derived
	// A default shard is not made smaller than this: the policy compares within a shard.
	shareBytes   = 1 << 20
	shareEntries = 512
)

// Options configure a cache of V.
type Options[V any] struct {
	Bytes   int64        // bound on the charged bytes of all entries; 0 means DefaultBytes
	Entries int          // bound on their number; 0 means Bytes/512, at least 1
	Shards  int          // a power of two up to MaxShards; 0 derives up to 16 from Bytes
	Size    func(*V) int // bytes a value refers to; nil means none. A negative result counts as 0
}

// Cache is a bounded map from string to V.
type Cache[V any] struct {
	hasher hasher
	shift  uint
	shards []shard[V]
	size   func(*V) int
	hits   counter
	misses counter
}

// New returns an empty cache. Errors have kind Invalid.
func New[V any](o Options[V]) (*Cache[V], error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	c := &Cache[V]{
		hasher: newHasher(),
		shift:  uint(64 - bits.TrailingZeros(uint(o.Shards))),
		shards: make([]shard[V], o.Shards),
		size:   o.Size,
	}
	for i := range c.shards {
		c.shards[i].init(o.Bytes/int64(o.Shards), o.Entries/o.Shards)
	}
	return c, nil
}

// complete fills defaults in and checks the result.
func (o *Options[V]) complete() error {
	if o.Bytes == 0 {
		o.Bytes = DefaultBytes
	}
	if o.Entries == 0 {
		o.Entries = max(1, int(o.Bytes/meanEntry))
	}
	if o.Shards == 0 {
		for o.Shards = 1; o.Shards < 16 && o.Bytes/int64(2*o.Shards) >= shareBytes && o.Entries/(2*o.Shards) >= shareEntries; {
			o.Shards *= 2
		}
	}
	switch {
	case o.Bytes < 0:
		return outrigger.Errorf(outrigger.Invalid, "Options.Bytes is %d; give a positive bound, or 0 for %d", o.Bytes, DefaultBytes)
	case o.Shards < 0 || o.Shards > MaxShards || o.Shards&(o.Shards-1) != 0:
		return outrigger.Errorf(outrigger.Invalid, "Options.Shards is %d; give a power of two up to %d, or 0", o.Shards, MaxShards)
	case o.Entries < o.Shards:
		return outrigger.Errorf(outrigger.Invalid, "Options.Entries is %d, less than one for each of %d shards; raise it or lower Shards", o.Entries, o.Shards)
	}
	return nil
}

func (c *Cache[V]) shard(h uint64) *shard[V] { return &c.shards[h>>c.shift] }

// Get returns the value last put under key, or nil.
func (c *Cache[V]) Get(key string) *V {
	p, _ := c.Count(key)
	return p
}

// Count is Get, and of a hit also says the how manieth it is of those counted together
// with it: of each goroutine's hits, roughly. It is for taking samples of them.
func (c *Cache[V]) Count(key string) (p *V, hit uint64) {
	h := c.hasher.hash(key)
	n, p := c.shards[h>>c.shift].index.Load().find(h, key)
	if p == nil {
		c.misses.add()
		return nil, 0
	}
	n.used()
	return p, c.hits.add()
}

// Peek returns what Get does, and counts nothing: it is for looking before an entry is
// replaced, which says nothing about how much the key is asked for.
func (c *Cache[V]) Peek(key string) *V {
	h := c.hasher.hash(key)
	_, p := c.shards[h>>c.shift].index.Load().find(h, key)
	return p
}

// used counts a hit. Hits at the same moment may count as one, and a store only when
// needed keeps hot entries in all cores' caches.
func (n *node[V]) used() {
	if u := n.uses.Load(); u < maxUses {
		n.uses.Store(u + 1)
	}
}

// Put stores v, which must not be nil and not be changed any more, under key and reports
// whether it was stored: it is not when it exceeds a shard's share of the byte bound, and
// then an older value of key is gone as well.
func (c *Cache[V]) Put(key string, v *V) bool {
	h := c.hasher.hash(key)
	return c.shard(h).put(h, key, v, c.charge(key, v))
}

// Offer stores v under key as Put does, but only if key is not stored and there is room
// without evicting anything. It reports whether it did.
func (c *Cache[V]) Offer(key string, v *V) bool {
	h := c.hasher.hash(key)
	return c.shard(h).offer(h, key, v, c.charge(key, v))
}

// charge is what an entry counts towards Options.Bytes.
func (c *Cache[V]) charge(key string, v *V) int64 {
	n := Overhead + int64(len(key)) + int64(unsafe.Sizeof(*v))
	if c.size != nil {
		n += int64(max(0, c.size(v)))
	}
	return n
}

// Remove forgets key and reports whether it was stored.
func (c *Cache[V]) Remove(key string) bool {
	h := c.hasher.hash(key)
	return c.shard(h).remove(h, key)
}

// Purge forgets everything, shard by shard. The counters of Stats stay.
func (c *Cache[V]) Purge() {
	for i := range c.shards {
		c.shards[i].purge()
	}
}

// Len returns the number of entries.
func (c *Cache[V]) Len() int {
	n := int64(0)
	for i := range c.shards {
		n += c.shards[i].count.Load()
	}
	return int(n)
}

// Bytes returns the charged bytes of all entries.
func (c *Cache[V]) Bytes() int64 {
	n := int64(0)
	for i := range c.shards {
		n += c.shards[i].bytes.Load()
	}
	return n
}

// Stats are counts since New.
type Stats struct {
	Hits, Misses, Evictions uint64
}

// Stats returns the counts. Calls in flight may or may not be included.
func (c *Cache[V]) Stats() Stats {
	s := Stats{Hits: c.hits.sum(), Misses: c.misses.sum()}
	for i := range c.shards {
		s.Evictions += c.shards[i].evictions.Load()
	}
	return s
}
