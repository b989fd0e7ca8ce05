package alerts_test

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// An error budget of 1 % of 30 days, and a model that serves a request in ten without fault
// for an hour, then fails half: the hour's burn is raised within minutes, by the arithmetic
// of the workbook after 0.01 / 0.5 × 1 h × 14.4 = 17 min, and over some 5 min after the last
// failure, while the six hours' one lives on until its own short window ends. A restart in
// between loses the past and takes the alerts over.
func TestBurnAlerts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		m := run(t, log, time.Second, nil)
		m.plan("deployment:\n  monitoring:\n    objectives:\n      chat: {target: 0.99}\n")
		serve := func(minutes, failures int, until func() bool) (took int) {
			for took < minutes && !until() {
				for range 6 {
					m.report(100, failures)
					time.Sleep(10 * time.Second)
				}
				took++
			}
			return took
		}
		never := func() bool { return false }
		stands := func(id string) bool { a := m.alert(id); return a != nil && a.ResolvedAt.IsZero() }
		serve(60, 0, never)
		if stands("burn-1h-chat") {
			t.Fatal("raised without a failure")
		}
		if took := serve(60, 50, func() bool { return stands("burn-1h-chat") }); took < 16 || took > 20 {
			t.Errorf("raised after %d minutes, want some 17", took)
		}
		a := m.alert("burn-1h-chat")
		if a == nil || a.Severity != "critical" || a.Numbers["limit"] != "14.4" || a.Numbers["target"] != "0.99" || !strings.Contains(a.Summary, "error budget") {
			t.Fatalf("%+v", a)
		}
		serve(20, 50, never)
		if !stands("burn-6h-chat") || m.alert("burn-6h-chat").Severity != "high" {
			t.Fatalf("%+v", m.alert("burn-6h-chat"))
		}
		if took := serve(30, 0, func() bool { return !stands("burn-1h-chat") }); took < 2 || took > 6 {
			t.Errorf("over after %d minutes, the short window is 5", took)
		}
		if !stands("burn-6h-chat") {
			t.Errorf("the slow burn ended with the fast one")
		}
		m.stop()
		m = run(t, log, time.Second, nil)
		time.Sleep(2 * time.Second)
		if !stands("burn-6h-chat") {
			t.Errorf("a restart ended the alert: %q", m.events("burn-6h-chat"))
		}
		serve(2, 0, never)
		if got := m.events("burn-6h-chat"); !slices.Equal(got, []string{"raised high", "resolved"}) {
			t.Errorf("%q", got)
		}
		m.stop()
	})
}

// An objective that leaves the plan takes its alerts along.
func TestBurnWithoutObjective(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := run(t, memory.New(), time.Second, nil)
		m.plan("deployment:\n  monitoring:\n    objectives:\n      chat: {target: 0.999, period: 7d}\n")
		for range 10 {
			m.report(100, 100)
			time.Sleep(time.Second)
		}
		if a := m.alert("burn-1h-chat"); a == nil || !a.ResolvedAt.IsZero() {
			t.Fatalf("%+v", a)
		}
		m.plan("deployment: {}\n")
		time.Sleep(2 * time.Second)
		if a := m.alert("burn-1h-chat"); a.ResolvedAt.IsZero() {
			t.Errorf("%+v", a)
		}
		m.stop()
	})
}
