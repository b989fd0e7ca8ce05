package facts

import (
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
)

// CanaryAggregate is where the events of configuration canaries are.
const CanaryAggregate = "config/canary"

// Canary is a policy change that is tried out on a few xDS clients, or was and is not in
// force anywhere.
type Canary struct {
	Share           uint32 // of the clients, in parts of experiments.Buckets
	Kinds, Nodes    []string
	Dwell, Patience time.Duration
	StartedAt       time.Time
	// Started is the log position of the start. Clients are drawn anew with each canary.
	Started uint64
	// Anew says that it tries again what an earlier one rolled back.
	Anew bool
	// Base is what the clients that are not chosen are to obey; RolledBack says that it is
	// for the chosen ones too, for the Reason.
	Base       *Facts
	RolledBack bool
	Reason     string
	// Label is the policy position under which Base is served.
	Label uint64
}

// Chooses reports whether a client is among those that get the policy first: by name, or
// by the bucket of its id. Of pods behind a relay ask about the relay
// (adsserver.NodeState.Decisive): they all get the same. The answer depends on nothing else, so it is the same on every
// replica and after every restart.
func (c *Canary) Chooses(n outrigger.Node) bool {
	if slices.Contains(c.Nodes, n.ID) {
		return true
	}
	kind := n.Kind
	if kind == xds.KindRelay {
		kind = "sidecar" // what a relay is sent is for sidecars
	}
	if len(c.Kinds) > 0 && !slices.Contains(c.Kinds, kind) {
		return false
	}
	return experiments.Bucket(CanaryAggregate+"/"+strconv.FormatUint(c.Started, 10), n.ID) < c.Share
}

// Canary returns the configuration canary that is not over: staging, or rolled back and
// not yet started anew or widened. nil = everybody has the newest policy.
func (f *Facts) Canary() *Canary { return f.canary }

// With returns the facts with these models in place of those of the same name.
func (f *Facts) With(models ...*Model) *Facts {
	if len(models) == 0 {
		return f
	}
	out := *f
	out.models = maps.Clone(f.models)
	for _, m := range models {
		out.models[m.Name] = m
	}
	return &out
}

func (d *draft) canaryStarted(p *pb.ConfigCanaryStarted, before *Facts) string {
	next := &Canary{Share: p.GetShare(), Kinds: p.GetKinds(), Nodes: p.GetNodes(), Dwell: p.GetDwell().AsDuration(), Patience: p.GetPatience().AsDuration(),
		StartedAt: d.at(), Started: d.event.GetPosition(), Base: before, Label: before.policyPosition, Reason: p.GetReason()}
	if old := d.canary; old != nil {
		if !old.RolledBack {
			return "a configuration canary is started while another one stands"
		}
		next.Base, next.Label, next.Anew = old.Base, old.Label, true
	}
	d.canary = next
	return ""
}

func (d *draft) canaryEnded(p *pb.ConfigCanaryEnded) string {
	old := d.canary
	switch {
	case old == nil:
		return "a configuration canary ends and none stands"
	case p.GetWidened():
		d.canary = nil
	case old.RolledBack:
		return "a configuration canary is rolled back twice"
	default:
		next := *old
		next.RolledBack, next.Reason, next.Label = true, p.GetReason(), d.event.GetPosition()
		d.canary = &next
	}
	return ""
}
