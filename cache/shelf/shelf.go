// Package shelf keeps answers of models for all pods of a node: the node tier of the cache
// whose process tier is package answers of proxy/inference. It stores bytes under keys and
// knows nothing of models.
//
//	s, err := shelf.New(shelf.Options{Bytes: 256 << 20, Tenants: []string{"acme"}, Tenant: access.Caller})
//	pb.RegisterNodeAnswersServer(server, s)
//
// # Promises
//
//   - An answer is found only under the key it was put under, by a caller of the same
//     tenant. The key is a hash over the question, who asked, version, arm and pins, so whoever
//     finds an answer could have asked for it. Tenants have a part of the room each, and none
//     can push out another's answers.
//
//   - A key belongs to a stretch, the part of a version's life between two changes. From
//     the moment EndStretch returned no answer of the stretch is found, and none that
//     is put later is taken: a sidecar that has not heard of the change yet brings nothing back.
//
//   - An answer is given out no longer than it was put for, by the agent's monotonic clock, and
//     comes with its age.
//
//   - What is kept never exceeds Bytes; MaxEnded stretches of a tenant are remembered as
//     ended. When that many are, all of the tenant's answers are dropped with the memory of the
//     oldest half, so that nothing comes back by being forgotten. An answer larger than
//     MaxAnswer, or than a shard of the tenant's part, is not taken.
//
//   - Of all who ask JoinFlight for what is not kept, one is told to lead; the others read its
//     answer along as it comes. A leader that is gone, by its own end or its process's, is
//     lost to all at once: who has read nothing yet asks the model. So is an answer to a
//     follower that is more than MaxAnswer behind; nobody waits for it. A stretch that ends
//     takes no more followers, and nothing of it is kept. A tenant has MaxFlights at one
//     time, and as many that are followed as half its part has room for at twice MaxAnswer
//     each, at least two, besides what is kept; beyond these everybody asks for himself. As
//     many again, at MaxAnswer each, may be on their way here with nobody following; what comes
//     beyond these is not kept.
//
// A restart begins empty, with nothing remembered as ended. Whoever puts an answer must
// therefore have seen that its stretch goes on; see Stretch in proxy/inference/answers. A process can put a wrong
// answer for its own tenant's questions: whoever shares a tenant is trusted with its answers.
//
// Bad requests are refused with INVALID_ARGUMENT, callers without a tenant as Options.Tenant
// says. All methods may be called concurrently; nothing runs in the background.
package shelf

