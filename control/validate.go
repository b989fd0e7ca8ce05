package control

import (
	"strings"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Limits of the admin API. They bound what facts hold in memory.
const (
	MaxModels      = policy.MaxModels
	MaxVersions    = policy.MaxVersions // per model, whatever their state
	MaxExperiments = 10_000
	MaxReasonBytes = 4096
	MaxModelName   = 200  // bytes; leaves room for prefixes in salts and cluster names
	maxLimit       = 1000 // of every list call
	defaultLimit   = 100
)

func invalid(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Invalid, format, args...)
}

func denied(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Denied, format, args...)
}

func locked(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Locked, format, args...)
}

// checkModelName allows '/', since applications ask for published models by names that hold
// it; where a name has to be one path segment (ids of rollouts and alerts), nameOf makes it one.
func checkModelName(s string) error {
	if len(s) > MaxModelName {
		return invalid("model is %d bytes long, the limit is %d; shorten it", len(s), MaxModelName)
	}
	return outrigger.CheckName("model", nameOf(s))
}

// nameOf is a model's name with '-' for '/', which names of other things must not hold.
func nameOf(model string) string { return strings.ReplaceAll(model, "/", "-") }

func checkReason(s string) error {
	if len(s) > MaxReasonBytes || !utf8.ValidString(s) {
		return invalid("reason is %d bytes long or not UTF-8; the limit is %d bytes of UTF-8", len(s), MaxReasonBytes)
	}
	return nil
}

func checkMetadata(m map[string]string) error {
	if len(m) > outrigger.MaxMetadataPairs {
		return invalid("metadata has %d pairs, the limit is %d", len(m), outrigger.MaxMetadataPairs)
	}
	size := 0
	for k, v := range m {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return invalid("metadata %q is not valid UTF-8", k)
		}
		size += len(k) + len(v)
	}
	if size > outrigger.MaxMetadataBytes {
		return invalid("metadata is %d bytes, the limit is %d", size, outrigger.MaxMetadataBytes)
	}
	return nil
}

func checkRegistration(r *pb.RegisterModelVersionRequest) error {
	if err := checkModelName(r.GetModel()); err != nil {
		return err
	}
	if err := outrigger.CheckName("version", r.GetVersion()); err != nil {
		return err
	}
	if n := len(r.GetUpstreamModel()); n > outrigger.MaxNameBytes {
		return invalid("upstream_model is %d bytes long, the limit is %d", n, outrigger.MaxNameBytes)
	}
	if err := checkMetadata(r.GetMetadata()); err != nil {
		return err
	}
	c := registered(r)
	if err := c.Check(); err != nil {
		return err
	}
	if err := c.CheckExpected(r.GetDigest()); err != nil {
		return err
	}
	if r.GetWithoutEndpoints() && len(r.GetEndpoints()) == 0 {
		return facts.TLS(r.GetTls()).Validate(nil)
	}
	if err := checkEndpoints(r.GetEndpoints()); err != nil {
		return err
	}
	endpoints := make([]policy.Endpoint, len(r.GetEndpoints()))
	for i, e := range r.GetEndpoints() {
		endpoints[i].Address = e.GetAddress()
	}
	return facts.TLS(r.GetTls()).Validate(endpoints)
}

func checkEndpoints(es []*pb.Endpoint) error {
	if n := len(es); n == 0 || n > policy.MaxEndpoints {
		return invalid("endpoints has %d entries, allowed is 1..%d", n, policy.MaxEndpoints)
	}
	seen := make(map[string]bool, len(es))
	for i, e := range es {
		if _, _, err := policy.SplitAddress(e.GetAddress()); err != nil {
			return outrigger.Errorf(outrigger.Invalid, "endpoints[%d]: %v", i, err)
		}
		if seen[e.GetAddress()] {
			return invalid("endpoints[%d] repeats %s; give each address once", i, e.GetAddress())
		}
		seen[e.GetAddress()] = true
		if e.GetWeight() > policy.MaxWeight {
			return invalid("endpoints[%d] has weight %d, allowed is 1..%d (0 is read as 1)", i, e.GetWeight(), policy.MaxWeight)
		}
		if e.GetRegion() != "" {
			if err := outrigger.CheckName("region", e.GetRegion()); err != nil {
				return outrigger.Errorf(outrigger.Invalid, "endpoints[%d]: %v", i, err)
			}
		}
	}
	return nil
}

