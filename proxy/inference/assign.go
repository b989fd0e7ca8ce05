package inference

import (
	"math/rand/v2"
	"net/http"
	"strconv"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Arms that no policy names, see package policy.
const (
	// ArmUnassigned is the arm of requests that carry no unit. They go to the last good
	// version and have no unit rows; statistics leave the arm out.
	ArmUnassigned = policy.ArmUnassigned
	// ArmLastGood is the arm of requests that were moved off the version their bucket
	// names, because it is quarantined or out of reach, or the dead-man lease has expired.
	ArmLastGood = policy.ArmLastGood
)

// PolicyStatus is how much the current policy can be trusted.
type PolicyStatus struct {
	// Live: the control plane is connected. False: the last good policy is in use.
	Live bool
	// DeadManExpired: the control plane has been out of reach for longer than the
	// dead-man lease. Models with a candidate live (DeadMan > 0) go to LastGood.
	DeadManExpired bool
}

// Assignment is where one logical request goes. All its attempts share it.
type Assignment struct {
	Model   *policy.Model
	Version *policy.Version
	Arm     string
	// Bucket and Unit are set if HasUnit: the bucket rule's 0..9999 and
	// experiments.UnitHash(Salt, unit).
	HasUnit bool
	Bucket  uint32
	Unit    uint32
}

var errNoVersion = outrigger.Errorf(outrigger.Unavailable, "no version of the model may serve: the assigned one is quarantined or unknown and there is no usable last good version")

// Assign applies the assignment rule of ARCHITECTURE.md to one request: pure, no
// allocation for units up to about 100 bytes, safe for concurrent use. unit is "" when
// the request has none. The error has kind Unavailable: no version may serve.
func Assign(m *policy.Model, unit string, st PolicyStatus) (Assignment, error) {
	a := Assignment{Model: m}
	good := usable(m, m.LastGood)
	expired := st.DeadManExpired && m.DeadMan > 0 && good != nil
	if unit == "" {
		a.Arm, a.Version = ArmUnassigned, good
		if a.Version == nil {
			a.Version = champion(m)
		}
		if a.Version == nil {
			return a, errNoVersion
		}
		return a, nil
	}
	a.HasUnit = true
	a.Unit = experiments.UnitHash(m.Salt, unit)
	a.Bucket = uint32(uint64(a.Unit) * experiments.Buckets >> 32) // experiments.Bucket, hashing once
	if arm := m.ArmOf(a.Bucket); arm != nil {
		a.Arm, a.Version = arm.Name, usable(m, arm.Version)
	}
	if a.Version == nil || (expired && a.Version != good) {
		a.Arm, a.Version = ArmLastGood, good
	}
	if a.Version == nil {
		return a, errNoVersion
	}
	return a, nil
}

// usable returns the named version unless it is unknown or quarantined.
func usable(m *policy.Model, name string) *policy.Version {
	if name == "" {
		return nil
	}
	if v := m.Version(name); v != nil && !v.Quarantined {
		return v
	}
	return nil
}

// champion returns the usable version of the widest arm, the first of equals.
func champion(m *policy.Model) *policy.Version {
	var best *policy.Version
	var width uint32
	for i := range m.Arms {
		var n uint32
		for _, r := range m.Arms[i].Ranges {
			n += r.End - r.Start
		}
		if n > width {
			if v := usable(m, m.Arms[i].Version); v != nil {
				best, width = v, n
			}
		}
	}
	return best
}

// Header keys in canonical form: a map index with them neither converts nor allocates.
const (
	hdrUser        = "X-User-Id"
	hdrSession     = "X-Session-Id"
	hdrRequestID   = "X-Request-Id"
	hdrIdempotency = "Idempotency-Key"
)

// unitOf returns what is randomised: the first present of x-user-id,
// safety_identifier, user, user_id of metadata (Anthropic) or parameters (Open Inference
// Protocol); with rule session also x-session-id, prompt_cache_key, sequence_id; with rule
// request also x-request-id, Idempotency-Key, and last a fresh random unit. The
// empty rule is user.
func unitOf[F fieldSource](rule experiments.Unit, h F, e *shape.Envelope) string {
	if u := h.first(hdrUser); u != "" {
		return u
	}
	if e.SafetyIdentifier != "" {
		return e.SafetyIdentifier
	}
	if e.User != "" {
		return e.User
	}
	if e.SubUser != "" {
		return e.SubUser
	}
	if rule != experiments.UnitSession && rule != experiments.UnitRequest {
		return ""
	}
	if u := h.first(hdrSession); u != "" {
		return u
	}
	if e.PromptCacheKey != "" {
		return e.PromptCacheKey
	}
	if e.Sequence != "" || rule != experiments.UnitRequest {
		return e.Sequence
	}
	// Ids that survive a client's retry keep the retry in the same arm.
	if u := h.first(hdrRequestID); u != "" {
		return u
	}
	if u := h.first(hdrIdempotency); u != "" {
		return u
	}
	return strconv.FormatUint(rand.Uint64(), 36)
}

func first(h http.Header, canonical string) string {
	if v := h[canonical]; len(v) > 0 {
		return v[0]
	}
	return ""
}
