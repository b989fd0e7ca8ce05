package deploy

import (
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Hooks say when a check of an automated_test gate is asked, as Flagger's webhooks do
// (https://docs.flagger.app/usage/webhooks). Those that must pass before traffic moves
// become gates of the phase before, an own phase "pending" without traffic if need be.
const (
	HookConfirmRollout  = "confirm-rollout"          // before the first candidate request
	HookPreRollout      = "pre-rollout"              // before the first candidate request, after confirm-rollout
	HookRollout         = "rollout"                  // again and again while the phase lasts; the default
	HookConfirmIncrease = "confirm-traffic-increase" // before the next phase gives more weight
	HookConfirmPromote  = "confirm-promotion"        // before the candidate gets everything
	HookRollback        = "rollback"                 // again and again; passing means: roll back
	HookPostRollout     = "post-rollout"             // once after the end; its answer changes nothing
	HookEvent           = "event"                    // told every change of state; its answer changes nothing
)

func hooks() []string {
	return []string{HookConfirmRollout, HookPreRollout, HookRollout, HookConfirmIncrease, HookConfirmPromote, HookRollback, HookPostRollout, HookEvent}
}

// Limits and defaults of a check.
const (
	DefaultCheckTimeout  = 10 * time.Second
	DefaultCheckInterval = 10 * time.Second
	MaxCheckTimeout      = 10 * time.Minute
)

// checkTest holds what a check must say. An empty hook is HookRollout.
func checkTest(c *pb.RolloutCheck) error {
	bad := func(format string, args ...any) error { return outrigger.Errorf(outrigger.Invalid, format, args...) }
	if h := c.GetHook(); h != "" && !slices.Contains(hooks(), h) {
		return bad("hook is %q; it is one of %s", h, strings.Join(hooks(), ", "))
	}
	if d := c.GetTimeout().AsDuration(); d < 0 || d > MaxCheckTimeout {
		return bad("timeout %v is outside 0..%v; 0 means %v", d, MaxCheckTimeout, DefaultCheckTimeout)
	}
	if d := c.GetInterval().AsDuration(); d != 0 && d < time.Second || d > MaxPhaseDuration {
		return bad("interval %v is outside 1s..%v; 0 means %v", d, MaxPhaseDuration, DefaultCheckInterval)
	}
	if (c.GetUrl() == "") == (len(c.GetCommand()) == 0) {
		return bad("a check has either a url or a command")
	}
	if len(c.GetCommand()) > 0 {
		if c.GetCommand()[0] == "" {
			return bad("the command names no program")
		}
		return nil
	}
	u, err := url.Parse(c.GetUrl())
	if err != nil || u.Host == "" || !slices.Contains([]string{"http", "https", "grpc"}, u.Scheme) || u.User != nil {
		return bad("url %q is not http://…, https://… or grpc://host:port[/service] without a password", c.GetUrl())
	}
	return nil
}

// placeHooks moves gates to where they take effect.
func placeHooks(phases []Phase) []Phase {
	out := make([]Phase, 0, len(phases)+1)
	var early []*pb.RolloutGate
	firstLive, full := -1, -1
	for i, p := range phases {
		if firstLive < 0 && p.Weight > 0 {
			firstLive = i
		}
		if full < 0 && p.Weight == FullWeight {
			full = i
		}
		p.Gates = slices.Clone(p.Gates)
		out = append(out, p)
	}
	move := func(i int, to func(hook string) bool) (moved []*pb.RolloutGate) {
		out[i].Gates = slices.DeleteFunc(out[i].Gates, func(g *pb.RolloutGate) bool {
			if to(g.GetCheck().GetHook()) {
				moved = append(moved, g)
				return true
			}
			return false
		})
		return moved
	}
	before := func(h string) bool { return h == HookConfirmRollout || h == HookPreRollout }
	for i := max(firstLive, 0); i < len(out); i++ {
		early = append(early, move(i, before)...)
	}
	if full > 0 {
		for i := range out {
			if i != full-1 {
				out[full-1].Gates = append(out[full-1].Gates, move(i, func(h string) bool { return h == HookConfirmPromote })...)
			}
		}
	}
	switch {
	case len(early) == 0:
	case firstLive > 0:
		out[firstLive-1].Gates = append(out[firstLive-1].Gates, early...)
	default:
		out = append([]Phase{{Name: "pending", Environment: "pending", Gates: early}}, out...)
	}
	return out
}
