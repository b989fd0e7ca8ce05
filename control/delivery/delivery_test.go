package delivery

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// recorded is a source with answers written down.
type recorded struct {
	nodes  []adsserver.NodeDelivery
	held   map[string][]adsserver.Held
	sets   map[string][]adsserver.Resource // by push
	pushes []adsserver.Push
	why    []adsserver.Explanation
	loads  []adsserver.Load
}

func (r *recorded) Nodes() []adsserver.NodeDelivery { return r.nodes }

func (r *recorded) Config(node string) ([]adsserver.Held, error) {
	held, ok := r.held[node]
	if !ok {
		return nil, outrigger.Errorf(outrigger.NotFound, "node %q not found", node)
	}
	return held, nil
}

func (r *recorded) SetAt(_, push string) (string, []adsserver.Resource, error) {
	if push == "" {
		push = "default/2"
	}
	set, ok := r.sets[push]
	if !ok {
		return "", nil, outrigger.Errorf(outrigger.NotFound, "push %q not found", push)
	}
	return push, set, nil
}

func (r *recorded) Pushes(only string) []adsserver.Push {
	return slices.DeleteFunc(slices.Clone(r.pushes), func(p adsserver.Push) bool { return only != "" && p.Group != only })
}

func (r *recorded) Explain(string, string, string) ([]adsserver.Explanation, error) {
	return r.why, nil
}

func (r *recorded) Loads() ([]adsserver.Load, uint64) { return r.loads, 3 }

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	out, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func node(id string, connected bool, behind time.Duration, nack string) adsserver.NodeDelivery {
	n := adsserver.NodeDelivery{NodeState: adsserver.NodeState{Node: outrigger.Node{ID: id}, Group: "default", Connected: connected}, Behind: behind}
	if nack != "" {
		n.Nack = &adsserver.Nack{Type: xds.TypeCluster, Message: nack}
	}
	return n
}

func TestStatus(t *testing.T) {
	src := &recorded{nodes: []adsserver.NodeDelivery{
		node("a", true, 0, ""), node("b", false, time.Minute, ""), node("c", true, time.Second, ""), node("d", true, 0, "bad"), node("e", true, 0, "")}}
	src.nodes[4].Group = "envoy"
	s := New(src, func() time.Time { return time.Unix(100, 0) })
	for name, c := range map[string]struct {
		ask                      *pb.XdsStatusRequest
		want                     string // node ids in order
		total, behind, rejecting uint32
		kind                     outrigger.Kind
	}{
		"all, those in trouble first":     {ask: &pb.XdsStatusRequest{}, want: "d c b a e", total: 5, behind: 1, rejecting: 1},
		"a group":                         {ask: &pb.XdsStatusRequest{Group: "envoy"}, want: "e", total: 1},
		"only those in trouble":           {ask: &pb.XdsStatusRequest{Troubled: true}, want: "d c b", total: 3, behind: 1, rejecting: 1},
		"the limit cuts off healthy ones": {ask: &pb.XdsStatusRequest{Limit: 2}, want: "d c", total: 5, behind: 1, rejecting: 1},
		"one":                             {ask: &pb.XdsStatusRequest{Node: "c"}, want: "c", total: 1, behind: 1},
		"one that is not in trouble":      {ask: &pb.XdsStatusRequest{Node: "a", Troubled: true}},
		"unknown":                         {ask: &pb.XdsStatusRequest{Node: "x"}, kind: outrigger.NotFound},
		"limit too high":                  {ask: &pb.XdsStatusRequest{Limit: maxNodes + 1}, kind: outrigger.Invalid},
		"limit below zero":                {ask: &pb.XdsStatusRequest{Limit: -1}, kind: outrigger.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := s.XdsStatus(context.Background(), c.ask)
			if c.kind != outrigger.Internal || err != nil {
				if !outrigger.IsKind(err, c.kind) || c.kind == outrigger.Internal {
					t.Fatalf("error %v, want kind %v", err, c.kind)
				}
				return
			}
			var ids []string
			for _, n := range got.Nodes {
				ids = append(ids, n.GetNode().GetId())
			}
			if strings.Join(ids, " ") != c.want || got.Total != c.total || got.Behind != c.behind || got.Rejecting != c.rejecting || got.Now.GetSeconds() != 100 {
				t.Errorf("%v of %d, %d behind, %d rejecting, at %v; want %s of %d, %d, %d", ids, got.Total, got.Behind, got.Rejecting, got.Now, c.want, c.total, c.behind, c.rejecting)
			}
		})
	}
}

