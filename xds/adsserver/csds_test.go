package adsserver_test

import (
	"context"
	"strings"
	"testing"

	admin "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	csds "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// csds dials the status service of the world's server, which Register leaves out.
func (w *world) csds() csds.ClientStatusDiscoveryServiceClient {
	conn := w.serveOn(func(r grpc.ServiceRegistrar) { w.srv.RegisterStatus(r) }, grpc.WithTransportCredentials(insecure.NewCredentials()))
	return csds.NewClientStatusDiscoveryServiceClient(conn)
}

func byName(m *matcher.StringMatcher) *csds.ClientStatusRequest {
	return &csds.ClientStatusRequest{NodeMatchers: []*matcher.NodeMatcher{{NodeId: m}}}
}

// entries prints "type name config-status client-status" of one client.
func statuses(c *csds.ClientConfig) map[string]string {
	out := map[string]string{}
	for _, x := range c.GetGenericXdsConfigs() {
		out[short(x.GetTypeUrl())+" "+x.GetName()] = x.GetConfigStatus().String() + " " + x.GetClientStatus().String()
	}
	return out
}

// One sidecar accepts, one rejects: both are told apart, per resource, with the reason,
// what stays in force and no secret.
func TestClientStatus(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		good, bad := w.delta(w.conn, "good/pod"), w.delta(w.conn, "bad/pod")
		for _, c := range []*deltaClient{good, bad} {
			c.follow()
			c.read()
			c.ackAll()
		}
		w.publish(chat(2, "v1", "v2"))
		good.read()
		good.ackAll()
		bad.read()
		for _, typeURL := range xds.Types() {
			if typeURL == xds.TypeModelPolicy {
				bad.nack(typeURL, "chat: too many versions")
			} else {
				bad.ack(typeURL)
			}
		}
		client := w.csds()
		out, err := client.FetchClientStatus(context.Background(), &csds.ClientStatusRequest{})
		if err != nil || len(out.GetConfig()) != 2 {
			t.Fatalf("%d clients, %v", len(out.GetConfig()), err)
		}
		got, want := statuses(out.GetConfig()[0]), statuses(out.GetConfig()[1]) // by id: bad, good
		if len(got) != len(want) || len(want) < 6 {
			t.Fatalf("bad %v\ngood %v", got, want)
		}
		for name, s := range want {
			if s != "SYNCED ACKED" {
				t.Errorf("good: %s is %s", name, s)
			}
			if name == "ModelPolicy chat" {
				s = "ERROR NACKED"
			}
			if got[name] != s {
				t.Errorf("bad: %s is %s, want %s", name, got[name], s)
			}
		}
		for _, x := range out.GetConfig()[0].GetGenericXdsConfigs() {
			if x.GetClientStatus() != admin.ClientResourceStatus_NACKED {
				continue
			}
			if x.GetErrorState().GetDetails() != "chat: too many versions" || x.GetErrorState().GetVersionInfo() == x.GetVersionInfo() ||
				x.GetXdsConfig() == nil || x.GetLastUpdated() == nil {
				t.Errorf("rejected: %v", x)
			}
			if body := x.GetXdsConfig().String(); !strings.Contains(body, "redacted") || strings.Contains(body, "v2") {
				t.Errorf("body in force: %s", body)
			}
		}

		for _, c := range []struct {
			r    *csds.ClientStatusRequest
			want int
		}{
			{byName(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: "bad/pod"}}), 1},
			{byName(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: "BAD/pod"}, IgnoreCase: true}), 1},
			{byName(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: "x"}}), 0},
			{byName(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Suffix{Suffix: "/pod"}}), 2},
			{byName(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Contains{Contains: "oo"}}), 1},
		} {
			out, err := client.FetchClientStatus(context.Background(), c.r)
			if err != nil || len(out.GetConfig()) != c.want {
				t.Errorf("%v: %d clients, %v, want %d", c.r, len(out.GetConfig()), err, c.want)
			}
		}
		unknown := byName(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{Regex: "."}}})
		if _, err := client.FetchClientStatus(context.Background(), unknown); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a regular expression: %v", err)
		}

		st, err := client.StreamClientStatus(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, bodies := range []bool{true, false} {
			if err := st.Send(&csds.ClientStatusRequest{ExcludeResourceContents: !bodies}); err != nil {
				t.Fatal(err)
			}
			out, err := st.Recv()
			if err != nil || len(out.GetConfig()) != 2 {
				t.Fatalf("stream: %d clients, %v", len(out.GetConfig()), err)
			}
			if has := out.GetConfig()[1].GetGenericXdsConfigs()[0].GetXdsConfig() != nil; has != bodies {
				t.Errorf("bodies %v, want %v", has, bodies)
			}
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
	})
}
