package plan

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

func read(t *testing.T, text string) (Plan, error) {
	t.Helper()
	f, err := seedconfig.Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return Of(f)
}

// The plan as its authors wrote it: every key has an effect.
func TestSeedPlan(t *testing.T) {
	text, err := os.ReadFile("../../internal/seedconfig/testdata/production_deployment.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := read(t, string(text))
	if err != nil {
		t.Fatal(err)
	}
	got := deploy.PhasesOf(p.Phases)
	if len(got) != 3 || got[0].Name != "canary" || got[0].Weight != 100 || got[0].MinDuration != 24*time.Hour || got[2].Weight != 10_000 || got[2].MinDuration != 0 {
		t.Fatalf("%+v", got)
	}
	if want := []string{"error_rate > 0.01", "performance_degradation > 0.1", "system_failure"}; !slices.Equal(got[1].RollbackWhen, want) {
		t.Errorf("limited rolls back when %q, want %q", got[1].RollbackWhen, want)
	}
	if g := got[0].Gates; len(g) != 1 || !slices.Equal(g[0].GetConditions(), []string{"error_rate < 0.01", "performance_degradation < 0.1", "user_satisfaction > 0.95"}) {
		t.Errorf("gates %v", g)
	}
	if !slices.Equal(p.Notify, []string{"engineering", "product"}) || p.ManualRollback {
		t.Errorf("tells %v, manual %v", p.Notify, p.ManualRollback)
	}
	kinds := map[string]int{}
	for i, n := range p.Notes {
		kinds[n.Kind]++
		if n.Line == 0 || n.Column == 0 || i > 0 && n.Line < p.Notes[i-1].Line {
			t.Errorf("note %v is nowhere or out of order", n)
		}
	}
	// Three unreported criteria; two triggers overridden in each of the last two phases and
	// one in the first, whose error rate is the trigger's.
	if kinds[Unprovable] != 3 || kinds[Precedence] != 5 || kinds[Contradiction] != 0 || kinds[Default] == 0 {
		t.Errorf("notes %v:\n%v", kinds, p.Notes)
	}
}

func TestNotes(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"deployment: {}", "1:1: default: no phases"},
		{"deployment:\n  phases:\n    canary: {rollback_threshold: {error_rate: 0.01}, success_criteria: {error_rate: '< 0.02'}}", "contradiction: phase canary advances"},
		{"deployment:\n  phases:\n    staging: {}\n    canary: {}", "default: phase staging: 100 % of environment staging, nothing of this mesh"},
		{"deployment:\n  monitoring:\n    alerts:\n      error_rate: {warning: 0.02, critical: 0.01}", "contradiction: alert error_rate: critical 0.01 is below warning 0.02"},
		{"deployment:\n  monitoring:\n    alerts:\n      moon_phase: {warning: 1, critical: 2}", "unprovable: alert moon_phase"},
		{"deployment:\n  monitoring:\n    alerts:\n      error_rate: {warning: 0.02, critical: 0.03}\n  rollback:\n    automatic_triggers: [error_rate > 0.01]", "a rollback comes first"},
	} {
		p, err := read(t, c.text)
		found := false
		for _, n := range p.Notes {
			found = found || strings.Contains(n.String(), c.want)
		}
		if err != nil || !found {
			t.Errorf("%s: %v, %v; want %s", c.text, p.Notes, err, c.want)
		}
	}
}

func TestStepsAndRefusals(t *testing.T) {
	p, err := read(t, "deployment:\n  phases:\n    canary: {steps: [1, 2, 5], duration: 3h}\n    full_production: {}\n  rollback: {manual_approval_required: true, cooldown: 1h}")
	if err != nil || len(p.Phases) != 4 || p.Phases[1].GetWeight() != 200 || p.Phases[1].GetStage() != "canary" || !p.ManualRollback || p.Cooldown.AsDuration() != time.Hour {
		t.Errorf("%+v, %v", p, err)
	}
	for text, want := range map[string]string{
		"deployment:\n  phases:\n    x: {}":                                                        `3:8: phase "x" has no user_percentage`,
		"deployment:\n  phases:\n    full_production: {}\n    canary: {}":                          "weights never fall",
		"deployment:\n  phases:\n    canary: {success_criteria: {moon: '> 1'}}":                    "undeclared reference to 'moon'",
		"deployment:\n  phases:\n    canary: {gates: {g: {kind: vibes}}}":                          `kind is "vibes"`,
		"deployment:\n  phases:\n    canary: {}\n  rollback:\n    automatic_triggers: [full_moon]": "undeclared reference to 'full_moon'",
	} {
		if _, err := read(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// Objectives are checked where they stand; without a period they are of 30 days.
func TestObjectives(t *testing.T) {
	parse := func(text string) seedconfig.File {
		f, err := seedconfig.Parse("plan.yaml", []byte("deployment:\n  monitoring:\n    objectives:\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := parse("      chat: {target: 0.999}\n      vision: {target: 0.9, period: 7d}\n")
	want := []alerting.Objective{{Model: "chat", Target: .999, Period: 30 * 24 * time.Hour}, {Model: "vision", Target: .9, Period: 7 * 24 * time.Hour}}
	if _, err := Of(f); err != nil || !slices.Equal(Objectives(f), want) {
		t.Errorf("%v, %v", Objectives(f), err)
	}
	for text, want := range map[string]string{"      chat: {target: 1}\n": "4:13", "      chat: {target: 0.9, period: 1h}\n": "periods 168h", "      'a b\tc': {target: 0.99}\n": "model"} {
		if _, err := Of(parse(text)); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}
