package alerting

import (
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// Objective is a service level objective of one model: of the requests of any Period at
// least the share Target must not fail. What may fail, 1 − Target, is the error budget.
type Objective struct {
	Model  string
	Target float64
	Period time.Duration
}

// Bounds of objectives. The longest window of a Burn must fit into the period.
const (
	MaxObjectives = 200
	MinPeriod     = 7 * 24 * time.Hour
	MaxPeriod     = 90 * 24 * time.Hour
)

// Check says what is wrong with an objective, with kind Invalid.
func (o Objective) Check() error {
	if err := outrigger.CheckName("model", o.Model); err != nil {
		return err
	}
	if !(o.Target >= 0.5 && o.Target <= 0.99999) || o.Period < MinPeriod || o.Period > MaxPeriod {
		return outrigger.Errorf(outrigger.Invalid, "objective of %q: target %v over %v; targets are 0.5 to 0.99999, periods %v to %v", o.Model, o.Target, o.Period, MinPeriod, MaxPeriod)
	}
	return nil
}

// Burn is one speed at which a budget must not be spent: its Share within the Long window,
// and still going on in the Short one, which is what makes the alert end soon after the
// failures do.
type Burn struct {
	Name        string
	Share       float64 // of the period's budget
	Long, Short time.Duration
	Severity    Severity
}

// Burns are those of The Site Reliability Workbook, chapter 5, table 5-8: 2 % of the budget
// in an hour, 5 % in six, 10 % in three days. For a period of 30 days they are the rates
// 14.4, 6 and 1.
func Burns() []Burn {
	return []Burn{
		{"1h", 0.02, time.Hour, 5 * time.Minute, Critical},
		{"6h", 0.05, 6 * time.Hour, 30 * time.Minute, High},
		{"3d", 0.10, 72 * time.Hour, 6 * time.Hour, Medium},
	}
}

// Rate is how many times faster than evenly the budget is spent where the burn begins. It is
// at least 1: what is spent evenly lasts for the period, however short that is.
func (b Burn) Rate(o Objective) float64 {
	return max(1, b.Share*float64(o.Period)/float64(b.Long))
}

// Spent is what a window saw: requests that were answered or failed, and those that failed.
type Spent struct{ Requests, Failures uint64 }

// Rate is the failure share over the budget's; 0 without requests.
func (s Spent) Rate(o Objective) float64 {
	if s.Requests == 0 {
		return 0
	}
	return float64(min(s.Failures, s.Requests)) / float64(s.Requests) / (1 - o.Target)
}

// unsure is how often chance may pass for at least half of a burn's rate, per look.
const unsure = 0.001

// Read looks at one burn: it holds while both windows spend at its rate or faster and the
// failures of the long one are more than chance makes of half that rate, so that one failure
// in a quiet night is nothing. Without requests in the short window nothing is
// known. Pure.
func (b Burn) Read(o Objective, long, short Spent) Reading {
	limit := b.Rate(o)
	switch {
	case short.Requests == 0:
		return Reading{}
	case long.Rate(o) < limit || short.Rate(o) < limit:
		return Reading{Holds: expr.False}
	}
	in, err := experiments.ClopperPearson(min(long.Failures, long.Requests), long.Requests, unsure)
	if err != nil || in.Low <= limit/2*(1-o.Target) {
		return Reading{}
	}
	return Reading{Holds: expr.True, Severity: b.Severity}
}
