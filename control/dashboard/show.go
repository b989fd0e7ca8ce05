package dashboard

import (
	"fmt"
	"html/template"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// noData is shown for what nobody measured.
const noData = "no data"

// funcs turn values into what people read.
var funcs = template.FuncMap{"count": count, "decimal": decimal, "share": share, "ms": millis, "when": when, "stamp": stamp, "words": words,
	"tone": tone, "weight": weight, "rail": rail, "evidence": gauges, "ended": ended, "split": split, "splitText": splitText, "shareOf": shareOf,
	"trial": trialOf, "list": func(s []string) string { return strings.Join(s, ", ") }, "neg": func(x float64) float64 { return -x },
	"label": func(lat float64) float64 { return 7 - lat + 8 }, "percent": percent, "signed": signed, "real": realText, "hour": func(t time.Time) string { return t.Format("15:04") }, "bar": bar, "below": func(h int) int { return 41 - h }, "times": func(a, b int) int { return a * b }, "told": told,
	"degrees": func(x float64) string { return strconv.FormatFloat(x, 'f', 1, 64) + "°" }}

// count writes a number with thin groups of three digits.
func count(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

// percent shows a share that may be unknown, signed a change of one, realText any number.
func percent(x *float64) string {
	if x == nil {
		return noData
	}
	return strconv.FormatFloat(100**x, 'f', 2, 64) + " %"
}

func signed(x *float64) string {
	if x == nil {
		return noData
	}
	return strings.Replace(fmt.Sprintf("%+.1f %%", 100**x), "-", "−", 1)
}

func realText(x *float64) string {
	if x == nil {
		return noData
	}
	return strconv.FormatFloat(*x, 'g', 4, 64)
}

// bar is the height of one hour's bar, 0..40.
func bar(n int) int { return min(8*n, 40) }

// told says what became of telling one route.
func told(d *pb.AlertDelivery) string {
	whom := d.GetRoute()
	if len(d.GetContacts()) > 0 && whom != "" {
		whom += " (" + strings.Join(d.GetContacts(), ", ") + ")"
	}
	switch {
	case whom == "":
		return d.GetError()
	case d.GetDelivered() && d.GetTold() == "resolved":
		return whom + " was told that it is over, " + stamp(d.GetAt())
	case d.GetDelivered():
		return whom + " was told, " + d.GetTold() + ", " + stamp(d.GetAt())
	case d.GetAt() != nil:
		return fmt.Sprintf("%s was not told: given up after %d attempts, %s", whom, d.GetAttempts(), d.GetError())
	}
	return fmt.Sprintf("%s is being told: %d attempts, %s", whom, d.GetAttempts(), d.GetError())
}

func decimal(x float64) string { return strconv.FormatFloat(x, 'f', 1, 64) }

func share(part, whole uint64) string {
	if whole == 0 {
		return noData
	}
	return strconv.FormatFloat(100*float64(part)/float64(whole), 'f', 2, 64) + " %"
}

func millis(x float64) string {
	switch {
	case x <= 0:
		return noData
	case x < 10:
		return strconv.FormatFloat(x, 'f', 2, 64) + " ms"
	}
	return strconv.FormatFloat(x, 'f', 0, 64) + " ms"
}

func when(t time.Time) string {
	if t.IsZero() {
		return noData
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

func stamp(t *timestamppb.Timestamp) string {
	if t == nil {
		return noData
	}
	return when(t.AsTime())
}

func words(s string) string { return strings.ReplaceAll(s, "_", " ") }

func tone(state string) string {
	switch state {
	case "completed", "running":
		return "good"
	case "rolled_back", "rolling_back", "aborted", "draining":
		return "bad"
	}
	return "warn"
}

func weight(parts uint32) string { return strconv.FormatFloat(float64(parts)/100, 'f', -1, 64) + " %" }

// step is one phase of the rail.
type step struct {
	Name, Share, Class string
	Here               bool
}

func rail(r *pb.Rollout) []step {
	over := ended(r.GetState())
	var out []step
	for i, p := range r.GetPhases() {
		s := step{Name: words(p.GetName()), Share: weight(p.GetWeight()), Here: i == int(r.GetPhase()) && !over}
		if p.GetEnvironment() != "" {
			s.Share = "in " + p.GetEnvironment()
		}
		switch {
		case r.GetState() == "completed" || i < int(r.GetPhase()):
			s.Class = "done"
		case i > int(r.GetPhase()):
		case tone(r.GetState()) == "bad":
			s.Class = "stopped"
			s.Share += ", stopped"
		default:
			s.Class = "now"
		}
		out = append(out, s)
	}
	return out
}

// gauge is the evidence of one stratum on a logarithmic scale of 0..100 on which the
// threshold is at 90.
type gauge struct {
	Name, Text, Label, Class string
	Width                    float64
}

func gauges(r *pb.Rollout) []gauge {
	evidence := r.GetEvidence()
	if r.GetRollback() != nil {
		evidence = r.GetRollback().GetEvidence() // what it was decided on
	}
	var out []gauge
	for _, e := range evidence {
		strength, limit := max(e.GetEValue(), e.GetSrValue(), 1), max(e.GetThreshold(), 1.0001)
		g := gauge{Name: e.GetStratum(), Width: min(100, 90*math.Log(strength)/math.Log(limit))}
		switch {
		case strength >= limit:
			g.Class = "over"
		case g.Width > 45:
			g.Class = "raised"
		default:
			g.Class = "calm"
		}
		g.Text = fmt.Sprintf("E %.3g, SR %.3g, rolls back at %.3g; candidate %s of %s failed (%s), baseline %s of %s (%s)", e.GetEValue(), e.GetSrValue(), e.GetThreshold(),
			count(e.GetCandidateFailures()), count(e.GetCandidateRequests()), share(e.GetCandidateFailures(), e.GetCandidateRequests()),
			count(e.GetBaselineFailures()), count(e.GetBaselineRequests()), share(e.GetBaselineFailures(), e.GetBaselineRequests()))
		g.Label = "evidence in " + e.GetStratum() + ": " + g.Text
		out = append(out, g)
	}
	return out
}

// part is one arm's piece of the bar, 0..10 000 from left to right.
type part struct{ X, W, Colour uint32 }

func split(m *pb.Model) (out []part) {
	x := uint32(0)
	for i, a := range m.GetArms() {
		out = append(out, part{x, a.GetWeight(), uint32(i % 6)})
		x += a.GetWeight()
	}
	return out
}

func splitText(m *pb.Model) string {
	var out []string
	for _, a := range m.GetArms() {
		out = append(out, a.GetName()+" ("+a.GetVersion()+") "+weight(a.GetWeight()))
	}
	return strings.Join(out, ", ")
}

func shareOf(m *pb.Model, version string) string {
	sum := uint32(0)
	for _, a := range m.GetArms() {
		if a.GetVersion() == version {
			sum += a.GetWeight()
		}
	}
	return weight(sum)
}

// trial is what the page of experiments shows of experiments.Result in its JSON form.
type trial struct {
	Decision, Reached, Ratio, Exposed string
	Arms                              []trialArm
	Warnings                          []string
}

type trialArm struct {
	Name, Units, Point, Text string
	Plot                     bool
	Low, High, At            float64 // 0..100
}

func trialOf(x *pb.ExperimentResultsResponse) trial {
	res := x.GetResults().AsMap()
	out := trial{Reached: noData, Ratio: noData, Exposed: noData}
	if d, ok := res["decision"].(map[string]any); ok {
		reasons, _ := d["reasons"].([]any)
		for _, why := range reasons {
			out.Decision = join(out.Decision, fmt.Sprint(why))
		}
	}
	if f, ok := res["information"].(float64); ok {
		out.Reached = strconv.FormatFloat(100*f, 'f', 0, 64) + " %"
	}
	if r, ok := res["ratio"].(map[string]any); ok {
		if mismatch, _ := r["mismatch"].(bool); mismatch {
			out.Ratio = "mismatch"
		} else if p, ok := r["chi_square_p"].(float64); ok {
			out.Ratio = fmt.Sprintf("as planned (p = %.3g)", p)
		}
	}
	if e, ok := res["exposure"].(map[string]any); ok {
		units, _ := e["units"].(float64)
		multiple, _ := e["multiple"].(float64)
		out.Exposed = share(uint64(multiple), uint64(units))
	}
	if ws, ok := res["warnings"].([]any); ok {
		for _, w := range ws {
			out.Warnings = append(out.Warnings, fmt.Sprint(w))
		}
	}
	arms, _ := res["arms"].([]any)
	out.Arms = armLines(arms)
	return out
}

func orEmpty(x any) any {
	if x == nil {
		return ""
	}
	return x
}

// armLines puts the arms' intervals on one scale.
func armLines(arms []any) (out []trialArm) {
	type reading struct{ point, low, high float64 }
	var all []reading
	var ends []float64
	for _, a := range arms {
		m, _ := a.(map[string]any)
		line := trialArm{Name: fmt.Sprint(orEmpty(m["name"])), Units: "0", Point: noData, Text: noData}
		if n, ok := m["units"].(float64); ok {
			line.Units = count(uint64(n))
		}
		r := reading{math.NaN(), math.NaN(), math.NaN()}
		if x, ok := m["value"].(float64); ok && m["n"] != 0.0 {
			line.Point, r.point = fmt.Sprintf("%.4g", x), x
		}
		if i, ok := m["interval"].(map[string]any); ok && !math.IsNaN(r.point) {
			low, okLow := i["low"].(float64)
			high, okHigh := i["high"].(float64)
			if okLow && okHigh {
				line.Text, r.low, r.high = fmt.Sprintf("%.4g to %.4g", low, high), low, high
				ends = append(ends, low, high)
			}
		}
		all, out = append(all, r), append(out, line)
	}
	if len(ends) == 0 {
		return out
	}
	low, high := slices.Min(ends), slices.Max(ends)
	scale := func(x float64) float64 {
		if high <= low {
			return 50
		}
		return 2 + 96*(x-low)/(high-low)
	}
	for i, r := range all {
		if !math.IsNaN(r.low) {
			out[i].Plot, out[i].Low, out[i].High, out[i].At = true, scale(r.low), scale(r.high), min(98, max(2, scale(r.point)))
		}
	}
	return out
}
