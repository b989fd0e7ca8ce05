package deploy

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Phase is one step of a rollout. It may end once both minima are met and every gate
// has passed.
type Phase struct {
	Name        string
	Weight      uint32        // candidate's share here, parts of 10 000; 0 only where Environment is another one
	MinDuration time.Duration // since the phase began
	MinRequests uint64        // logical candidate requests seen in the phase
	// Stage is the phase this one is a step of; empty = it is a phase of its own.
	Stage string
	// Gates and RollbackWhen are read-only. RollbackWhen are conditions: see Decide.
	Gates        []*pb.RolloutGate
	RollbackWhen []string
	// FeatureFlags, MonitoringLevel and Environment are what the phase is meant to be
	// like; Share is its part of the environment's units.
	FeatureFlags                 []string
	MonitoringLevel, Environment string
	Share                        uint32
}

// PhasesOf converts from the API form; what is referred to is shared.
func PhasesOf(in []*pb.RolloutPhase) []Phase {
	out := make([]Phase, len(in))
	for i, p := range in {
		out[i] = Phase{Name: p.GetName(), Weight: p.GetWeight(), MinDuration: p.GetMinDuration().AsDuration(), MinRequests: p.GetMinRequests(),
			Stage: p.GetStage(), Gates: p.GetGates(), RollbackWhen: p.GetRollbackWhen(), FeatureFlags: p.GetFeatureFlags(),
			MonitoringLevel: p.GetMonitoringLevel(), Environment: p.GetEnvironment(), Share: p.GetShare()}
	}
	return out
}

// PhasesPB is the inverse of PhasesOf.
func PhasesPB(in []Phase) []*pb.RolloutPhase {
	out := make([]*pb.RolloutPhase, len(in))
	for i, p := range in {
		out[i] = &pb.RolloutPhase{Name: p.Name, Weight: p.Weight, MinDuration: durationpb.New(p.MinDuration), MinRequests: p.MinRequests,
			Stage: p.Stage, Gates: p.Gates, RollbackWhen: p.RollbackWhen, FeatureFlags: p.FeatureFlags,
			MonitoringLevel: p.MonitoringLevel, Environment: p.Environment, Share: p.Share}
	}
	return out
}

// DefaultPhases are used when a start request names none: canary 1 %, limited 10 %,
// full 100 %. The minima are what lets a doubled failure rate of 1 % show in each
// phase (about 1 300 candidate requests at the median).
func DefaultPhases() []Phase {
	return []Phase{
		{Name: "canary", Weight: 100, MinDuration: 10 * time.Minute, MinRequests: 1_500},
		{Name: "limited", Weight: 1_000, MinDuration: 10 * time.Minute, MinRequests: 5_000},
		{Name: "full", Weight: FullWeight, MinDuration: 10 * time.Minute, MinRequests: 5_000},
	}
}

// Limits on a start request.
const (
	MaxPhases        = 32
	MaxPhaseDuration = 90 * 24 * time.Hour
	MaxAlpha         = 0.1
	DefaultAlpha     = 0.01
	DefaultCooldown  = 10 * time.Minute
	MaxGates         = 32 // of one phase
	MaxConditions    = 32 // of one gate, and of one phase's rollback
)

// PlanStandard names the plan of StandardPhases.
const PlanStandard = "standard"

// Start turns a start request into the event that starts the rollout, with defaults
// filled in; lastGood is the version that serves now. It checks what can be checked
// without knowing the model: names, candidate ≠ lastGood, at most MaxPhases phases with
// distinct names, weights 1..10 000 that never fall (0 in phases of another environment,
// which come first), gates and conditions that can be judged, minima in range, and alpha within
// (0, MaxAlpha] (0 = DefaultAlpha). Errors have kind Invalid and name the field.
func Start(req *pb.StartRolloutRequest, lastGood string) (*pb.RolloutStarted, error) {
	if req.GetId() != "" {
		if err := outrigger.CheckName("id", req.GetId()); err != nil {
			return nil, err
		}
	}
	for _, f := range []struct{ field, value string }{
		{"model", strings.ReplaceAll(req.GetModel(), "/", "-")}, // models may have '/' in their names
		{"candidate", req.GetCandidate()}, {"last_good", lastGood},
	} {
		if err := outrigger.CheckName(f.field, f.value); err != nil {
			return nil, err
		}
	}
	if req.GetCandidate() == lastGood {
		return nil, outrigger.Errorf(outrigger.Invalid, "candidate %q serves already; roll out another version", lastGood)
	}
	phases := PhasesOf(req.GetPhases())
	switch {
	case req.GetPlan() == PlanStandard && len(phases) == 0:
		phases = StandardPhases()
	case req.GetPlan() != "":
		return nil, outrigger.Errorf(outrigger.Invalid, "plan %q is not %q, or phases are given, too; leave one of them empty", req.GetPlan(), PlanStandard)
	case len(phases) == 0:
		phases = DefaultPhases()
	}
	phases = placeHooks(phases)
	if err := checkPhases(phases); err != nil {
		return nil, err
	}
	cooldown := req.GetCooldown().AsDuration()
	if cooldown < 0 || cooldown > MaxPhaseDuration {
		return nil, outrigger.Errorf(outrigger.Invalid, "cooldown %v is outside 0..%v; 0 means %v", cooldown, MaxPhaseDuration, DefaultCooldown)
	}
	cooldown = cmp.Or(cooldown, DefaultCooldown)
	alpha := req.GetAlpha()
	if alpha == 0 {
		alpha = DefaultAlpha
	}
	if !(alpha > 0 && alpha <= MaxAlpha) {
		return nil, outrigger.Errorf(outrigger.Invalid, "alpha %v is outside (0, %v]; 0 means %v", alpha, MaxAlpha, DefaultAlpha)
	}
	return &pb.RolloutStarted{Model: req.GetModel(), Candidate: req.GetCandidate(), LastGood: lastGood,
		Phases: PhasesPB(phases), Alpha: alpha, Cooldown: durationpb.New(cooldown), Author: req.GetActor(), ManualRollback: req.GetManualRollback()}, nil
}

