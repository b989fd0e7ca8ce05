package monitor

import (
	"math"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/DataDog/sketches-go/ddsketch/mapping"
	"github.com/DataDog/sketches-go/ddsketch/pb/sketchpb"
	"github.com/DataDog/sketches-go/ddsketch/store"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
)

// Sketches are DDSketch (Masson, Rim, Lee, VLDB 2019) with 1 % relative accuracy and
// the logarithmic mapping, as ddsketch.NewDefaultDDSketch(0.01) makes them, in
// milliseconds.
const (
	accuracy = 0.01
	// maxBins bounds a sketch's memory to 16 KiB; 2 048 bins of 2 % width span 17 decades
	// above the lowest that is kept exact.
	maxBins        = 2_048
	maxSketchBytes = 64 << 10
	// Values outside are not durations: a nanosecond to three years, in milliseconds.
	minValue, maxValue = 1e-6, 1e11
)

// sketch is a decoded DDSketch; nil is an empty one.
type sketch = *ddsketch.DDSketch

func newSketch() sketch {
	m, err := mapping.NewLogarithmicMapping(accuracy)
	if err != nil {
		panic(err) // only for an accuracy outside (0, 1)
	}
	return ddsketch.NewDDSketchFromStoreProvider(m, newStore)
}

func newStore() store.Store { return store.NewCollapsingLowestDenseStore(maxBins) }

// decodeSketch reads the protobuf form. Empty input is no sketch and no error. It
// refuses another mapping (it could not be merged), negative values, and indexes and
// counts that no honest recorder produces. Errors have kind Invalid.
func decodeSketch(raw []byte) (sketch, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	if len(raw) > maxSketchBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "sketch is %d bytes, the limit is %d", len(raw), maxSketchBytes)
	}
	var msg sketchpb.DDSketch
	if err := proto.Unmarshal(raw, &msg); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "sketch is not a DDSketch message: %v", err)
	}
	if n := msg.GetNegativeValues(); len(n.GetBinCounts())+len(n.GetContiguousBinCounts()) > 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "sketch holds negative values; durations are not negative")
	}
	if !countable(msg.GetZeroCount()) {
		return nil, outrigger.Errorf(outrigger.Invalid, "sketch counts %v zeros", msg.GetZeroCount())
	}
	s := newSketch()
	m, err := mapping.FromProto(msg.GetMapping())
	if err != nil || !m.Equals(s.IndexMapping) {
		return nil, outrigger.Errorf(outrigger.Invalid, "sketch mapping is not logarithmic with %v relative accuracy", accuracy)
	}
	if err := checkBins(m, msg.GetPositiveValues()); err != nil {
		return nil, err
	}
	s, err = ddsketch.FromProtoWithStoreProvider(&msg, newStore)
	if err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "sketch: %v", err)
	}
	return s, nil
}

func checkBins(m mapping.IndexMapping, s *sketchpb.Store) error {
	low, high := m.Index(minValue), m.Index(maxValue)
	check := func(index int, count float64) error {
		if index < low || index > high || !countable(count) {
			return outrigger.Errorf(outrigger.Invalid, "sketch bin %d has count %v; bins are %d..%d, counts finite and not negative", index, count, low, high)
		}
		return nil
	}
	for i, n := range s.GetBinCounts() {
		if err := check(int(i), n); err != nil {
			return err
		}
	}
	for i, n := range s.GetContiguousBinCounts() {
		if err := check(int(s.GetContiguousBinIndexOffset())+i, n); err != nil {
			return err
		}
	}
	return nil
}

func countable(n float64) bool { return n >= 0 && n < 1<<40 && !math.IsNaN(n) }

// merge adds from to *to, which it creates on first use. from is not modified.
func merge(to *sketch, from sketch) {
	if from == nil {
		return
	}
	if *to == nil {
		*to = newSketch()
	}
	if err := (*to).MergeWith(from); err != nil {
		panic(err) // only for another mapping, which decodeSketch refuses
	}
}

// quantile reads a quantile in milliseconds; 0 from an empty sketch.
func quantile(s sketch, q float64) float64 {
	if s == nil || s.IsEmpty() {
		return 0
	}
	x, err := s.GetValueAtQuantile(q)
	if err != nil {
		return 0
	}
	return x
}
