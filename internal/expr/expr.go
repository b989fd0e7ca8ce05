// Package expr evaluates conditions over measurements that are known only within an
// interval. A condition is a CEL expression (github.com/google/cel-spec) and its answer
// has three values:
//
//	error_rate < 0.01          True   the whole interval lies below 0.01
//	                           False  the whole interval lies at or above it
//	                           Unknown the interval contains it, or nothing was measured
//
// &&, || and ! follow CEL's own rules for unknowns, so "a && b" is False as soon as one
// side certainly is. No data is Unknown, never True.
//
//	c, err := expr.Compile("error_rate < 0.01 && response_time < 5000ms", names)
//	answer, err := c.Eval(func(name string) Measure { … })
//
// # Form
//
// Every comparison has a metric on its left and a number or another metric on its
// right. Durations ("5000ms", "2s", "1.5m", "24h") are milliseconds. A metric that is a
// condition by itself ("system_failure") is written bare. Names nobody knows,
// arithmetic on metrics and anything that is not true or false are refused by Compile
// (kind Invalid), which evaluates the condition once to see.
//
// # Bounds and concurrency
//
// An expression has at most MaxBytes bytes. Compile takes tens of microseconds,
// Eval about one. A Condition is immutable and safe for concurrent use.
package expr

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"

	"github.com/outrigger-mesh/outrigger"
)

// MaxBytes bounds the text of one condition.
const MaxBytes = 4096

// Truth is a three-valued answer.
type Truth uint8

// The answers. The zero value is Unknown: what was not asked is not known.
const (
	Unknown Truth = iota
	True
	False
)

// String returns "unknown", "true" or "false".
func (t Truth) String() string {
	return [...]string{"unknown", "true", "false"}[min(t, False)]
}

// Measure is what is known about one metric: it lies within [Low, High], the best single
// guess is Point, and N observations say so. Known false means nothing was measured; the
// other fields are then ignored.
type Measure struct {
	Low, High, Point float64
	N                uint64
	Known            bool
}

// Exactly is a measure without uncertainty.
func Exactly(x float64) Measure { return Measure{Low: x, High: x, Point: x, Known: true} }

// String shows the interval, for explanations.
func (m Measure) String() string {
	if !m.Known {
		return "no data"
	}
	return fmt.Sprintf("%.4g within [%.4g, %.4g], n = %d", m.Point, m.Low, m.High, m.N)
}

// Name is one metric a condition may use. A Bool metric is a condition by itself: its
// measure is read as true at 1 or more, false at 0 or less, unknown between.
type Name struct {
	Name string
	Bool bool
}

// Condition is a compiled expression.
type Condition struct {
	// Source is the expression as it was given.
	Source string
	// Names are the metrics it uses, sorted.
	Names   []string
	program cel.Program
	bools   map[string]bool
}

// Compile checks an expression against the metrics there are. Errors have kind Invalid
// and say where the fault is.
func Compile(source string, names []Name) (*Condition, error) {
	if len(source) > MaxBytes || strings.TrimSpace(source) == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "condition is %d bytes long; write 1 to %d", len(source), MaxBytes)
	}
	options := []cel.EnvOption{cel.CrossTypeNumericComparisons(true)}
	bools := make(map[string]bool)
	for _, n := range names {
		t := cel.DynType
		if n.Bool {
			t, bools[n.Name] = cel.BoolType, true
		}
		options = append(options, cel.Variable(n.Name, t))
	}
	env, err := cel.NewEnv(options...)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "the environment of conditions")
	}
	text, err := durations(source)
	if err != nil {
		return nil, err
	}
	tree, issues := env.Compile(text)
	if issues.Err() != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "condition %q: %s; known metrics are %s", source, firstIssue(issues), known(names))
	}
	if tree.OutputType() != cel.BoolType {
		return nil, outrigger.Errorf(outrigger.Invalid, "condition %q is a %v; write a comparison such as \"error_rate < 0.01\"", source, tree.OutputType())
	}
	c := &Condition{Source: source, bools: bools}
	if err := c.walk(tree.NativeRep().Expr(), names); err != nil {
		return nil, err
	}
	if c.program, err = env.Program(tree); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "condition %q: %v", source, err)
	}
	// What only fails when evaluated must not wait for production to do it.
	if _, err := c.Eval(func(string) Measure { return Exactly(0.5) }); err != nil {
		return nil, err
	}
	return c, nil
}

// walk allows what has a meaning over intervals and collects the names.
func (c *Condition) walk(e ast.Expr, names []Name) error {
	bad := func(what string) error {
		return outrigger.Errorf(outrigger.Invalid, "condition %q: %s; combine comparisons of a metric (left) with a number or metric (right) by &&, || and !", c.Source, what)
	}
	switch e.Kind() {
	case ast.IdentKind:
		if !slices.Contains(c.Names, e.AsIdent()) {
			c.Names = append(c.Names, e.AsIdent())
			slices.Sort(c.Names)
		}
		return nil
	case ast.LiteralKind:
		return nil
	case ast.CallKind:
		call := e.AsCall()
		switch call.FunctionName() {
		case operators.LogicalAnd, operators.LogicalOr, operators.LogicalNot, operators.Negate:
		case operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals:
			if left := call.Args()[0]; left.Kind() != ast.IdentKind || c.bools[left.AsIdent()] {
				return bad("a comparison has no metric on its left")
			}
		default:
			return bad(fmt.Sprintf("%q is not supported", call.FunctionName()))
		}
		for _, a := range call.Args() {
			if err := c.walk(a, names); err != nil {
				return err
			}
		}
		return nil
	}
	return bad("only comparisons are supported")
}

// Eval answers the condition from measurements. measure is asked once per name used. An
// error means a comparison that has no meaning and has kind Invalid.
func (c *Condition) Eval(measure func(name string) Measure) (Truth, error) {
	in := make(map[string]any, len(c.Names))
	for _, n := range c.Names {
		m := measure(n)
		if c.bools[n] {
			in[n] = boolValue(m)
			continue
		}
		in[n] = metric{m}
	}
	out, _, err := c.program.Eval(in)
	return truth(c.Source, out, err)
}

// Explain lists the measurements behind an answer: "error_rate 0.01 within […], n = 9".
func (c *Condition) Explain(measure func(name string) Measure) string {
	parts := make([]string, len(c.Names))
	for i, n := range c.Names {
		parts[i] = n + " " + measure(n).String()
	}
	return strings.Join(parts, "; ")
}

func firstIssue(i *cel.Issues) string {
	e := i.Errors()[0]
	return fmt.Sprintf("column %d: %s", e.Location.Column()+1, e.Message)
}

func known(names []Name) string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = n.Name
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

var durationText = regexp.MustCompile(`\b([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s|m|h|d)\b`)

// durations writes durations as milliseconds, which CEL can read.
func durations(source string) (string, error) {
	var failed error
	out := durationText.ReplaceAllStringFunc(source, func(s string) string {
		days := strings.TrimSuffix(s, "d")
		unit := time.Duration(1)
		if days != s {
			s, unit = days+"h", 24
		}
		d, err := time.ParseDuration(s)
		if err != nil {
			failed = outrigger.Errorf(outrigger.Invalid, "condition %q: %q is not a duration", source, s)
		}
		return strconv.FormatFloat(float64(d*unit)/float64(time.Millisecond), 'f', -1, 64)
	})
	return out, failed
}
