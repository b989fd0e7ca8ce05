//go:build !dataplane

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// drillReport is the result of a drill; the JSON form is part of the product's contract.
type drillReport struct {
	Sidecars          int                   `json:"sidecars"`
	Processes         int                   `json:"processes"`
	Envoys            int                   `json:"envoys"`
	RequestsPerSecond float64               `json:"requests_per_second"`
	Weight            uint32                `json:"weight"`
	ErrorRate         float64               `json:"error_rate"`
	DeadManMs         float64               `json:"dead_man_ms"`
	Calls             drillClients          `json:"calls"`
	Stages            map[string]drillStage `json:"stages"`
	Runs              []drillRun            `json:"runs"`
	Kills             []drillKill           `json:"kills"`
	WrongAfterAck     int                   `json:"wrong_after_ack"`
	AfterLease        int                   `json:"after_lease"`
	OK                bool                  `json:"ok"`
}

// drillStage is one stage over all runs. Target 0 is none.
type drillStage struct {
	Median float64 `json:"median"`
	Worst  float64 `json:"worst"`
	Target float64 `json:"target,omitempty"`
	Met    bool    `json:"met"`
}

// drillStages are the stages in the order of events, with what they are in words.
var drillStages = [...]struct {
	name, words string
	target      float64
	of          func(drillRun) float64
}{
	{"first_bad_ms", "bad version → first bad answer", 0, func(r drillRun) float64 { return r.FirstBadMs }},
	{"decided_ms", "first bad answer → decision", float64(drillDecisionTarget.Milliseconds()), func(r drillRun) float64 { return r.DecidedMs }},
	{"zero_ms", "decision → weight 0 at every sidecar", 0, func(r drillRun) float64 { return r.ZeroMs }},
	{"push_ack_ms", "of that: push → last acknowledgement", float64(drillPushTarget.Milliseconds()), func(r drillRun) float64 { return r.PushAckMs }},
	{"total_ms", "bad version → weight 0 at every sidecar", 0, func(r drillRun) float64 { return r.TotalMs }},
}

