//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
)

// upFlags are the settings of the one-machine mesh.
type upFlags struct {
	script   string
	duration time.Duration
	speed    float64
	dir      string
	http     string
	cue      time.Duration
	plain    bool
	// difference is how much more often version 2 succeeds, in the script experiment.
	difference float64
}

// The scripts of up.
const (
	scriptDemo       = "demo"
	scriptExperiment = "experiment"
)

func upCommand(g *globals) *cobra.Command {
	u := &upFlags{}
	cmd := &cobra.Command{Use: "up", Short: "Run a whole mesh on this machine and replay a real trace through it", Args: exactArgs(),
		Long: `Up starts a control plane, a node agent, two sidecars, two versions of a model server
and two client applications, each its own process, and replays a real trace of LLM
requests through them. Version 2 is rolled out as a canary, turns bad on cue, and is
detected and rolled back. Without --script the cue is the key "b" (or the signal
USR1) and the mesh keeps running until interrupted.

With --script experiment the versions are the arms of an experiment instead: 92 % of
version 1's calls succeed, and --difference more of version 2's. The experiment is judged
by a plan that was frozen before it started; when the plan's rule concludes, the winner
becomes the champion and gets all traffic. With --difference 0 it must stay undecided.`}
	f := cmd.Flags()
	f.StringVar(&u.script, "script", "", `"demo" plays the whole story, "experiment" an experiment between the versions, and both end with a summary; empty waits for you`)
	f.DurationVar(&u.duration, "duration", 45*time.Second, "wall time to replay for")
	f.Float64Var(&u.speed, "speed", 10, "how much faster than real time the trace is replayed, 0.1 to 100")
	f.StringVar(&u.dir, "data", "", "directory for the event log and sockets (default: a new temporary one, removed at the end)")
	f.StringVar(&u.http, "http", "127.0.0.1:7401", "status page; a free port is taken when this one is in use")
	f.DurationVar(&u.cue, "cue", 0, "when version 2 turns bad, after the start of traffic (default 40 % of the duration)")
	f.Float64Var(&u.difference, "difference", 0.03, "script experiment: how much more often version 2 succeeds than version 1's 92 %, -0.05 to 0.05")
	f.BoolVar(&u.plain, "plain", false, "print lines instead of the full-screen view, also on a terminal")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := g.configure(cmd, "up"); err != nil {
			return err
		}
		if u.script == scriptExperiment {
			// An experiment wants units, not a pace to watch.
			u.speed = cmp.Or(changed(cmd, "speed", u.speed), 40)
			u.duration = cmp.Or(changed(cmd, "duration", u.duration), time.Minute)
		}
		if err := u.validate(); err != nil {
			return configError{err}
		}
		return u.run(cmd, g)
	}
	return cmd
}

func (u *upFlags) validate() error {
	switch {
	case u.script != "" && u.script != scriptDemo && u.script != scriptExperiment:
		return fmt.Errorf("--script is %q; the scripts are %s and %s", u.script, scriptDemo, scriptExperiment)
	case !(u.difference >= -0.05 && u.difference <= 0.05):
		return fmt.Errorf("--difference is %v; give -0.05 to 0.05", u.difference)
	case u.speed < 0.1 || u.speed > 100:
		return fmt.Errorf("--speed is %v; give 0.1 to 100", u.speed)
	case u.duration < 10*time.Second || u.duration > 24*time.Hour:
		return fmt.Errorf("--duration is %v; give 10s to 24h", u.duration)
	case u.cue < 0 || u.cue > u.duration:
		return fmt.Errorf("--cue is %v; give a time within the duration of %v", u.cue, u.duration)
	}
	if u.cue == 0 {
		u.cue = u.duration * 2 / 5
	}
	return nil
}

// run starts everything, watches the story, and always stops every child again.
func (u *upFlags) run(cmd *cobra.Command, g *globals) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	dir, cleanup, err := u.workDir()
	if err != nil {
		return err
	}
	defer cleanup()
	m := newMesh(dir, u, g)
	defer m.stop()
	if err := m.start(ctx); err != nil {
		return err
	}
	view := newView(cmd, g, u, m)
	st, err := m.play(ctx, view)
	if err != nil {
		return err
	}
	sum := st.summary()
	if err := view.finish(sum); err != nil {
		return err
	}
	switch u.script {
	case scriptDemo:
		return sum.verdict()
	case scriptExperiment:
		return errors.Join(sum.served(), sum.Experiment.verdict(u.difference))
	}
	return nil
}

// changed is a flag's value if something set it (the configuration file does as well), else zero.
func changed[T any](cmd *cobra.Command, flag string, value T) (out T) {
	if cmd.Flags().Changed(flag) {
		out = value
	}
	return out
}

func (u *upFlags) workDir() (dir string, cleanup func(), err error) {
	if u.dir != "" {
		if err := os.MkdirAll(u.dir, 0o700); err != nil {
			return "", nil, fmt.Errorf("--data: %w", err)
		}
		abs, err := filepath.Abs(u.dir)
		return abs, func() {}, err
	}
	dir, err = os.MkdirTemp("", "outrigger-")
	if err != nil {
		return "", nil, fmt.Errorf("temporary directory: %w", err)
	}
	return dir, func() { os.RemoveAll(dir) }, nil
}

// errInterrupted is how a child's end on our own request is told from a crash.
var errInterrupted = errors.New("interrupted")
