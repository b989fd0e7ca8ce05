// Package policy is the typed, immutable routing policy of one node group: what the
// control plane decides and every sidecar obeys. It is pure data plus validation;
// xds/translate turns it into standard xDS and back.
//
// A Policy is never modified after Validate has accepted it; it is published behind
// one atomic pointer and may be read by any number of goroutines.
package policy

import (
	"time"

	"github.com/outrigger-mesh/outrigger/experiments"
)

// Policy is everything one sidecar needs to route. Same log position ⇒ same bytes on
// every replica, so all slices are sorted by name (Normalise does it).
type Policy struct {
	// Position is the log position it was compiled from.
	Position uint64
	Models   []Model
	Regions  []Region
}

// Model maps the logical name an app writes in its request to versions.
type Model struct {
	Name string
	// Salt of the bucket rule; changes only when a new randomisation is wanted.
	Salt string
	// Unit is what is randomised: the first present of user, session, request up to
	// and including this one.
	Unit experiments.Unit
	// WeightEpoch counts changes of weights; statistics never pool across epochs.
	WeightEpoch uint64
	// Arms cover the buckets [0, experiments.Buckets) exactly once, together.
	Arms []Arm
	// Experiment is the name of the experiment whose arms these are; empty if none.
	Experiment string
	// Enrolment says who is divided between the arms; the zero value is everybody.
	Enrolment Enrolment
	// Versions are all versions an arm may name, plus LastGood.
	Versions []Version
	// Shadows are versions that get copies of requests and answer them to nobody.
	Shadows []Shadow
	// LastGood is the version to fall back to; empty if none. It also takes over the
	// buckets of arms whose version is quarantined.
	LastGood string
	// DeadMan: with a candidate live, a sidecar cut off for longer sends everything to
	// LastGood. 0 = no candidate live.
	DeadMan time.Duration
	// Timeout of a whole logical request, 0 = DefaultTimeout; MaxAttempts ≥ 1.
	Timeout     time.Duration
	MaxAttempts uint32
	// Fault is injected into requests of the model on purpose; the zero value is none.
	Fault Fault
	// Access lists who may use the model: a request must carry one of the headers with
	// its exact value. Empty = everyone. A header is only as trustworthy as what sets it.
	Access []Access
}

// Shadow is a version that gets copies of the requests of a share of the units: those in
// the last Share of the model's buckets, because a candidate gets the first. Requests
// without a unit are not copied.
type Shadow struct {
	Version string
	Share   uint32 // 1..experiments.Buckets
}

// Mirrors reports whether requests of the bucket are copied.
func (s *Shadow) Mirrors(bucket uint32) bool { return bucket >= experiments.Buckets-s.Share }

// Enrolment says which units take part in an experiment.
type Enrolment struct {
	// Target is a condition over the request, see expr.CompileTarget; empty = everybody.
	Target string
	// Gates must all hold the unit: coverage, namespaces.
	Gates []Gate
	// Version serves units that do not take part; needed with Target or Gates.
	Version string
}

// Limited reports whether anybody with a unit may be left out.
func (e *Enrolment) Limited() bool { return e.Target != "" || len(e.Gates) > 0 }

// Gate holds the units of one range of buckets under a salt of its own.
type Gate struct {
	Salt string
	experiments.Range
}

// Admits reports whether all gates hold the unit. No allocation for units up to about
// 100 bytes.
func (e *Enrolment) Admits(unit string) bool {
	for i := range e.Gates {
		g := &e.Gates[i]
		if b := experiments.Bucket(g.Salt, unit); b < g.Start || b >= g.End {
			return false
		}
	}
	return true
}

// Fault is chaos for tests of an application: a share of the requests, chosen at random
// and independently, is delayed and a share is answered with an error instead of being
// sent. Shares are parts of experiments.Buckets.
type Fault struct {
	AbortShare  uint32
	AbortStatus uint32 // HTTP, 200..599; needed with AbortShare
	DelayShare  uint32
	Delay       time.Duration // above 0 with DelayShare
}

// Access is one header value that opens a model.
type Access struct{ Header, Value string }

