package deploy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// span is opening hours on some days of the week, in minutes since midnight.
type span struct {
	days     [7]bool // from Sunday
	from, to int
}

// days are calendar days, both included.
type days struct{ first, last time.Time }

// times reads the windows of a time_based gate. Offsets are fixed: a purely computed
// answer knows no daylight saving.
func (g *gate) times(in *pb.RolloutGate) error {
	bad := func(format string, args ...any) error { return outrigger.Errorf(outrigger.Invalid, format, args...) }
	if d := in.GetDwell().AsDuration(); d < 0 || d > MaxPhaseDuration {
		return bad("dwell %v is outside 0..%v", d, MaxPhaseDuration)
	}
	if in.GetDwell().AsDuration() == 0 && len(in.GetHours())+len(in.GetFreezes()) == 0 {
		return bad("neither dwell, hours nor freezes are given")
	}
	if s := in.GetUtcOffset(); s != "" {
		at, err := time.Parse("-07:00", s)
		if err != nil {
			return bad("utc_offset %q is not one like +02:00", s)
		}
		_, seconds := at.Zone()
		g.offset = time.Duration(seconds) * time.Second
	}
	for _, s := range in.GetHours() {
		one, err := parseHours(s)
		if err != nil {
			return err
		}
		g.hours = append(g.hours, one)
	}
	for _, s := range in.GetFreezes() {
		first, last, found := strings.Cut(s, "/")
		if !found {
			last = first
		}
		a, errA := time.Parse(time.DateOnly, first)
		b, errB := time.Parse(time.DateOnly, last)
		if errA != nil || errB != nil || b.Before(a) {
			return bad("freeze %q is not a day or two like 2026-12-20/2027-01-02", s)
		}
		g.freezes = append(g.freezes, days{a, b})
	}
	return nil
}

var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// parseHours reads "mon-fri 09:00-17:00", "sat 10:00-12:00" or "09:00-24:00".
func parseHours(s string) (out span, err error) {
	bad := outrigger.Errorf(outrigger.Invalid, "hours %q are not like \"mon-fri 09:00-17:00\", the end after the beginning and at most 24:00", s)
	on, clock, found := strings.Cut(s, " ")
	if !found {
		on, clock = "sun-sat", s
	}
	first, last, several := strings.Cut(on, "-")
	if !several {
		last = first
	}
	a, b := slices.Index(weekdays, first), slices.Index(weekdays, last)
	if a < 0 || b < 0 {
		return out, bad
	}
	for d := a; ; d = (d + 1) % 7 { // "fri-mon" goes over the end of the week
		out.days[d] = true
		if d == b {
			break
		}
	}
	from, to, found := strings.Cut(clock, "-")
	out.from, err = minutes(from)
	if err == nil {
		out.to, err = minutes(to)
	}
	if err != nil || !found || out.to <= out.from {
		return out, bad
	}
	return out, nil
}

func minutes(s string) (int, error) {
	if s == "24:00" {
		return 24 * 60, nil
	}
	t, err := time.Parse("15:04", s)
	return t.Hour()*60 + t.Minute(), err
}

// open says whether the windows of the gate are open. A closed window is not a failure:
// it opens.
func (g *gate) open(r *Rollout, now time.Time) (Outcome, string) {
	if left := r.PhaseSince.Add(g.GetDwell().AsDuration()).Sub(now); left > 0 {
		return Inconclusive, fmt.Sprintf("%v of %v left", left.Round(time.Second), g.GetDwell().AsDuration())
	}
	local := now.UTC().Add(g.offset)
	today := time.Date(local.Year(), local.Month(), local.Day(), 0, 0, 0, 0, time.UTC)
	for _, f := range g.freezes {
		if !today.Before(f.first) && !today.After(f.last) {
			return Inconclusive, fmt.Sprintf("changes are frozen until the end of %s", f.last.Format(time.DateOnly))
		}
	}
	if len(g.hours) == 0 {
		return Pass, "the time has come"
	}
	minute := local.Hour()*60 + local.Minute()
	for _, h := range g.hours {
		if h.days[local.Weekday()] && minute >= h.from && minute < h.to {
			return Pass, "within " + strings.Join(g.GetHours(), ", ")
		}
	}
	return Inconclusive, "outside " + strings.Join(g.GetHours(), ", ")
}
