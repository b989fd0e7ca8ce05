package node

import (
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// retireEvery is how often idle tables are looked for.
const retireEvery = time.Second

// table is one table and who may be told of it.
type table struct {
	tenant string // "" = of all tenants
	w      *shm.Writer
	r      *shm.Reader
	used   atomic.Int64 // when it was last asked for, by Options.Clock
	hits   allowance    // of hits reported
}

// tableSet is what tables there are. It is replaced, never changed, so that finding a
// key's table takes no lock.
type tableSet struct {
	list    []*table
	tenants map[string]*table // nil = one table for all, list[0]
}

// of returns the table of a tenant's keys; nil when there is none.
func (s *tableSet) of(tenant string) *table {
	if s.tenants == nil {
		return s.list[0]
	}
	return s.tenants[tenant]
}

// with returns the set with t instead of what there was for its tenant.
func (s *tableSet) with(t *table) *tableSet {
	if s == nil || s.tenants == nil {
		return &tableSet{list: []*table{t}}
	}
	out := s.without(t.tenant)
	out.tenants[t.tenant] = t
	out.list = append(out.list, t)
	return out
}

// without returns the set of one table per tenant without that of one.
func (s *tableSet) without(tenant string) *tableSet {
	out := &tableSet{tenants: make(map[string]*table, len(s.list)+1)}
	for _, t := range s.list {
		if t.tenant != tenant {
			out.tenants[t.tenant] = t
			out.list = append(out.list, t)
		}
	}
	return out
}

// share is the part of o that one of n tables gets.
func share(o shm.Options, n int) shm.Options {
	if n > 1 {
		if o.Bytes == 0 {
			o.Bytes = defaultTableBytes
		}
		o.Bytes = max(1, o.Bytes/int64(n)) // too little is an error, 0 would be the default
		if o.Slots > 0 {
			o.Slots = max(1, o.Slots/n)
		}
	}
	return o
}

// defaultTableBytes is shm's, needed where it is divided.
const defaultTableBytes = 64 << 20

// newTable makes a table; the caller puts it into use.
func (a *Agent) newTable(tenant string, o shm.Options) (*table, error) {
	w, err := shm.Create(o)
	if err != nil {
		return nil, err
	}
	t := &table{tenant: tenant, w: w, r: w.Reader()}
	t.used.Store(a.o.Clock())
	return t, nil
}

// adopt puts t into use as it is, empty: what the feed has proved holds for it too. It
// needs the mutex.
func (a *Agent) adopt(t *table) {
	f := a.state.Feed()
	if f.Incarnation != 0 {
		t.w.SetHead(f.Applied, f.Incarnation)
	}
	if a.state.Fresh(a.o.Clock()) {
		t.w.SetLease(f.Lease)
	}
	a.tables.Store(a.tables.Load().with(t))
}

// use returns the table of a tenant that is read or attached to, and makes it if there is
// none yet. nil without an error means that this agent keeps none for that tenant: reads
// are answered and leave nothing behind. Errors are those of shm.Create.
func (a *Agent) use(tenant string) (*table, error) {
	for {
		set := a.tables.Load()
		if set.tenants == nil {
			return set.list[0], nil
		}
		if t := set.of(tenant); t != nil {
			t.used.Store(a.o.Clock())
			return t, nil
		}
		if !a.o.Access.serves(tenant) {
			return nil, nil
		}
		if err := a.create(tenant); err != nil {
			return nil, err
		}
	}
}

// create makes the table of a tenant, unless another was faster or the tables are being
// replaced by others.
func (a *Agent) create(tenant string) error {
	a.mu.Lock()
	o := a.share
	a.mu.Unlock()
	t, err := a.newTable(tenant, o) // system calls, so not under the mutex
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.ended:
		return errors.Join(outrigger.Errorf(outrigger.Unavailable, "the node agent has stopped"), t.w.Close())
	case a.share != o || a.tables.Load().of(tenant) != nil:
		return t.w.Close()
	}
	a.adopt(t)
	a.o.Logger.Info("table created", "tenant", tenant, "bytes", t.w.Stats().ArenaBytes)
	return nil
}

// hold is use for a process on connection c, which keeps the table from being retired
// until the connection ends.
func (a *Agent) hold(c net.Conn, tenant string) (*table, error) {
	for {
		t, err := a.use(tenant)
		if err != nil || t == nil {
			return nil, err
		}
		a.mu.Lock()
		present := a.tables.Load().of(tenant) == t
		if present {
			a.readers.hold(c, t)
		}
		a.mu.Unlock()
		if present {
			return t, nil
		}
	}
}

// idle decides whether a table is to be retired: nobody is attached to it and it was not
// asked for during the time after.
func idle(attached int, used, now int64, after time.Duration) bool {
	return attached == 0 && now-used >= int64(after)
}

// retireIdle closes the tables of tenants who have gone. Their memory is the system's
// again once the collector has seen that nobody reads them.
func (a *Agent) retireIdle() {
	var gone []*table
	a.mu.Lock()
	now := a.o.Clock()
	for _, t := range a.tables.Load().list {
		if idle(a.readers.holding(t), t.used.Load(), now, a.o.TableIdle) {
			a.tables.Store(a.tables.Load().without(t.tenant))
			a.drop(t)
			gone = append(gone, t)
		}
	}
	a.mu.Unlock()
	for _, t := range gone {
		if err := t.w.Close(); err != nil {
			a.o.Logger.Error("retire a table", "tenant", t.tenant, "error", err)
		}
		a.o.Logger.Info("idle table retired", "tenant", t.tenant)
	}
}

// drop takes a table that is not in the set any more out of the protocol. It needs the
// mutex.
func (a *Agent) drop(t *table) {
	t.w.SetLease(0)
	a.evicted.Add(t.w.Stats().Evictions)
	for _, key := range keysOf(t.w) {
		a.run(coherence.Evicted{Key: key})
	}
}

// Rotate replaces every table by a new, empty one, for example a larger one: o is divided
// as Options.Table is. Attached readers see the end of their attachment and attach to the
// new table. Errors are those of shm.Create; the old tables then stay.
func (a *Agent) Rotate(o shm.Options) error {
	n := a.o.Access.count()
	part := share(o, n)
	room, err := part.Capacity()
	if err != nil {
		return err
	}
	var one *table
	if a.o.Access == nil {
		if one, err = a.newTable("", part); err != nil {
			return err
		}
	}
	a.mu.Lock()
	old := a.tables.Load().list
	a.share = part
	a.state.Resize(a.o.maxKeys(n * room))
	if one != nil {
		a.adopt(one)
	} else {
		a.tables.Store(&tableSet{tenants: map[string]*table{}}) // made when they are used again
	}
	for _, t := range old {
		a.drop(t)
	}
	a.mu.Unlock()
	for _, t := range old {
		a.readers.end(t)
		if e := t.w.Close(); e != nil {
			err = e
		}
	}
	return err
}

func keysOf(w *shm.Writer) []outrigger.Key {
	var out []outrigger.Key
	w.Range(func(id string, _ shm.Entry, _ []byte) bool {
		if k, err := outrigger.ParseKey(id); err == nil {
			out = append(out, k)
		}
		return true
	})
	return out
}