// Clients that are sent nothing come first, counted, with what it is that they hold.
func TestStatusOfHeld(t *testing.T) {
	src := &recorded{nodes: []adsserver.NodeDelivery{node("a", true, 0, ""), node("d", true, 0, "bad"), node("h", true, time.Minute, "")}}
	src.nodes[2].Held, src.nodes[2].HeldSince = "Cluster model/chat/v1", time.Unix(40, 0)
	got, err := New(src, func() time.Time { return time.Unix(100, 0) }).XdsStatus(context.Background(), &pb.XdsStatusRequest{Troubled: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Nodes) != 2 || got.Held != 1 {
		t.Fatalf("%d nodes, %d held, want 2 and 1", len(got.Nodes), got.Held)
	}
	if h := got.Nodes[0]; h.GetNode().GetId() != "h" || h.Held != "Cluster model/chat/v1" || h.HeldSince.GetSeconds() != 40 {
		t.Errorf("the first is %v", h)
	}
	if d := got.Nodes[1]; d.Held != "" || d.HeldSince != nil {
		t.Errorf("the second is %v", d)
	}
}

// secret is a cluster whose transport socket holds a private key.
func secret(t *testing.T, key string) *anypb.Any {
	return pack(t, &cluster.Cluster{Name: "model/chat/v1", TransportSocket: &core.TransportSocket{Name: "tls",
		ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: pack(t, &tls.UpstreamTlsContext{CommonTlsContext: &tls.CommonTlsContext{
			TlsCertificates: []*tls.TlsCertificate{{PrivateKey: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: key}}}}}})}}})
}

