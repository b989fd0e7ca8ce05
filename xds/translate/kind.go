package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Kind is a kind of xDS client. Each gets the same policy in the form it obeys.
type Kind string

// The kinds. KindGRPC is any proxyless gRPC client: grpc-go, C-core (Python, C++, Ruby)
// and grpc-js understand the same subset.
const (
	KindSidecar Kind = "sidecar"
	KindGRPC    Kind = "grpc"
	KindEnvoy   Kind = "envoy"
)

// Kinds lists all kinds.
func Kinds() []Kind { return []Kind{KindSidecar, KindGRPC, KindEnvoy} }

// kindOfAgent reads the user agent a foreign client sends in its node: "envoy", or
// "gRPC Go", "gRPC C-core linux …", "gRPC Node Pure JS" and the like. Anything else is
// unknown, "".
func kindOfAgent(n *core.Node) Kind {
	agent := strings.ToLower(n.GetUserAgentName())
	switch {
	case agent == "envoy":
		return KindEnvoy
	case strings.HasPrefix(agent, "grpc"):
		return KindGRPC
	}
	return ""
}

// Support says how a kind of client obeys a feature.
type Support string

// The levels of support, from best to worst.
const (
	Full    Support = "full"
	Approx  Support = "approximate" // obeyed in another form; Note says how it differs
	Ignored Support = "ignored"     // the client goes on without it; Note says what happens
)

// Capability is one cell of the capability table.
type Capability struct {
	Support Support
	Note    string // empty when Full
}

// Feature is one row of the capability table: something a policy may ask for.
type Feature struct {
	Name string
	// Uses lists what in the policy asks for it, as "model" or "model/version".
	uses func(*policy.Policy) []string
	By   map[Kind]Capability
}

// Problem is one feature a policy uses that a kind of client does not fully obey.
type Problem struct {
	Kind    Kind
	Feature string
	Capability
	// Where are the models or versions that use the feature, sorted.
	Where []string
}

// String returns one line for a log or a terminal.
func (p Problem) String() string {
	const most = 3
	where := strings.Join(p.Where[:min(most, len(p.Where))], ", ")
	if n := len(p.Where) - most; n > 0 {
		where += fmt.Sprintf(" and %d more", n)
	}
	return fmt.Sprintf("%s clients: %s of %s is %s: %s", p.Kind, p.Feature, where, p.Support, p.Note)
}

// Lint lists what a kind of client does not fully obey of a policy, in the order of
// Features. Nothing of a policy is left out of a set silently: it is either carried or
// named here.
func Lint(p *policy.Policy, kind Kind) []Problem {
	var out []Problem
	for _, f := range Features() {
		c := f.By[kind]
		if c.Support == Full {
			continue
		}
		if where := f.uses(p); len(where) > 0 {
			slices.Sort(where)
			out = append(out, Problem{Kind: kind, Feature: f.Name, Capability: c, Where: slices.Compact(where)})
		}
	}
	return out
}

