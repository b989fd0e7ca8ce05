package deploy

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Defaults of a graceful rollback.
const (
	DefaultRamp  = time.Minute
	DefaultDrain = 30 * time.Second
	rampSteps    = 4
)

// Drain plans a graceful rollback from weight: down by quarters over ramp, then at 0 for
// at most drain. Zero durations mean the defaults.
func Drain(weight uint32, ramp, drain time.Duration, reason string) *pb.RolloutDraining {
	if ramp == 0 {
		ramp = DefaultRamp
	}
	if drain == 0 {
		drain = DefaultDrain
	}
	out := &pb.RolloutDraining{Reason: reason, Every: durationpb.New(ramp / rampSteps), Drain: durationpb.New(drain)}
	last := weight
	for i := uint32(rampSteps - 1); i > 0; i-- {
		if w := uint32(uint64(weight) * uint64(i) / rampSteps); w > 0 && w < last {
			out.Weights, last = append(out.Weights, w), w
		}
	}
	out.Weights = append(out.Weights, 0)
	return out
}

// NextRamp says what a graceful rollback does now: give the candidate weight (change is
// true), or, at 0 and drained, end with a rollback (over is true). idle is true when
// nothing is known to be in flight on the candidate any more.
func NextRamp(r *Rollout, idle bool, now time.Time) (weight uint32, change, over bool) {
	if r.State != Draining {
		return 0, false, false
	}
	waited := now.Sub(r.RampedAt)
	if r.Ramp == 0 {
		return 0, false, idle || waited >= r.Drain.GetDrain().AsDuration()
	}
	if waited < r.Drain.GetEvery().AsDuration() {
		return 0, false, false
	}
	for _, w := range r.Drain.GetWeights() {
		if w < r.Ramp {
			return w, true, false
		}
	}
	return 0, true, false
}
