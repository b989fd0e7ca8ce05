package experiments

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

var lifeStart = time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)

func lifePlan(m Method) *Plan {
	return &Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "ok", Kind: KindProportion},
		Goal: Goal{Baseline: .9, MDE: .03, Alpha: .05, Power: .8, Method: m, Looks: 5}, MinDuration: time.Hour, MaxDuration: 48 * time.Hour}
}

func running(t *testing.T, m Method) Lifecycle {
	t.Helper()
	var l Lifecycle
	for _, tr := range []Transition{{To: StateDraft}, {To: StatePlanned, Plan: lifePlan(m)}, {To: StateRunning, At: lifeStart}} {
		var err error
		if l, err = l.Apply(tr); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// Every move there is, allowed or not: a refusal names the state, the wish and what is
// allowed, and changes nothing.
func TestLifecycleMoves(t *testing.T) {
	allowed := map[State][]State{
		"":             {StateDraft, StatePlanned, StateRunning},
		StateDraft:     {StatePlanned, StateRunning, StateArchived},
		StatePlanned:   {StatePlanned, StateRunning, StateArchived},
		StateRunning:   {StateConcluded, StateStopped},
		StateConcluded: {StateArchived},
		StateStopped:   {StateArchived},
		StateArchived:  nil,
	}
	for from, may := range allowed {
		for _, to := range States() {
			l := Lifecycle{State: from}
			tr := Transition{To: to, At: lifeStart}
			switch to {
			case StatePlanned:
				tr.Plan = lifePlan(MethodCS)
			case StateStopped:
				tr.Cause = CauseManual
			}
			next, err := l.Apply(tr)
			if slices.Contains(may, to) {
				if err != nil || next.State != to {
					t.Errorf("%q to %q: %v, state %q", from, to, err, next.State)
				}
				continue
			}
			if !outrigger.IsKind(err, outrigger.Locked) || !reflect.DeepEqual(next, l) ||
				!strings.Contains(err.Error(), `"`+string(to)+`"`) || !strings.Contains(err.Error(), "allowed are") {
				t.Errorf("%q to %q: %v, state %q", from, to, err, next.State)
			}
		}
	}
}

func TestLifecycleRefusals(t *testing.T) {
	cs, obf := running(t, MethodCS), running(t, MethodOBF)
	looked, err := obf.Apply(Transition{To: StateRunning, Look: .4})
	if err != nil || !slices.Equal(looked.Looks, []float64{.4}) {
		t.Fatalf("look: %v, %v", looked.Looks, err)
	}
	bad := lifePlan(MethodCS)
	bad.Goal.Alpha = 5
	for name, c := range map[string]struct {
		from Lifecycle
		tr   Transition
		kind outrigger.Kind
		want string
	}{
		"frozen plan edited":        {cs, Transition{To: StatePlanned, Plan: lifePlan(MethodCS)}, outrigger.Locked, "running"},
		"plan smuggled into start":  {Lifecycle{State: StateDraft}, Transition{To: StateRunning, Plan: lifePlan(MethodCS)}, outrigger.Locked, "frozen"},
		"plan without a plan":       {Lifecycle{State: StateDraft}, Transition{To: StatePlanned}, outrigger.Invalid, "without a plan"},
		"impossible plan":           {Lifecycle{State: StateDraft}, Transition{To: StatePlanned, Plan: bad}, outrigger.Invalid, "alpha"},
		"unknown state":             {cs, Transition{To: "paused"}, outrigger.Invalid, "paused"},
		"concluded by a person":     {cs, Transition{To: StateConcluded}, outrigger.Locked, "rule decides"},
		"ships the control":         {cs, Transition{To: StateConcluded, Outcome: OutcomeShip, Serve: "a"}, outrigger.Invalid, `allowed are ["b"]`},
		"keeps the treatment":       {cs, Transition{To: StateConcluded, Outcome: OutcomeKeep, Serve: "b"}, outrigger.Invalid, `allowed are ["a"]`},
		"stopped without a cause":   {cs, Transition{To: StateStopped}, outrigger.Invalid, "cause"},
		"a look of the wrong kind":  {cs, Transition{To: StateRunning, Look: .5}, outrigger.Locked, "obf"},
		"a look back":               {looked, Transition{To: StateRunning, Look: .3}, outrigger.Invalid, "(0.4, 1]"},
		"a look beyond the horizon": {looked, Transition{To: StateRunning, Look: 1.1}, outrigger.Invalid, "1.1"},
	} {
		next, err := c.from.Apply(c.tr)
		if !outrigger.IsKind(err, c.kind) || !strings.Contains(err.Error(), c.want) || !reflect.DeepEqual(next, c.from) {
			t.Errorf("%s: %v, changed %v", name, err, !reflect.DeepEqual(next, c.from))
		}
	}
}

// evidenceOf is one stratum of two halves: k successes of n units each.
func evidenceOf(t *testing.T, na, ka, nb, kb uint64) Data {
	t.Helper()
	cell := func(name string, k, n uint64) ArmData {
		s, err := Count(k, n)
		if err != nil {
			t.Fatal(err)
		}
		return ArmData{Name: name, Weight: 5000, Units: n, Cells: map[string]Cell{"ok": {Sums: s}}}
	}
	return Data{Strata: []StratumData{{Stratum: Stratum{"eu", 7}, Arms: []ArmData{cell("a", ka, na), cell("b", kb, nb)}}},
		Exposure: Exposure{Units: na + nb}}
}

func TestStep(t *testing.T) {
	day := lifeStart.Add(24 * time.Hour)
	leak := evidenceOf(t, 4000, 3600, 4000, 3900)
	leak.Strata = append(leak.Strata, StratumData{Stratum: Stratum{"us", 7}, Arms: []ArmData{
		{Name: "a", Weight: 10_000, Units: 50}, {Name: "b", Weight: 0, Units: 50}}})
	for name, c := range map[string]struct {
		method Method
		data   Data
		now    time.Time
		want   []Transition
	}{
		"nothing yet":         {MethodCS, evidenceOf(t, 0, 0, 0, 0), day, nil},
		"better":              {MethodCS, evidenceOf(t, 4000, 3600, 4000, 3900), day, []Transition{{To: StateConcluded, At: day, Outcome: OutcomeShip, Serve: "b"}}},
		"too soon":            {MethodCS, evidenceOf(t, 4000, 3600, 4000, 3900), lifeStart.Add(time.Minute), nil},
		"worse":               {MethodCS, evidenceOf(t, 4000, 3900, 4000, 3600), day, []Transition{{To: StateConcluded, At: day, Outcome: OutcomeKeep, Serve: "a"}}},
		"leak holds it up":    {MethodCS, leak, day, nil},
		"ratio mismatch":      {MethodCS, evidenceOf(t, 4000, 3600, 3000, 2900), lifeStart.Add(time.Minute), []Transition{{To: StateStopped, At: lifeStart.Add(time.Minute), Cause: CauseSRM}}},
		"timeout keeps":       {MethodCS, evidenceOf(t, 200, 180, 200, 181), lifeStart.Add(48 * time.Hour), []Transition{{To: StateConcluded, At: lifeStart.Add(48 * time.Hour), Outcome: OutcomeInconclusive, Serve: "a"}}},
		"look without result": {MethodOBF, evidenceOf(t, 700, 630, 700, 640), day, []Transition{{To: StateRunning, At: day, Look: -1}}},
	} {
		v, err := Step(running(t, c.method), c.data, c.now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for i := range c.want {
			if c.want[i].Look < 0 && v.Result.Look != nil { // whatever share that was
				c.want[i].Look = v.Result.Look.Fraction
			}
		}
		if !reflect.DeepEqual(v.Next, c.want) {
			t.Errorf("%s: %+v, want %+v; %+v", name, v.Next, c.want, v.Result.Decision)
		}
	}
}

// What was decided stays decided, whatever arrives afterwards.
func TestConcludesOnce(t *testing.T) {
	l, day := running(t, MethodCS), lifeStart.Add(24*time.Hour)
	v, err := Step(l, evidenceOf(t, 4000, 3600, 4000, 3900), day)
	if err != nil || len(v.Next) != 1 {
		t.Fatal(v.Next, err)
	}
	if l, err = l.Apply(v.Next[0]); err != nil {
		t.Fatal(err)
	}
	v, err = Step(l, evidenceOf(t, 40_000, 39_000, 40_000, 36_000), day.Add(time.Hour))
	if err != nil || len(v.Next) != 0 || v.Result.Decision.Outcome != OutcomeShip || v.Result.Decision.Serve != "b" {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err := Step(Lifecycle{State: StateRunning, StartedAt: lifeStart}, Data{}, day); !outrigger.IsKind(err, outrigger.Locked) {
		t.Fatalf("without a plan: %v", err)
	}
	stopped, err := running(t, MethodCS).Apply(Transition{To: StateStopped, At: day, Cause: CauseManual})
	if err != nil || stopped.Serve != "a" {
		t.Fatal(stopped.Serve, err)
	}
	if v, err = Step(stopped, evidenceOf(t, 4000, 3600, 4000, 3900), day); err != nil || len(v.Next) != 0 || v.Result.Decision.Outcome != OutcomeStoppedManual {
		t.Fatalf("%+v, %v", v, err)
	}
}
