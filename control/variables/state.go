package variables

import (
	"strings"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Aggregate prefixes in the log.
const (
	varPrefix     = "var/"
	sessionPrefix = "session/"
)

func varAggregate(k outrigger.Key) string { return varPrefix + k.String() }

func sessionAggregate(id sessionID) string { return sessionPrefix + id.tenant + "/" + id.name }

// parseVar is the inverse of varAggregate; ok is false for anything else.
func parseVar(aggregate string) (outrigger.Key, bool) {
	parts := strings.Split(aggregate, "/")
	if len(parts) != 4 || parts[0] != "var" {
		return outrigger.Key{}, false
	}
	k := outrigger.Key{Tenant: parts[1], Session: parts[2], Name: parts[3]}
	return k, k.Validate() == nil
}

// parseSession is the inverse of sessionAggregate.
func parseSession(aggregate string) (sessionID, bool) {
	parts := strings.Split(aggregate, "/")
	if len(parts) != 3 || parts[0] != "session" {
		return sessionID{}, false
	}
	id := sessionID{tenant: parts[1], name: parts[2]}
	return id, id.check() == nil
}

type sessionID struct{ tenant, name string }

func (id sessionID) check() error {
	if err := outrigger.CheckName("tenant", id.tenant); err != nil {
		return err
	}
	return outrigger.CheckName("session", id.name)
}

func (id sessionID) key(name string) outrigger.Key {
	return outrigger.Key{Tenant: id.tenant, Session: id.name, Name: name}
}

// state is the projection: what the log says up to applied. Only the applier changes
// it, through apply and under Service.mu; the applier itself may read without the lock.
type state struct {
	origin   origin
	limits   foldLimits
	applied  uint64
	sessions map[sessionID]*session
	live     int                         // live variables in all sessions
	locked   map[outrigger.Key]*variable // those with an optimisation lock
}

// origin is what the fold puts into versions whose event leaves it open.
type origin struct {
	region      string
	incarnation uint64
}

// foldLimits are part of the fold: two projections are equal only with equal limits.
type foldLimits struct {
	graves int // tombstones kept per session
}

func newState(o origin, l foldLimits) *state {
	return &state{origin: o, limits: l, sessions: make(map[sessionID]*session), locked: make(map[outrigger.Key]*variable)}
}

// noteLock keeps locked in step with a variable that has changed.
func (st *state) noteLock(v *variable) {
	if key := keyOf(v); v.pb.GetOptimization() != nil {
		st.locked[key] = v
	} else if len(st.locked) > 0 {
		delete(st.locked, key)
	}
}

// session is one life of a session: from its SessionCreated to its SessionDeleted.
type session struct {
	// Fixed at creation.
	id         sessionID
	ttl        time.Duration // 0 = default
	metadata   map[string]string
	createdAt  time.Time
	createdPos uint64

	// Changed by apply.
	seq     uint64               // of the session's aggregate
	vars    map[string]*variable // by name, tombstones included
	ids     map[string]string    // id of a live variable to its name
	live    int
	lastID  int       // highest n of an id "var_<name>_<n>"
	lastPos uint64    // highest position of any change inside the session
	lastAt  time.Time // time of the youngest event inside the session
	floor   uint64    // highest position of a tombstone that was dropped
	graves  []grave   // tombstones, oldest first
	deps    dependencies

	// Soft state, not part of the fold.
	touched  atomic.Int64 // last use in Unix ns; closing while the sweep removes it
	reserved atomic.Int64 // highest n handed out for an id
}

type grave struct {
	name     string
	position uint64
}

// closing in session.touched says that the sweep has decided; later uses are too late.
const closing = -1

// variable is one name of a session. It is never modified: each event replaces it.
type variable struct {
	pb          *pb.Variable // of a tombstone: id, key and version only
	constraints outrigger.Constraints
	seq         uint64 // of the variable's aggregate
	position    uint64 // of its youngest event
	deleted     bool
}

func (v *variable) counter() int32 { return v.pb.GetVersion().GetCounter() }

// lookup finds a live variable by id, then by name.
func (s *session) lookup(identifier string) *variable {
	if name, ok := s.ids[identifier]; ok {
		return s.vars[name]
	}
	if v := s.vars[identifier]; v != nil && !v.deleted {
		return v
	}
	return nil
}

// previous is the position of the last change of a name, or a bound above it.
func (s *session) previous(name string) uint64 {
	if v := s.vars[name]; v != nil {
		return v.position
	}
	return max(s.createdPos, s.floor)
}

// effectiveTTL applies the default.
func (s *session) effectiveTTL() time.Duration {
	if s.ttl == 0 {
		return outrigger.DefaultSessionTTL
	}
	return s.ttl
}

// touch moves the last use forward; it reports false when the sweep was faster.
func (s *session) touch(at int64) bool {
	for {
		old := s.touched.Load()
		if old == closing {
			return false
		}
		if at <= old || s.touched.CompareAndSwap(old, at) {
			return true
		}
	}
}

// lastUsed is the later of the last event and the last soft use, in Unix ns.
func (s *session) lastUsed() int64 { return max(s.lastAt.UnixNano(), s.touched.Load()) }

// reserveID hands out the next n of an id; the applier's lock must be held for reading.
func (s *session) reserveID(name string) string {
	for {
		old := s.reserved.Load()
		n := max(int(old), s.lastID) + 1
		id := variableID(name, n)
		for s.vars[id] != nil { // a variable has this very name; an equal id would hide it
			n++
			id = variableID(name, n)
		}
		if s.reserved.CompareAndSwap(old, int64(n)) {
			return id
		}
	}
}
