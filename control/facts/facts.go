// Package facts folds the event log into everything that is known about a mesh except
// its variables: models with their versions and aliases, experiments, rollouts, regions
// and alerts.
//
// Apply is the fold: a pure function from one immutable value and one event to the next
// value. Replaying the same events always gives the same facts, on every replica and
// after every restart, so whatever is computed from facts (package control/compile) is
// the same everywhere too. Projection is the thin shell that keeps the latest value
// behind an atomic pointer by following a log.
//
// Bad input: the log is the truth and has already been acknowledged, so Apply never
// fails. An event that makes no sense here (an alias of a model nobody registered, a
// phase of a rollout that has ended) changes nothing but the Skipped counter, which
// Status shows, and the aggregate's sequence. Payloads from a newer schema are passed over in the same way.
//
// Concurrency: a *Facts and everything reachable from it is read-only once Apply has
// returned it and may be shared freely; the next value shares what did not change.
//
// Bounds: at most MaxAlerts alerts, MaxEndedRollouts ended rollouts and MaxOptimizations
// runs of each of MaxTaskTypes types of task stay in memory (the oldest leave first; the log keeps all). Models, versions and experiments are
// bounded where they are created, by the admin API.
package facts

import (
	"maps"
	"slices"
	"strings"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy/models"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Bounds on what is remembered in memory.
const (
	MaxAlerts        = 1000
	MaxEndedRollouts = 200
	MaxEpochs        = 200 // per experiment
	MaxDeliveries    = 32  // per alert: outcomes of different routes
)

// Aggregate prefixes; the name or id follows.
const (
	ModelPrefix      = "model/"
	ExperimentPrefix = "experiment/"
	RolloutPrefix    = "rollout/"
	RegionPrefix     = "region/"
	AlertPrefix      = "alert/"
)

// Aliases of a model: movable names for versions.
const (
	Champion   = "champion"   // serves everything that is not under test
	Challenger = "challenger" // what is being tested against the champion
	LastGood   = "last_good"  // what to return to
)

// States of a model version.
const (
	Registered  = string(models.Registered)  // known; serves nothing unless an experiment arm or alias names it
	Production  = string(models.Production)  // the champion
	Shadow      = string(models.Shadow)      // answers copies of requests, which nobody sees
	Candidate   = string(models.Candidate)   // being rolled out
	Quarantined = string(models.Quarantined) // rolled back; serves nothing until cleared by hand
	Retired     = string(models.Retired)     // serves nothing
)

// States of an experiment.
const (
	Draft     = "draft"
	Planned   = "planned"
	Running   = "running"
	Concluded = "concluded"
	Stopped   = "stopped"
	Archived  = "archived"
)

// DefaultUnit randomises by the most stable thing a request carries: its user, else its
// session, else the request itself, so every request is enrolled.
const DefaultUnit = experiments.UnitRequest

// Facts is the state after some prefix of the log. The zero value is the state of an
// empty log. Use the methods; everything they return is read-only.
type Facts struct {
	position       uint64
	policyPosition uint64
	models         map[string]*Model
	experiments    map[string]*Experiment
	rollouts       map[string]*Rollout
	regions        map[string]*pb.Region
	alerts         []*Alert          // in order of being raised
	epochs         map[uint64]string // weight epochs in which an experiment's split was in force
	deployment     *Deployment
	sequences      map[string]uint64
	pushed         uint64
	skipped        Skipped
	canary         *Canary
	optimizers     map[string]*Optimizer
	optimizations  map[string][]Optimization // by type of task
}

// Skipped counts events that made no sense and describes the last one.
type Skipped struct {
	Count    uint64
	Position uint64
	Reason   string
}

// Limits are those of circuit_breakers and outlier_detection, see policy.Version.
type Limits struct{ MaxConnections, MaxPending, MaxRequests, MaxRetries, ConsecutiveFailures uint32 }

// Experiment is one A/B test between versions of a model.
type Experiment struct {
	Name      string
	Model     string
	State     string
	Arms      []ExperimentArm
	Reason    string
	ChangedAt time.Time
	// Life is the state with what led to it; its plan is frozen. Plan is the same as
	// recorded, with a draft the wishes; nil if there is none.
	Life experiments.Lifecycle
	Plan *pb.ExperimentPlan
	// Epochs are the weight epochs in which the model was split as the arms say, in
	// order, the first MaxEpochs: in others (an arm's version was down) nothing can be
	// compared.
	Epochs []uint64
	// Results are those of the moment of the decision, as JSON; nil if nothing decided.
	Results []byte
	// Enrolment says who takes part; nil = everybody.
	Enrolment *pb.ExperimentEnrolment
}

// ExperimentArm is one variant; the weights of all arms sum to experiments.Buckets.
// Ranges are kept when weights change, so that units flip only if they must.
type ExperimentArm struct {
	Name    string
	Version string
	Weight  uint32
	Ranges  []experiments.Range
	// Configuration is what the arm's requests should find, values as JSON.
	Configuration map[string]string
}

// Position is the log position of the last event that changed anything here.
func (f *Facts) Position() uint64 { return f.position }

// PolicyPosition is the log position of the last event compiled policy may depend on:
// of a model, experiment, rollout or region. Variable writes do not move it, so they
// never cause a push.
func (f *Facts) PolicyPosition() uint64 { return f.policyPosition }

// Pushed is the policy position of the last push the log records as settled.
func (f *Facts) Pushed() uint64 { return f.pushed }

// Sequence is the last sequence of a model's, experiment's, rollout's or region's
// aggregate, events that made no sense included: what a writer to it must expect.
func (f *Facts) Sequence(aggregate string) uint64 { return f.sequences[aggregate] }

// Skipped tells about events that made no sense.
func (f *Facts) Skipped() Skipped { return f.skipped }

// Model returns the model of that name, or nil.
func (f *Facts) Model(name string) *Model { return f.models[name] }

// Models returns all models by name.
func (f *Facts) Models() []*Model { return sorted(f.models) }

// ModelCount is the number of models.
func (f *Facts) ModelCount() int { return len(f.models) }

// Experiment returns the experiment of that name, or nil.
func (f *Facts) Experiment(name string) *Experiment { return f.experiments[name] }

// Experiments returns all experiments by name.
func (f *Facts) Experiments() []*Experiment { return sorted(f.experiments) }

// Region returns the registered region of that name, or nil.
func (f *Facts) Region(name string) *pb.Region { return f.regions[name] }

// Regions returns all registered regions by name.
func (f *Facts) Regions() []*pb.Region { return sorted(f.regions) }

func sorted[T any](m map[string]T) []T {
	out := make([]T, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}

// draft is the next Facts while Apply builds it. Maps and values are cloned the first
// time they are written, so the previous Facts stays as it is.
type draft struct {
	Facts
	event *pb.Event
}

// Apply returns the facts after event e, given those before it. Events must be given in
// log order. If e is none of this package's business the same pointer comes back.
func Apply(f *Facts, e *pb.Event) *Facts {
	switch e.GetPayload().(type) {
	case *pb.Event_VariableSet, *pb.Event_VariableRegistered, *pb.Event_VariableDeleted,
		*pb.Event_OptimizationStarted, *pb.Event_OptimizationStopped, *pb.Event_DependencyAdded,
		*pb.Event_SessionCreated, *pb.Event_SessionDeleted:
		return f // nearly every event of a log; passing over one allocates nothing
	}
	d := draft{Facts: *f, event: e}
	reason, ours, push := "", true, true
	switch p := e.GetPayload().(type) {
	case *pb.Event_ModelVersionRegistered:
		reason = d.versionRegistered(p.ModelVersionRegistered)
	case *pb.Event_ModelVersionState:
		reason = d.versionState(p.ModelVersionState)
	case *pb.Event_AliasMoved:
		reason = d.aliasMoved(p.AliasMoved)
	case *pb.Event_ModelConfigured:
		reason = d.modelConfigured(p.ModelConfigured)
	case *pb.Event_ModelAnnotated:
		reason = d.modelAnnotated(p.ModelAnnotated)
		push = false
	case *pb.Event_ExperimentChanged:
		reason = d.experimentChanged(p.ExperimentChanged)
	case *pb.Event_RolloutStarted, *pb.Event_RolloutAdvanced, *pb.Event_RollbackStarted,
		*pb.Event_RollbackCompleted, *pb.Event_RolloutEnded, *pb.Event_RolloutHeld, *pb.Event_RolloutResumed,
		*pb.Event_RolloutSteppedBack, *pb.Event_RolloutDraining, *pb.Event_RolloutRamped, *pb.Event_RollbackDrillStarted:
		reason = d.rolloutEvent()
	case *pb.Event_RolloutApproved, *pb.Event_RolloutGateDecided, *pb.Event_RollbackDrillCompleted:
		// Policy does not depend on these, so they cause no push.
		reason = d.rolloutEvent()
		push = false
	case *pb.Event_DeploymentConfigured:
		reason = d.deploymentConfigured(p.DeploymentConfigured)
		push = false
	case *pb.Event_ConfigCanaryStarted:
		reason = d.canaryStarted(p.ConfigCanaryStarted, f)
	case *pb.Event_ConfigCanaryEnded:
		reason = d.canaryEnded(p.ConfigCanaryEnded)
	case *pb.Event_RegionRegistered:
		reason = d.regionRegistered(p.RegionRegistered)
	case *pb.Event_RegionRemoved:
		reason = d.regionRemoved()
	default:
		ours = d.outsidePolicy()
		if !ours {
			return f
		}
		d.position = e.GetPosition()
		return &d.Facts
	}
	d.position = e.GetPosition()
	d.sequences = with(d.sequences, e.GetAggregate(), e.GetSequence())
	if reason != "" {
		// Nothing else changed: handlers write only once they know the event makes sense.
		d.skipped = Skipped{Count: d.skipped.Count + 1, Position: e.GetPosition(), Reason: reason}
		return &d.Facts
	}
	if push {
		d.policyPosition = e.GetPosition()
	}
	return &d.Facts
}

// outsidePolicy applies what compiled policy does not depend on and reports whether the
// event was of that sort.
func (d *draft) outsidePolicy() bool {
	switch p := d.event.GetPayload().(type) {
	case *pb.Event_AlertRaised:
		d.alertRaised(p.AlertRaised)
	case *pb.Event_AlertResolved:
		d.alertResolved()
	case *pb.Event_AlertSilenced:
		d.alertSilenced(p.AlertSilenced)
	case *pb.Event_AlertNotified:
		d.alertNotified(p.AlertNotified)
	case *pb.Event_PushRecorded:
		d.pushed = max(d.pushed, p.PushRecorded.GetPush())
	case *pb.Event_OptimizerRegistered:
		return d.optimizerRegistered(p.OptimizerRegistered)
	case *pb.Event_OptimizerRemoved:
		return d.optimizerRemoved()
	case *pb.Event_OptimizationRecorded:
		return d.optimizationRecorded(p.OptimizationRecorded)
	default:
		return false
	}
	return true
}

// subject returns what follows the aggregate's prefix, or false if it has another one.
func (d *draft) subject(prefix string) (string, bool) {
	name, ok := strings.CutPrefix(d.event.GetAggregate(), prefix)
	return name, ok && name != ""
}

func (d *draft) at() time.Time { return wire.Time(d.event.GetAt()) }

func (d *draft) regionRegistered(p *pb.RegionRegistered) string {
	name, ok := d.subject(RegionPrefix)
	if !ok || p.GetRegion().GetName() != name {
		return "region_registered names another region than its aggregate " + d.event.GetAggregate()
	}
	d.regions = with(d.regions, name, p.GetRegion())
	return ""
}

func (d *draft) regionRemoved() string {
	name, _ := d.subject(RegionPrefix)
	if d.regions[name] == nil {
		return "region_removed of the unknown region " + name
	}
	d.regions = maps.Clone(d.regions)
	delete(d.regions, name)
	return ""
}

// with returns a copy of m with one entry set.
func with[K comparable, V any](m map[K]V, k K, v V) map[K]V {
	out := make(map[K]V, len(m)+1)
	maps.Copy(out, m)
	out[k] = v
	return out
}
