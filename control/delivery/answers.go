package delivery

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// XdsConfig returns what a node has in force and should have.
func (s *Service) XdsConfig(_ context.Context, r *pb.XdsConfigRequest) (*pb.XdsConfigResponse, error) {
	only, err := typeURL(r.GetType())
	if err != nil {
		return nil, err
	}
	held, err := s.ads.Config(r.GetNode())
	if err != nil {
		return nil, err
	}
	out, d := &pb.XdsConfigResponse{Node: r.GetNode()}, dumper{maxBytes}
	for i := range held {
		h := &held[i]
		if only != "" && h.Type != only || !strings.HasPrefix(h.Name, r.GetNamePrefix()) {
			continue
		}
		x, fits, err := resourcePB(h, &d, r.GetBodies())
		if err != nil {
			return nil, err
		}
		if !fits {
			out.LeftOut++
			continue
		}
		out.Resources = append(out.Resources, x)
	}
	return out, nil
}

func resourcePB(h *adsserver.Held, d *dumper, body bool) (out *pb.XdsResource, fits bool, err error) {
	out, fits = &pb.XdsResource{Type: h.Type, Name: h.Name, Verdict: h.Verdict, Wanted: h.Wanted, Sent: h.Sent, Version: h.Version, Nack: nackPB(h.Nack)}, true
	if body {
		out.Body, fits, err = d.dump(h.Body)
	}
	return out, fits, err
}

// side is one half of a comparison.
type side struct {
	name string
	set  map[adsserver.ResourceID]body
}

type body struct {
	version string
	any     *anypb.Any
}

// XdsDiff compares two pushes of a node's group, or what two nodes have in force.
func (s *Service) XdsDiff(_ context.Context, r *pb.XdsDiffRequest) (*pb.XdsDiffResponse, error) {
	from, to, err := s.sides(r)
	if err != nil {
		return nil, err
	}
	out, d := &pb.XdsDiffResponse{From: from.name, To: to.name}, dumper{maxBytes}
	for _, id := range differing(from.set, to.set) {
		a, b := from.set[id], to.set[id]
		x := &pb.XdsChange{Type: id.Type, Name: id.Name, FromVersion: a.version, ToVersion: b.version}
		var fits, both bool
		if x.FromBody, fits, err = d.dump(a.any); err != nil {
			return nil, err
		}
		if x.ToBody, both, err = d.dump(b.any); err != nil {
			return nil, err
		}
		if !fits || !both {
			out.LeftOut++
			continue
		}
		out.Changes = append(out.Changes, x)
	}
	return out, nil
}

func (s *Service) sides(r *pb.XdsDiffRequest) (from, to side, err error) {
	if r.GetOther() != "" {
		if r.GetFrom()+r.GetTo() != "" {
			return from, to, outrigger.Errorf(outrigger.Invalid, "other and versions exclude each other; compare two nodes, or two pushes of one")
		}
		if from, err = s.effective(r.GetNode()); err == nil {
			to, err = s.effective(r.GetOther())
		}
		return from, to, err
	}
	if r.GetFrom() == "" {
		return from, to, outrigger.Errorf(outrigger.Invalid, "from is empty; give the id or position of a push, see the push log")
	}
	if from, err = s.pushed(r.GetNode(), r.GetFrom()); err == nil {
		to, err = s.pushed(r.GetNode(), r.GetTo())
	}
	return from, to, err
}

func (s *Service) effective(node string) (side, error) {
	held, err := s.ads.Config(node)
	out := side{name: node, set: make(map[adsserver.ResourceID]body)}
	for _, h := range held {
		if h.Version != "" {
			out.set[h.ResourceID] = body{h.Version, h.Body}
		}
	}
	return out, err
}

func (s *Service) pushed(node, push string) (side, error) {
	id, set, err := s.ads.SetAt(node, push)
	out := side{name: id, set: make(map[adsserver.ResourceID]body)}
	for _, x := range set {
		out.set[x.ResourceID] = body{x.Version, x.Body}
	}
	return out, err
}

