package adsclient_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// scripted is a foreign ADS server: it says what the test tells it, in that order.
type scripted struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	say chan *discovery.DeltaDiscoveryResponse
}

func (s *scripted) DeltaAggregatedResources(st discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	go func() {
		for {
			if _, err := st.Recv(); err != nil { // noted by the tap
				return
			}
		}
	}()
	for {
		select {
		case r := <-s.say:
			if err := st.Send(r); err != nil {
				return err
			}
		case <-st.Context().Done():
			return nil
		}
	}
}

func startScripted(t *testing.T) (*replica, *scripted) {
	r, s := &replica{}, &scripted{say: make(chan *discovery.DeltaDiscoveryResponse)}
	r.serve(t, func(g grpc.ServiceRegistrar) { discovery.RegisterAggregatedDiscoveryServiceServer(g, s) })
	return r, s
}

// response wraps all resources of a type, without those named.
func response(t *testing.T, res *translate.Resources, typeURL string, without ...string) *discovery.DeltaDiscoveryResponse {
	out := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: "n"}
next:
	for _, name := range res.Names(typeURL) {
		for _, w := range without {
			if w == name {
				continue next
			}
		}
		raw, err := translate.Marshal(res.Get(typeURL, name))
		if err != nil {
			t.Fatal(err)
		}
		out.Resources = append(out.Resources, &discovery.Resource{Name: name, Version: "1", Resource: &anypb.Any{TypeUrl: typeURL, Value: raw}})
	}
	return out
}

// Warming: MeshPolicy closes the push while one load assignment is missing. Nothing is
// in force and nothing acknowledged until it arrives.
func TestWarming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := startScripted(t)
		res := resources(t, mesh(1, model("a", 1000)))
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		for _, typeURL := range xds.Types() {
			if typeURL == xds.TypeEndpoint {
				s.say <- response(t, res, typeURL, "model/a/v2")
				continue
			}
			s.say <- response(t, res, typeURL)
		}
		synctest.Wait()
		if c.Policy() != nil || len(only(r.transcript(), "< ACK")) != 0 {
			t.Fatal("an incomplete set was put in force or acknowledged")
		}
		s.say <- response(t, res, xds.TypeEndpoint, "model/a/v1")
		synctest.Wait()
		if c.Policy() == nil {
			t.Fatal("the complete set is not in force")
		}
		wantLines(t, only(r.transcript(), "< ACK"), []string{
			"< ACK Cluster", "< ACK ClusterLoadAssignment", "< ACK ClusterLoadAssignment", "< ACK Listener",
			"< ACK RouteConfiguration", "< ACK ModelPolicy", "< ACK MeshPolicy",
		})
	})
}

// Warming ends after 10 s: the incomplete model is rejected by the name of what is
// missing, the others take effect.
func TestWarmingEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := startScripted(t)
		res := resources(t, mesh(1, model("a", 1000), model("b", 1000)))
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		for _, typeURL := range xds.Types() {
			s.say <- response(t, res, typeURL, "model/a/v2")
		}
		time.Sleep(10*time.Second - time.Nanosecond)
		synctest.Wait()
		if c.Policy() != nil {
			t.Fatal("too early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if p := c.Policy(); p == nil || p.Model("a") != nil || p.Model("b") == nil {
			t.Fatalf("policy %+v", p)
		}
		nacks := only(r.transcript(), "< NACK")
		if len(nacks) != 1 || !strings.Contains(nacks[0], "Cluster model/a/v2: missing") {
			t.Fatalf("rejections %q", nacks)
		}
	})
}

// A resource under another type URL, one of no model, and a type nobody asked for.
func TestForeignResources(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := startScripted(t)
		res := resources(t, mesh(1, model("a", 1000)))
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		s.say <- &discovery.DeltaDiscoveryResponse{TypeUrl: "type.googleapis.com/x.Y", Nonce: "y"}
		for _, typeURL := range xds.Types() {
			resp := response(t, res, typeURL)
			if typeURL == xds.TypeCluster {
				resp.Resources = append(resp.Resources, &discovery.Resource{Name: "stray", Resource: &anypb.Any{TypeUrl: xds.TypeListener}})
			}
			s.say <- resp
		}
		synctest.Wait()
		if c.Policy().Model("a") == nil {
			t.Fatal("a stray resource stopped the model")
		}
		lines := r.transcript()
		nacks := only(lines, "< NACK")
		if len(nacks) != 1 || !strings.HasPrefix(nacks[0], "< NACK Cluster: ") || !strings.Contains(nacks[0], "stray") {
			t.Fatalf("rejections %q", nacks)
		}
		if got := only(lines, "< ACK Y"); len(got) != 1 {
			t.Fatalf("unasked type: %q", lines)
		}
	})
}

// A mesh part that is wrong leaves everything as it is.
func TestBrokenMesh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := startScripted(t)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		for _, typeURL := range xds.Types() {
			s.say <- response(t, resources(t, mesh(1, model("a", 1000))), typeURL)
		}
		synctest.Wait()
		r.transcript()
		next := resources(t, mesh(2, model("a", 2000)))
		s.say <- response(t, next, xds.TypeRoute)
		broken := response(t, next, xds.TypeMeshPolicy)
		broken.Resources[0].Version, broken.Resources[0].Resource.Value = "2", []byte{0xff}
		s.say <- broken
		synctest.Wait()
		if p := c.Policy(); p.Position != 1 || p.Model("a").Arms[0].Weight() != 1000 {
			t.Fatalf("policy %+v", p)
		}
		if nacks := only(r.transcript(), "< NACK"); len(nacks) != 1 || !strings.HasPrefix(nacks[0], "< NACK MeshPolicy") {
			t.Fatalf("rejections %q", nacks)
		}
	})
}

// A control plane that is heard but whose mesh part is unusable does not renew the lease
// of a policy from disk.
func TestBrokenMeshOverDiskPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		canary := model("a", 1000)
		canary.DeadMan = time.Hour
		good := start(t)
		good.publish(t, resources(t, mesh(1, canary)), 1)
		run(t, adsclient.Options{Dial: []adsclient.Dialer{good.dial}, Dir: dir}).stop()

		r, s := startScripted(t)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}, Dir: dir})
		for _, typeURL := range xds.Types() {
			resp := response(t, resources(t, mesh(2, canary)), typeURL)
			if typeURL == xds.TypeMeshPolicy {
				resp.Resources[0].Version, resp.Resources[0].Resource.Value = "2", []byte{0xff}
			}
			s.say <- resp
		}
		synctest.Wait()
		if st := c.Status(); st.Source != adsclient.SourceDisk || st.LastContact.IsZero() || !c.DeadManExpired(time.Now()) {
			t.Fatalf("status %+v", st)
		}
	})
}
