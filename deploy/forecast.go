package deploy

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"gonum.org/v1/gonum/stat/distuv"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// GateAlpha is how often an interval that a gate looks at may ever be wrong, however
// often one looks.
const GateAlpha = 0.05

// Forecast says what each gate and minimum of the phases needs before it can pass, at a
// traffic of the whole model in requests per second (0 = unknown), and warns of what
// cannot be proved while its phase is planned to last.
//
// It assumes a candidate that is twice as good as a bound on a share demands (an error
// rate of half the bound), and response times of which the logarithm spreads by 0.5
// around equal medians. Reality decides differently; the order of magnitude is what
// counts.
func Forecast(phases []Phase, rps float64) (out []*pb.GateForecast, warnings []string) {
	for _, p := range phases {
		rate := rps * float64(p.Weight) / FullWeight
		if p.MinRequests > 0 {
			f := counted(p, "min_requests", p.MinRequests, rate)
			f.Needs = fmt.Sprintf("%d requests of the candidate", p.MinRequests)
			out, warnings = add(out, warnings, p, f, rps)
		}
		for _, g := range p.Gates {
			switch g.GetKind() {
			case GateMetrics:
				for _, c := range g.GetConditions() {
					out, warnings = add(out, warnings, p, criterion(p, g.GetName(), c, rate), rps)
				}
			case GateTime:
				out = append(out, &pb.GateForecast{Phase: p.Name, Gate: g.GetName(), Needs: "time", Expected: g.GetDwell(), Provable: true})
			case GateApproval:
				out = append(out, &pb.GateForecast{Phase: p.Name, Gate: g.GetName(), Provable: true,
					Needs: fmt.Sprintf("%d approvals", max(g.GetApprovals(), 1))})
			default:
				out = append(out, &pb.GateForecast{Phase: p.Name, Gate: g.GetName(), Needs: "the answer of " + g.GetKind(), Provable: true})
			}
		}
	}
	return out, warnings
}

func add(out []*pb.GateForecast, warnings []string, p Phase, f *pb.GateForecast, rps float64) ([]*pb.GateForecast, []string) {
	out = append(out, f)
	switch {
	case f.GetProvable():
		return out, warnings
	case f.GetRequests() == 0:
		warnings = append(warnings, fmt.Sprintf("phase %s, gate %s: %s", p.Name, f.GetGate(), f.GetNeeds()))
	case p.Weight == 0:
		warnings = append(warnings, fmt.Sprintf("phase %s, gate %s: %s, and the candidate gets none here; it stays inconclusive", p.Name, f.GetGate(), f.GetNeeds()))
	case rps <= 0:
		warnings = append(warnings, fmt.Sprintf("phase %s, gate %s: %s; how long that takes is unknown without traffic", p.Name, f.GetGate(), f.GetNeeds()))
	default:
		warnings = append(warnings, fmt.Sprintf("phase %s, gate %s: %s takes about %v, but the phase is planned to last %v", p.Name, f.GetGate(), f.GetNeeds(), f.GetExpected().AsDuration().Round(time.Minute), p.MinDuration))
	}
	return out, warnings
}

// counted fills in how long n requests take at a rate per second. A phase without a
// planned duration has all the time there is.
func counted(p Phase, gate string, n uint64, rate float64) *pb.GateForecast {
	f := &pb.GateForecast{Phase: p.Name, Gate: gate, Requests: n}
	if rate > 0 {
		seconds := min(float64(n)/rate, 1e9)
		took := time.Duration(seconds * float64(time.Second))
		f.Expected = durationpb.New(took)
		f.Provable = p.MinDuration == 0 || took <= p.MinDuration
	}
	return f
}

var comparisonText = regexp.MustCompile(`^\s*([a-z_]+)\s*(<=?|>=?)\s*([0-9.]+)(ms|s|m|h)?\s*$`)

// criterion forecasts one condition of the form "metric OP number"; others, and metrics
// nothing reports, cannot be forecast.
func criterion(p Phase, gate, source string, rate float64) *pb.GateForecast {
	unknown := func(why string) *pb.GateForecast {
		return &pb.GateForecast{Phase: p.Name, Gate: gate, Needs: source + ": " + why}
	}
	m := comparisonText.FindStringSubmatch(source)
	if m == nil {
		f := unknown("the requests it needs cannot be foretold")
		f.Provable = true
		return f
	}
	bound, err := strconv.ParseFloat(m[3], 64)
	if err != nil {
		return unknown("not a number")
	}
	less := strings.HasPrefix(m[2], "<")
	var n uint64
	switch {
	case m[1] == "error_rate" && less && bound > 0:
		n = shareRequests(bound)
	case m[1] == "success_rate" && !less && bound < 1:
		n = shareRequests(1 - bound)
	case m[1] == MetricDegradation && less && bound > 0:
		n = degradationRequests(bound)
	case m[1] == "requests" && !less:
		n = uint64(bound) + 1
	case m[1] == MetricSatisfaction, m[1] == MetricAccuracy:
		return unknown("applications must report it; without reports it stays inconclusive")
	case m[1] == MetricCost:
		return unknown("the model needs a cost formula, or applications must report it; without either it stays inconclusive")
	default:
		f := unknown("the requests it needs depend on the candidate")
		f.Provable = true
		return f
	}
	f := counted(p, gate, n, rate)
	f.Needs = fmt.Sprintf("%s needs about %d requests of the candidate", source, n)
	return f
}

// shareRequests is the least n whose interval around half the bound lies below it.
func shareRequests(bound float64) uint64 {
	s := experiments.Sequence{Alpha: GateAlpha, Tuning: experiments.DefaultTuning}
	return least(func(n uint64) bool {
		in, err := s.Proportion(uint64(math.Floor(float64(n)*bound/2)), n)
		return err == nil && in.High < bound
	})
}

// degradationRequests is the least n at which two 95th percentiles of equal
// distributions, each within its interval, are proved to differ by less than the bound.
// The baseline has many more requests; its interval counts for nothing.
func degradationRequests(bound float64) uint64 {
	s := experiments.Sequence{Alpha: GateAlpha / 2, Tuning: experiments.DefaultTuning}
	const level, spread = 0.95, 0.5
	normal := distuv.UnitNormal
	return least(func(n uint64) bool {
		in, err := s.Proportion(uint64(math.Round(float64(n)*level)), n)
		if err != nil || in.High >= 1 {
			return false
		}
		return math.Exp(spread*(normal.Quantile(in.High)-normal.Quantile(level)))-1 < bound
	})
}

// least is the smallest n up to a thousand million for which ok holds, to about one
// percent, given that it holds for all larger n, too; the limit if for none.
func least(ok func(n uint64) bool) uint64 {
	const limit = 1_000_000_000
	high := uint64(1)
	for ; !ok(high); high *= 2 {
		if high >= limit {
			return limit
		}
	}
	low := high / 2
	for high-low > 1+low/100 {
		if mid := low + (high-low)/2; ok(mid) {
			high = mid
		} else {
			low = mid
		}
	}
	return high
}