func TestConfigAndDiff(t *testing.T) {
	id := func(typeURL, name string) adsserver.ResourceID {
		return adsserver.ResourceID{Type: typeURL, Name: name}
	}
	v1, route := id(xds.TypeCluster, "model/chat/v1"), id(xds.TypeRoute, "model/chat")
	src := &recorded{
		held: map[string][]adsserver.Held{
			"a": {{ResourceID: v1, Verdict: adsserver.VerdictLive, Wanted: "1", Version: "1", Body: secret(t, "first key")},
				{ResourceID: route, Verdict: adsserver.VerdictWaiting, Wanted: "9"}},
			"b": {{ResourceID: v1, Verdict: adsserver.VerdictRejected, Wanted: "2", Version: "2", Body: secret(t, "second key"), Nack: &adsserver.Nack{Message: "no"}}},
		},
		sets: map[string][]adsserver.Resource{
			"default/1": {{ResourceID: v1, Version: "1", Body: secret(t, "first key")}},
			"default/2": {{ResourceID: v1, Version: "1", Body: secret(t, "first key")}, {ResourceID: route, Version: "9"}},
		},
	}
	s, ctx := New(src, nil), context.Background()

	got, err := s.XdsConfig(ctx, &pb.XdsConfigRequest{Node: "a", Bodies: true})
	if err != nil || len(got.Resources) != 2 || got.Resources[0].Body == "" || got.LeftOut != 0 {
		t.Fatalf("%v, %v", got, err)
	}
	if body := got.Resources[0].Body; strings.Contains(body, "first key") {
		t.Errorf("a private key is shown: %s", body)
	}
	if got, err = s.XdsConfig(ctx, &pb.XdsConfigRequest{Node: "a", Type: "cluster"}); err != nil || len(got.Resources) != 1 || got.Resources[0].Body != "" {
		t.Errorf("clusters without bodies: %v, %v", got, err)
	}
	if got, err = s.XdsConfig(ctx, &pb.XdsConfigRequest{Node: "a", NamePrefix: "other"}); err != nil || len(got.Resources) != 0 {
		t.Errorf("another prefix: %v, %v", got, err)
	}
	for _, c := range []struct {
		name string
		call func() error
		kind outrigger.Kind
	}{
		{"unknown node", func() error { _, err := s.XdsConfig(ctx, &pb.XdsConfigRequest{Node: "x"}); return err }, outrigger.NotFound},
		{"unknown type", func() error {
			_, err := s.XdsConfig(ctx, &pb.XdsConfigRequest{Node: "a", Type: "Cloister"})
			return err
		}, outrigger.Invalid},
		{"diff without from", func() error { _, err := s.XdsDiff(ctx, &pb.XdsDiffRequest{Node: "a"}); return err }, outrigger.Invalid},
		{"diff with other and from", func() error {
			_, err := s.XdsDiff(ctx, &pb.XdsDiffRequest{Node: "a", Other: "b", From: "1"})
			return err
		}, outrigger.Invalid},
		{"diff with a forgotten push", func() error { _, err := s.XdsDiff(ctx, &pb.XdsDiffRequest{Node: "a", From: "default/0"}); return err }, outrigger.NotFound},
		{"diff with an unknown node", func() error { _, err := s.XdsDiff(ctx, &pb.XdsDiffRequest{Node: "a", Other: "x"}); return err }, outrigger.NotFound},
		{"explain nothing", func() error { _, err := s.XdsExplain(ctx, &pb.XdsExplainRequest{Node: "a"}); return err }, outrigger.Invalid},
	} {
		if err := c.call(); !outrigger.IsKind(err, c.kind) {
			t.Errorf("%s: %v, want kind %v", c.name, err, c.kind)
		}
	}

	diff, err := s.XdsDiff(ctx, &pb.XdsDiffRequest{Node: "a", From: "default/1"})
	if err != nil || diff.From != "default/1" || diff.To != "default/2" || len(diff.Changes) != 1 || diff.Changes[0].Name != route.Name || diff.Changes[0].FromVersion != "" {
		t.Errorf("between pushes: %v, %v", diff, err)
	}
	diff, err = s.XdsDiff(ctx, &pb.XdsDiffRequest{Node: "a", Other: "b"})
	if err != nil || len(diff.Changes) != 1 { // a holds no route either
		t.Fatalf("between nodes: %v, %v", diff, err)
	}
	if c := diff.Changes[0]; c.FromVersion != "1" || c.ToVersion != "2" || c.FromBody != c.ToBody || c.FromBody == "" {
		t.Errorf("two that differ in a secret alone: %v", c)
	}
}

// Bodies stop at the bound, and what is missing is counted.
func TestBodiesAreBounded(t *testing.T) {
	d := dumper{left: 200}
	a := pack(t, &cluster.Cluster{Name: strings.Repeat("n", 150)})
	if text, fits, err := d.dump(a); err != nil || !fits || text == "" {
		t.Fatalf("first: %v, %v", fits, err)
	}
	if _, fits, err := d.dump(a); err != nil || fits {
		t.Errorf("second: fits %v, %v; want not", fits, err)
	}
	if _, fits, err := d.dump(nil); err != nil || !fits {
		t.Errorf("nothing: fits %v, %v", fits, err)
	}
}

