package seedconfig

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/outrigger-mesh/outrigger"
)

// The plan as its authors wrote it: no YAML parser takes it, this reader takes all of it.
func TestSeedPlan(t *testing.T) {
	text, err := os.ReadFile("testdata/production_deployment.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if yaml.Unmarshal(text, new(any)) == nil {
		t.Fatal("the file is YAML after all; the test proves nothing")
	}
	f, err := Parse("production_deployment.yaml", text)
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/production_deployment.golden")
	if err != nil {
		t.Fatal(err)
	}
	if string(got)+"\n" != string(want) {
		t.Errorf("got\n%s", got)
	}
	e := f.Experiments[0]
	if e.Duration != 30*24*time.Hour || e.MinimumSampleSize != 1000 || e.Groups[1].Configuration["dspy_enabled"] != "true" {
		t.Errorf("experiment %+v", e)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "f is empty"},
		{"deployment: [1]", `f:1:13: a list stands where a mapping is expected`},
		{"deployment:\n  phasen: {}", `f:2:3: key "phasen" is unknown; known are experiments, monitoring, phases, rollback`},
		{"deployment:\n  phases:\n    a:\n      user_percentage: 101", `f:4:24: "101" stands where a number from 0 to 100 is expected`},
		{"deployment:\n  phases:\n    a:\n      duration: 3 fortnights", `f:4:17: "3 fortnights" is not a duration`},
		{"deployment:\n  phases:\n    a:\n      success_criteria:\n        x: > high", `f: line 5: `},
		{"deployment:\n  phases:\n    a:\n      success_criteria:\n        x: > 0x10", `f:5:12: criterion "x" is "> 0x10"`},
		{"deployment:\n  experiments:\n    e:\n      groups: {a: {weight: 1}}", `f:4:7: experiment "e" has 1 groups`},
		{"deployment:\n  experiments:\n    e:\n      groups: {a: {weight: 1.5}, b: {weight: 1}}", `f:4:28: "1.5" stands where a whole number`},
		{"deployment:\n  experiments:\n    e:\n      enabled: maybe", `f:4:16: "maybe" stands where true or false`},
		{"deployment:\n  rollback:\n    automatic_triggers: [a > b]", `f:3:26: trigger "a > b"`},
		{"deployment:\n  phases:\n    a: {}\n    a: {}", `f:4:5: key "a" is empty, no text or given twice`},
		{strings.Repeat("#", MaxBytes+1), "the limit is 1048576"},
	} {
		_, err := Parse("f", []byte(c.text))
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.60q: got %v, want %s", c.text, err, c.want)
		}
	}
}

func TestDurations(t *testing.T) {
	for in, want := range map[string]time.Duration{"5000ms": 5 * time.Second, "30d": 720 * time.Hour, "2w": 336 * time.Hour, "1d12h": 36 * time.Hour, "0s": 0} {
		if d, err := ParseDuration(in); err != nil || d != want {
			t.Errorf("%s = %v, %v", in, d, err)
		}
	}
	for _, in := range []string{"", "d", "5", "-1h", "1h1d", "99999999999d", "36501d", "1e3d"} {
		if d, err := ParseDuration(in); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%q = %v, %v", in, d, err)
		}
	}
}

// FuzzParse: no text makes the reader panic, and what it takes keeps its promises.
func FuzzParse(f *testing.F) {
	seed, err := os.ReadFile("testdata/production_deployment.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(seed))
	f.Add("deployment:\n  experiments: &a {x: *a}")
	f.Fuzz(func(t *testing.T, s string) {
		out, err := Parse("f", []byte(s))
		if err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
			t.Fatalf("kind of %v", err)
		}
		for _, e := range out.Experiments {
			if len(e.Groups) < 2 || e.Duration < 0 {
				t.Fatalf("accepted %+v", e)
			}
		}
	})
}
