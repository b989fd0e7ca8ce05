package expr

import (
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func subject(attributes map[string]string) Subject {
	return Subject{Unit: "ann@example.org", Model: "chat", Region: "eu",
		Attribute: func(name string) (string, bool) { v, ok := attributes[name]; return v, ok }}
}

// Every row is one target and whether the same request is meant.
func TestTargets(t *testing.T) {
	s := subject(map[string]string{"plan": "pro", "x-app-version": "2.10", "country": "de"})
	for source, want := range map[string]bool{
		`attributes.plan == "pro"`:                                      true,
		`attributes["x-app-version"].startsWith("2.")`:                  true,
		`attributes.plan == "free"`:                                     false,
		`attributes.country in ["de", "at", "ch"] && region == "eu"`:    true,
		`attributes.beta == "yes"`:                                      false, // it has none
		`has(attributes.beta) ? attributes.beta == "yes" : true`:        true,
		`!has(attributes.beta)`:                                         true,
		`attributes.beta == "yes" || attributes.plan == "pro"`:          true, // CEL: one true settles it
		`unit.endsWith("@example.org")`:                                 true,
		`unit.matches("^[a-z]+@")`:                                      true,
		`model != "chat"`:                                               false,
		`size(attributes.plan) + 1 == 4`:                                true,
		`int(attributes.plan) > 3`:                                      false, // no number: cannot be decided
		`has(attributes.plan) && (attributes.plan + "x").contains("x")`: true,
	} {
		target, err := CompileTarget(source)
		if err != nil {
			t.Errorf("%s: %v", source, err)
			continue
		}
		if got, _ := target.Matches(s); got != want {
			t.Errorf("%s: %v, want %v", source, got, want)
		}
	}
	target, err := CompileTarget(`attributes.b == "1" || has(attributes.a) || attributes["b"] == "2"`)
	if err != nil || !slices.Equal(target.Attributes, []string{"a", "b"}) {
		t.Errorf("attributes %v, %v", target.Attributes, err)
	}
}

func TestTargetsRefused(t *testing.T) {
	many := make([]string, 17)
	for i := range many {
		many[i] = "has(attributes.a" + string(rune('a'+i)) + ")"
	}
	for source, want := range map[string]string{
		"":                                    "1 to 1024",
		strings.Repeat("x", 1025):             "1025 bytes",
		"plan == 'pro'":                       "attributes.NAME",
		"attributes.plan":                     "write a comparison",
		"attributes[unit] == 'x'":             "not constant",
		"size(attributes) > 1":                "as a whole",
		"attributes.exists(k, k == 'x')":      "undeclared",
		"unit in {'a': 1}":                    "only comparisons",
		"attributes.plan == 3":                "no matching overload",
		strings.Join(many, " || "):            "17 attributes",
		"unit == ''.format([model]) && false": "undeclared",
	} {
		_, err := CompileTarget(source)
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", source, err, want)
		}
	}
}

// A long attribute cannot make an evaluation long: it matches nobody instead.
func TestTargetCostIsBounded(t *testing.T) {
	target, err := CompileTarget(`attributes.text.matches("(a|aa)+b")`)
	if err != nil {
		t.Fatal(err)
	}
	yes, err := target.Matches(subject(map[string]string{"text": strings.Repeat("a", 100_000) + "b"}))
	if yes || err == nil || !strings.Contains(err.Error(), "cost") {
		t.Errorf("%v, %v", yes, err)
	}
	if yes, err := target.Matches(subject(map[string]string{"text": "aab"})); !yes || err != nil {
		t.Errorf("%v, %v", yes, err)
	}
}

func FuzzTarget(f *testing.F) {
	for _, s := range []string{`attributes.plan == "pro"`, `unit in ["a"]`, `has(attributes.x) ? true : false`, `attributes["a"].matches("(")`} {
		f.Add(s, "v")
	}
	f.Fuzz(func(t *testing.T, source, value string) {
		target, err := CompileTarget(source)
		if err != nil {
			if !outrigger.IsKind(err, outrigger.Invalid) {
				t.Fatalf("%q: %v", source, err)
			}
			return
		}
		_, _ = target.Matches(Subject{Unit: value, Attribute: func(string) (string, bool) { return value, true }})
	})
}

func BenchmarkTarget(b *testing.B) {
	target, err := CompileTarget(`attributes.plan == "pro" && region == "eu"`)
	if err != nil {
		b.Fatal(err)
	}
	s := subject(map[string]string{"plan": "pro"})
	b.ReportAllocs()
	for b.Loop() {
		if yes, _ := target.Matches(s); !yes {
			b.Fatal("no match")
		}
	}
}
