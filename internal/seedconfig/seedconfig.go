// Package seedconfig reads deployment plans: rollout phases, experiments, alert levels
// and rollback triggers in one file that people write by hand.
//
// The form is YAML with three liberties that its authors take and YAML does not give or
// types do not know:
//
//   - a comparison as a value, "user_satisfaction: > 0.95". To YAML a value that begins
//     with '>' is the head of a folded text, and the file does not parse. A line "key:
//     OP number", OP one of < <= > >= == !=, is read as a comparison.
//   - durations with days and weeks ("30d", "2w", "1d12h") beside Go's ("24h",
//     "5000ms"); null is "no limit".
//   - a trigger is a comparison in one string ("error_rate > 0.02") or the bare name of
//     a condition ("system_failure").
//
// # Phases
//
// Beside the keys of the published strategy (user_percentage, duration, success_criteria) a
// phase may have rollback_threshold (a mapping from metric to the number it must not
// exceed), steps (percentages), min_requests, feature_flags, monitoring_level, environment,
// and gates, a mapping from name to a gate: kind, conditions, approvals, approvers, expiry,
// hook, url, command, timeout, interval, metadata, dwell, hours, utc_offset, freezes,
// experiment, on_inconclusive, on_fail, max_wait, dry_run. What a gate means is checked by
// whoever starts a rollout (package deploy).
//
// An alert (monitoring.alerts) is a metric with warning and critical, or any name with a
// condition and a severity; both may have for, a duration.
//
// monitoring.objectives maps a model to its target, a share, and period, a duration.
//
// Everything else is strict. A key nobody knows, a value of another type, a weight
// below 0, a name given twice: each is refused with file, line and column, kind Invalid,
// and nothing is returned. Lists and mappings keep the order of the file.
//
// Bounds: 1 MiB, 1 000 entries in any list or mapping. Parse is pure and safe for
// concurrent use. It fuzzes without panics (FuzzParse).
package seedconfig

