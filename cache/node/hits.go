package node

import (
	"context"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// maxHits is how many reported hits count in one table in a second, and in a burst: some 10 ms of
// the table's mutex, of which a process that makes reports up gets no more.
const maxHits = 1 << 16

// allowance meters reports. The zero value has a full second's.
type allowance struct {
	mu   sync.Mutex
	used int   // of maxHits, at
	at   int64 // ns
}

// take returns how many of n may count now.
func (a *allowance) take(n int, now int64) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if since := now - a.at; since >= int64(time.Second) {
		a.used, a.at = 0, now
	} else if back := int(since * maxHits / int64(time.Second)); back > 0 {
		a.used, a.at = max(0, a.used-back), now
	}
	n = max(0, min(n, maxHits-a.used))
	a.used += n
	return n
}

// readElsewhere is told by a process which keys it had hits for. Which table that concerns
// is not for the process to say: it is the one it is given.
func (a *Agent) readElsewhere(ctx context.Context, hashes []uint64, weight uint32) {
	if len(hashes) == 0 {
		return
	}
	tenant := ""
	if a.o.Access != nil {
		tenant = a.o.Access.tenantOf(ctx)
	}
	t := a.tables.Load().of(tenant)
	if t == nil {
		return
	}
	n := t.hits.take(min(len(hashes), shm.MaxSamples), a.o.Clock())
	t.w.TouchAll(hashes[:n], int(min(weight, shm.MaxWeight)))
}
