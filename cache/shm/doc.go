// Package shm is the node tier: one memory-mapped table per node agent, or one for each of
// the agent's tenants, written by the node agent alone and read, without locks or system
// calls, by every sidecar and client library it is handed to.
//
// # Use
//
// The agent calls Create, keeps the Writer and hands each authenticated sidecar the file
// of Writer.Descriptor over its Unix socket. The sidecar calls Open and reads:
//
//	e, buf := r.Get("tenant/session/name", buf[:0])
//	switch e.State {
//	case shm.Present:  // buf holds the current value
//	case shm.Negative: // known not to exist; buf holds what the writer attached, if anything
//	case shm.Invalid:  // known to be stale; buf holds the last value, for callers that accept it
//	case shm.Absent:   // nothing known, or the read gave up (e.GaveUp): ask the agent
//	}
//
// A process may keep a decoded copy beside (e.Slot, e.Stamp); the copy is current if and
// only if r.Stamp(e.Slot) == e.Stamp, which is one atomic load.
//
// # Promises
//
//   - A value is returned whole and exactly as put, or not at all. Readers cannot block,
//     slow down or corrupt the writer or each other.
//   - Invalidate is one atomic store. No Get that begins after it returns the key as
//     Present, and no copy held anywhere on the node compares as current any more.
//   - A stamp is never handed out twice by a table, whatever happens to its slot, Flush
//     included. Tables start their stamps at the wall clock in nanoseconds, so a later
//     table of a restarted agent does not repeat them either, unless the clock was set
//     back; compare a stamp only with the Reader it came from and the clock is irrelevant.
//   - "Absent" is always a safe answer: the table may forget any key at any time (arena
//     pressure, index pressure). What leaves is what was asked for least lately, going by
//     misses, which are Puts of new keys, and by what Writer.Touch reports of the hits; see
//     policy. On skewed loads the hit ratio is within two points of the best of ARC and 2Q
//     when a quarter of the hits is reported, and above LRU when none is.
//   - A Get is bounded: at most 128 slots of 24 bytes are probed, and a slot that keeps
//     changing is retried 64 times before the read gives up, is counted and says Absent.
//   - A Put is bounded: it moves at most 16 times its own size of older records, which for
//     the largest value is 16 MiB of memory traffic.
//
// Limits: keys of 1 to MaxKeyBytes bytes, values up to MaxValueBytes, one byte less than
// 1 MiB (and a quarter of the arena: the default of 64 MiB holds any). A value above the limit is refused with kind Exhausted and whatever the
// table held for that key is removed, so that a too large new value can never leave an
// older one in place.
//
// # Layout (version 2)
//
// Little-endian 64-bit words: a header page, the index, the arena. Nothing in it is a pointer.
//
//	header   line 0  magic, layout version, total bytes, slots, arena bytes, checksum of these
//	         line 1  generation, feed lease, closed, head count, head[2]{position, incarnation}
//	         line 2  intent
//	slot     stamp<<2|state, hash, location        (24 bytes; the index ends on a page)
//	record   slot<<32|klen<<20|vlen, stamp<<2|state, checksum, key words, value words
//
// The search for a key begins at the slot (hash·slots)>>64 and goes on from slot to slot.
// Locations and intent are logical word offsets that only grow; the physical place is the
// offset modulo the arena. A record never wraps: the rest of the arena is skipped instead.
//
// The stamp is the slot's sequence counter. To put, the writer raises intent to the end
// of the new record, writes the record, stores the location, then stores the stamp. A
// reader loads stamp and location, copies the record, and accepts it only if the record
// carries that very stamp (an older one when the state is Invalid), the slot still does,
// and intent has not come within one arena of the location. Every intermediate state
// fails one of the three, so there is no odd "busy" phase to be caught in: invalidation
// and eviction are one store to the stamp, relocation is one store to the location, and a
// writer killed between two stores leaves at worst one key unreadable in a table whose
// feed lease is about to lapse.
//
// # Memory model
//
// Every shared word is read and written with sync/atomic, also while copying values; a
// plain copy between two atomic loads would be a data race by the Go memory model and
// would need a load-load fence on arm64. Within one program the argument above is
// therefore Go's: atomics behave as if sequentially consistent. Between processes the Go
// memory model is silent and the argument is the hardware's: the compiler emits the same
// instructions for mapped memory (MOV and XCHG on amd64, LDAR and STLR on arm64), and
// those order accesses of different processes to one physical page as they do accesses of
// two threads. As a second line of defence every read verifies the record's xxhash.
//
// # Crashes, restarts, hostile files
//
// A new agent always creates a new table; readers learn of it from their socket, from
// Closed, or because the feed lease in the header lapses. The memory is an anonymous file
// sealed against resizing and, after the writer has mapped it, against any further
// writable mapping; the descriptor given away is opened read-only besides. Open refuses a
// file that is not so sealed (it could be truncated under the reader, which is SIGBUS),
// has a foreign magic, another layout version or geometry that does not add up; offsets
// and lengths found in the table are checked before use, so a damaged table yields Absent
// and a count, never a fault.
//
// # Concurrency
//
// Writer methods may be called from any goroutine; they serialise on one mutex, except
// SetLease, which is a single store and never waits. Reader methods may be called from
// any number of goroutines. Neither needs closing for memory's sake: a mapping is removed
// once the last Writer or Reader on it is garbage, so a reader swapped out under load
// stays valid for calls still in flight.
package shm
