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
//   - A key belongs to a stretch, the part of a version's life between two changes. From
//     the moment EndStretch returned no answer of the stretch is found, and none that
//     is put later is taken: a sidecar that has not heard of the change yet brings nothing back.
//   - An answer is given out no longer than it was put for, by the agent's monotonic clock, and
//     comes with its age.
//   - What is kept never exceeds Bytes; MaxEnded stretches of a tenant are remembered as
//     ended. When that many are, all of the tenant's answers are dropped with the memory of the
//     oldest half, so that nothing comes back by being forgotten. An answer larger than
//     MaxAnswer, or than a shard of the tenant's part, is not taken.
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
	kept *tier.Cache[entry]

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

func (e *entry) size() int { return entryBytes + headerBytes(e.answer) + cap(e.answer.Body) }

func headerBytes(a *pb.NodeAnswer) (n int) {
	for _, f := range a.GetHeader() {
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
)

var results = [...]string{hit: "hit", miss: "miss", over: "ended", stored: "stored", refused: "refused"}

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
		s.tenants[name] = &part{kept: kept, ended: map[[KeyBytes]byte]struct{}{}}
	}
	return s, s.instruments()
}

func (s *Store) instruments() error {
	if s.o.Meter == nil {
		return nil
	}
	calls, err := s.o.Meter.Int64ObservableCounter("outrigger.node.answers", metric.WithUnit("{call}"),
		metric.WithDescription("Answers of models asked of the node agent and put there, by outrigger.result: hit, miss, ended (of a version's past), stored, refused (too large or ended)."))
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

// GetAnswer implements pb.NodeAnswersServer.
func (s *Store) GetAnswer(ctx context.Context, r *pb.GetAnswerRequest) (*pb.GetAnswerResponse, error) {
	p, err := s.of(ctx)
	if err != nil {
		return nil, err
	}
	stretch, err := hashed("stretch", r.GetStretch())
	if err != nil {
		return nil, err
	}
	if _, err := hashed("key", r.GetKey()); err != nil {
		return nil, err
	}
	e := p.kept.Get(string(r.GetKey()))
	now := s.o.Clock()
	switch {
	case p.isOver(stretch): // looked at after the entry, so that what ended before is never given
		s.counts[over].Add(1)
	case e == nil || e.stretch != stretch || now >= e.expiry:
		s.counts[miss].Add(1)
	default:
		s.counts[hit].Add(1)
		const ms = 1e6
		return &pb.GetAnswerResponse{Answer: &pb.NodeAnswer{Header: e.answer.Header, Body: e.answer.Body, AgeMs: (now - e.born) / ms, TtlMs: (e.expiry - now) / ms}}, nil
	}
	return &pb.GetAnswerResponse{}, nil
}

// PutAnswer implements pb.NodeAnswersServer.
func (s *Store) PutAnswer(ctx context.Context, r *pb.PutAnswerRequest) (*pb.PutAnswerResponse, error) {
	p, err := s.of(ctx)
	if err != nil {
		return nil, err
	}
	stretch, err := hashed("stretch", r.GetStretch())
	if err != nil {
		return nil, err
	}
	if _, err := hashed("key", r.GetKey()); err != nil {
		return nil, err
	}
	a := r.GetAnswer()
	const ms, most = 1e6, 24 * 60 * 60 * 1000
	if a == nil || a.GetAgeMs() < 0 || a.GetAgeMs() > most || a.GetTtlMs() < 1 || a.GetTtlMs() > most {
		return nil, status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "an answer of age %d ms for %d ms; give ages of 0 and times of 1 to %d", a.GetAgeMs(), a.GetTtlMs(), most))
	}
	now := s.o.Clock()
	e := &entry{stretch: stretch, answer: a, born: now - a.AgeMs*ms, expiry: now + a.TtlMs*ms}
	kept := len(a.Body) <= MaxAnswer && headerBytes(a) <= MaxHeader && !p.isOver(stretch) && p.kept.Put(string(r.GetKey()), e)
	if kept {
		s.counts[stored].Add(1)
	} else {
		s.counts[refused].Add(1)
	}
	return &pb.PutAnswerResponse{Kept: kept}, nil
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
	}
	return &pb.EndStretchResponse{}, nil
}
