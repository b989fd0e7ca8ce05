// Package outrigger is the vocabulary every part of the mesh shares: keys, typed
// values and their constraints, versions, sessions, regions, nodes, consistency
// levels and the one documented set of errors.
//
// It holds data and the rules that make data valid, nothing else: it imports the
// standard library only, starts no goroutine, never reads a clock and never does
// I/O. Everything here is an immutable value once built and may be shared between
// goroutines; slices and maps inside a value must not be modified after it has
// been handed to somebody else.
package outrigger

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits every component enforces on its inputs. They bound memory per entry and
// keep identifiers printable in logs, headers and xDS resource names.
const (
	MaxNameBytes     = 256     // tenant, session and variable name, each
	MaxValueBytes    = 4 << 20 // JSON plus binary part of one value
	MaxMetadataPairs = 64
	MaxMetadataBytes = 16 << 10 // all keys and values of one metadata map together
	MaxBatch         = 1000     // keys in one batch call
	MaxHistory       = 1000     // versions returned by one history call
)

// DefaultTenant is the tenant of callers that name none.
const DefaultTenant = "default"

// Key identifies one variable. All three parts are non-empty, at most MaxNameBytes
// of UTF-8, and free of control characters and of '/', which separates the parts in
// the text form.
type Key struct {
	Tenant  string
	Session string
	Name    string
}

// String returns "tenant/session/name".
func (k Key) String() string { return k.Tenant + "/" + k.Session + "/" + k.Name }

// ParseKey reads the text form written by String. "session/name" is accepted as
// shorthand for the default tenant. Errors have kind Invalid.
func ParseKey(s string) (Key, error) {
	parts := strings.SplitN(s, "/", 4)
	var k Key
	switch len(parts) {
	case 2:
		k = Key{Tenant: DefaultTenant, Session: parts[0], Name: parts[1]}
	case 3:
		k = Key{Tenant: parts[0], Session: parts[1], Name: parts[2]}
	default:
		return Key{}, Errorf(Invalid, "key %q has %d parts; write tenant/session/name or session/name", clip([]byte(s)), strings.Count(s, "/")+1)
	}
	if err := k.Validate(); err != nil {
		return Key{}, err
	}
	return k, nil
}

// Validate reports the first part of the key that breaks a rule.
func (k Key) Validate() error {
	if err := CheckName("tenant", k.Tenant); err != nil {
		return err
	}
	if err := CheckName("session", k.Session); err != nil {
		return err
	}
	return CheckName("name", k.Name)
}

// CheckName applies the identifier rules to one value; field names it in the error,
// which has kind Invalid.
func CheckName(field, s string) error {
	switch {
	case s == "":
		return Errorf(Invalid, "%s is empty; give 1 to %d bytes", field, MaxNameBytes)
	case len(s) > MaxNameBytes:
		return Errorf(Invalid, "%s is %d bytes long, the limit is %d; shorten it", field, len(s), MaxNameBytes)
	case !utf8.ValidString(s):
		return Errorf(Invalid, "%s %q is not valid UTF-8", field, s)
	}
	for _, r := range s {
		if unicode.IsControl(r) || r == '/' {
			return Errorf(Invalid, "%s %q contains %q; control characters and '/' are not allowed", field, s, r)
		}
	}
	return nil
}

// Dot names one write uniquely across the whole mesh: the region whose log ordered
// it, the incarnation of that log, and its position there (positions start at 1).
// The zero Dot means "no write".
type Dot struct {
	Region      string
	Incarnation uint64
	Position    uint64
}

// IsZero reports whether d names no write.
func (d Dot) IsZero() bool { return d.Position == 0 }

// String returns "region@incarnation:position".
func (d Dot) String() string { return fmt.Sprintf("%s@%x:%d", d.Region, d.Incarnation, d.Position) }

// Version identifies one value of one variable.
//
//   - Counter is what clients see and compare: 0 at registration, plus one per
//     accepted set. It is per variable.
//   - Dot is the write that produced the value.
//   - Context holds, per region, the highest position of writes to this variable the
//     writer had seen, including its own. A version a dominates b if and only if
//     a.Context[b.Dot.Region] ≥ b.Dot.Position; if neither dominates they are
//     concurrent. The algebra is in cache/version.
//   - HLC is a hybrid logical clock stamp (48 bits of milliseconds, 16 bits of
//     logical counter) used only to break ties between concurrent versions.
type Version struct {
	Counter int32
	Dot     Dot
	Context map[string]uint64
	HLC     uint64
}

// Variable is one typed, versioned value together with what was declared about it.
type Variable struct {
	ID          string // "var_<name>_<n>", assigned at registration, unique per session
	Key         Key
	Value       Value
	Constraints Constraints
	Metadata    map[string]string
	Source      string // who wrote it last, e.g. "PYTHON" or "ELIXIR" for bridge clients
	Version     Version
	CreatedAt   time.Time
	UpdatedAt   time.Time
}

// Session groups variables. Its TTL slides: every use moves ExpiresAt to use + TTL.
type Session struct {
	Tenant     string
	ID         string
	TTL        time.Duration // 0 means DefaultSessionTTL
	Metadata   map[string]string
	CreatedAt  time.Time
	LastUsedAt time.Time
	Variables  int // number of live variables
}