import (
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// MaxBytes bounds a file, maxEntries any list or mapping in it.
const (
	MaxBytes   = 1 << 20
	maxEntries = 1000
)

// File is the section "deployment".
type File struct {
	Phases      []Phase
	Experiments []Experiment
	Alerts      []Alert
	Dashboards  []string
	Rollback    Rollback
	Objectives  []Objective `json:",omitempty"`
}

// Position is a place in the file, from 1.
type Position struct{ Line, Column int }

// Phase is one step of a rollout. Fields that the file leaves out are zero.
type Phase struct {
	Name           string
	At             Position      `json:"-"`
	UserPercentage float64       // 0..100
	Duration       time.Duration // 0 = no limit
	Success        []Condition

	HasPercentage   bool              `json:"-"`
	HasDuration     bool              `json:"-"`
	Steps           []float64         `json:",omitempty"` // percentages, rising
	MinRequests     uint64            `json:",omitempty"`
	Rollback        []Condition       `json:",omitempty"` // rollback_threshold: "metric > number"
	FeatureFlags    []string          `json:",omitempty"`
	MonitoringLevel string            `json:",omitempty"`
	Environment     string            `json:",omitempty"`
	Gates           []*pb.RolloutGate `json:",omitempty"`
}

// Condition is a comparison, or without Op the name of something that happens.
type Condition struct {
	Metric string
	Op     string
	Value  float64
	At     Position `json:"-"`
}

// String returns the condition as an expression.
func (c Condition) String() string {
	if c.Op == "" {
		return c.Metric
	}
	return c.Metric + " " + c.Op + " " + strconv.FormatFloat(c.Value, 'g', -1, 64)
}

// Experiment is one split between groups.
type Experiment struct {
	Name    string
	Enabled bool
	Groups  []Group
	// SuccessMetrics come in order: the first decides, the others are described.
	SuccessMetrics []string
	Duration       time.Duration
	// MinimumSampleSize counts the units of all groups together.
	MinimumSampleSize uint64
}

// Group is one arm. Configuration holds each value as JSON.
type Group struct {
	Name          string
	Weight        uint32 // relative to the sum over the groups
	Configuration map[string]string
}

// Alert holds the two levels of one metric, or under a name of its own a condition and
// how bad it is.
type Alert struct {
	Metric            string
	Warning, Critical Quantity
	At                Position `json:"-"`

	// For is how long it must hold; 0 = at once.
	For                 time.Duration `json:",omitempty"`
	Condition, Severity string        `json:",omitempty"`
}

// Objective is a service level objective of a model: the share of requests over a period
// that must not fail.
type Objective struct {
	Model  string
	Target float64
	Period time.Duration // 0 = 30 days
	At     Position      `json:"-"`
}

// Quantity is a number, in milliseconds when Duration is set.
type Quantity struct {
	Value    float64
	Duration bool
}

// Rollback says when to go back and whom to tell.
type Rollback struct {
	Triggers               []Condition
	ManualApprovalRequired bool
	Contacts               []Contact
	// Cooldown is the time after a rollback in which the model is not rolled out again;
	// 0 = the default.
	Cooldown time.Duration `json:",omitempty"`
}

// Contact is a team; OnCall is true if it is woken.
type Contact struct {
	Team   string
	OnCall bool
}

// Parse reads a file; name is what errors call it.
func Parse(name string, text []byte) (File, error) {
	r := reader{name: name}
	if len(text) > MaxBytes {
		return File{}, outrigger.Errorf(outrigger.Invalid, "%s is %d bytes long, the limit is %d", name, len(text), MaxBytes)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(quoteComparisons(text), &doc); err != nil {
		return File{}, outrigger.Errorf(outrigger.Invalid, "%s: %s", name, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if len(doc.Content) == 0 {
		return File{}, outrigger.Errorf(outrigger.Invalid, "%s is empty; it begins with \"deployment:\"", name)
	}
	var f File
	r.mapping(doc.Content[0], fields{"deployment": func(n *yaml.Node) { f = r.deployment(n) }})
	if r.err != nil {
		return File{}, r.err
	}
	return f, nil
}

var comparisonLine = regexp.MustCompile(`^(\s*(?:- )?[A-Za-z_][\w.-]*:[ \t]+)((?:<=|>=|==|!=|<|>)[ \t]*[-+]?[0-9][^\s#'"]*)([ \t]*(?:#.*)?\r?)$`)

// quoteComparisons puts quotes around comparisons. Lines stay lines and the value still
// begins in its column, so positions in errors are those of the file.
func quoteComparisons(text []byte) []byte {
	lines := strings.Split(string(text), "\n")
	for i, l := range lines {
		lines[i] = comparisonLine.ReplaceAllString(l, `${1}"${2}"${3}`)
	}
	return []byte(strings.Join(lines, "\n"))
}

var comparison = regexp.MustCompile(`^(<=|>=|==|!=|<|>)\s*(\S+)$`)

// parseComparison reads "OP number".
func parseComparison(s string) (op string, value float64, ok bool) {
	m := comparison.FindStringSubmatch(s)
	if m == nil {
		return "", 0, false
	}
	v, ok := number(m[2])
	return m[1], v, ok
}

// number refuses what only machines write: NaN, infinities, hexadecimal.
func number(s string) (float64, bool) {
	v, err := strconv.ParseFloat(s, 64)
	return v, err == nil && strings.Trim(s, "+-.eE0123456789") == "" && v-v == 0
}

var dayPart = regexp.MustCompile(`^(\d+(?:\.\d+)?)(d|w)`)

// ParseDuration is time.ParseDuration with days ("30d", 24 hours each) and weeks ("2w")
// in front. The error has kind Invalid; the result is not negative.
func ParseDuration(s string) (time.Duration, error) {
	bad := outrigger.Errorf(outrigger.Invalid, "duration %q is not one like 5000ms, 24h, 30d or 1d12h, up to 36500d", s)
	rest, total := s, 0.0
	for m := dayPart.FindStringSubmatch(rest); m != nil; m = dayPart.FindStringSubmatch(rest) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return 0, bad
		}
		if m[2] == "w" {
			v *= 7
		}
		total += v * float64(24*time.Hour)
		rest = rest[len(m[0]):]
	}
	const most = float64(36500 * 24 * time.Hour)
	if rest != "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d < 0 {
			return 0, bad
		}
		total += float64(d)
	}
	if s == "" || total > most {
		return 0, bad
	}
	return time.Duration(total), nil
}

// asJSON turns any YAML value into JSON.
func asJSON(n *yaml.Node) (string, error) {
	var v any
	if err := n.Decode(&v); err != nil {
		return "", err
	}
	b, err := json.Marshal(v)
	return string(b), err
}
