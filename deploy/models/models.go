// Package models says what a model version is and which states it may pass through.
//
// # Versions
//
// A Version is immutable: what it was registered with is what it answers with, for ever.
// Its Digest covers exactly what determines the answers: the name the endpoint knows it
// by, the artefact, the parameters and the pinned variable versions. Where it runs
// (endpoints), where it comes from (lineage) and free metadata are recorded beside it and
// may be equal or different without changing the digest, so two versions with one digest
// are the same thing registered twice. Digests are comparable across machines, releases
// and regions; Digest documents the bytes that are hashed.
//
// # States
//
//	registered ─→ validated ─→ shadow ─→ candidate ─→ production ─→ retired
//	     ↑ any of them ─→ quarantined ─→ registered        retired ─→ registered
//
// Stages may be skipped forward, because a rollout checks a version in its own way; they
// are never entered backwards except by returning to registered, which starts anew.
// CheckMove is the whole rule. A shadow version may be given copies of requests by
// whoever mirrors them; the mesh gives it no share of its own accord.
//
// # Promises
//
// Everything is a pure function of its arguments, safe for concurrent use. Bad input is
// an outrigger.Error of kind Invalid (a malformed field) or Locked (a move that is not
// allowed), naming the field, its value and what is allowed; nothing panics.
package models

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
)

// State is where a version is in its life.
type State string

// States of a version.
const (
	Registered  State = "registered"  // known; serves only what an experiment arm or alias gives it
	Validated   State = "validated"   // passed offline checks
	Shadow      State = "shadow"      // answers copies of requests, which nobody sees
	Candidate   State = "candidate"   // being rolled out; set by rollouts only
	Production  State = "production"  // the champion
	Retired     State = "retired"     // serves nothing
	Quarantined State = "quarantined" // taken out because it misbehaved; serves nothing
)

// States lists all states in the order of a good life.
func States() []State {
	return []State{Registered, Validated, Shadow, Candidate, Production, Retired, Quarantined}
}

// Moves lists where a version may go from a state, nil for an unknown one.
func Moves(from State) []State {
	switch from {
	case Registered:
		return []State{Validated, Shadow, Candidate, Production, Retired, Quarantined}
	case Validated:
		return []State{Registered, Shadow, Candidate, Production, Retired, Quarantined}
	case Shadow:
		return []State{Registered, Candidate, Production, Retired, Quarantined}
	case Candidate:
		return []State{Registered, Production, Quarantined}
	case Production:
		return []State{Registered, Retired, Quarantined}
	case Quarantined:
		return []State{Registered, Retired}
	case Retired:
		return []State{Registered}
	}
	return nil
}

// CheckMove refuses a change of state that is not in Moves: Invalid for a word that is no
// state, Locked for a move that is not allowed. Staying is allowed.
func CheckMove(model, version string, from, to State) error {
	if !slices.Contains(States(), to) {
		return outrigger.Errorf(outrigger.Invalid, "state %q is not one of %s", to, join(States()))
	}
	allowed := Moves(from)
	if from == to || slices.Contains(allowed, to) {
		return nil
	}
	if from == Quarantined || from == Retired {
		return outrigger.Errorf(outrigger.Locked, "version %q of model %q is %s and cannot become %s; set it to registered first", version, model, from, to)
	}
	return outrigger.Errorf(outrigger.Locked, "version %q of model %q is %s and cannot become %s; allowed are %s", version, model, from, to, join(allowed))
}

func join(states []State) string {
	words := make([]string, len(states))
	for i, s := range states {
		words[i] = string(s)
	}
	return strings.Join(words, ", ")
}

// Bounds of one version's content.
const (
	MaxParameters     = 100       // parameters of a version
	MaxPins           = 100       // pinned variables of a version
	MaxParents        = 16        // direct ancestors of a version
	MaxParameterBytes = 64 * 1024 // all parameter names and values together
)

// Content is what determines a version's answers.
type Content struct {
	Upstream   string            // the name the endpoint knows it by
	Artifact   string            // "sha256:" and 64 hex digits, or empty: nothing of ours
	Parameters map[string]string // what it is called with, for example temperature=0.2
	Pins       map[string]int32  // SESSION/NAME of a variable or prompt to its version, from 0
}

