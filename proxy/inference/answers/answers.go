// Package answers is the cache of model answers: what the same question, put to the same
// version of a model, was answered before. Cache is the process tier, Node what the pods of
// a node share.
//
//	c, err := answers.New(answers.Options{Bytes: 64 << 20, TTL: time.Minute})
//	keys, _, ok := answers.Question(q)                  // ok: may be answered from memory at all
//	if a := c.Get(keys.Process, now, -1); a != nil { … } // replay a.Header, a.Body
//	f, leader := c.Join(keys.Process)                    // one asks the model, the others read along, then Leave
//
// Promises.
//
//   - A key is a SHA-256 over the canonical request (JSON without insignificant space, keys
//     sorted, numbers as written), API, upstream path, version and its generation, arm,
//     tenant, and the versions of variables pinned by the caller and by the version. Two requests that differ
//     in any of these never share an answer. Whether a stream is asked for is in the
//     request, so a stream is answered with the stream that was recorded, event for event,
//     and JSON with JSON.
//   - Only what Question calls deterministic is cached, or what the caller or operator
//     opted in for; see Deterministic for the rules of each protocol.
//   - Only whole answers with status 200 are kept, for at most TTL, less if the answer's
//     Cache-Control says so. Errors never are.
//   - Memory is bounded by Options.Bytes for answers kept, and by twice MaxAnswer for each of
//     the flights in progress. An answer that grows beyond MaxAnswer is not kept.
//   - Readers of a flight get its bytes as they come (package internal/flight). If it fails
//     before its first byte, or is no stream, they are told to ask for themselves; after
//     it, they see it fail as the leader did.
//
// Entries of a version that was quarantined, or changed its upstream name, are not
// reachable from that moment on, also when it comes back: its generation is another. They
// leave memory by age.
//
// New starts nothing. All methods are safe for concurrent use.
package answers

import (
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache/tier"
	"github.com/outrigger-mesh/outrigger/internal/flight"
)

// Defaults and limits.
const (
	DefaultTTL = 5 * time.Minute
	MaxAnswer  = 1 << 20 // bytes of one answer
	minBytes   = 1 << 20
	maxFlights = 4096 // at one time; further questions are asked without company
)

// Options of a Cache.
type Options struct {
	// Bytes bounds what is kept, at least 1 MiB.
	Bytes int64
	// TTL bounds the age of an answer; 0 = DefaultTTL.
	TTL time.Duration
	// Full reports that there is no memory for more of answers on their way: such a one is
	// then treated as one longer than MaxAnswer. nil = never.
	Full func() bool
}

// Answer is one whole answer; it must not be modified.
type Answer struct {
	Header http.Header // of the model server, without what belongs to one connection or request
	Body   []byte
	Stored time.Time
	Expiry time.Time
}

// Key is what Question returns; opaque.
type Key string

// Cache holds answers and flights.
type Cache struct {
	ttl  time.Duration
	kept *tier.Cache[Answer]
	full func() bool // no memory for more on the way

	mu      sync.Mutex
	flights map[Key]*Flight

	hits, misses, joins atomic.Uint64
}

// New returns an empty cache. Errors have kind Invalid.
func New(o Options) (*Cache, error) {
	if o.Bytes < minBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "answers: Bytes is %d; give at least %d", o.Bytes, minBytes)
	}
	if o.TTL < 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "answers: TTL is %v; give a duration above 0, or 0 for %v", o.TTL, DefaultTTL)
	}
	if o.TTL == 0 {
		o.TTL = DefaultTTL
	}
	shards := 1
	for shards < 16 && o.Bytes/int64(2*shards) >= 4*MaxAnswer {
		shards *= 2
	}
	kept, err := tier.New(tier.Options[Answer]{Bytes: o.Bytes, Shards: shards, Entries: max(int(o.Bytes/2048), shards), Size: (*Answer).size})
	if err != nil {
		return nil, err
	}
	return &Cache{ttl: o.TTL, kept: kept, full: o.Full, flights: map[Key]*Flight{}}, nil
}

// entryBytes is what an Answer and its header map are charged besides their text.
const entryBytes = 512

func (a *Answer) size() int {
	n := entryBytes + cap(a.Body)
	for k, vs := range a.Header {
		n += len(k)
		for _, v := range vs {
			n += len(v) + 16
		}
	}
	return n
}

// Get returns the answer kept under key, nil if there is none that is younger than its
// expiry and than maxAge; maxAge < 0 = no such limit.
func (c *Cache) Get(key Key, now time.Time, maxAge time.Duration) *Answer {
	a := c.kept.Get(string(key))
	if a == nil || !now.Before(a.Expiry) || maxAge >= 0 && now.Sub(a.Stored) > maxAge {
		c.misses.Add(1)
		return nil
	}
	c.hits.Add(1)
	return a
}

// Stats are counts since New, and what is kept now.
type Stats struct {
	Hits    uint64 `json:"hits"`
	Misses  uint64 `json:"misses"`
	Joined  uint64 `json:"joined"` // of the misses: read along with a flight
	Entries int    `json:"entries"`
	Bytes   int64  `json:"bytes"`
}

// Stats returns the present counts.
func (c *Cache) Stats() Stats {
	return Stats{Hits: c.hits.Load(), Misses: c.misses.Load(), Joined: c.joins.Load(), Entries: c.kept.Len(), Bytes: c.kept.Bytes()}
}

// Join returns the flight that is asking the question, or makes the caller the leader of
// a new one. A leader must end its flight, with Finish or Fail. The flight is nil, and
// the caller on its own, when there are too many.
func (c *Cache) Join(key Key) (f *Flight, leader bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f = c.flights[key]; f != nil {
		c.joins.Add(1)
		f.Enter()
		return f, false
	}
	if len(c.flights) >= maxFlights {
		return nil, true
	}
	f = &Flight{c: c, key: key}
	f.Flight = flight.New[http.Header](MaxAnswer, func() { c.unlist(f) }, c.full)
	c.flights[key] = f
	return f, true
}

func (c *Cache) unlist(f *Flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flights[f.key] == f {
		delete(c.flights, f.key)
	}
}

// Flight is one question on its way, with everybody who asked it. Begin, Write, Finish
// and Fail are the leader's, one at a time; Read and Await are everybody else's.
type Flight struct {
	*flight.Flight[http.Header]
	c   *Cache
	key Key
}

// Progress is what a reader sees of a flight.
type Progress = flight.Progress[http.Header]

// Fail ends the flight without an answer. After Finish or Fail it does nothing.
func (f *Flight) Fail() { f.End(false) }

// Fill ends the flight with an answer from elsewhere, which is kept until its expiry, for
// at most the cache's TTL from when it was stored.
func (f *Flight) Fill(a *Answer) {
	kept := *a
	if limit := a.Stored.Add(f.c.ttl); limit.Before(kept.Expiry) {
		kept.Expiry = limit
	}
	f.c.kept.Put(string(f.key), &kept) // before the flight ends, so that nobody falls between
	f.Flight.Fill(a.Header, a.Body)
}

// Finish ends the flight with a whole answer, which is kept if keep is above 0, for at
// most so long and for at most the cache's TTL. It returns what is kept, or nil.
func (f *Flight) Finish(now time.Time, keep time.Duration) *Answer {
	header, body, begun, all := f.Got()
	if !begun || !all || keep <= 0 {
		f.End(true)
		return nil
	}
	a := &Answer{Header: header, Body: body, Stored: now, Expiry: now.Add(min(keep, f.c.ttl))}
	f.c.kept.Put(string(f.key), a) // before the flight ends, so that nobody falls between
	f.End(true)
	return a
}
