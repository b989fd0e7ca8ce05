package coherence

import (
	"encoding/binary"
	"hash/maphash"
	"iter"
	"math"
	"math/bits"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// keys are all keys with an exact floor, found by name, by session and by time of
// storing. A key with a name of up to 8 bytes costs 64 bytes and about 3 of index, each
// further 12 bytes of name cost 16, and a session costs its name once. No operation looks
// at all keys but all and clear.
type keys struct {
	entries  slab[entry]
	pieces   slab[piece]
	sessions slab[session]
	byName   map[sessionName]ref
	long     map[*entry]string // names of 255 bytes and more
	logs     []logName         // [0] = of a value without a version, or of none
	logOf    map[logName]uint16
	count    int

	// The index is hashed linearly (Litwin, "Linear hashing: a new tool for file and table
	// addressing", VLDB 1980): it grows by one bucket at a time, so that no step pays for
	// all keys. Its seed is drawn, so that no tenant can choose names that collide.
	index    []*[chunkSize]ref
	nBuckets uint64
	seed     maphash.Seed
	scratch  []byte

	order, brief list // normal and short-lived
}

// perBucket is how many keys a bucket has on average before the index grows.
const perBucket = 2

func newKeys() keys {
	return keys{
		byName: map[sessionName]ref{}, long: map[*entry]string{}, logs: make([]logName, 1), logOf: map[logName]uint16{{}: 0},
		index: []*[chunkSize]ref{new([chunkSize]ref)}, nBuckets: chunkSize, seed: maphash.MakeSeed(),
	}
}

// find returns the key's entry, or nil.
func (k *keys) find(key outrigger.Key) *entry {
	s := k.byName[sessionName{key.Tenant, key.Session}]
	if s == 0 {
		return nil
	}
	for r := *k.bucket(k.hashOf(s, key.Name)); r != 0; {
		e := k.entries.at(r)
		if e.session == s && k.isNamed(e, key.Name) {
			return e
		}
		r = e.inIndex
	}
	return nil
}

// add makes an entry for a key that has none, at the end of order.
func (k *keys) add(key outrigger.Key) *entry {
	r, e := k.entries.take()
	s := k.byName[sessionName{key.Tenant, key.Session}]
	if s == 0 {
		s = k.addSession(key.Tenant, key.Session)
	}
	e.session = s
	k.setName(e, key.Name)
	b := k.bucket(k.hashOf(s, key.Name))
	e.inIndex, *b = *b, r
	k.append(&k.order, e, r)
	of := k.sessions.at(s)
	if e.before = of.last; e.before != 0 {
		k.entries.at(e.before).after = r
	} else {
		of.first = r
	}
	of.last = r
	if k.count++; k.count > perBucket*int(k.nBuckets) {
		k.grow()
	}
	return e
}

// remove gives e's piece back: e must not be used any more.
func (k *keys) remove(e *entry) {
	b := k.bucket(k.hashOfEntry(e))
	for k.entries.at(*b) != e {
		b = &k.entries.at(*b).inIndex
	}
	r := *b
	*b = e.inIndex
	k.unlink(e)
	of := k.sessions.at(e.session)
	if e.before != 0 {
		k.entries.at(e.before).after = e.after
	} else {
		of.first = e.after
	}
	if e.after != 0 {
		k.entries.at(e.after).before = e.before
	} else {
		of.last = e.before
	}
	if of.first == 0 {
		delete(k.byName, of.sessionName)
		k.sessions.give(e.session)
	}
	k.dropName(e)
	k.entries.give(r)
	if k.count--; k.count == 0 && len(k.entries.chunks) > 1 {
		k.clear()
	}
}

// clear forgets all keys and gives their memory back.
func (k *keys) clear() {
	seed, scratch := k.seed, k.scratch
	*k = newKeys()
	k.seed, k.scratch = seed, scratch
}

// all yields every entry by time of storing, the normal ones first. The one yielded may
// be removed.
func (k *keys) all() iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		for _, r := range [...]ref{k.order.first, k.brief.first} {
			for r != 0 {
				e := k.entries.at(r)
				r = e.next
				if !yield(e) {
					return
				}
			}
		}
	}
}

// of yields the entries of a session in the order they came.
func (k *keys) of(tenant, id string) iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		s := k.byName[sessionName{tenant, id}]
		if s == 0 {
			return
		}
		for r := k.sessions.at(s).first; r != 0; {
			e := k.entries.at(r)
			if r = e.after; !yield(e) {
				return
			}
		}
	}
}

// key returns the key of an entry.
func (k *keys) key(e *entry) outrigger.Key {
	of := k.sessions.at(e.session)
	return outrigger.Key{Tenant: of.tenant, Session: of.id, Name: string(k.nameOf(e))}
}

func (k *keys) addSession(tenant, id string) ref {
	r, s := k.sessions.take()
	// One string of its own: what came in may be part of something large.
	both := string(append(append(make([]byte, 0, len(tenant)+len(id)), tenant...), id...))
	s.sessionName = sessionName{both[:len(tenant)], both[len(tenant):]}
	k.byName[s.sessionName] = r
	return r
}

// list returns the order e is in.
func (k *keys) list(e *entry) *list {
	if e.flags&isBrief != 0 {
		return &k.brief
	}
	return &k.order
}