func checkPhases(phases []Phase) error {
	if len(phases) == 0 || len(phases) > MaxPhases {
		return outrigger.Errorf(outrigger.Invalid, "rollout has %d phases; give 1 to %d", len(phases), MaxPhases)
	}
	for i, p := range phases {
		switch {
		case p.Name == "" || slices.ContainsFunc(phases[:i], func(q Phase) bool { return q.Name == p.Name }):
			return outrigger.Errorf(outrigger.Invalid, "phase %d: name %q is empty or used twice", i, p.Name)
		case p.Weight > FullWeight || p.Weight == 0 && (p.Environment == "" || i == len(phases)-1):
			return outrigger.Errorf(outrigger.Invalid, "phase %s: weight %d is outside 1..%d (parts of 10 000)", p.Name, p.Weight, FullWeight)
		case i > 0 && p.Weight < phases[i-1].Weight:
			return outrigger.Errorf(outrigger.Invalid, "phase %s: weight %d is below the %d of phase %s; weights never fall", p.Name, p.Weight, phases[i-1].Weight, phases[i-1].Name)
		case p.MinDuration < 0 || p.MinDuration > MaxPhaseDuration:
			return outrigger.Errorf(outrigger.Invalid, "phase %s: min_duration %v is outside 0..%v", p.Name, p.MinDuration, MaxPhaseDuration)
		}
		if _, err := NewKeeper(p); err != nil {
			return err
		}
	}
	return nil
}

// Names of the standard phases, in order.
const (
	Development       = "development"
	Staging           = "staging"
	Canary            = "canary"
	LimitedProduction = "limited_production"
	FullProduction    = "full_production"
)

// StandardPhases are development, staging, canary (1 %), limited_production (10 %) and
// full_production, with the shares, durations, flags and thresholds of the published
// deployment strategy. Development and staging are 100 % of environments of their own:
// here they have weight 0, and what they ask for is in their gates.
func StandardPhases() []Phase {
	var out []Phase
	for _, name := range []string{Development, Staging, Canary, LimitedProduction, FullProduction} {
		p, _ := StandardPhase(name)
		out = append(out, p)
	}
	return out
}

// StandardPhase returns the defaults of a standard phase, and false for another name.
func StandardPhase(name string) (Phase, bool) {
	core := []string{"core_features"}
	standard := func(share uint32, level string, errors, degradation string) Phase {
		p := Phase{Name: name, Weight: share, Share: share, FeatureFlags: core, MonitoringLevel: level,
			RollbackWhen: []string{"error_rate > " + errors, "performance_degradation > " + degradation}}
		if name == Development || name == Staging {
			p.Environment, p.Weight = name, 0
		}
		return p
	}
	var p Phase
	switch name {
	case Development:
		p = standard(FullWeight, "debug", "0.1", "0.3")
		p.FeatureFlags = []string{"all_features"}
	case Staging:
		p = standard(FullWeight, "info", "0.05", "0.2")
	case Canary:
		p = standard(100, "warn", "0.02", "0.15")
		p.MinDuration = 24 * time.Hour
	case LimitedProduction:
		p = standard(1_000, "warn", "0.01", "0.1")
		p.MinDuration = 72 * time.Hour
	case FullProduction:
		p = standard(FullWeight, "error", "0.005", "0.05")
	default:
		return Phase{}, false
	}
	return p, true
}

// Steps divides a phase into steps of growing weight (1 → 2 → 5 %). Each step but the
// last lasts an equal part of the phase's minima; the gates belong to the last, which
// keeps the phase's name. Errors have kind Invalid.
func Steps(p Phase, weights []uint32) ([]Phase, error) {
	if len(weights) == 0 {
		return []Phase{p}, nil
	}
	if p.Environment != "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "phase %s is of environment %s and has no steps here", p.Name, p.Environment)
	}
	out := make([]Phase, len(weights))
	n := len(weights)
	for i, w := range weights {
		s := p
		s.Weight, s.Share, s.Stage = w, w, p.Name
		s.MinDuration, s.MinRequests = p.MinDuration/time.Duration(n), p.MinRequests/uint64(n)
		if i < n-1 {
			s.Name, s.Gates = p.Name+"-"+strconv.Itoa(i+1), nil
		}
		out[i] = s
	}
	return out, nil
}
