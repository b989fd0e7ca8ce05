package cache

import (
	"context"
	"errors"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

const anyAge = time.Duration(math.MaxInt64)

// retryDown is how long a peer that did not answer is not waited for again by readers
// that have another answer, so that an outage costs each reader little.
const retryDown = 250 * time.Millisecond

// Get reads one variable with the asked consistency. Errors have kind Invalid for a bad
// request, Unavailable and Stale as the package comment says, Cancelled or Timeout when
// the caller's context ends, and whatever the authority refuses with.
func (s *Store) Get(ctx context.Context, r Request) (Answer, error) {
	a, err := s.get(ctx, r)
	switch {
	case err != nil:
		s.failures.Add(1)
		if end := ctx.Err(); end != nil {
			kind := outrigger.Cancelled
			if errors.Is(end, context.DeadlineExceeded) {
				kind = outrigger.Timeout
			}
			err = outrigger.Wrap(kind, err, "the caller's context ended while "+r.Key.String()+" was read")
		}
	case a.Stale:
		s.stale.Add(1)
	}
	return a, err
}

func (s *Store) get(ctx context.Context, r Request) (Answer, error) {
	if err := r.Key.Validate(); err != nil {
		return Answer{}, err
	}
	if r.Encoding < -1 || r.Encoding >= len(s.o.Encoders) {
		return Answer{}, outrigger.Errorf(outrigger.Invalid, "encoding is %d, there are %d encoders", r.Encoding, len(s.o.Encoders))
	}
	if c := r.Consistency; c.Level == outrigger.Bounded && c.MaxAge <= 0 {
		return Answer{}, outrigger.Errorf(outrigger.Invalid, "consistency bounded(%v) has no positive bound", c.MaxAge)
	}
	id, asked := r.Key.String(), r.Consistency
	var by declaration
	if r.Declared {
		if e := s.tier.Peek(id); e != nil {
			by = e.declares
		}
		r.Consistency = by.or(asked)
	}
	a, err := s.getAs(ctx, r, id)
	if r.Declared && err == nil && a.Found && a.declares != by {
		// It was not known before what the variable declares, or that has changed.
		by = a.declares
		if r.Consistency = by.or(asked); r.Consistency != a.Consistency {
			a, err = s.getAs(ctx, r, id)
		}
	}
	a.ByVariable = by.ok
	if r.Explain && err == nil {
		a.Explain = s.explain(ctx, r.Key)
	}
	return a, err
}

func (d declaration) or(c outrigger.Consistency) outrigger.Consistency {
	if d.ok {
		return d.consistency
	}
	return c
}

// getAs answers with r.Consistency.
func (s *Store) getAs(ctx context.Context, r Request, id string) (a Answer, err error) {
	maxAge, after := anyAge, r.After
	var m miss
	ok := false
	switch r.Consistency.Level {
	case outrigger.Strong:
		m = miss{why: mustAsk}
	case outrigger.Bounded:
		maxAge = r.Consistency.MaxAge
	case outrigger.Eventual:
		after = nil
	}
	if m.why == 0 {
		if a, m, ok = s.local(id, r.Encoding, maxAge, after); !ok && m.why == behind {
			a, m, ok = s.await(ctx, id, r.Encoding, maxAge, after)
		}
	}
	if ok {
		a.Why = whyTier(a.Tier)
	} else if a, err = s.elsewhere(ctx, r, id, after, maxAge, m); r.Explain {
		a.Why = m.text() + ": " + a.Why
	}
	a.Consistency = r.Consistency
	return a, err
}

// elsewhere answers what this machine's tiers could not.
func (s *Store) elsewhere(ctx context.Context, r Request, id string, after []outrigger.Dot, maxAge time.Duration, m miss) (Answer, error) {
	a, err := s.remote(ctx, r, id, after, m)
	switch {
	case err == nil && r.Consistency.Level == outrigger.Bounded && a.Age > maxAge:
		return Answer{}, outrigger.Errorf(outrigger.Stale, "%s cannot be met for %s: the origin took %v to answer", r.Consistency, r.Key, a.Age)
	case err == nil || ctx.Err() != nil || !silence(err):
		return a, err
	}
	a, err = s.withoutOrigin(r, id, after, err)
	a.Why = "last known value, nobody can be asked"
	return a, err
}

// silence tells "nobody answered" from an answer that is an error.
func silence(err error) bool {
	switch outrigger.KindOf(err) {
	case outrigger.Unavailable, outrigger.Timeout, outrigger.Internal, outrigger.Unknown:
		return true
	}
	return false
}

// remote asks the agent, else the origin.
func (s *Store) remote(ctx context.Context, r Request, id string, after []outrigger.Dot, m miss) (Answer, error) {
	// A table, the agent's included, may be older than an answer that came from elsewhere
	// less than a lease ago, and knows nothing of another log's positions.
	strong := r.Consistency.Level == outrigger.Strong || r.Consistency.Level == outrigger.Bounded || s.fenced() || m.why == otherLog
	spare := false
	if level := r.Consistency.Level; level == outrigger.SessionLevel || level == outrigger.Eventual {
		e, _ := s.lastKnown(id, level)
		spare = e != nil
	}
	var errs error
	for _, p := range s.peers() {
		if spare && s.clock() < p.downUntil.Load() {
			errs = errors.Join(errs, outrigger.Errorf(outrigger.Unavailable, "%s did not answer a moment ago", p.name))
			continue
		}
		var a Answer
		var err error
		if p == s.origin {
			a, err = s.askOrigin(ctx, r, id, after)
		} else {
			a, err = s.askAgent(ctx, p, r, id, after, strong)
		}
		if err == nil || ctx.Err() != nil || !silence(err) {
			a.Why = "asked the " + p.name
			return a, err
		}
		p.downUntil.Store(s.clock() + int64(retryDown))
		errs = errors.Join(errs, err)
	}
	return Answer{}, outrigger.Wrap(outrigger.Unavailable, errs, r.Key.String()+" cannot be read")
}

func (s *Store) fenced() bool { return s.clock() < s.fence.Load()+s.lease() }

// lease is how old an answer of an agent may be.
func (s *Store) lease() int64 {
	if v := s.view.Load(); v != nil {
		return max(v.lease, int64(s.o.Lease))
	}
	return int64(s.o.Lease)
}

// reading is what one call found.
type reading struct {
	result  *pb.ReadResult
	started int64
	asOf    dotIn
}

// read makes one call, or two: an answer that is behind a position of its log is asked
// for again as of that position.
func (s *Store) read(ctx context.Context, p *peer, key outrigger.Key, strong bool, after []outrigger.Dot, minimum uint64) (reading, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.Timeout)
	defer cancel()
	r, err := s.readOnce(ctx, p, key, strong, minimum)
	if err != nil {
		return reading{}, err
	}
	if want := position(after, r.asOf.incarnation); want > r.asOf.position && want > minimum {
		return s.readOnce(ctx, p, key, strong, want)
	}
	return r, nil
}

