package expr

import (
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

var names = []Name{{Name: "error_rate"}, {Name: "baseline_error_rate"}, {Name: "response_time"}, {Name: "user_satisfaction"}, {Name: "system_failure", Bool: true}}

func between(low, high float64) Measure {
	return Measure{Low: low, High: high, Point: (low + high) / 2, N: 100, Known: true}
}

// Every row is one condition over the same measurements.
func TestTruth(t *testing.T) {
	measured := map[string]Measure{
		"error_rate": between(.005, .015), "baseline_error_rate": between(.02, .03),
		"response_time": between(900, 1100), "system_failure": between(0, 1),
	} // user_satisfaction: nobody measures it
	for source, want := range map[string]Truth{
		"error_rate < 0.02":                           True,
		"error_rate < 0.01":                           Unknown,
		"error_rate < 0.004":                          False,
		"error_rate > 0.02":                           False,
		"error_rate > 2":                              False, // whole numbers compare, too
		"error_rate >= 0.001 && error_rate <= 0.02":   True,
		"user_satisfaction > 0.95":                    Unknown,
		"user_satisfaction > 0.95 && error_rate > 1":  False, // one certain no settles it
		"user_satisfaction > 0.95 || error_rate < 1":  True,
		"!(user_satisfaction > 0.95)":                 Unknown,
		"!(error_rate > 0.02)":                        True,
		"response_time < 5000ms":                      True,
		"response_time > 1s":                          Unknown,
		"response_time < 1.5m && response_time < 24h": True,
		"error_rate < baseline_error_rate":            True,
		"baseline_error_rate <= error_rate":           False,
		"system_failure":                              Unknown,
		"system_failure || error_rate > 0.001":        True,
	} {
		c, err := Compile(source, names)
		if err != nil {
			t.Errorf("%s: %v", source, err)
			continue
		}
		got, err := c.Eval(func(n string) Measure { return measured[n] })
		if err != nil || got != want {
			t.Errorf("%s = %v, %v; want %v (%s)", source, got, err, want, c.Explain(func(n string) Measure { return measured[n] }))
		}
	}
}

func TestExactly(t *testing.T) {
	c, err := Compile("error_rate <= 0.5 && error_rate >= 0.5", names)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Eval(func(string) Measure { return Exactly(.5) }); got != True || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	b, err := Compile("system_failure", names)
	if err != nil {
		t.Fatal(err)
	}
	for x, want := range map[float64]Truth{0: False, 1: True} {
		if got, err := b.Eval(func(string) Measure { return Exactly(x) }); got != want || err != nil {
			t.Errorf("%v is %v, %v", x, got, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	for source, want := range map[string]string{
		"":                                   "write 1 to 4096",
		"errorrate > 1":                      `column 1: undeclared reference to 'errorrate'`,
		"error_rate":                         "write a comparison",
		"0.02 < error_rate":                  "no metric on its left",
		"error_rate * 2.0 > 1.0":             "no metric on its left",
		"error_rate > baseline_error_rate*2": "not supported",
		"error_rate == 0.1":                  `"_==_" is not supported`,
		"error_rate > 'x'":                   "no such overload",
		"system_failure > 1":                 "no matching overload",
		"error_rate > ":                      "Syntax error",
		"[1].all(x, x > 0)":                  "only comparisons",
		strings.Repeat("x", MaxBytes+1):      "4097 bytes",
	} {
		_, err := Compile(source, names)
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %s", source, err, want)
		}
	}
}

// FuzzCompile: no text panics, and what compiles evaluates.
func FuzzCompile(f *testing.F) {
	f.Add("error_rate > 0.02 || !(system_failure && response_time < 5000ms)")
	f.Add("-(-1) < error_rate")
	f.Fuzz(func(t *testing.T, source string) {
		c, err := Compile(source, names)
		if err != nil {
			return
		}
		for _, m := range []Measure{{}, Exactly(0), between(-1, 2)} {
			if _, err := c.Eval(func(string) Measure { return m }); err != nil {
				t.Fatalf("%q compiles and fails: %v", source, err)
			}
		}
	})
}