// Arms that sidecars report and no split may name. Requests under them were assigned by
// nobody's choice of weights, so statistics that compare arms leave them out.
const (
	// ArmUnassigned is the arm of requests without a unit.
	ArmUnassigned = "unassigned"
	// ArmLastGood is the arm of requests that LastGood serves instead of the version
	// their bucket names.
	ArmLastGood = "last-good"
	// ArmNotEnrolled is the arm of units that take no part in the model's experiment.
	ArmNotEnrolled = "not-enrolled"
	// ArmForced is the arm of requests that a tester sent to an arm on purpose.
	ArmForced = "forced"
	// ArmShadow is the arm of copies of requests that a shadow version answers to nobody.
	ArmShadow = "shadow-copy"
)

// Assigned reports whether an arm is one that units are assigned to.
func Assigned(arm string) bool {
	switch arm {
	case ArmUnassigned, ArmLastGood, ArmNotEnrolled, ArmForced, ArmShadow:
		return false
	}
	return true
}

// Arm is one variant of the split.
type Arm struct {
	Name    string
	Version string
	Ranges  []experiments.Range
	// Settings are what applications find under this arm, by name.
	Settings []Setting
}

// Setting is one value an arm gives to applications, as JSON.
type Setting struct{ Name, JSON string }

// Version is one deployable thing behind a model; it becomes one xDS cluster.
type Version struct {
	Name string
	// Upstream is the model name its endpoints know.
	Upstream    string
	Quarantined bool
	// Pins are the variables its answers depend on, SESSION/NAME of the default tenant: an
	// answer from memory counts only while none of them has changed.
	Pins      []string
	Endpoints []Endpoint
	// TLS says how its endpoints are reached over TLS; nil = in the clear.
	TLS *TLS `json:",omitempty"`
	// MaxRequests and the failure thresholds become circuit_breakers and
	// outlier_detection; 0 = the package defaults.
	MaxRequests         uint32
	ConsecutiveFailures uint32
	OpenFor             time.Duration
	// MaxConnections bounds the connections that carry requests to all endpoints together,
	// MaxPending the requests that wait for one; 0 = MaxRequests, which then decides alone.
	// MaxRetries bounds the retries in flight; 0 = none of its own beyond the retry budget.
	MaxConnections, MaxPending, MaxRetries uint32
	// Shed is the share of requests refused on purpose, in parts of experiments.Buckets:
	// what an overloaded version is relieved by.
	Shed uint32
}

// Endpoint is one address serving a version.
type Endpoint struct {
	Address  string // host:port
	Region   string
	Weight   uint32 // ≥ 1
	Priority uint32 // 0 first; only the order counts, see Normalise
}

// Region is what sidecars know about a region for ordering candidates.
type Region struct {
	Name      string
	Gateway   string // host:port
	Latitude  float64
	Longitude float64
	Healthy   bool
}

// Defaults for zero fields of Version, and of Model where said.
const (
	DefaultMaxRequests         = 1024
	DefaultConsecutiveFailures = 5
	DefaultOpenFor             = 10 * time.Second
	DefaultTimeout             = 10 * time.Minute // of Model
)

// Model returns the model of that name, or nil. O(log n); no allocation.
func (p *Policy) Model(name string) *Model {
	lo, hi := 0, len(p.Models)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if p.Models[mid].Name < name {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(p.Models) && p.Models[lo].Name == name {
		return &p.Models[lo]
	}
	return nil
}

// Version returns the version of that name, or nil.
func (m *Model) Version(name string) *Version {
	for i := range m.Versions {
		if m.Versions[i].Name == name {
			return &m.Versions[i]
		}
	}
	return nil
}

// Serving returns the version that serves the arm: its own, or LastGood while its own
// is quarantined; nil if neither exists.
func (m *Model) Serving(a *Arm) *Version {
	v := m.Version(a.Version)
	if v != nil && v.Quarantined && m.LastGood != "" {
		return m.Version(m.LastGood)
	}
	return v
}

// Weight is the number of buckets the arm owns, 0..experiments.Buckets for a valid model.
func (a *Arm) Weight() uint32 {
	var n uint32
	for _, r := range a.Ranges {
		n += r.End - r.Start
	}
	return n
}

// ArmOf returns the arm whose ranges hold the bucket, or nil. No allocation.
func (m *Model) ArmOf(bucket uint32) *Arm {
	for i := range m.Arms {
		for _, r := range m.Arms[i].Ranges {
			if bucket >= r.Start && bucket < r.End {
				return &m.Arms[i]
			}
		}
	}
	return nil
}