func (s *Store) readOnce(ctx context.Context, p *peer, key outrigger.Key, strong bool, minimum uint64) (reading, error) {
	if strong {
		ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderConsistency, outrigger.Consistency{Level: outrigger.Strong}.String())
	}
	started := s.clock()
	resp, err := p.coh.Read(ctx, &pb.ReadRequest{Keys: []*pb.Key{wire.KeyPB(key)}, MinPosition: minimum})
	if err == nil && len(resp.GetResults()) != 1 {
		err = outrigger.Errorf(outrigger.Internal, "the %s answered %d results for one key", p.name, len(resp.GetResults()))
	}
	if err != nil {
		return reading{}, status.FromGRPC(err, nil)
	}
	s.learnRegion(resp.GetRegion())
	return reading{result: resp.GetResults()[0], started: started, asOf: dotIn{resp.GetIncarnation(), resp.GetAsOf()}}, nil
}

// askAgent reads through an agent, which keeps the answer in its table.
func (s *Store) askAgent(ctx context.Context, p *peer, r Request, id string, after []outrigger.Dot, strong bool) (Answer, error) {
	minimum := uint64(0)
	if v := s.view.Load(); v != nil && len(after) > 0 {
		minimum = position(after, headOf(v).incarnation)
	}
	got, err := s.read(ctx, p, r.Key, strong, after, minimum)
	if err != nil {
		return Answer{}, err
	}
	s.originReads.Add(1)
	if !s.keeps(p) {
		s.raiseFence()
	}
	known := got.started
	if !strong {
		known -= s.lease() // the agent may have answered from its table
	}
	e := s.learn(id, got.result, known, got.asOf)
	// If the table proves this very answer, the next read is a hit.
	if v := s.current(); v != nil {
		if base, live := s.live(v, s.clock()); live {
			t, state := s.fromTable(id, v, base, headOf(v))
			if (state == shm.Present || state == shm.Negative) && sameAnswer(t, e) {
				if t.asOf.incarnation == e.asOf.incarnation {
					t.asOf.position = max(t.asOf.position, e.asOf.position)
				}
				s.put(id, t)
				e = t
			}
		}
	}
	a := s.answer(id, e, r.Encoding, outrigger.TierOrigin, known)
	if r.SeenAll {
		a.Seen = s.dotOf(got.asOf)
	}
	return a, nil
}

func sameAnswer(a, b *entry) bool {
	if a.variable == nil || b.variable == nil {
		return a.variable == nil && b.variable == nil && a.sessionExists == b.sessionExists
	}
	return wire.Dot(a.variable.GetVersion().GetDot()) == wire.Dot(b.variable.GetVersion().GetDot())
}