// DefaultSessionTTL is how long an unused session lives (snakepit v0.4.3 uses the same).
const DefaultSessionTTL = time.Hour

// ExpiresAt is when the session may be swept if nobody uses it again.
func (s Session) ExpiresAt() time.Time {
	ttl := s.TTL
	if ttl == 0 {
		ttl = DefaultSessionTTL
	}
	return s.LastUsedAt.Add(ttl)
}

// Node identifies a process of the mesh for policy, feed and delivery tracking.
type Node struct {
	ID     string            // unique, stable over restarts, e.g. "node-a/pod-1"
	Kind   string            // "sidecar", "agent", "control"
	Region string            // region name
	Zone   string            // optional zone within the region
	Labels map[string]string // free-form, used for policy groups
}

// Tier says which level answered a read.
type Tier uint8

// The tiers, from nearest to farthest.
const (
	TierNone    Tier = iota
	TierProcess      // the sidecar's own memory
	TierNode         // the node's shared table
	TierOrigin       // the control plane's projection of the log
)

// String returns the lower-case word used in headers and metrics.
func (t Tier) String() string {
	switch t {
	case TierProcess:
		return "process"
	case TierNode:
		return "node"
	case TierOrigin:
		return "origin"
	}
	return "none"
}

// Level is a consistency level.
type Level uint8

// Consistency levels; the zero value is SessionLevel, the default.
const (
	SessionLevel Level = iota // read-your-writes and monotonic reads
	Strong                    // read at the authority
	Bounded                   // answer no older than Consistency.MaxAge or fail
	Eventual                  // always answer
)

// Consistency is a level plus the bound that Bounded needs.
type Consistency struct {
	Level  Level
	MaxAge time.Duration // only with Bounded; > 0
}

// String returns the header form: "session", "strong", "bounded(500ms)", "eventual".
func (c Consistency) String() string {
	switch c.Level {
	case Strong:
		return "strong"
	case Bounded:
		return "bounded(" + c.MaxAge.String() + ")"
	case Eventual:
		return "eventual"
	}
	return "session"
}

// ParseConsistency reads the header form; the empty string is the default (session).
// Errors have kind Invalid.
func ParseConsistency(s string) (Consistency, error) {
	switch s {
	case "", "session":
		return Consistency{}, nil
	case "strong":
		return Consistency{Level: Strong}, nil
	case "eventual":
		return Consistency{Level: Eventual}, nil
	}
	if arg, ok := strings.CutPrefix(s, "bounded("); ok && strings.HasSuffix(arg, ")") {
		d, err := time.ParseDuration(strings.TrimSuffix(arg, ")"))
		if err == nil && d > 0 {
			return Consistency{Level: Bounded, MaxAge: d}, nil
		}
	}
	return Consistency{}, Errorf(Invalid, "consistency %q is not one of strong, session, bounded(<duration>), eventual", clip([]byte(s)))
}

// MetadataConsistency is the metadata key of a variable that says how it is read when a
// request does not: a consistency in header form.
const MetadataConsistency = "consistency"

// DeclaredConsistency returns what a variable's metadata declares. declared is false when
// it declares nothing, or nothing that can be read; authorities refuse the latter.
func DeclaredConsistency(metadata map[string]string) (c Consistency, declared bool) {
	text, ok := metadata[MetadataConsistency]
	if !ok || text == "" {
		return Consistency{}, false
	}
	c, err := ParseConsistency(text)
	return c, err == nil
}

// Headers and gRPC metadata keys the mesh reads and writes. Every answer names the
// tier, version and (for inference) arm it came from.
const (
	HeaderConsistency = "x-outrigger-consistency" // request
	HeaderToken       = "x-outrigger-token"       // request and answer: opaque session token
	HeaderExplain     = "x-outrigger-explain"     // request: "true"; answer: why, as key=value pairs
	HeaderTier        = "x-outrigger-tier"        // answer: process, node, origin
	HeaderVersion     = "x-outrigger-version"     // answer: variable counter or model version name
	HeaderDot         = "x-outrigger-dot"         // answer: the write behind the value
	HeaderAge         = "x-outrigger-age"         // answer: bound on the answer's age, in milliseconds
	HeaderFeed        = "x-outrigger-feed"        // answer: "live", or "down" when freshness cannot be proved
	HeaderStale       = "x-outrigger-stale"       // answer: "true" when served beyond the asked guarantee
	HeaderPolicy      = "x-outrigger-policy"      // answer: "live", or "last-good" with the control plane down
	HeaderModel       = "x-outrigger-model"       // answer: logical model
	HeaderArm         = "x-outrigger-arm"         // answer: experiment arm
	HeaderRegion      = "x-outrigger-region"      // answer: region of the chosen endpoint
	HeaderAttempts    = "x-outrigger-attempts"    // answer: upstream attempts made
	HeaderBucket      = "x-outrigger-bucket"      // stamped on upstream requests: 0..9999
	HeaderSession     = "x-session-id"            // request: session
	HeaderUser        = "x-user-id"               // request: user
	HeaderTenant      = "x-outrigger-tenant"      // request: tenant
	// HeaderOptimization, on a request that writes: ids of the optimisations the writer
	// holds, separated by commas.
	HeaderOptimization = "x-outrigger-optimization"
)