// Digest is "sha256:" and 64 lower-case hex digits over the content. The bytes hashed
// are the JSON object {"artifact":…,"parameters":[[name,value],…],"pins":[[name,version],…],
// "upstream":…} without white space, lists sorted by name in byte order, so that any
// language can check it. Fields that are empty are hashed as empty, not left out.
func (c Content) Digest() string {
	params, pins := [][2]string{}, [][2]any{}
	for _, k := range slices.Sorted(maps.Keys(c.Parameters)) {
		params = append(params, [2]string{k, c.Parameters[k]})
	}
	for _, k := range slices.Sorted(maps.Keys(c.Pins)) {
		pins = append(pins, [2]any{k, c.Pins[k]})
	}
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	// Strings and integers always encode.
	_ = enc.Encode(struct {
		Artifact   string      `json:"artifact"`
		Parameters [][2]string `json:"parameters"`
		Pins       [][2]any    `json:"pins"`
		Upstream   string      `json:"upstream"`
	}{c.Artifact, params, pins, c.Upstream})
	sum := sha256.Sum256([]byte(strings.TrimSuffix(b.String(), "\n")))
	return digestPrefix + hex.EncodeToString(sum[:])
}

const digestPrefix = "sha256:"

// CheckDigest refuses, with kind Invalid, what is not "sha256:" and 64 lower-case hex
// digits; field names the value in the error.
func CheckDigest(field, s string) error {
	digits, ok := strings.CutPrefix(s, digestPrefix)
	raw, err := hex.DecodeString(digits)
	if !ok || err != nil || len(raw) != sha256.Size || digits != strings.ToLower(digits) {
		return outrigger.Errorf(outrigger.Invalid, "%s %q is not %q and %d lower-case hex digits", field, s, digestPrefix, 2*sha256.Size)
	}
	return nil
}

// Check refuses content that is malformed or beyond the bounds, with kind Invalid.
func (c Content) Check() error {
	if c.Artifact != "" {
		if err := CheckDigest("artifact", c.Artifact); err != nil {
			return err
		}
	}
	if n := len(c.Parameters); n > MaxParameters {
		return outrigger.Errorf(outrigger.Invalid, "parameters has %d entries, the limit is %d", n, MaxParameters)
	}
	size := 0
	for _, k := range slices.Sorted(maps.Keys(c.Parameters)) {
		if err := outrigger.CheckName("parameters", k); err != nil {
			return err
		}
		if !utf8.ValidString(c.Parameters[k]) {
			return outrigger.Errorf(outrigger.Invalid, "parameters: the value of %q is not valid UTF-8", k)
		}
		size += len(k) + len(c.Parameters[k])
	}
	if size > MaxParameterBytes {
		return outrigger.Errorf(outrigger.Invalid, "parameters are %d bytes, the limit is %d; pin a variable instead", size, MaxParameterBytes)
	}
	return c.checkPins()
}

func (c Content) checkPins() error {
	if n := len(c.Pins); n > MaxPins {
		return outrigger.Errorf(outrigger.Invalid, "pins has %d entries, the limit is %d", n, MaxPins)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Pins)) {
		session, name, ok := strings.Cut(k, "/")
		if !ok {
			return outrigger.Errorf(outrigger.Invalid, "pins: %q is not SESSION/NAME of a variable", k)
		}
		if err := outrigger.CheckName("pins session", session); err != nil {
			return err
		}
		if err := outrigger.CheckName("pins name", name); err != nil {
			return err
		}
		if v := c.Pins[k]; v < 0 {
			return outrigger.Errorf(outrigger.Invalid, "pins: version of %q is %d, allowed is 0 or more", k, v)
		}
	}
	return nil
}

// CheckExpected refuses, with kind Conflict, content whose digest is not the expected
// one; an empty expectation accepts any.
func (c Content) CheckExpected(want string) error {
	if want == "" {
		return nil
	}
	if err := CheckDigest("digest", want); err != nil {
		return err
	}
	if got := c.Digest(); got != want {
		return outrigger.Errorf(outrigger.Conflict, "the content has digest %s, expected %s; it is not what was meant to be registered", got, want)
	}
	return nil
}

// Parent reads one entry of a lineage, VERSION of the same model or MODEL@VERSION.
func Parent(model, entry string) (parentModel, version string) {
	if i := strings.LastIndexByte(entry, '@'); i >= 0 {
		return entry[:i], entry[i+1:]
	}
	return model, entry
}