// askOrigin reads directly. Readers of one key at one time share a call, unless their
// consistency needs one of their own, or a write or such a read ended in between.
func (s *Store) askOrigin(ctx context.Context, r Request, id string, after []outrigger.Dot) (Answer, error) {
	var got reading
	var err error
	if l := r.Consistency.Level; l == outrigger.Strong || l == outrigger.Bounded || len(after) > 0 {
		got, err = s.read(ctx, s.origin, r.Key, true, after, 0)
		s.epoch.Add(1)
	} else {
		// The call is everybody's: it ends with Timeout, not with the reader that began it.
		flight := s.direct.DoChan(id+"\x00"+strconv.FormatUint(s.epoch.Load(), 10), func() (any, error) {
			return s.read(context.WithoutCancel(ctx), s.origin, r.Key, true, nil, 0)
		})
		select {
		case shared := <-flight:
			if err = shared.Err; err == nil {
				got = shared.Val.(reading)
			}
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return Answer{}, err
	}
	s.originReads.Add(1)
	s.raiseFence()
	e := s.learn(id, got.result, got.started, got.asOf)
	a := s.answer(id, e, r.Encoding, outrigger.TierOrigin, got.started)
	if r.SeenAll {
		a.Seen = s.dotOf(got.asOf)
	}
	return a, nil
}

// raiseFence keeps tables from being used until they are proved to be as new as now.
func (s *Store) raiseFence() {
	now := s.clock()
	for old := s.fence.Load(); old < now && !s.fence.CompareAndSwap(old, now); old = s.fence.Load() {
	}
}

// learn remembers an answer that came without a proof, as the last known value. An
// answer that was overtaken by a newer one is not remembered.
func (s *Store) learn(id string, r *pb.ReadResult, known int64, asOf dotIn) *entry {
	e := &entry{variable: r.GetVariable(), sessionExists: r.GetSessionExists() || r.GetVariable() != nil, known: known,
		asOf: asOf, heard: s.clock(), declares: declarationOf(r.GetVariable())}
	s.put(id, e)
	return e
}

// withoutOrigin answers when nobody did.
func (s *Store) withoutOrigin(r Request, id string, after []outrigger.Dot, why error) (Answer, error) {
	e, from := s.lastKnown(id, r.Consistency.Level)
	switch r.Consistency.Level {
	case outrigger.Strong:
		return Answer{}, why
	case outrigger.Bounded:
		if e == nil {
			return Answer{}, outrigger.Wrap(outrigger.Stale, why, r.Consistency.String()+" cannot be met: nothing is known of "+r.Key.String())
		}
		a := s.answer(id, e, r.Encoding, from, e.known)
		if a.Age > r.Consistency.MaxAge {
			return Answer{}, outrigger.Wrap(outrigger.Stale, why, r.Consistency.String()+" cannot be met: the last proof is "+a.Age.String()+" old")
		}
		return a, nil
	}
	if e == nil {
		return Answer{}, why
	}
	if !r.Kept && !e.showsAll(after) {
		return Answer{}, outrigger.Wrap(outrigger.Stale, why, "the last known value of "+r.Key.String()+" may be older than the session token")
	}
	a := s.answer(id, e, r.Encoding, from, e.known)
	a.Stale, a.FeedLive, a.Reason = true, false, "nobody can be asked: "+why.Error()
	return a, nil
}

// lastKnown returns the best answer to give when nobody can be asked, and the tier it is
// from: a value that is known to have changed since is for eventual consistency only.
func (s *Store) lastKnown(id string, level outrigger.Level) (e *entry, from outrigger.Tier) {
	since := s.changed.since(id[:strings.LastIndexByte(id, '/')])
	mine, table, state, base := s.bothKnown(id)
	if mine != nil && mine.doubt {
		since, mine = max(since, mine.known), nil
	}
	// An answer from elsewhere, or of an earlier table, may be newer than the table is.
	elsewhere := mine != nil && (mine.view == nil || mine.view != s.view.Load()) && (mine.heard >= base || state == shm.Absent)
	switch {
	case elsewhere && mine.known >= since:
		return mine, outrigger.TierProcess
	case (state == shm.Present || state == shm.Negative) && base > since:
		// Kept here as well: the next table may not hold it, and it must not go back.
		s.put(id, table)
		return table, outrigger.TierNode
	case level != outrigger.Eventual:
		return nil, outrigger.TierNone
	case mine != nil:
		return mine, outrigger.TierProcess
	case table != nil:
		return table, outrigger.TierNode
	}
	return nil, outrigger.TierNone
}

// bothKnown returns what the process tier and the table in use hold of a key.
func (s *Store) bothKnown(id string) (mine, table *entry, state shm.State, base int64) {
	mine = s.tier.Peek(id)
	if v := s.view.Load(); v != nil {
		base = v.base() // the table says nothing about later
		table, state = s.fromTable(id, v, base, headOf(v))
	}
	return mine, table, state, base
}
