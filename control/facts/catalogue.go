package facts

import (
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/models"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Model is one logical model: the name apps write in their requests.
type Model struct {
	Name     string
	Versions []Version // in order of registration
	Aliases  map[string]string
	Unit     experiments.Unit
	// Timeout and MaxAttempts are 0 when not configured.
	Timeout     time.Duration
	MaxAttempts uint32
	// Limits of each version; zero fields are not configured.
	Limits Limits
	// Description and Tags decide nothing and may change; Cost is the formula of what a
	// version costs, empty if there is none.
	Description string
	Tags        map[string]string
	Cost        string
	// CreatedAt and TouchedAt are the times of the first and the last event about it.
	CreatedAt, TouchedAt time.Time
	// Rollout is the id of the rollout that has not ended, Experiment the name of the
	// running experiment; empty if none.
	Rollout    string
	Experiment string

	// Split is how requests are divided now.
	Split Split
	// WeightEpoch is the log position of the last event that changed Split.
	WeightEpoch uint64
	// ChangedAt is the log position of the last event that changed anything above.
	ChangedAt uint64
}

// Version is one immutable deployable thing behind a model.
type Version struct {
	Name         string
	Upstream     string // as the endpoints know it; never empty
	Endpoints    []policy.Endpoint
	TLS          *policy.TLS // how they are reached; nil = in the clear
	Metadata     map[string]string
	State        string
	Reason       string
	RegisteredAt time.Time
	RequestID    string // of the registration

	Number     int32 // 1, 2, 3, … in order of registration
	Digest     string
	Parameters map[string]string
	Pins       map[string]int32
	Parents    []string
	Artifact   string

	// Shadow is the share, in parts of experiments.Buckets, of the units whose requests a
	// shadow gets copies of; 0 in every other state.
	Shadow uint32
	// Description and Tags decide nothing and may change. ChangedAt is when they or the
	// state last did.
	Description string
	Tags        map[string]string
	ChangedAt   time.Time
}

// Catalogued reports whether the model is only written down: none of its versions could
// ever answer, because none has an endpoint.
func (m *Model) Catalogued() bool {
	return !slices.ContainsFunc(m.Versions, func(v Version) bool { return len(v.Endpoints) > 0 })
}

// Content is what the version's digest covers.
func (v *Version) Content() models.Content {
	return models.Content{Upstream: v.Upstream, Artifact: v.Artifact, Parameters: v.Parameters, Pins: v.Pins}
}

// Servable reports whether the version may receive requests.
func (v *Version) Servable() bool {
	return v != nil && v.State != Quarantined && v.State != Retired && len(v.Endpoints) > 0
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
