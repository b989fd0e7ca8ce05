package facts

import (
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Served is what answered for a model at a moment.
type Served struct {
	Model    *Model // as it was then: its split, aliases, rollout and experiment
	Position uint64 // of the last event that counts
	Since    time.Time
	Actor    string // of the event at Model.WeightEpoch, which made the split what it was
}

// remember publishes the kept events for readers. They only ever grow behind what was
// published, so readers share the bytes.
func (p *Projection) remember() {
	k := p.kept
	k.events = k.events[:len(k.events):len(k.events)]
	p.past.Store(&k)
}

// At folds the log's own events again up to and including a position (0 = any) and a time
// (zero = any) and returns the facts as they were, without alerts and pushes, which are not
// kept. It costs what ServedAt costs. The error has kind Internal.
func (p *Projection) At(position uint64, t time.Time) (*Facts, error) {
	past := p.past.Load()
	if past.failed {
		return nil, outrigger.Errorf(outrigger.Internal, "an event could not be kept, so the past cannot be folded; restart the control plane")
	}
	f := new(Facts)
	for b := past.events; len(b) > 0; {
		size, rest, ok := uvarint(b)
		if !ok || size > uint64(len(rest)) {
			return nil, outrigger.Errorf(outrigger.Internal, "kept events are cut off %d bytes before their end", len(b))
		}
		e := new(pb.Event)
		if err := proto.Unmarshal(rest[:size], e); err != nil {
			return nil, outrigger.Wrap(outrigger.Internal, err, "kept event")
		}
		if position != 0 && e.GetPosition() > position || !t.IsZero() && e.GetAt().AsTime().After(t) {
			break // neither runs backwards in a log
		}
		f, b = Apply(f, e), rest[size:]
	}
	return f, nil
}

// ServedAt folds the log's own events again up to and including time t and says what
// served the model then. It is exact where the log is: an event counts from its own
// time, sidecars follow within the push, and an emergency kill is in force slightly
// before its event. It costs a fold of all control events (not of variable writes) and
// reads no storage.
//
// Errors: NotFound for a model that had not been registered by t, Internal when the
// events cannot be read.
func (p *Projection) ServedAt(model string, t time.Time) (Served, error) {
	past := p.past.Load()
	if past.failed {
		return Served{}, outrigger.Errorf(outrigger.Internal, "an event could not be kept, so the past cannot be folded; restart the control plane")
	}
	f, out := new(Facts), Served{}
	for b := past.events; len(b) > 0; {
		size, rest, ok := uvarint(b)
		if !ok || size > uint64(len(rest)) {
			return Served{}, outrigger.Errorf(outrigger.Internal, "kept events are cut off %d bytes before their end", len(b))
		}
		e := new(pb.Event)
		if err := proto.Unmarshal(rest[:size], e); err != nil {
			return Served{}, outrigger.Wrap(outrigger.Internal, err, "kept event")
		}
		if e.GetAt().AsTime().After(t) {
			break // times never run backwards in a log
		}
		f, b = Apply(f, e), rest[size:]
		out.Position = e.GetPosition()
		if m := f.Model(model); m != nil && m.WeightEpoch == e.GetPosition() {
			out.Since, out.Actor = e.GetAt().AsTime(), e.GetActor()
		}
	}
	if out.Model = f.Model(model); out.Model == nil {
		return Served{}, outrigger.Errorf(outrigger.NotFound, "model %q was not registered at %s", model, t.UTC().Format(time.RFC3339Nano))
	}
	return out, nil
}