// median of what of gives for runs, which must not be empty.
func median(runs []drillRun, of func(drillRun) float64) float64 {
	var v []float64
	for _, r := range runs {
		v = append(v, of(r))
	}
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// finish fills in what follows from the runs.
func (r *drillReport) finish() {
	r.Stages, r.WrongAfterAck, r.AfterLease = map[string]drillStage{}, 0, 0
	for _, s := range drillStages {
		if len(r.Runs) == 0 {
			continue
		}
		st := drillStage{Median: median(r.Runs, s.of), Target: s.target}
		for _, run := range r.Runs {
			st.Worst = max(st.Worst, s.of(run))
		}
		st.Met = s.target == 0 || st.Worst <= s.target
		r.Stages[s.name] = st
	}
	for _, run := range r.Runs {
		r.WrongAfterAck += run.Wrong
	}
	for _, k := range r.Kills {
		r.WrongAfterAck += k.Wrong
		r.AfterLease += k.AfterLease
	}
	r.OK = r.verdict(false) == nil
}

func (r *drillReport) print(asJSON bool, w io.Writer) error {
	r.finish()
	if asJSON {
		return json.NewEncoder(w).Encode(r)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "%d sidecars in %d processes, %.0f requests/s, %.2f %% of the users to the candidate, which fails %.0f %% of its calls once it is bad\n\n",
		r.Sidecars, r.Processes, r.RequestsPerSecond, float64(r.Weight)/100, 100*r.ErrorRate)
	if len(r.Runs) > 0 {
		r.printRuns(tw)
	}
	if len(r.Kills) > 0 {
		fmt.Fprintf(tw, "\nCONTROL PLANE KILLED\tSERVED BY\tLAST REQUEST\tBEGUN AFTER %.0f s\tBACK AFTER\tOUT EVERYWHERE\n", r.DeadManMs/1000)
		for _, k := range r.Kills {
			finished := "before the kill"
			if k.FinishedMs > 0 {
				finished = fmt.Sprintf("%.0f ms later", k.FinishedMs)
			}
			fmt.Fprintf(tw, "%.0f ms after the version turned bad, %s\t%d sidecars\t%.0f ms after the kill\t%d\t%.0f ms\t%s\n",
				k.KilledMs, k.Moment, k.Serving, k.LastMs, k.AfterLease, k.AwayMs, finished)
		}
	}
	if r.Envoys > 0 {
		r.printEnvoys(tw)
	}
	fmt.Fprintf(tw, "\n%d calls, %d failed by bad versions, %d failed otherwise\n", r.Calls.Requests, r.Calls.Failed-r.Calls.Unexplained, r.Calls.Unexplained)
	return tw.Flush()
}

// printEnvoys says when the Envoys sent their last request to a bad version.
func (r *drillReport) printEnvoys(w io.Writer) {
	decided, killed := 0.0, 0.0
	for _, run := range r.Runs {
		decided = max(decided, run.EnvoyMs)
	}
	for _, k := range r.Kills {
		killed = max(killed, k.EnvoyMs)
	}
	fmt.Fprintf(w, "\n%d Envoys sent their last request to a bad version at most %.0f ms after the decision, and %.0f ms after the control plane was killed\n",
		r.Envoys, decided, killed)
}

func (r *drillReport) printRuns(w io.Writer) {
	fmt.Fprintf(w, "%d ROLLBACKS\tMEDIAN\tWORST\tTARGET\n", len(r.Runs))
	for _, s := range drillStages {
		st, target := r.Stages[s.name], ""
		if st.Target > 0 {
			target = fmt.Sprintf("≤ %.0f ms: met", st.Target)
			if !st.Met {
				target = fmt.Sprintf("≤ %.0f ms: missed", st.Target)
			}
		}
		fmt.Fprintf(w, "%s\t%.0f ms\t%.0f ms\t%s\n", s.words, st.Median, st.Worst, target)
	}
	count := func(words string, of func(drillRun) float64) {
		worst := 0.0
		for _, run := range r.Runs {
			worst = max(worst, of(run))
		}
		fmt.Fprintf(w, "%s\t%.0f\t%.0f\t\n", words, median(r.Runs, of), worst)
	}
	count("bad answers until the decision", func(x drillRun) float64 { return float64(x.BadAnswers) })
	count("requests of the candidate until then", func(x drillRun) float64 { return float64(x.Asked) })
	inFlight, worst := 0, 0.0
	for _, run := range r.Runs {
		inFlight += run.InFlight
		worst = max(worst, run.InFlightMs)
	}
	fmt.Fprintf(w, "\nrequests to a bad version that began after their sidecar had the rollback: %d, must be 0\n", r.WrongAfterAck)
	fmt.Fprintf(w, "under way at that moment, over all runs: %d, the last arrived %.1f ms later\n", inFlight, worst)
}

// verdict is what a drill demands.
func (r *drillReport) verdict(strict bool) error {
	var errs []error
	demand := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for _, run := range r.Runs {
		demand(run.Wrong == 0, "%d requests reached %s after their sidecars had the rollback", run.Wrong, run.Candidate)
		demand(int(run.Acked) == r.Sidecars && run.LaggardSeen == 0, "%d of %d sidecars acknowledged the rollback of %s", run.Acked, r.Sidecars, run.Candidate)
		demand(run.BadAnswers > 0, "%s was rolled back without a bad answer", run.Candidate)
	}
	for _, k := range r.Kills {
		demand(k.AfterLease == 0, "%d requests reached %s that began after the dead-man lease, with the control plane away", k.AfterLease, k.Candidate)
		demand(k.Wrong == 0, "%d requests reached %s after their sidecars had the rollback", k.Wrong, k.Candidate)
	}
	demand(r.Calls.Requests > 0, "no call was made")
	demand(r.Calls.Unexplained == 0, "%d calls failed that no bad version explains; the first: %s", r.Calls.Unexplained, r.Calls.First)
	if strict {
		for _, s := range drillStages {
			if st, ok := r.Stages[s.name]; ok {
				demand(st.Met, "%s took %.0f ms, the target is %.0f ms", s.words, st.Worst, st.Target)
			}
		}
	}
	return errors.Join(errs...)
}
