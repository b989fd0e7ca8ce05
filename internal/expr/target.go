package expr

import (
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"

	"github.com/outrigger-mesh/outrigger"
)

// Bounds of a Target.
const (
	MaxTargetBytes = 1024
	MaxAttributes  = 16 // that one expression names
	// maxTargetCost bounds one evaluation, in CEL's units (about one per operator and ten
	// characters compared); an expression that would cost more matches nobody.
	maxTargetCost = 2000
)

// Target is a compiled condition over one request that is about to be assigned: who takes
// part in an experiment. Unlike a Condition it has two values. Names it may use:
//
//	unit, model, region   text
//	attributes            text by name, only by constant names: attributes.plan == "pro",
//	                      attributes["x-plan"], has(attributes.plan)
//
// with CEL's comparisons, &&, ||, !, ?:, in, arithmetic and the functions of text
// (startsWith, endsWith, contains, matches, size). Loops and other macros are refused, so
// the cost is bounded by the text's length and that of the attributes. A Target is
// immutable and safe for concurrent use.
type Target struct {
	// Source is the expression as it was given; Attributes those it names, sorted.
	Source     string
	Attributes []string
	program    cel.Program
}

// Subject is what a Target is asked about. Attribute is asked once per name the
// expression uses; ok is false for one the request does not have.
type Subject struct {
	Unit, Model, Region string
	Attribute           func(name string) (value string, ok bool)
}

// CompileTarget checks an expression. Errors have kind Invalid and say where the fault is.
func CompileTarget(source string) (*Target, error) {
	if len(source) > MaxTargetBytes || strings.TrimSpace(source) == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "target is %d bytes long; write 1 to %d", len(source), MaxTargetBytes)
	}
	env, err := cel.NewEnv(cel.ClearMacros(), cel.Macros(cel.HasMacro), cel.Variable("unit", cel.StringType), cel.Variable("model", cel.StringType),
		cel.Variable("region", cel.StringType), cel.Variable("attributes", cel.MapType(cel.StringType, cel.StringType)))
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "the environment of targets")
	}
	tree, issues := env.Compile(source)
	if issues.Err() != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "target %q: %s; it may use unit, model, region and attributes.NAME", source, firstIssue(issues))
	}
	if tree.OutputType() != cel.BoolType {
		return nil, outrigger.Errorf(outrigger.Invalid, "target %q is a %v; write a comparison such as attributes.plan == \"pro\"", source, tree.OutputType())
	}
	t := &Target{Source: source}
	if err := t.collect(tree.NativeRep().Expr()); err != nil {
		return nil, err
	}
	slices.Sort(t.Attributes)
	if t.Attributes = slices.Compact(t.Attributes); len(t.Attributes) > MaxAttributes {
		return nil, outrigger.Errorf(outrigger.Invalid, "target %q names %d attributes; the limit is %d", source, len(t.Attributes), MaxAttributes)
	}
	if t.program, err = env.Program(tree, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxTargetCost)); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "target %q: %v", source, err)
	}
	return t, nil
}

// collect notes the attributes' names, which must be constants so that only those are
// looked for in a request.
func (t *Target) collect(e ast.Expr) error {
	switch e.Kind() {
	case ast.SelectKind:
		s := e.AsSelect()
		if s.Operand().Kind() == ast.IdentKind && s.Operand().AsIdent() == "attributes" {
			t.Attributes = append(t.Attributes, s.FieldName())
			return nil
		}
		return t.collect(s.Operand())
	case ast.CallKind:
		call := e.AsCall()
		args := call.Args()
		if call.FunctionName() == operators.Index && args[0].Kind() == ast.IdentKind && args[0].AsIdent() == "attributes" {
			name, ok := any(nil), args[1].Kind() == ast.LiteralKind
			if ok {
				name = args[1].AsLiteral().Value()
			}
			if s, text := name.(string); ok && text {
				t.Attributes = append(t.Attributes, s)
				return nil
			}
			return t.dynamic()
		}
		if call.IsMemberFunction() {
			args = append([]ast.Expr{call.Target()}, args...)
		}
		return t.collectAll(args)
	case ast.ListKind:
		return t.collectAll(e.AsList().Elements())
	case ast.IdentKind:
		if e.AsIdent() == "attributes" {
			return t.dynamic()
		}
		return nil
	case ast.LiteralKind:
		return nil
	}
	return outrigger.Errorf(outrigger.Invalid, "target %q: only comparisons and functions of text are supported", t.Source)
}

func (t *Target) collectAll(es []ast.Expr) error {
	for _, e := range es {
		if err := t.collect(e); err != nil {
			return err
		}
	}
	return nil
}

func (t *Target) dynamic() error {
	return outrigger.Errorf(outrigger.Invalid, "target %q: attributes is used as a whole or with a name that is not constant; write attributes.NAME or attributes[\"NAME\"]", t.Source)
}

// Matches says whether the subject is meant. One that lacks an attribute the answer
// depends on is not, and neither is one whose evaluation would exceed the bound: a
// condition that cannot be decided enrols nobody. The error says why, for logs.
func (t *Target) Matches(s Subject) (bool, error) {
	attributes := make(map[string]string, len(t.Attributes))
	for _, name := range t.Attributes {
		if v, ok := s.Attribute(name); ok {
			attributes[name] = v
		}
	}
	out, _, err := t.program.Eval(map[string]any{"unit": s.Unit, "model": s.Model, "region": s.Region, "attributes": attributes})
	if err != nil {
		return false, fmt.Errorf("target %q: %w", t.Source, err)
	}
	yes, ok := out.Value().(bool)
	return ok && yes, nil
}
