package alerting

import (
	"math"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

var month = Objective{Model: "chat", Target: 0.999, Period: 30 * 24 * time.Hour}

// The rates of the workbook's tables for 30 days, and of another period.
func TestBurnRates(t *testing.T) {
	week := Objective{Model: "chat", Target: 0.99, Period: 7 * 24 * time.Hour}
	for i, want := range [][2]float64{{14.4, 3.36}, {6, 1.4}, {1, 1}} {
		b := Burns()[i]
		if got := [2]float64{b.Rate(month), b.Rate(week)}; math.Abs(got[0]-want[0]) > 1e-9 || math.Abs(got[1]-want[1]) > 1e-9 {
			t.Errorf("%s: %v, want %v", b.Name, got, want)
		}
		if b.Long != 12*b.Short {
			t.Errorf("%s: the short window is %v, want a twelfth of %v", b.Name, b.Short, b.Long)
		}
	}
}

// After a clean past the failure share e begins; the workbook's detection time is
// (1 − target) / e × long window × rate. Once it ends the alert is over within the short
// window. 100 requests a second, looked at
// 3 600 times in a long window.
func TestBurnDetection(t *testing.T) {
	for _, c := range []struct {
		burn   int
		share  float64
		detect time.Duration // 0: never
	}{
		{0, 1, 52 * time.Second}, {0, 0.1, 8*time.Minute + 38*time.Second}, {0, 0.0288, 30 * time.Minute}, {0, 0.014, 0}, {0, 0.001, 0},
		{1, 1, 130 * time.Second}, {1, 0.012, 3 * time.Hour}, {1, 0.005, 0}, {2, 1, 259 * time.Second}, {2, 0.002, 36 * time.Hour}, {2, 0.0009, 0},
	} {
		b := Burns()[c.burn]
		// failing is how much of a window that ends at now lies within the failures' time.
		spent := func(window, now, until time.Duration) Spent {
			bad := max(0, min(now, until)-max(0, now-window))
			return Spent{Requests: uint64(window.Seconds() * 100), Failures: uint64(math.Round(bad.Seconds() * 100 * c.share))}
		}
		holds := func(now, until time.Duration) bool {
			return b.Read(month, spent(b.Long, now, until), spent(b.Short, now, until)).Holds == expr.True
		}
		step := b.Long / 3600
		at := time.Duration(0)
		for at <= 2*b.Long && !holds(at, 3*b.Long) {
			at += step
		}
		if c.detect == 0 {
			if at <= 2*b.Long {
				t.Errorf("%s at %v: raised after %v", b.Name, c.share, at)
			}
			continue
		}
		// The short window fills up too; it is never the slower one.
		if d := at - c.detect; d < -step || d > c.detect/100+2*step {
			t.Errorf("%s at %v: after %v, the workbook says %v", b.Name, c.share, at, c.detect)
		}
		end := at + time.Minute
		for now := end; ; now += step {
			if !holds(now, end) {
				if now-end > b.Short {
					t.Errorf("%s at %v: over %v after the failures, the short window is %v", b.Name, c.share, now-end, b.Short)
				}
				break
			}
		}
	}
}

// A failure in a quiet night proves nothing, no requests are no answer, and objectives that
// cannot be are refused.
func TestBurnOfLittle(t *testing.T) {
	b := Burns()[0]
	for name, c := range map[string]struct {
		long, short Spent
		want        expr.Truth
	}{
		"one failure of three":       {Spent{3, 1}, Spent{1, 1}, expr.Unknown},
		"nothing in the last while":  {Spent{1000, 900}, Spent{}, expr.Unknown},
		"ten of ten":                 {Spent{10, 10}, Spent{10, 10}, expr.True},
		"over, and the hour was bad": {Spent{1000, 900}, Spent{50, 0}, expr.False},
		"more failures than calls":   {Spent{10, 20}, Spent{10, 20}, expr.True},
	} {
		if got := b.Read(month, c.long, c.short); got.Holds != c.want || (got.Severity == Critical) != (c.want == expr.True) {
			t.Errorf("%s: %v", name, got)
		}
	}
	for _, o := range []Objective{{"", .99, month.Period}, {"m", 1, month.Period}, {"m", math.NaN(), month.Period}, {"m", .99, time.Hour}, {"m", .99, 400 * 24 * time.Hour}} {
		if err := o.Check(); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if err := month.Check(); err != nil {
		t.Error(err)
	}
}