import (
	"context"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/tier"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Limits.
const (
	KeyBytes   = 32      // of a key, and of a stretch
	MaxAnswer  = 1 << 20 // bytes of a body
	MaxHeader  = 64 << 10
	MaxEnded   = 4096 // stretches of a tenant remembered as ended
	MaxAtOnce  = 1000 // stretches ended by one call
	MinBytes   = 4 << 20
	entryBytes = 256 // what an answer is charged besides its text
	ms         = 1e6 // of Options.Clock
	maxTTL     = 24 * 60 * 60 * 1000
)

// Options configure New.
type Options struct {
	// Bytes bounds what is kept for all tenants together, at least MinBytes for each.
	Bytes int64
	// Tenants that may come; each has an equal part. nil = everybody shares one.
	Tenants []string
	// Tenant says whose caller it is; nil = everybody is of tenant "". Its errors refuse
	// the call; one of no tenant in Tenants is refused.
	Tenant func(context.Context) (string, error)
	// Clock is monotonic, in ns; required.
	Clock func() int64
	Meter metric.Meter // nil = none
}

// Store implements pb.NodeAnswersServer.
type Store struct {
	pb.UnimplementedNodeAnswersServer
	o       Options
	tenants map[string]*part
	counts  [len(results)]atomic.Uint64
}

// part is one tenant's.
type part struct {
	kept    *tier.Cache[entry]
	flights *flights

	mu    sync.RWMutex
	ended map[[KeyBytes]byte]struct{}
	order [][KeyBytes]byte // of ended, oldest first
}

// entry is one answer. The message is not modified after it was stored.
type entry struct {
	stretch      [KeyBytes]byte
	answer       *pb.NodeAnswer
	born, expiry int64 // by Options.Clock
}

func (e *entry) size() int {
	return entryBytes + headerBytes(e.answer.GetHeader()) + cap(e.answer.Body)
}

func headerBytes(header []*pb.AnswerField) (n int) {
	for _, f := range header {
		n += 96 + len(f.GetName()) + len(f.GetValue())
	}
	return n
}

// What calls came to.
type result int

const (
	hit result = iota
	miss
	over // of an ended stretch
	stored
	refused
	joined // read along
	alone  // without company, as there are too many flights
)

var results = [...]string{hit: "hit", miss: "miss", over: "ended", stored: "stored", refused: "refused", joined: "joined", alone: "alone"}

// New returns an empty store. Errors have kind Invalid, or are the meter's.
func New(o Options) (*Store, error) {
	names := o.Tenants
	if names == nil {
		names = []string{""}
	}
	if each := o.Bytes / int64(max(1, len(names))); each < MinBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "shelf: %d bytes for %d tenants are %d each; give at least %d", o.Bytes, len(names), each, MinBytes)
	}
	if o.Clock == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "shelf: Options.Clock is nil; give the agent's clock")
	}
	s := &Store{o: o, tenants: make(map[string]*part, len(names))}
	for _, name := range names {
		each := o.Bytes / int64(len(names))
		shards := 1
		for shards < 16 && each/int64(2*shards) >= 4*MaxAnswer {
			shards *= 2
		}
		kept, err := tier.New(tier.Options[entry]{Bytes: each, Shards: shards, Entries: max(int(each/2048), shards), Size: (*entry).size})
		if err != nil {
			return nil, err
		}
		s.tenants[name] = &part{kept: kept, flights: newFlights(each), ended: map[[KeyBytes]byte]struct{}{}}
	}
	return s, s.instruments()
}

func (s *Store) instruments() error {
	if s.o.Meter == nil {
		return nil
	}
	calls, err := s.o.Meter.Int64ObservableCounter("outrigger.node.answers", metric.WithUnit("{call}"),
		metric.WithDescription("Answers of models asked of the node agent and put there, by outrigger.result: hit, miss, ended (of a version's past), stored, refused (too large or ended), joined (read along with another pod's question), alone (too many of these)."))
	if err != nil {
		return err
	}
	bytes, err := s.o.Meter.Int64ObservableGauge("outrigger.node.answers.bytes", metric.WithUnit("By"), metric.WithDescription("Size of the answers of models the node agent keeps."))
	if err != nil {
		return err
	}
	_, err = s.o.Meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for r, name := range results {
			o.ObserveInt64(calls, int64(s.counts[r].Load()), metric.WithAttributes(attribute.String("outrigger.result", name)))
		}
		var n int64
		for _, p := range s.tenants {
			n += p.kept.Bytes()
		}
		o.ObserveInt64(bytes, n)
		return nil
	}, calls, bytes)
	return err
}

// of returns the part of whoever calls.
func (s *Store) of(ctx context.Context) (*part, error) {
	tenant := ""
	if s.o.Tenant != nil {
		var err error
		if tenant, err = s.o.Tenant(ctx); err != nil {
			return nil, status.ToGRPC(err)
		}
	}
	if p := s.tenants[tenant]; p != nil {
		return p, nil
	}
	return nil, status.ToGRPC(outrigger.Errorf(outrigger.Denied, "answers are kept for tenants, and the caller has none"))
}

func hashed(what string, raw []byte) (out [KeyBytes]byte, err error) {
	if copy(out[:], raw) != KeyBytes || len(raw) != KeyBytes {
		return out, status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "%s has %d bytes; give %d", what, len(raw), KeyBytes))
	}
	return out, nil
}

// isOver says whether a stretch has ended.
func (p *part) isOver(stretch [KeyBytes]byte) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	_, over := p.ended[stretch]
	return over
}

// asked checks a question.
func asked(q *pb.GetAnswerRequest) (key, stretch [KeyBytes]byte, err error) {
	if key, err = hashed("key", q.GetKey()); err == nil {
		stretch, err = hashed("stretch", q.GetStretch())
	}
	return key, stretch, err
}

