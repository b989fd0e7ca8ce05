package seedconfig

import (
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func at(n *yaml.Node) Position { return Position{n.Line, n.Column} }

// gate reads one gate of a phase.
func (r *reader) gate(name string, n *yaml.Node) *pb.RolloutGate {
	g := &pb.RolloutGate{Name: name}
	check := func() *pb.RolloutCheck {
		if g.Check == nil {
			g.Check = &pb.RolloutCheck{}
		}
		return g.Check
	}
	d := func(n *yaml.Node) *durationpb.Duration { return span(r.duration(n)) }
	r.mapping(n, fields{
		"kind":            func(n *yaml.Node) { g.Kind = r.text(n) },
		"conditions":      func(n *yaml.Node) { g.Conditions = r.texts(n) },
		"approvals":       func(n *yaml.Node) { g.Approvals = uint32(r.whole(n, 100)) },
		"approvers":       func(n *yaml.Node) { g.Approvers = r.texts(n) },
		"expiry":          func(n *yaml.Node) { g.Expiry = d(n) },
		"hook":            func(n *yaml.Node) { check().Hook = r.text(n) },
		"url":             func(n *yaml.Node) { check().Url = r.text(n) },
		"command":         func(n *yaml.Node) { check().Command = r.texts(n) },
		"timeout":         func(n *yaml.Node) { check().Timeout = d(n) },
		"interval":        func(n *yaml.Node) { check().Interval = d(n) },
		"dwell":           func(n *yaml.Node) { g.Dwell = d(n) },
		"hours":           func(n *yaml.Node) { g.Hours = r.texts(n) },
		"utc_offset":      func(n *yaml.Node) { g.UtcOffset = r.text(n) },
		"freezes":         func(n *yaml.Node) { g.Freezes = r.texts(n) },
		"experiment":      func(n *yaml.Node) { g.Experiment = r.text(n) },
		"on_inconclusive": func(n *yaml.Node) { g.OnInconclusive = r.text(n) },
		"on_fail":         func(n *yaml.Node) { g.OnFail = r.text(n) },
		"max_wait":        func(n *yaml.Node) { g.MaxWait = d(n) },
		"dry_run":         func(n *yaml.Node) { g.DryRun = r.boolean(n) },
		"metadata": func(n *yaml.Node) {
			check().Metadata = map[string]string{}
			r.each(n, func(key string, _, v *yaml.Node) { g.Check.Metadata[key] = r.text(v) })
		},
	})
	return g
}

// span leaves no duration out where there is none.
func span(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}