// differing lists what is not the same in both, by push order and name.
func differing(a, b map[adsserver.ResourceID]body) (out []adsserver.ResourceID) {
	for id, x := range a {
		if b[id].version != x.version {
			out = append(out, id)
		}
	}
	for id := range b {
		if _, there := a[id]; !there {
			out = append(out, id)
		}
	}
	slices.SortFunc(out, func(a, b adsserver.ResourceID) int {
		return cmp.Or(cmp.Compare(slices.Index(xds.Pushed(), a.Type), slices.Index(xds.Pushed(), b.Type)), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// XdsPushLog lists pushes, the newest first.
func (s *Service) XdsPushLog(_ context.Context, r *pb.XdsPushLogRequest) (*pb.XdsPushLogResponse, error) {
	limit, err := limitOf(r.GetLimit(), defaultPushes, adsserver.MaxPushes)
	if err != nil {
		return nil, err
	}
	out := &pb.XdsPushLogResponse{}
	for _, p := range s.ads.Pushes(r.GetGroup()) {
		if r.GetPush() != "" && p.ID != r.GetPush() {
			continue
		}
		if len(out.Pushes) < limit {
			out.Pushes = append(out.Pushes, pushPB(&p))
		}
	}
	if r.GetPush() != "" && len(out.Pushes) == 0 {
		return nil, outrigger.Errorf(outrigger.NotFound, "push %q not found; the newest %d of each group are remembered", r.GetPush(), adsserver.MaxPushes)
	}
	return out, nil
}

func pushPB(p *adsserver.Push) *pb.XdsPush {
	out := &pb.XdsPush{Id: p.ID, Group: p.Group, Position: p.Position, At: wire.TimePB(p.At), Resources: uint32(p.Resources),
		Changes: uint32(len(p.Changed)), First: p.First}
	for _, c := range p.Changed[:min(maxChanged, len(p.Changed))] {
		out.Changed = append(out.Changed, xds.ShortType(c.Type)+" "+c.Name)
	}
	for _, d := range p.Nodes {
		out.Nodes = append(out.Nodes, &pb.XdsDelivery{Node: d.Node, Outcome: d.Outcome, SentAt: wire.TimePB(d.Sent), Seconds: d.Latency.Seconds(), Nack: nackPB(d.Nack)})
		if d.Lagging {
			out.Laggards = append(out.Laggards, d.Node)
		}
		if d.Outcome == adsserver.OutcomeAcked {
			out.Acked++
			out.Seconds = max(out.Seconds, d.Latency.Seconds())
		}
	}
	return out
}

// XdsExplain answers for one resource at one node.
func (s *Service) XdsExplain(_ context.Context, r *pb.XdsExplainRequest) (*pb.XdsExplainResponse, error) {
	only, err := typeURL(r.GetType())
	if err != nil {
		return nil, err
	}
	if r.GetResource() == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "resource is empty; give a name, such as model/<model>")
	}
	found, err := s.ads.Explain(r.GetNode(), only, r.GetResource())
	if err != nil {
		return nil, err
	}
	out := &pb.XdsExplainResponse{Node: r.GetNode(), Live: true}
	for i := range found {
		x := &found[i]
		res, _, err := resourcePB(&x.Held, nil, false)
		if err != nil {
			return nil, err
		}
		out.Live = out.Live && x.Verdict == adsserver.VerdictLive
		out.Answers = append(out.Answers, &pb.XdsExplanation{Resource: res, Push: x.Push, Since: wire.TimePB(x.Since), AtLatest: x.AtLatest, Why: x.Why})
	}
	return out, nil
}

// XdsLoad returns what clients without a sidecar reported.
func (s *Service) XdsLoad(_ context.Context, r *pb.XdsLoadRequest) (*pb.XdsLoadResponse, error) {
	rows, refused := s.ads.Loads()
	out := &pb.XdsLoadResponse{Refused: refused}
	for i := range rows {
		l := &rows[i]
		if r.GetModel() != "" && l.Model != r.GetModel() || r.GetGroup() != "" && l.Group != r.GetGroup() {
			continue
		}
		row := &pb.XdsLoadRow{Group: l.Group, Model: l.Model, Version: l.Version, Region: l.Region, Issued: l.Issued,
			Succeeded: l.Succeeded, Failed: l.Failed, Dropped: l.Dropped, At: wire.TimePB(l.At)}
		for _, name := range slices.Sorted(maps.Keys(l.Metrics)) {
			row.Metrics = append(row.Metrics, &pb.XdsLoadMetric{Name: name, Requests: l.Metrics[name].Requests, Total: l.Metrics[name].Total})
		}
		out.Rows = append(out.Rows, row)
	}
	return out, nil
}