// find returns the answer that is kept, no older than maxAge ms (< 0 = of any age), or why there is none.
func (s *Store) find(p *part, key, stretch [KeyBytes]byte, maxAge int64) (*pb.NodeAnswer, result) {
	e := p.kept.Get(string(key[:]))
	now := s.o.Clock()
	switch {
	case p.isOver(stretch): // looked at after the entry, so that what ended before is never given
		return nil, over
	case e == nil || e.stretch != stretch || now >= e.expiry || maxAge >= 0 && now-e.born > maxAge*ms:
		return nil, miss
	}
	return &pb.NodeAnswer{Header: e.answer.Header, Body: e.answer.Body, AgeMs: (now - e.born) / ms, TtlMs: (e.expiry - now) / ms}, hit
}

// GetAnswer implements pb.NodeAnswersServer.
func (s *Store) GetAnswer(ctx context.Context, r *pb.GetAnswerRequest) (*pb.GetAnswerResponse, error) {
	p, err := s.of(ctx)
	if err != nil {
		return nil, err
	}
	key, stretch, err := asked(r)
	if err != nil {
		return nil, err
	}
	a, came := s.find(p, key, stretch, -1)
	s.counts[came].Add(1)
	return &pb.GetAnswerResponse{Answer: a}, nil
}

// PutAnswer implements pb.NodeAnswersServer.
func (s *Store) PutAnswer(ctx context.Context, r *pb.PutAnswerRequest) (*pb.PutAnswerResponse, error) {
	p, err := s.of(ctx)
	if err != nil {
		return nil, err
	}
	key, stretch, err := asked(&pb.GetAnswerRequest{Key: r.GetKey(), Stretch: r.GetStretch()})
	if err != nil {
		return nil, err
	}
	a := r.GetAnswer()
	if a == nil || a.GetAgeMs() < 0 || a.GetAgeMs() > maxTTL || a.GetTtlMs() < 1 || a.GetTtlMs() > maxTTL {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "an answer of age %d ms for %d ms; give ages of 0 and times of 1 to %d", a.GetAgeMs(), a.GetTtlMs(), maxTTL))
	}
	now := s.o.Clock()
	kept := s.keep(p, key, &entry{stretch: stretch, answer: a, born: now - a.AgeMs*ms, expiry: now + a.TtlMs*ms})
	return &pb.PutAnswerResponse{Kept: kept}, nil
}

// keep stores an answer unless it is too large or its stretch has ended.
func (s *Store) keep(p *part, key [KeyBytes]byte, e *entry) bool {
	kept := len(e.answer.Body) <= MaxAnswer && headerBytes(e.answer.Header) <= MaxHeader && !p.isOver(e.stretch) && p.kept.Put(string(key[:]), e)
	if kept {
		s.counts[stored].Add(1)
	} else {
		s.counts[refused].Add(1)
	}
	return kept
}

// EndStretch implements pb.NodeAnswersServer.
func (s *Store) EndStretch(ctx context.Context, r *pb.EndStretchRequest) (*pb.EndStretchResponse, error) {
	p, err := s.of(ctx)
	if err != nil {
		return nil, err
	}
	if n := len(r.GetStretches()); n > MaxAtOnce {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "%d stretches; give at most %d at once", n, MaxAtOnce))
	}
	all := make([][KeyBytes]byte, 0, len(r.GetStretches()))
	for _, raw := range r.GetStretches() {
		stretch, err := hashed("stretch", raw)
		if err != nil {
			return nil, err
		}
		all = append(all, stretch)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, stretch := range all {
		if _, known := p.ended[stretch]; known {
			continue
		}
		if len(p.order) >= MaxEnded {
			for _, old := range p.order[:MaxEnded/2] {
				delete(p.ended, old)
			}
			p.order = append(p.order[:0], p.order[MaxEnded/2:]...)
			p.kept.Purge()
		}
		p.ended[stretch], p.order = struct{}{}, append(p.order, stretch)
		p.flights.end(stretch)
	}
	return &pb.EndStretchResponse{}, nil
}
