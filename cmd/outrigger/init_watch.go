package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/proxy/intercept/netfilter"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// watchdog makes interception fail open: while nothing takes connections at the sidecar's
// ports the rules are out, so that new connections of the pod go where they were going,
// unseen by the mesh; once something does again they are back.
type watchdog struct {
	every               time.Duration
	failures, successes int // in a row, before the rules go or come
	alive               func(context.Context) error
	install             func() error
	remove              func() error
	say                 func(format string, args ...any)
}

// verdict counts looks in a row. It is the whole decision.
type verdict struct {
	in        bool // the rules are in force
	good, bad int
}

// look takes in one more look and says what to do: nothing (0), install (1), remove (-1).
func (v *verdict) look(alive bool, failures, successes int) int {
	if alive {
		v.good, v.bad = v.good+1, 0
	} else {
		v.good, v.bad = 0, v.bad+1
	}
	switch {
	case v.in && v.bad >= failures:
		return -1
	case !v.in && v.good >= successes:
		return 1
	}
	return 0
}

// run looks until ctx ends, and leaves the rules as they are then: a watchdog that is
// replaced must not open a gap. A change that fails is tried again at the next look.
func (w *watchdog) run(ctx context.Context, in bool) error {
	v := verdict{in: in}
	t := time.NewTicker(w.every)
	defer t.Stop()
	for {
		look, cancel := context.WithTimeout(ctx, w.every)
		err := w.alive(look)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		change, what := w.remove, "removed"
		switch v.look(err == nil, w.failures, w.successes) {
		case 0:
			change = nil
		case 1:
			change, what = w.install, "installed"
		}
		if change != nil {
			if cerr := change(); cerr != nil {
				w.say("rules not %s: %v", what, cerr)
			} else {
				v.in = !v.in
				w.say("rules %s: after %d failed and %d good looks in a row; the last said: %v", what, v.bad, v.good, err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (i *initFlags) watchCommand() *cobra.Command {
	w := &watchdog{}
	cmd := &cobra.Command{Use: "watch", Short: "Keep the rules in force while the sidecar takes connections (fail-open)", Args: exactArgs(),
		Long: `Watch connects to the sidecar's intercept ports on localhost again and again. After
--failures looks in a row in vain it removes the rules in one transaction: new connections
of the pod then go directly to where they were going, not counted, routed or protected by
the mesh, and localhost ports that only the sidecar serves are refused. After --successes
good looks it installs them again. Connections that exist are not touched.

Rules that differ from the settings are removed at once, and these installed when the sidecar
is seen. It runs beside the sidecar, in its network namespace, with CAP_NET_ADMIN, until it is
stopped, and then leaves the rules as they are. Without it interception fails closed: the
pod's connections are refused while the sidecar is down. A sidecar that hangs but accepts is
not noticed; its liveness probe (/healthz) ends that one.`}
	f := cmd.Flags()
	f.DurationVar(&w.every, "interval", 500*time.Millisecond, "time between looks, and for one")
	f.IntVar(&w.failures, "failures", 3, "looks in vain, in a row, before the rules go")
	f.IntVar(&w.successes, "successes", 2, "good looks, in a row, before they come back")
	cmd.RunE = i.verb(true, func(cmd *cobra.Command, r rules.Ruleset) error {
		if w.every <= 0 || w.failures < 1 || w.successes < 1 {
			return usageError{errors.New("--interval, --failures and --successes must be positive")}
		}
		w.alive = i.accepts
		w.install = func() error { return netfilter.Install(r) }
		w.remove = func() error { _, err := netfilter.Uninstall(r); return err }
		w.say = func(format string, args ...any) {
			// Nobody may be reading; the rules matter more than the line.
			_ = i.report(cmd, map[string]any{"table": r.Table, "message": fmt.Sprintf(format, args...)}, fmt.Sprintf(format, args...))
		}
		diff, err := netfilter.Verify(r)
		if err == nil && len(diff) > 0 {
			err = w.remove() // rules of other settings would stay with a sidecar that is down
		}
		if err != nil {
			return err
		}
		return w.run(cmd.Context(), len(diff) == 0)
	})
	return cmd
}

// accepts reports whether the sidecar takes connections at every port it is sent some.
func (i *initFlags) accepts(ctx context.Context) error {
	for _, port := range []uint16{i.outbound, i.inbound} {
		if port == 0 {
			continue
		}
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
		if err != nil {
			return err
		}
		c.Close()
	}
	return nil
}