// Features is the capability table. The tests with real clients hold its "full" cells.
func Features() []Feature {
	full, approx, ignored := Capability{Support: Full}, cell(Approx), cell(Ignored)
	all := func(sidecar, grpc, envoy Capability) map[Kind]Capability {
		return map[Kind]Capability{KindSidecar: sidecar, KindGRPC: grpc, KindEnvoy: envoy}
	}
	return []Feature{
		{"split", models(func(m *policy.Model) bool { return len(m.Arms) > 1 }), all(full, full, full)},
		{"assignment by unit", models(func(m *policy.Model) bool { return len(m.Arms) > 1 }), all(full,
			approx("the application must send "+bucketHeader+"; calls without it are split by weight, each for itself"),
			approx("units are read from headers and the fields model, user, safety_identifier, prompt_cache_key, metadata and parameters of JSON bodies, models named in paths are not seen"))},
		{"settings of arms", models(func(m *policy.Model) bool {
			return slices.ContainsFunc(m.Arms, func(a policy.Arm) bool { return len(a.Settings) > 0 })
		}), all(full, ignored("applications find settings at a sidecar only (OFREP)"), ignored("applications find settings at a sidecar only (OFREP)"))},
		{"enrolment", models(func(m *policy.Model) bool { return m.Enrolment.Limited() }), all(full,
			approx("nobody takes part: all calls get the version of those who do not"),
			approx("nobody takes part: all calls get the version of those who do not"))},
		{"upstream model name", versions(func(m *policy.Model, v *policy.Version) bool { return v.Upstream != "" && v.Upstream != m.Name }), all(full,
			ignored("the body is not rewritten; the endpoint must accept the model's logical name"),
			ignored("the body is not rewritten; the endpoint must accept the model's logical name"))},
		{"dead-man lease", models(func(m *policy.Model) bool { return m.DeadMan > 0 }), all(full,
			ignored("a client that is cut off keeps the candidate"),
			full)},
		{"quarantine", versions(func(_ *policy.Model, v *policy.Version) bool { return v.Quarantined }), all(full, full, full)},
		{"failover to the last good version", models(func(m *policy.Model) bool { return m.LastGood != "" }), all(full, full, full)},
		{"concurrent requests", versions(func(_ *policy.Model, v *policy.Version) bool { return v.MaxRequests > 0 }), all(full,
			approx("grpc-js counts calls once they have begun, so a burst begun at once exceeds the limit"), full)},
		{"connections and pending requests", versions(func(_ *policy.Model, v *policy.Version) bool {
			return cmp.Or(v.MaxConnections, v.MaxRequests) != v.MaxRequests || cmp.Or(v.MaxPending, v.MaxRequests) != v.MaxRequests
		}), all(approx("of HTTP/1.1; requests share connections of HTTP/2"), ignored("requests share connections"), full)},
		{"concurrent retries", versions(func(_ *policy.Model, v *policy.Version) bool { return v.MaxRetries > 0 }), all(full,
			ignored("retries are not counted apart"), full)},
		{"ejection after consecutive failures", versions(func(_ *policy.Model, v *policy.Version) bool { return v.ConsecutiveFailures > 0 }), all(full,
			approx(fmt.Sprintf("gRPC ejects by share of failures: %d %% of at least that many calls within %v", grpcFailurePercent, ejectionInterval)), full)},
		{"endpoint weights", versions(endpointWeightsDiffer), all(full,
			approx("regions are weighted by the sum of their endpoints; within a region endpoints take turns"), full)},
		{"TLS to endpoints", versions(func(_ *policy.Model, v *policy.Version) bool { return v.TLS != nil }), all(full,
			approx("gRPC has no SDS: a client needs xDS credentials and, in its bootstrap, the certificate provider "+ProviderInstance+" with the trust bundle and certificate; without them its calls fail, and none goes out in the clear"),
			approx("copies for shadows keep the application's Host, and with several server names in one version Host has no port"))},
		{"priorities", versions(func(_ *policy.Model, v *policy.Version) bool {
			return slices.ContainsFunc(v.Endpoints, func(e policy.Endpoint) bool { return e.Priority > 0 })
		}), all(full, approx("a priority takes over when the one before is out altogether, no sooner"), full)},
		{"retries", models(func(m *policy.Model) bool { return m.MaxAttempts > 1 }), all(full,
			approx("only calls that failed before any answer began are retried, at most 5 attempts"), full)},
		{"timeout", models(func(m *policy.Model) bool { return m.Timeout > 0 }), all(full, full, full)},
		{"shadow traffic", models(func(m *policy.Model) bool { return len(m.Shadows) > 0 }), all(full,
			ignored("gRPC has no request_mirror_policies; nothing is copied"),
			approx("bodies are copied as they are, and what shadows answer is not reported by Envoy"))},
		{"shedding", versions(func(_ *policy.Model, v *policy.Version) bool { return v.Shed > 0 }), all(
			ignored("sidecars do not shed yet"), full, full)},
		{"fault injection", models(func(m *policy.Model) bool { return m.Fault != policy.Fault{} }), all(
			ignored("sidecars inject no faults yet"),
			approx("grpc-js takes faults up, and ends them, with the next change of the model's routes"), full)},
		{"access rules", models(func(m *policy.Model) bool { return len(m.Access) > 0 }), all(
			ignored("sidecars do not enforce them yet"),
			ignored("gRPC enforces access in servers only; enforce it at the endpoint"), full)},
	}
}

// bucketHeader is spelled here so that the table reads well.
const bucketHeader = "x-outrigger-bucket"

func cell(s Support) func(note string) Capability {
	return func(note string) Capability { return Capability{Support: s, Note: note} }
}

func models(uses func(*policy.Model) bool) func(*policy.Policy) []string {
	return func(p *policy.Policy) (out []string) {
		for i := range p.Models {
			if uses(&p.Models[i]) {
				out = append(out, p.Models[i].Name)
			}
		}
		return out
	}
}

func versions(uses func(*policy.Model, *policy.Version) bool) func(*policy.Policy) []string {
	return func(p *policy.Policy) (out []string) {
		for i := range p.Models {
			m := &p.Models[i]
			for j := range m.Versions {
				if uses(m, &m.Versions[j]) {
					out = append(out, m.Name+"/"+m.Versions[j].Name)
				}
			}
		}
		return out
	}
}

// endpointWeightsDiffer: two endpoints of one region and priority weigh differently.
func endpointWeightsDiffer(_ *policy.Model, v *policy.Version) bool {
	es := slices.Clone(v.Endpoints)
	slices.SortFunc(es, func(a, b policy.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Region, b.Region), cmp.Compare(a.Weight, b.Weight))
	})
	for i := 1; i < len(es); i++ {
		a, b := es[i-1], es[i]
		if a.Priority == b.Priority && a.Region == b.Region && a.Weight != b.Weight {
			return true
		}
	}
	return false
}

// killKey is the runtime key of a version: the percentage, 0 or 100, of its buckets that
// it serves; the last good version serves the others.
func killKey(model, version string) string { return "outrigger.serve." + model + "/" + version }

// serves is the percentage a version serves.
func serves(v *policy.Version) uint32 {
	if v.Quarantined {
		return 0
	}
	return 100
}
