package facts

import (
	"fmt"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Prefixes of the salts that decide who takes part.
const (
	saltCoverage  = "coverage:"
	saltNamespace = "namespace:"
)

// enrolment compiles who takes part. Coverage has a salt per experiment; all experiments
// of a namespace share one, so that their disjoint ranges share no unit.
func enrolment(e *Experiment, stable string) (out policy.Enrolment) {
	w := e.Enrolment
	out.Target = w.GetTarget()
	if c := w.GetCoverage(); c > 0 && c < experiments.Buckets {
		// From 0 on, so that a wider coverage keeps everybody who takes part.
		out.Gates = append(out.Gates, policy.Gate{Salt: saltCoverage + e.Name, Range: experiments.Range{Start: 0, End: c}})
	}
	if w.GetNamespace() != "" {
		out.Gates = append(out.Gates, policy.Gate{Salt: saltNamespace + w.GetNamespace(), Range: NamespaceRange(w)})
	}
	if out.Limited() {
		out.Version = stable
	}
	return out
}

// NamespaceRange is the buckets of its namespace that an experiment claims.
func NamespaceRange(e *pb.ExperimentEnrolment) experiments.Range {
	r := experiments.Range{Start: e.GetNamespaceStart(), End: e.GetNamespaceEnd()}
	if r.End == 0 {
		r.End = experiments.Buckets
	}
	return r
}

// Crowded says which experiment that has not ended claims buckets of a namespace that e
// would claim too; "" if none does. Whoever ended has released its buckets.
func (f *Facts) Crowded(name string, e *pb.ExperimentEnrolment) string {
	if e.GetNamespace() == "" {
		return ""
	}
	want := NamespaceRange(e)
	for _, o := range f.Experiments() {
		ended := o.State == Concluded || o.State == Stopped || o.State == Archived
		if o.Name == name || ended || o.Enrolment.GetNamespace() != e.GetNamespace() {
			continue
		}
		if has := NamespaceRange(o.Enrolment); want.Start < has.End && has.Start < want.End {
			return fmt.Sprintf("namespace %q: buckets [%d,%d) overlap with [%d,%d) of experiment %q, which is %s; claim others, or end it",
				e.GetNamespace(), want.Start, want.End, has.Start, has.End, o.Name, o.State)
		}
	}
	return ""
}

// crowded is Crowded within the fold: of two replicas that let overlapping claims pass at
// the same moment, the log's order decides, the same everywhere.
func (d *draft) crowded(e *Experiment) string { return d.Facts.Crowded(e.Name, e.Enrolment) }