// checkArms checks the arms of an experiment against the versions of its model.
func checkArms(m *facts.Model, arms []*pb.ExperimentArm) error {
	if n := len(arms); n < 2 || n > policy.MaxArms-1 {
		return invalid("arms has %d entries, allowed is 2..%d", n, policy.MaxArms-1)
	}
	weights := make([]experiments.Weighted, len(arms))
	for i, a := range arms {
		if err := outrigger.CheckName("arms.name", a.GetName()); err != nil {
			return err
		}
		if !policy.Assigned(a.GetName()) {
			return invalid("arm name %q is reserved for requests outside of the split; choose another", a.GetName())
		}
		v := m.Version(a.GetVersion())
		if v == nil {
			return outrigger.Errorf(outrigger.NotFound, "arm %q: version %q of model %q not found; registered are %s", a.GetName(), a.GetVersion(), m.Name, versionNames(m))
		}
		if !v.Servable() {
			return locked("arm %q: version %q of model %q is %s; only registered and production versions may be tested", a.GetName(), v.Name, m.Name, v.State)
		}
		if a.GetWeight() == 0 || a.GetWeight() >= experiments.Buckets {
			return invalid("arm %q has weight %d, allowed is 1..%d parts of %d; an arm that gets nobody cannot be compared", a.GetName(), a.GetWeight(), experiments.Buckets-1, experiments.Buckets)
		}
		weights[i] = experiments.Weighted{Name: a.GetName(), Weight: a.GetWeight()}
	}
	_, err := experiments.Allocate(weights)
	return err
}

// checkEnrolment checks who is to take part in an experiment.
func checkEnrolment(f *facts.Facts, name string, e *pb.ExperimentEnrolment) error {
	if e == nil {
		return nil
	}
	if e.GetTarget() != "" {
		if _, err := expr.CompileTarget(e.GetTarget()); err != nil {
			return err
		}
	}
	if e.GetCoverage() > experiments.Buckets {
		return invalid("coverage is %d, allowed is 1..%d, or 0 for all", e.GetCoverage(), experiments.Buckets)
	}
	r := facts.NamespaceRange(e)
	if e.GetNamespace() == "" {
		if e.GetNamespaceStart() != 0 || e.GetNamespaceEnd() != 0 {
			return invalid("namespace is empty, but its buckets are [%d,%d); name it, or leave them out", r.Start, r.End)
		}
		return nil
	}
	if err := outrigger.CheckName("namespace", e.GetNamespace()); err != nil {
		return err
	}
	if len(e.GetNamespace()) > MaxModelName {
		return invalid("namespace is %d bytes long, the limit is %d; shorten it", len(e.GetNamespace()), MaxModelName)
	}
	if r.Start >= r.End || r.End > experiments.Buckets {
		return invalid("buckets of namespace %q are [%d,%d); write 0 ≤ start < end ≤ %d", e.GetNamespace(), r.Start, r.End, experiments.Buckets)
	}
	if why := f.Crowded(name, e); why != "" {
		return invalid("%s", why)
	}
	return nil
}

func versionNames(m *facts.Model) string {
	if len(m.Versions) == 0 {
		return "none"
	}
	names := make([]string, len(m.Versions))
	for i := range m.Versions {
		names[i] = m.Versions[i].Name
	}
	return strings.Join(names, ", ")
}

// listLimit reads the limit field of list calls.
func listLimit(n int32) (int, error) {
	switch {
	case n == 0:
		return maxLimit, nil
	case n < 0 || n > maxLimit:
		return 0, invalid("limit is %d, allowed is 1..%d, or 0 for %d", n, maxLimit, maxLimit)
	}
	return int(n), nil
}
