package dashboard

import (
	"fmt"
	"slices"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// View is everything the pages show, from one version of the facts. What is unknown is
// left out (nil, zero) and shown as "no data"; nothing is filled in.
type View struct {
	Status      *pb.StatusResponse
	Experiments []*pb.ExperimentResultsResponse
	Forecasts   map[string][]*pb.GateForecast // by rollout, of all its phases
	Events      []*pb.Event                   // the newest first
	Optimisers  []string
	Places      []Place   // by model, version and region
	Rate        float64   // requests per second of all models, now
	Position    uint64    // of the log, as of which this is
	At          time.Time // zero = now
}

// Place is one version in one region in the last minute.
type Place struct {
	Model, Version, Region string
	Requests, Failures     uint64
	P50, P99               float64 // milliseconds, of the Of requests under one split; 0 = no data
	Of                     uint64
}

// Matrix is who answers where, and how fast: a line per model and version, a column per
// region.
type Matrix struct {
	Regions []string
	Lines   []MatrixLine
}

// MatrixLine has one cell per region; nil = nothing was answered there.
type MatrixLine struct {
	Name  string
	Cells []*Place
}

// Matrix orders the places.
func (v *View) Matrix() (m Matrix) {
	for i := range v.Places {
		if r := v.Places[i].Region; !slices.Contains(m.Regions, r) {
			m.Regions = append(m.Regions, r)
		}
	}
	slices.Sort(m.Regions)
	for i := range v.Places {
		p := &v.Places[i]
		name := p.Model + " " + p.Version
		at := slices.IndexFunc(m.Lines, func(l MatrixLine) bool { return l.Name == name })
		if at < 0 {
			m.Lines = append(m.Lines, MatrixLine{Name: name, Cells: make([]*Place, len(m.Regions))})
			at = len(m.Lines) - 1
		}
		m.Lines[at].Cells[slices.Index(m.Regions, p.Region)] = p
	}
	return m
}

// Row is one version of a comparison.
type Row struct {
	Name                   string
	Requests, Good, Tokens uint64
	P50, P99               float64 // milliseconds; 0 = no data
}

// Pair is a rollout under way with what its two versions did.
type Pair struct {
	Rollout             *pb.Rollout
	Candidate, Baseline Row
}

func (v *View) stats(model, version string) *pb.VersionStats {
	for _, m := range v.Status.GetModels() {
		for _, x := range m.GetVersions() {
			if m.GetName() == model && x.GetVersion() == version {
				return x.GetStats()
			}
		}
	}
	return nil
}

func rowOf(name string, s *pb.VersionStats) Row {
	return Row{Name: name, Requests: s.GetRequests(), Good: s.GetRequests() - s.GetFailures(), Tokens: s.GetTokensOut(), P50: s.GetP50Ms(), P99: s.GetP99Ms()}
}

// Running are the rollouts that have not ended.
func (v *View) Running() []*pb.Rollout {
	return slices.DeleteFunc(slices.Clone(v.Status.GetRollouts()), func(r *pb.Rollout) bool { return ended(r.GetState()) })
}

// Pairs compares candidate and last good version of every rollout under way.
func (v *View) Pairs() []Pair {
	var out []Pair
	for _, r := range v.Running() {
		out = append(out, Pair{r, rowOf(r.GetCandidate()+" (candidate)", v.stats(r.GetModel(), r.GetCandidate())),
			rowOf(r.GetLastGood()+" (baseline)", v.stats(r.GetModel(), r.GetLastGood()))})
	}
	return out
}

func (v *View) total() (out Row) {
	for _, m := range v.Status.GetModels() {
		for _, x := range m.GetVersions() {
			r := rowOf("", x.GetStats())
			out.Requests, out.Good = out.Requests+r.Requests, out.Good+r.Good
		}
	}
	return out
}

// Requests is how many were counted since the replica started, Good those that did not fail.
func (v *View) Requests() uint64 { return v.total().Requests }

// Good is the part of Requests that did not fail.
func (v *View) Good() uint64 { return v.total().Good }

// Standing are the alerts that are not resolved; Resolved the others.
func (v *View) Standing() []*pb.Alert { return v.alerts(false) }

// Firing are those that stand and are not silenced, Silenced those that are.
func (v *View) Firing() []*pb.Alert { return v.inState("firing") }

// Silenced are the alerts that stand and that nobody is told about.
func (v *View) Silenced() []*pb.Alert { return v.inState("silenced") }

func (v *View) inState(state string) (out []*pb.Alert) {
	for _, a := range v.Status.GetAlerts() {
		if alertState(a, v.now()) == state {
			out = append(out, a)
		}
	}
	return out
}

// Resolved are the alerts that are over.
func (v *View) Resolved() []*pb.Alert { return v.alerts(true) }

func (v *View) alerts(resolved bool) (out []*pb.Alert) {
	for _, a := range v.Status.GetAlerts() {
		if (a.GetResolvedAt() != nil) == resolved {
			out = append(out, a)
		}
	}
	return out
}

// OnPolicy counts the nodes that run the newest policy.
func (v *View) OnPolicy() (n int) {
	for _, x := range v.Status.GetNodes() {
		if x.GetAckedPosition() >= v.Status.GetPolicyPosition() {
			n++
		}
	}
	return n
}

// CacheReads is how many reads all tiers answered.
func (v *View) CacheReads() uint64 {
	c := v.Status.GetCache()
	return c.GetHitsProcess() + c.GetHitsNode() + c.GetHitsOrigin()
}

func (v *View) rollout(id string) *pb.Rollout {
	for _, r := range v.Status.GetRollouts() {
		if r.GetId() == id {
			return r
		}
	}
	return nil
}

func ended(state string) bool {
	return state == "rolled_back" || state == "completed" || state == "aborted"
}

// gateLine is one gate of the present phase and what it still wants.
type gateLine struct {
	*pb.RolloutGateDecided
	Needs string
}

// gates joins what the gates said with how many more requests each is expected to need.
func (v *View) gates(r *pb.Rollout) []gateLine {
	var seen uint64
	if e := r.GetEvidence(); len(e) > 0 {
		seen = e[0].GetCandidateRequests() // of all strata together
	}
	phase := ""
	if i := int(r.GetPhase()); i < len(r.GetPhases()) {
		phase = r.GetPhases()[i].GetName()
	}
	var out []gateLine
	for _, g := range r.GetGates() {
		line := gateLine{RolloutGateDecided: g}
		for _, f := range v.Forecasts[r.GetId()] {
			if f.GetPhase() != phase || f.GetGate() != g.GetGate() || g.GetOutcome() != "inconclusive" || f.GetRequests() <= seen {
				continue
			}
			line.Needs = fmt.Sprintf("needs about %s more requests of the candidate", count(f.GetRequests()-seen))
			if d := f.GetExpected().AsDuration(); d > 0 {
				line.Needs += fmt.Sprintf("; %v in all at the present traffic", d.Round(time.Second))
			}
		}
		out = append(out, line)
	}
	return out
}

// approvalGates are the gates of the present phase that people say yes to.
func approvalGates(r *pb.Rollout) (out []string) {
	if i := int(r.GetPhase()); i < len(r.GetPhases()) {
		for _, g := range r.GetPhases()[i].GetGates() {
			if g.GetKind() == "manual_approval" {
				out = append(out, g.GetName())
			}
		}
	}
	return out
}
