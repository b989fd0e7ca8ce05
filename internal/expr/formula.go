package expr

import (
	"math"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/outrigger-mesh/outrigger"
)

// maxFormulaCost bounds one evaluation, in CEL's units; a formula without macros stays far
// below.
const maxFormulaCost = 10_000

// Formula is a compiled expression whose result is a number, such as a price. It may be
// evaluated by any number of goroutines.
type Formula struct {
	// Source is the expression as it was given.
	Source  string
	names   []string
	program cel.Program
}

// CompileFormula checks a formula over the named numbers, all of which are doubles:
// "tokens_in * 2.5e-6 + tokens_out * 1e-5". Whole numbers must be written as 2.0, as CEL
// does not mix kinds of numbers. Errors have kind Invalid and say where the fault is.
func CompileFormula(source string, names []string) (*Formula, error) {
	if len(source) > MaxBytes || strings.TrimSpace(source) == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "formula is %d bytes long; write 1 to %d", len(source), MaxBytes)
	}
	options := []cel.EnvOption{cel.ClearMacros()}
	for _, n := range names {
		options = append(options, cel.Variable(n, cel.DoubleType))
	}
	env, err := cel.NewEnv(options...)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "the environment of formulas")
	}
	tree, issues := env.Compile(source)
	if issues.Err() != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "formula %q: %s; it may use %s, and whole numbers are written as 2.0", source, firstIssue(issues), strings.Join(slices.Sorted(slices.Values(names)), ", "))
	}
	if tree.OutputType() != cel.DoubleType {
		return nil, outrigger.Errorf(outrigger.Invalid, "formula %q is a %v; write one that is a number, such as tokens_out * 0.00001", source, tree.OutputType())
	}
	f := &Formula{Source: source, names: slices.Clone(names)}
	if f.program, err = env.Program(tree, cel.CostLimit(maxFormulaCost)); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "formula %q: %v", source, err)
	}
	if _, err := f.Eval(func(string) float64 { return 1 }); err != nil {
		return nil, err
	}
	return f, nil
}

// Eval computes the formula. The error, of kind Invalid, means that it has no finite value
// there (a division by zero).
func (f *Formula) Eval(value func(name string) float64) (float64, error) {
	in := make(map[string]any, len(f.names))
	for _, n := range f.names {
		in[n] = value(n)
	}
	out, _, err := f.program.Eval(in)
	if err != nil {
		return 0, outrigger.Errorf(outrigger.Invalid, "formula %q: %v", f.Source, err)
	}
	x, ok := ref.Val(out).(types.Double)
	if !ok || math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
		return 0, outrigger.Errorf(outrigger.Invalid, "formula %q has no finite value there", f.Source)
	}
	return float64(x), nil
}
