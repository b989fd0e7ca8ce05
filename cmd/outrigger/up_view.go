//go:build !dataplane

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// view shows a run: a full-screen picture on a terminal, otherwise one line a second
// on standard error. The summary goes to standard output in either case.
type view struct {
	g        *globals
	u        *upFlags
	out, err io.Writer
	page     string

	quit chan struct{} // the person asked to end
	cue  chan struct{} // the person asked for version 2 to turn bad

	program *tea.Program
	ended   chan struct{} // closed when the terminal program has ended
}

func newView(cmd *cobra.Command, g *globals, u *upFlags, m *mesh) *view {
	v := &view{g: g, u: u, out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), page: m.statusPage(),
		quit: make(chan struct{}, 1), cue: make(chan struct{}, 1), ended: make(chan struct{})}
	fmt.Fprintf(v.err, "status page: %s\n", v.page)
	stdout, ok := v.out.(*os.File)
	if u.plain || g.output == "json" || !ok || !isTerminal(stdout) {
		close(v.ended)
		return v
	}
	v.program = tea.NewProgram(model{v: v}, tea.WithOutput(stdout), tea.WithoutSignalHandler(), tea.WithAltScreen())
	go func() {
		defer close(v.ended)
		if _, err := v.program.Run(); err != nil {
			fmt.Fprintln(v.err, "terminal view:", err)
		}
	}()
	return v
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// update shows the present picture.
func (v *view) update(p picture) {
	if v.program != nil {
		v.program.Send(p)
		return
	}
	phase, evidence := phaseOf(p)
	fmt.Fprintf(v.err, "%6s  calls %d (%s)  failed %d  p50 %.0f ms p99 %.0f ms  reads %d (%s)  lag p50 %.2f ms p99 %.2f ms  %s %s\n",
		p.Elapsed.Round(time.Second), p.Calls, shares(p.Split), p.Failed, p.P50, p.P99, p.Reads, shares(p.Hits),
		p.Mesh.GetCache().GetInvalidationLagP50Ms(), p.Mesh.GetCache().GetInvalidationLagP99Ms(), phase, evidence)
}

// shares prints counts as percentages, sorted by name.
func shares(m map[string]int) string {
	total := 0
	for _, n := range m {
		total += n
	}
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		name := k
		if name == "" {
			name = "none"
		}
		parts = append(parts, fmt.Sprintf("%s %.1f%%", name, 100*float64(m[k])/float64(max(total, 1))))
	}
	return strings.Join(parts, ", ")
}

// phaseOf names the rollout's phase and its strongest evidence.
func phaseOf(p picture) (phase, evidence string) {
	if p.Trial != nil {
		return p.Trial.State + " " + p.Trial.Outcome, p.Trial.line()
	}
	r := p.Rollout
	if r == nil {
		return "no rollout yet", ""
	}
	phase = r.State
	if r.State == "running" && int(r.Phase) < len(r.Phases) {
		phase = fmt.Sprintf("%s %.0f%%", r.Phases[r.Phase].Name, float64(r.Phases[r.Phase].Weight)/100)
	}
	for _, e := range r.Evidence {
		evidence = fmt.Sprintf("evidence %.3g of %.3g", max(e.EValue, 0), e.Threshold)
	}
	return phase, evidence
}

