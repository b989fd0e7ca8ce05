package inference

import (
	"net/http"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// HeaderForce carries a grant (identity.Grant) that sends a request to an arm on purpose.
const HeaderForce = "x-outrigger-force"

const hdrForce = "X-Outrigger-Force"

// Enrolment is a model's, ready to be asked. A nil one includes everybody.
type Enrolment struct {
	e      *policy.Enrolment
	target *expr.Target // nil = none
	broken bool         // the target does not compile here
}

// CompileEnrolment returns nil for a model whose experiment everybody takes part in. With
// a target that does not compile (a control plane of another version wrote it) nobody
// does; the error, of kind Invalid, says why and comes beside the Enrolment.
func CompileEnrolment(e *policy.Enrolment) (*Enrolment, error) {
	if !e.Limited() {
		return nil, nil
	}
	out := &Enrolment{e: e}
	if e.Target == "" {
		return out, nil
	}
	var err error
	out.target, err = expr.CompileTarget(e.Target)
	out.broken = err != nil
	return out, err
}

// Includes reports whether the subject takes part. Gates are asked first and cost no
// allocation; the target costs microseconds.
func (e *Enrolment) Includes(s expr.Subject) bool {
	switch {
	case e == nil:
		return true
	case e.broken || !e.e.Admits(s.Unit):
		return false
	case e.target == nil:
		return true
	}
	yes, _ := e.target.Matches(s) // what cannot be decided enrols nobody
	return yes
}

// Outside is where a unit goes that takes no part in the model's experiment: the
// enrolment's version, else the last good one. It has no bucket and no unit row. The
// error is that of Assign.
func Outside(m *policy.Model) (Assignment, error) {
	if v := usable(m, m.Enrolment.Version); v != nil {
		return Assignment{Model: m, Arm: policy.ArmNotEnrolled, Version: v}, nil
	}
	if v := usable(m, m.LastGood); v != nil {
		return Assignment{Model: m, Arm: ArmLastGood, Version: v}, nil
	}
	return Assignment{Model: m}, errNoVersion
}

// Forced is where a grant sends a request: to the version of the arm it names, as no
// arm's sample. ok is false if the grant is for another experiment, the arm is unknown or
// its version may not serve.
func Forced(m *policy.Model, g identity.Grant) (a Assignment, ok bool) {
	if m.Experiment == "" || g.Experiment != m.Experiment {
		return a, false
	}
	for i := range m.Arms {
		if m.Arms[i].Name != g.Arm {
			continue
		}
		v := usable(m, m.Arms[i].Version)
		return Assignment{Model: m, Arm: policy.ArmForced, Version: v}, v != nil
	}
	return a, false
}

var errGrant = outrigger.Errorf(outrigger.Unauthorised, "%s is not accepted: it is not signed by the mesh's keys, has ended, or names an experiment or arm that this model does not have", HeaderForce)

// assignTo decides where a request goes: by grant, by enrolment, by bucket. The error has
// kind Unauthorised for a grant that does not hold, which must not quietly become a
// sample, else Unavailable.
func assignTo[F fieldSource](h *Handler, mp *modelPlan, m *policy.Model, unit string, f F, st PolicyStatus, now time.Time) (Assignment, error) {
	if text := f.first(hdrForce); text != "" {
		if h.o.Grants == nil {
			return Assignment{Model: m}, errGrant
		}
		g, err := h.o.Grants(text, now)
		if err != nil {
			return Assignment{Model: m}, errGrant
		}
		a, ok := Forced(m, g)
		if !ok {
			return Assignment{Model: m}, errGrant
		}
		return a, nil
	}
	if mp.enrolment != nil && unit != "" && !mp.enrolment.Includes(expr.Subject{Unit: unit, Model: m.Name, Region: h.o.Region,
		Attribute: func(name string) (string, bool) {
			v := f.first(http.CanonicalHeaderKey(name))
			return v, v != ""
		}}) {
		return Outside(m)
	}
	return Assign(m, unit, st)
}
