package variable

import (
	"context"
	"slices"
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
// fails the batch. field names the list in errors. A bounded batch is as a whole no older
// than its bound: an answer ages while others are waited for, and while a missing session
// is made, so that it is read again, once, and then fails as stale.
func (c core) readMany(ctx context.Context, tenant, session, field string, identifiers []string, want cache.Request) (batch, error) {
	if n := len(identifiers); n > outrigger.MaxBatch {
		return batch{}, outrigger.Errorf(outrigger.Exhausted, "%s has %d entries, the limit is %d; split the call", field, n, outrigger.MaxBatch)
	}
	if err := outrigger.CheckName("session", session); err != nil {
		return batch{}, err
	}
	asked := distinct(identifiers)
	answers, err := c.lookAll(ctx, tenant, session, asked, want)
	var missing error
	if err == nil && slices.ContainsFunc(answers, func(a cache.Answer) bool { return !a.Found && !a.SessionExists }) {
		start := time.Now()
		missing = c.ensureSession(ctx, tenant, session)
		aged(answers, time.Since(start)) // what was missing may have been made meanwhile
	}
	if err == nil && missing == nil && tooOld(answers) {
		if answers, err = c.lookAll(ctx, tenant, session, asked, want); err == nil && tooOld(answers) {
			err = outrigger.Errorf(outrigger.Stale, "%s cannot be met for the %d %s together: reading them took longer; ask for fewer, or for a wider bound", answers[0].Consistency, len(asked), field)
		}
	}
	if err != nil {
		c.o.Counters.Errors.Add(uint64(len(asked)))
		return batch{}, err
	}
	for _, a := range answers {
		c.o.Counters.count(a, nil)
	}
	return gather(asked, answers), missing
}

func aged(answers []cache.Answer, by time.Duration) {
	for i := range answers {
		answers[i].Age += by
	}
}

func tooOld(answers []cache.Answer) bool {
	return slices.ContainsFunc(answers, func(a cache.Answer) bool {
		return a.Consistency.Level == outrigger.Bounded && a.Age > a.Consistency.MaxAge
	})
}

// gather sorts the answers into what was found and what was not.
func gather(asked []string, answers []cache.Answer) batch {
	b := batch{variables: make(map[string]*pb.Variable, len(asked))}
	b.worst.FeedLive = true
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
	}
	return b
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
// It returns when all of them are done, with their ages at that time; the first error
// stops the rest.
func (c core) lookAll(ctx context.Context, tenant, session string, identifiers []string, want cache.Request) ([]cache.Answer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answers, answered := make([]cache.Answer, len(identifiers)), make([]time.Time, len(identifiers))
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
		answers[i], answered[i] = a, time.Now()
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
	now := time.Now()
	for i, at := range answered {
		answers[i].Age += now.Sub(at)
	}
	return answers, nil
}