// finish closes the picture and prints the summary.
func (v *view) finish(s summary) error {
	if v.program != nil {
		v.program.Quit()
		<-v.ended
	}
	s.TraceSeconds = v.u.duration.Seconds() * v.u.speed
	if v.g.output == "json" {
		return json.NewEncoder(v.out).Encode(s)
	}
	w := v.out
	fmt.Fprintf(w, "\nServed %d model calls (%s) and %d variable reads (%s), %d writes, in %.0f s of the trace.\n",
		s.Requests, shares(s.Split), s.Reads, shares(s.Hits), s.Writes, s.TraceSeconds)
	fmt.Fprintf(w, "Latency of calls p50 %.0f ms, p99 %.0f ms; of reads p50 %.2f ms, p99 %.2f ms; invalidation lag p50 %.2f ms, p99 %.2f ms.\n",
		s.LatencyMs["p50"], s.LatencyMs["p99"], s.ReadMs["p50"], s.ReadMs["p99"], s.Invalidation["p50"], s.Invalidation["p99"])
	fmt.Fprintf(w, "Errors: %d caused by the script, %d others.\n", s.ScriptErrors, s.Errors)
	for _, u := range s.Unexplained {
		fmt.Fprintln(w, "  ", u)
	}
	if r := s.Rollback; r != nil {
		fmt.Fprintf(w, "Rollback: first bad answer %.0f ms after the cue, decided %.0f ms later, acknowledged by all %d sidecars after another %.0f ms; %d calls reached the bad version after that.\n",
			r.FirstBadMs, r.DecidedMs, r.Acked, r.AckedMs, r.WrongAfterAck)
	}
	if e := s.Experiment; e != nil {
		e.print(w)
	}
	fmt.Fprintf(w, "\nAudit (decisions only; %d events in the log):\n", s.Events)
	for _, e := range s.audit {
		switch {
		case e.GetVariableSet() != nil || e.GetVariableRegistered() != nil || e.GetSessionCreated() != nil || e.GetPushRecorded() != nil:
		default:
			fmt.Fprintf(w, "  %6d  %s  %-8s %s\n", e.Position, e.At.AsTime().Format("15:04:05.000"), e.Actor, eventLine(e))
		}
	}
	return nil
}

// model is the full-screen picture (Elm style: state, update, view).
type model struct {
	v *view
	p picture
}

// Init starts nothing: pictures are sent from outside.
func (m model) Init() tea.Cmd { return nil }

// Update takes a new picture or a key.
func (m model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case picture:
		m.p = msg
	case tea.KeyMsg:
		switch msg.String() {
		case "q", "ctrl+c", "esc":
			signalOnce(m.v.quit)
		case "b":
			signalOnce(m.v.cue)
		}
	}
	return m, nil
}

func signalOnce(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // asked before
	}
}

// View draws the picture.
func (m model) View() string {
	p := m.p
	var b strings.Builder
	done := min(1, p.Elapsed.Seconds()/m.v.u.duration.Seconds())
	fmt.Fprintf(&b, "Outrigger   %s   %s\n\n", m.v.page, bar(done, 30))
	fmt.Fprintf(&b, "  model calls    %6d   failed %d (%d not by the script)\n", p.Calls, p.Failed, p.Unexplained)
	for _, k := range slices.Sorted(maps.Keys(p.Split)) {
		share := float64(p.Split[k]) / float64(max(p.Calls, 1))
		fmt.Fprintf(&b, "    %-12s %s %5.1f %%\n", k, bar(share, 30), 100*share)
	}
	fmt.Fprintf(&b, "  latency        p50 %.0f ms   p99 %.0f ms\n\n", p.P50, p.P99)
	fmt.Fprintf(&b, "  variable reads %6d   writes %d   p50 %.2f ms   p99 %.2f ms\n", p.Reads, p.Writes, p.ReadP50, p.ReadP99)
	for _, k := range []string{"process", "node", "origin"} {
		share := float64(p.Hits[k]) / float64(max(p.Reads, 1))
		fmt.Fprintf(&b, "    %-12s %s %5.1f %%\n", k, bar(share, 30), 100*share)
	}
	c := p.Mesh.GetCache()
	fmt.Fprintf(&b, "  invalidation   p50 %.2f ms   p99 %.2f ms from commit to the node's table\n\n", c.GetInvalidationLagP50Ms(), c.GetInvalidationLagP99Ms())
	phase, evidence := phaseOf(p)
	what := "rollout"
	if p.Trial != nil {
		what = "experiment"
	}
	fmt.Fprintf(&b, "  %-14s %s   %s\n", what, phase, evidence)
	if p.MeshErr != nil {
		fmt.Fprintf(&b, "  control plane  not answering: %v\n", p.MeshErr)
	}
	b.WriteString("\n  b: version 2 turns bad   q: end\n")
	return b.String()
}

func bar(share float64, width int) string {
	n := int(share*float64(width) + 0.5)
	return strings.Repeat("█", n) + strings.Repeat("░", width-n)
}
