package variable

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
)

// maxParallel bounds the reads of one batch that wait for an answer at the same time.
const maxParallel = 16

// batch is what the reads of many identifiers found.
type batch struct {
	variables map[string]*pb.Variable // by identifier as asked
	missing   []string                // in the order asked
	// worst is the weakest statement that holds for every answer; of nobody when nothing
	// was asked.
	worst cache.Answer
	seen  []outrigger.Dot // by the answers
}

// readMany reads many variables; one that does not exist is listed, any other failure
// fails the batch. field names the list in errors.
func (c core) readMany(ctx context.Context, tenant, session, field string, identifiers []string, want cache.Request) (batch, error) {
	b := batch{variables: make(map[string]*pb.Variable, len(identifiers))}
	if n := len(identifiers); n > outrigger.MaxBatch {
		return b, outrigger.Errorf(outrigger.Exhausted, "%s has %d entries, the limit is %d; split the call", field, n, outrigger.MaxBatch)
	}
	if err := outrigger.CheckName("session", session); err != nil {
		return b, err
	}
	asked := distinct(identifiers)
	answers, err := c.lookAll(ctx, tenant, session, asked, want)
	if err != nil {
		return b, err
	}
	b.worst.FeedLive = true
	sessionMissing := false
	for i, a := range answers {
		w := &b.worst
		if b.seen = append(b.seen, a.Seen); a.Tier > w.Tier {
			w.Why, w.Explain, w.Consistency, w.ByVariable = a.Why, a.Explain, a.Consistency, a.ByVariable
		}
		w.Tier, w.Age = max(w.Tier, a.Tier), max(w.Age, a.Age)
		w.FeedLive, w.Stale = w.FeedLive && a.FeedLive, w.Stale || a.Stale
		if a.Found {
			b.variables[asked[i]] = a.Variable
			continue
		}
		b.missing = append(b.missing, asked[i])
		sessionMissing = sessionMissing || !a.SessionExists
	}
	if sessionMissing {
		start := time.Now()
		err = c.ensureSession(ctx, tenant, session)
		b.worst.Age += time.Since(start)
	}
	return b, err
}

// distinct drops repetitions and keeps the order.
func distinct(identifiers []string) []string {
	seen := make(map[string]struct{}, len(identifiers))
	out := make([]string, 0, len(identifiers))
	for _, id := range identifiers {
		if _, again := seen[id]; !again {
			seen[id] = struct{}{}
			out = append(out, id)
		}
	}
	return out
}

// lookAll answers each identifier. The caller's goroutine works alone while answers come
// from this machine, which takes less than handing them out would; with the first that
// had to be fetched others help, so that misses do not wait for each other one by one.
// It returns when all of them are done; the first error stops the rest.
func (c core) lookAll(ctx context.Context, tenant, session string, identifiers []string, want cache.Request) ([]cache.Answer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answers := make([]cache.Answer, len(identifiers))
	var next atomic.Int64
	one := func() (more, far bool) {
		i := int(next.Add(1) - 1)
		if i >= len(identifiers) || ctx.Err() != nil {
			return false, false
		}
		a, err := c.look(ctx, tenant, session, identifiers[i], want)
		if err != nil {
			cancel(err) // the first cause stays
			return false, false
		}
		answers[i] = a
		return true, a.Tier == outrigger.TierOrigin
	}
	var helpers sync.WaitGroup
	alone := true
	for more := true; more; {
		var far bool
		if more, far = one(); far && alone {
			alone = false
			for range min(maxParallel-1, len(identifiers)-int(next.Load())) {
				helpers.Go(func() {
					for more := true; more; {
						more, _ = one()
					}
				})
			}
		}
	}
	helpers.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return answers, nil
}
