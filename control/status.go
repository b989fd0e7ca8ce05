package control

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// Bounds of one status answer; the lists have calls of their own that page or filter.
const (
	statusModels   = 200
	statusRollouts = 50
	statusAlerts   = 100
	statusNodes    = 1000
)

// Status is everything the status page shows, from one version of the facts and the live
// views as they are.
func (a *admin) Status(_ context.Context, _ *pb.ListRequestAll) (*pb.StatusResponse, error) {
	f := a.facts.Facts()
	regions, _ := a.regionList(f)
	alerts := a.alerts(f)
	return &pb.StatusResponse{
		Region: a.region.GetName(), Incarnation: strconv.FormatUint(a.log.Incarnation(), 16), Head: a.log.Head(),
		PolicyPosition: a.position(), Nodes: a.nodes(), Models: a.models(f, statusModels), Rollouts: a.rollouts(f, statusRollouts),
		Cache: a.monitor.CacheStats(), Regions: regions, Alerts: alerts[:min(statusAlerts, len(alerts))],
		StartedAt: wire.TimePB(a.started), Now: a.timestamp(),
	}, nil
}

// nodes joins who follows policy with who follows the change feed, by node id. Nodes with
// a problem come first, so that the bound cuts off healthy ones.
func (a *admin) nodes() []*pb.NodeStatus {
	byID := make(map[string]*pb.NodeStatus)
	for _, n := range a.ledger.Ledger() {
		byID[n.Node.ID] = &pb.NodeStatus{Node: wire.NodePB(n.Node), Connected: n.Connected, AckedPosition: n.Acked,
			Nack: nackText(n.Nack), Since: wire.TimePB(n.Since)}
	}
	for _, s := range a.feeds.Stats().Feeds {
		n := byID[s.Node.ID]
		if n == nil {
			n = &pb.NodeStatus{Node: wire.NodePB(s.Node), Connected: true, Since: wire.TimePB(s.Since)}
			byID[s.Node.ID] = n
		}
		n.FeedApplied = max(n.FeedApplied, s.Sent)
	}
	out := make([]*pb.NodeStatus, 0, len(byID))
	for _, n := range byID {
		out = append(out, n)
	}
	slices.SortFunc(out, func(x, y *pb.NodeStatus) int {
		return cmp.Or(cmp.Compare(trouble(y), trouble(x)), cmp.Compare(x.GetNode().GetId(), y.GetNode().GetId()))
	})
	return out[:min(statusNodes, len(out))]
}

func trouble(n *pb.NodeStatus) int {
	switch {
	case n.GetNack() != "":
		return 2
	case !n.GetConnected():
		return 1
	}
	return 0
}

func nackText(n *adsserver.Nack) string {
	if n == nil {
		return ""
	}
	if n.Resource == "" {
		return n.Message
	}
	return n.Resource + ": " + n.Message
}

// problem is an alert that is not in the log, because it follows from what is: it stands
// while the facts stand.
type problem struct{ id, severity, text string }

// problems lists what the facts themselves say is wrong.
func problems(f *facts.Facts, o compile.Options) []problem {
	var out []problem
	for _, p := range compile.Problems(f, o) {
		severity, prefix := "medium", ""
		if p.Out {
			severity, prefix = "high", fmt.Sprintf("model %s is not served: ", p.Model)
		}
		out = append(out, problem{id: "policy/" + p.Model, severity: severity, text: prefix + p.Text})
	}
	if s := f.Skipped(); s.Count > 0 {
		out = append(out, problem{id: "log/skipped", severity: "low",
			text: fmt.Sprintf("%d events of the log made no sense and were passed over, the last at %d: %s", s.Count, s.Position, s.Reason)})
	}
	return out
}