func TestPushLogAndLoad(t *testing.T) {
	at := time.Unix(50, 0)
	src := &recorded{
		pushes: []adsserver.Push{
			{ID: "default/2", Group: "default", Position: 2, At: at, Changed: []adsserver.ResourceID{{Type: xds.TypeRoute, Name: "model/chat"}}, Nodes: []adsserver.Delivery{
				{Node: "a", Outcome: adsserver.OutcomeAcked, Latency: 2 * time.Second}, {Node: "b", Outcome: adsserver.OutcomeAcked, Latency: time.Second},
				{Node: "c", Outcome: adsserver.OutcomeNacked, Lagging: true, Nack: &adsserver.Nack{Message: "no"}}}},
			{ID: "grpc/2", Group: "grpc", Position: 2, At: at},
			{ID: "default/1", Group: "default", Position: 1, At: at, First: true},
		},
		loads: []adsserver.Load{{Group: "grpc", Model: "chat", Version: "v1", Issued: 7}, {Group: "grpc", Model: "other"}},
	}
	s, ctx := New(src, nil), context.Background()
	got, err := s.XdsPushLog(ctx, &pb.XdsPushLogRequest{Push: "default/2"})
	if err != nil || len(got.Pushes) != 1 {
		t.Fatalf("%v, %v", got, err)
	}
	if p := got.Pushes[0]; p.Acked != 2 || p.Seconds != 2 || !slices.Equal(p.Laggards, []string{"c"}) || !slices.Equal(p.Changed, []string{"RouteConfiguration model/chat"}) || p.Nodes[2].GetNack().GetMessage() != "no" {
		t.Errorf("push %v", p)
	}
	for _, c := range []struct {
		ask  *pb.XdsPushLogRequest
		want int
		kind outrigger.Kind
	}{
		{ask: &pb.XdsPushLogRequest{}, want: 3},
		{ask: &pb.XdsPushLogRequest{Group: "default"}, want: 2},
		{ask: &pb.XdsPushLogRequest{Limit: 1}, want: 1},
		{ask: &pb.XdsPushLogRequest{Push: "default/9"}, kind: outrigger.NotFound},
		{ask: &pb.XdsPushLogRequest{Limit: adsserver.MaxPushes + 1}, kind: outrigger.Invalid},
	} {
		got, err := s.XdsPushLog(ctx, c.ask)
		if c.want == 0 {
			if !outrigger.IsKind(err, c.kind) {
				t.Errorf("%v: %v, want kind %v", c.ask, err, c.kind)
			}
		} else if err != nil || len(got.Pushes) != c.want {
			t.Errorf("%v: %d pushes, %v; want %d", c.ask, len(got.GetPushes()), err, c.want)
		}
	}
	load, err := s.XdsLoad(ctx, &pb.XdsLoadRequest{Model: "chat"})
	if err != nil || len(load.Rows) != 1 || load.Rows[0].Issued != 7 || load.Refused != 3 {
		t.Errorf("load %v, %v", load, err)
	}
}

// A resource is live only if it is in every type that knows its name.
func TestExplain(t *testing.T) {
	explanation := func(typeURL, verdict string) adsserver.Explanation {
		return adsserver.Explanation{Held: adsserver.Held{ResourceID: adsserver.ResourceID{Type: typeURL, Name: "model/chat"}, Verdict: verdict}, Why: "because"}
	}
	for _, c := range []struct {
		verdicts []string
		live     bool
	}{{[]string{adsserver.VerdictLive, adsserver.VerdictLive}, true}, {[]string{adsserver.VerdictLive, adsserver.VerdictPending}, false}} {
		src := &recorded{}
		for _, v := range c.verdicts {
			src.why = append(src.why, explanation(xds.TypeListener, v))
		}
		got, err := New(src, nil).XdsExplain(context.Background(), &pb.XdsExplainRequest{Node: "a", Resource: "model/chat"})
		if err != nil || got.Live != c.live || len(got.Answers) != len(c.verdicts) || got.Answers[0].Why != "because" {
			t.Errorf("%v: %v, %v; want live %v", c.verdicts, got, err, c.live)
		}
	}
}
