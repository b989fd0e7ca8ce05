package facts

import (
	"fmt"
	"maps"
	"strings"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// Rollout is one rollout and who began it. The embedded deploy.Rollout is the fold of
// its aggregate; its Apply must not be called on it.
type Rollout struct {
	deploy.Rollout
	Actor string // of the start
	// EndedAt is the log position of the event that ended it, 0 while it is unfinished.
	EndedAt uint64
}

// Rollout returns the rollout of that id, or nil.
func (f *Facts) Rollout(id string) *Rollout { return f.rollouts[id] }

// Rollouts returns all remembered rollouts by id.
func (f *Facts) Rollouts() []*Rollout { return sorted(f.rollouts) }

// RunningRollouts returns the rollouts that have not ended, those being rolled back
// included, by id: what control/monitor watches.
func (f *Facts) RunningRollouts() []deploy.Rollout {
	var out []deploy.Rollout
	for _, m := range f.Models() {
		if r := f.rollouts[m.Rollout]; r != nil {
			out = append(out, r.Rollout)
			out[len(out)-1].Sequence = f.sequences[RolloutPrefix+r.ID]
		}
	}
	return out
}

// rolloutEvent folds an event of a rollout's aggregate, and what follows from it for the
// model: a start makes the candidate a candidate and pins the last good version, a
// rollback quarantines it, completion makes it the champion. These follow from the one
// event, so there is no moment, and no crash, between them.
func (d *draft) rolloutEvent() string {
	id, ok := d.subject(RolloutPrefix)
	if !ok {
		return fmt.Sprintf("%q is not the aggregate of a rollout", d.event.GetAggregate())
	}
	next := new(Rollout)
	if old := d.rollouts[id]; old != nil {
		*next = *old
	}
	// The log is gapless; what Apply would miss here is an event that was skipped, and one
	// such event must not make the rollout deaf to the rollback that follows it.
	next.Sequence = d.event.GetSequence() - 1
	if err := next.Apply(d.event); err != nil {
		return err.Error()
	}
	_, first := d.event.GetPayload().(*pb.Event_RolloutStarted)
	if why := rolloutFits(d.models[next.Model], next, first); why != "" {
		return why
	}
	if next.State.Ended() {
		next.EndedAt = d.event.GetPosition()
	}
	if first {
		next.Actor = d.event.GetActor()
	}
	d.rollouts = with(d.rollouts, id, next)
	d.forgetRollouts()
	switch d.event.GetPayload().(type) {
	case *pb.Event_RolloutApproved, *pb.Event_RolloutGateDecided, *pb.Event_RollbackDrillCompleted:
		return "" // the model stays as it is, and so does its label
	}
	return d.edit(next.Model, func(m *Model) string {
		m.follow(next, d.event)
		return ""
	})
}

// rolloutFits says why the rollout cannot be one of model m, or "".
func rolloutFits(m *Model, r *Rollout, first bool) string {
	switch {
	case m == nil:
		return fmt.Sprintf("rollout %q is about the unknown model %q", r.ID, r.Model)
	case m.Version(r.Candidate) == nil || m.Version(r.LastGood) == nil:
		return fmt.Sprintf("rollout %q is from %q to %q; model %q does not have both", r.ID, r.LastGood, r.Candidate, m.Name)
	case m.Rollout != r.ID && (m.Rollout != "" || !first):
		return fmt.Sprintf("rollout %q is not the one of model %q, which is %q", r.ID, m.Name, m.Rollout)
	}
	return ""
}

// follow changes the model as the rollout's event demands.
func (m *Model) follow(r *Rollout, e *pb.Event) {
	switch e.GetPayload().(type) {
	case *pb.Event_RolloutStarted:
		m.Rollout = r.ID
		m.Aliases[LastGood] = r.LastGood
		m.setState(r.Candidate, Candidate, "rollout "+r.ID)
	case *pb.Event_RollbackStarted:
		if r.Rollback.GetBlameless() {
			m.setState(r.Candidate, Registered, r.Reason)
		} else {
			m.setState(r.Candidate, Quarantined, r.Reason)
		}
	case *pb.Event_RolloutEnded:
		m.Rollout = ""
		switch v := m.Version(r.Candidate); {
		case r.State == deploy.Completed:
			m.Aliases[Champion] = r.Candidate
			m.setState(r.Candidate, Production, "rollout "+r.ID)
		case v.State == Candidate:
			m.setState(r.Candidate, Registered, strings.TrimSpace("rollout "+r.ID+" ended: "+r.Reason))
		}
	}
}

// forgetRollouts drops the rollout that ended first when too many are remembered.
func (d *draft) forgetRollouts() {
	if len(d.rollouts) <= MaxEndedRollouts {
		return
	}
	oldest := ""
	for id, r := range d.rollouts {
		if r.EndedAt != 0 && (oldest == "" || r.EndedAt < d.rollouts[oldest].EndedAt) {
			oldest = id
		}
	}
	if oldest != "" {
		d.rollouts, d.sequences = maps.Clone(d.rollouts), maps.Clone(d.sequences)
		delete(d.rollouts, oldest)
		delete(d.sequences, RolloutPrefix+oldest)
	}
}
