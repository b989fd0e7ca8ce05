package expr

import (
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func TestFormula(t *testing.T) {
	names := []string{"tokens_in", "tokens_out", "requests"}
	values := map[string]float64{"tokens_in": 2e6, "tokens_out": 1e5, "requests": 0}
	of := func(n string) float64 { return values[n] }
	for source, want := range map[string]float64{
		"tokens_in * 2.5e-6 + tokens_out * 1e-5": 6,
		"requests > 100.0 ? 1.0 : 0.25":          0.25,
		"3.5":                                    3.5,
	} {
		f, err := CompileFormula(source, names)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := f.Eval(of); err != nil || got < want*(1-1e-12) || got > want*(1+1e-12) {
			t.Errorf("%s is %v, %v; want %v", source, got, err, want)
		}
	}
	f, err := CompileFormula("tokens_in / requests", names)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Eval(of); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a division by zero: %v", err)
	}
	for source, why := range map[string]string{
		"":                       "1 to",
		"tokens_in * 2":          "written as 2.0",
		"tokens_inn":             "tokens_in, tokens_out",
		"tokens_in > 2.0":        "is a bool",
		"1.0 / 0.0":              "no finite value",
		strings.Repeat("x", 1e5): "long",
	} {
		if _, err := CompileFormula(source, names); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), why) {
			t.Errorf("%.20q: %v, want %q", source, err, why)
		}
	}
}