func (k *keys) append(l *list, e *entry, r ref) {
	e.set(isBrief, l == &k.brief)
	e.prev, e.next = l.last, 0
	if l.last != 0 {
		k.entries.at(l.last).next = r
	} else {
		l.first = r
	}
	l.last = r
}

// unlink takes e out of its order and returns its ref.
func (k *keys) unlink(e *entry) (r ref) {
	l := k.list(e)
	if e.prev != 0 {
		p := &k.entries.at(e.prev).next
		r, *p = *p, e.next
	} else {
		r, l.first = l.first, e.next
	}
	if e.next != 0 {
		k.entries.at(e.next).prev = e.prev
	} else {
		l.last = e.prev
	}
	return r
}

// toBack makes e the youngest of an order.
func (k *keys) toBack(l *list, e *entry) { k.append(l, e, k.unlink(e)) }

// front returns the oldest of an order, or nil.
func (k *keys) front(l *list) *entry {
	if l.first == 0 {
		return nil
	}
	return k.entries.at(l.first)
}

func (k *keys) hashOf(s ref, name string) uint64 { return mix(maphash.String(k.seed, name), s) }

func (k *keys) hashOfEntry(e *entry) uint64 {
	return mix(maphash.Bytes(k.seed, k.nameOf(e)), e.session)
}

func mix(hash uint64, s ref) uint64 { return hash ^ uint64(s)*0x9e3779b97f4a7c15>>17 }

// bucket returns the head of the bucket for a hash. The buckets below nBuckets that have
// not been split since their number last doubled take the hashes of those to come.
func (k *keys) bucket(hash uint64) *ref {
	doubled := uint64(1) << bits.Len64(k.nBuckets-1)
	b := hash & (doubled - 1)
	if b >= k.nBuckets {
		b -= doubled / 2
	}
	return &k.index[b>>chunkBits][b%chunkSize]
}

// grow adds a bucket and moves there what belongs to it from the one it is split from.
func (k *keys) grow() {
	if int(k.nBuckets>>chunkBits) == len(k.index) {
		k.index = append(k.index, new([chunkSize]ref))
	}
	from := k.nBuckets - uint64(1)<<(bits.Len64(k.nBuckets)-1)
	k.nBuckets++
	head := &k.index[from>>chunkBits][from%chunkSize]
	r := *head
	*head = 0
	for r != 0 {
		e := k.entries.at(r)
		next := e.inIndex
		b := k.bucket(k.hashOfEntry(e))
		e.inIndex, *b = *b, r
		r = next
	}
}

// nameOf returns e's name, valid until the next call.
func (k *keys) nameOf(e *entry) []byte {
	n := int(e.nameBytes)
	switch {
	case n == longName:
		k.scratch = append(k.scratch[:0], k.long[e]...)
		return k.scratch
	case n <= len(e.name):
		return e.name[:n]
	}
	b := append(k.scratch[:0], e.name[:4]...)
	for r := binary.LittleEndian.Uint32(e.name[4:]); r != 0; {
		p := k.pieces.at(r)
		b = append(b, p.b[:min(len(p.b), n-len(b))]...)
		r = p.next
	}
	k.scratch = b
	return b
}

func (k *keys) isNamed(e *entry, name string) bool {
	if n := int(e.nameBytes); n != len(name) && n != longName {
		return false
	}
	return string(k.nameOf(e)) == name
}

func (k *keys) setName(e *entry, name string) {
	if len(name) >= longName {
		e.nameBytes = longName
		k.long[e] = string(append([]byte(nil), name...))
		return
	}
	e.nameBytes = uint8(len(name))
	if len(name) <= len(e.name) {
		copy(e.name[:], name)
		return
	}
	copy(e.name[:4], name)
	r, p := k.pieces.take()
	binary.LittleEndian.PutUint32(e.name[4:], r)
	for name = name[4+copy(p.b[:], name[4:]):]; name != ""; name = name[copy(p.b[:], name):] {
		var q *piece
		p.next, q = k.pieces.take()
		p = q
	}
}

func (k *keys) dropName(e *entry) {
	switch n := int(e.nameBytes); {
	case n == longName:
		delete(k.long, e)
	case n > len(e.name):
		for r := binary.LittleEndian.Uint32(e.name[4:]); r != 0; {
			next := k.pieces.at(r).next
			k.pieces.give(r)
			r = next
		}
	}
}

// remember notes the write behind the value e holds, nil = none. Logs have numbers; there
// are more than fit only if 65,535 came and went without a flush between, and then entries
// of further ones are not compared (see State.compare).
func (k *keys) remember(e *entry, d *pb.Dot) {
	name := logName{d.GetRegion(), d.GetIncarnation()}
	n, ok := k.logOf[name]
	if !ok {
		if n = noLog; len(k.logs) < noLog {
			n = uint16(len(k.logs))
			k.logs, k.logOf[name] = append(k.logs, name), n
		}
	}
	e.log, e.dot = n, d.GetPosition()
}

const noLog = math.MaxUint16

// shown returns the write behind the value e holds, if its log has a number.
func (k *keys) shown(e *entry) outrigger.Dot {
	l := k.logs[e.log]
	return outrigger.Dot{Region: l.region, Incarnation: l.incarnation, Position: e.dot}
}
