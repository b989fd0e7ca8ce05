package adsserver_test

import (
	"slices"
	"testing"
	"testing/synctest"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// The aggregated scenarios of the conformance suite github.com/ii/xds-test-harness (features
// subscribing, unsubscribing and delta; 26 in each variant), by its names. The suite changes
// resources over one connection and subscriptions over another, and waits for neither to
// have arrived before it goes on, so that its "unsubscribe" scenarios depend on which of the
// two is faster; here a change happens when what was sent before it has been handled. Where
// it accepts more than one answer, this is the one we give.

// setting is what a target is set up with: names of resources, each under a version.
type setting struct {
	w        *world
	position uint64
	state    map[translate.Key]string
}

func (s *setting) put(typeURL, version string, names ...string) {
	s.w.t.Helper()
	for _, name := range names {
		s.state[translate.Key{TypeURL: typeURL, Name: name}] = version
	}
	s.push()
}

func (s *setting) remove(typeURL, name string) {
	s.w.t.Helper()
	delete(s.state, translate.Key{TypeURL: typeURL, Name: name})
	s.push()
}

// push publishes the resources, which are no mesh: hence by force.
func (s *setting) push() {
	s.w.t.Helper()
	res := new(translate.Resources)
	for k, version := range s.state {
		var m proto.Message
		switch k.TypeURL {
		case xds.TypeCluster:
			m = &cluster.Cluster{Name: k.Name, AltStatName: version}
		case xds.TypeListener:
			m = &listener.Listener{Name: k.Name, StatPrefix: version}
		case xds.TypeRoute:
			m = &route.RouteConfiguration{Name: k.Name, InternalOnlyHeaders: []string{version}}
		case xds.TypeEndpoint:
			m = &endpoint.ClusterLoadAssignment{ClusterName: k.Name, Policy: &endpoint.ClusterLoadAssignment_Policy{
				DropOverloads: []*endpoint.ClusterLoadAssignment_Policy_DropOverload{{Category: version}}}}
		}
		res.Put(k.TypeURL, k.Name, m)
	}
	s.position++
	if err := s.w.srv.PublishForced(adsserver.DefaultGroup, res, s.position); err != nil {
		s.w.t.Fatal(err)
	}
	synctest.Wait()
}

const (
	cds, lds = xds.TypeCluster, xds.TypeListener
	rds, eds = xds.TypeRoute, xds.TypeEndpoint
)

// expect is a response of one type with these resources, as both clients print it.
func expect(typeURL string, names ...string) string {
	line := short(typeURL)
	for _, name := range slices.Sorted(slices.Values(names)) {
		line += " +" + name
	}
	return line
}

func TestConformanceSotw(t *testing.T) {
	type target struct {
		*setting
		*sotwClient
	}
	count := 0
	scenario := func(name string, services []string, run func(c target, service string)) {
		for _, service := range services {
			count++
			t.Run(short(service)+" "+name, func(t *testing.T) {
				bubble(t, adsserver.Options{}, func(w *world) {
					c := target{&setting{w: w, state: map[translate.Key]string{}}, w.sotw("n")}
					run(c, service)
					c.sotwClient.want() // never more than necessary
				})
			})
		}
	}
	// gets wants one response and accepts it, asking for the same names from then on; it is of
	// another version than the one before.
	gets := func(c target, service string, resources, names []string) {
		t.Helper()
		before := c.version[service]
		c.sotwClient.want(expect(service, resources...))
		c.request(service, nil, names...)
		if c.version[service] == before {
			c.sotwClient.w.t.Fatalf("%v came under the version of before, %q", resources, before)
		}
	}
	abc := []string{"A", "B", "C"}
	scenario("The service should send all resources on a wildcard request", []string{cds, lds}, func(c target, s string) {
		c.put(s, "1", abc...)
		c.request(s, nil)
		gets(c, s, abc, nil)
	})
	scenario("The service should send updates to the client", []string{cds, lds}, func(c target, s string) {
		c.put(s, "1", abc...)
		c.request(s, nil)
		gets(c, s, abc, nil)
		c.put(s, "2", "A")
		gets(c, s, abc, nil)
	})
	scenario("Wildcard subscriptions receive updates when new resources are added", []string{cds, lds}, func(c target, s string) {
		c.put(s, "1", abc...)
		c.request(s, nil)
		gets(c, s, abc, nil)
		c.put(s, "2", "D")
		gets(c, s, []string{"A", "B", "C", "D"}, nil)
	})
	scenario("When subscribing to specific resources, receive only these resources", []string{lds, rds}, func(c target, s string) {
		c.put(s, "1", "G", "B", "L", "D")
		c.request(s, nil, "L", "G")
		gets(c, s, []string{"L", "G"}, []string{"L", "G"})
	})
	for _, kind := range []struct {
		services []string
		full     bool // a response holds all that is subscribed to
	}{{[]string{cds, lds}, true}, {[]string{rds, eds}, false}} {
		all := func(changed string, names ...string) []string {
			if kind.full {
				return names
			}
			return []string{changed}
		}
		scenario("When subscribing to specific resources, receive response when those resources change", kind.services, func(c target, s string) {
			c.put(s, "1", "A", "B", "C", "D")
			c.request(s, nil, "B", "D")
			gets(c, s, []string{"B", "D"}, []string{"B", "D"})
			c.put(s, "2", "B")
			gets(c, s, all("B", "B", "D"), []string{"B", "D"})
		})
		scenario("When subscribing to resources that don't exist, receive response when they are created", kind.services, func(c target, s string) {
			c.put(s, "1", abc...)
			c.request(s, nil, "A", "Z")
			gets(c, s, []string{"A"}, []string{"A", "Z"})
			c.put(s, "2", "Z")
			gets(c, s, all("Z", "A", "Z"), []string{"A", "Z"})
		})
		scenario("Client can unsubcribe from some resources", kind.services, func(c target, s string) {
			c.put(s, "1", "A", "B", "C", "D")
			c.request(s, nil, "A", "B", "C")
			gets(c, s, abc, []string{"A"})
			c.sotwClient.want()
			c.put(s, "2", "A")
			gets(c, s, []string{"A"}, []string{"A"})
			c.put(s, "3", "B")
		})
	}
	for _, pair := range [][2]string{{cds, lds}, {rds, eds}} {
		scenario("Client can subscribe to multiple services via ADS, then "+short(pair[1]), pair[:1], func(c target, s string) {
			for _, one := range pair {
				c.put(one, "1", abc...)
			}
			for _, one := range pair {
				c.request(one, nil, "B")
				gets(c, one, []string{"B"}, []string{"B"})
			}
			c.put(s, "2", "B")
			gets(c, s, []string{"B"}, []string{"B"})
		})
	}
	scenario("Client can unsubscribe from all resources", []string{cds, rds, lds, eds}, func(c target, s string) {
		c.put(s, "1", "A", "B", "C", "D")
		c.request(s, nil, "A", "B")
		gets(c, s, []string{"A", "B"}, []string{"A", "B"})
		c.request(s, nil)
		c.sotwClient.want()
		c.put(s, "2", "B")
	})
	if count != 26 {
		t.Errorf("%d scenarios, want 26", count)
	}
}

func TestConformanceDelta(t *testing.T) {
	type target struct {
		*setting
		*deltaClient
	}
	count := 0
	scenario := func(name string, services []string, run func(c target, service string)) {
		for _, service := range services {
			count++
			t.Run(short(service)+" "+name, func(t *testing.T) {
				bubble(t, adsserver.Options{}, func(w *world) {
					c := target{&setting{w: w, state: map[translate.Key]string{}}, w.delta(w.conn, "n")}
					c.node = &core.Node{Id: "n"} // no sidecar, which would have to follow everything
					run(c, service)
					c.want() // never more than necessary
				})
			})
		}
	}
	// gets wants one response and accepts it; each resource in it is of another version than
	// the one the client had.
	gets := func(c target, service string, names ...string) {
		t.Helper()
		before := map[string]string{}
		for _, name := range names {
			before[name] = c.vers[service+" "+name]
		}
		c.want(expect(service, names...))
		for name, version := range before {
			if c.vers[service+" "+name] == version {
				c.deltaClient.w.t.Fatalf("%s came under the version of before, %q", name, version)
			}
		}
		c.ack(service)
	}
	every := []string{cds, lds, rds, eds}
	scenario("When subscribing to specific resources, receive only these resources", []string{lds, rds}, func(c target, s string) {
		c.put(s, "1", "G", "B", "L", "D")
		c.subscribe(s, "L", "G")
		gets(c, s, "L", "G")
	})
	scenario("Subscribe to resources one after the other", every, func(c target, s string) {
		c.put(s, "1", "A", "B", "C")
		c.subscribe(s, "A")
		gets(c, s, "A")
		c.subscribe(s, "B")
		gets(c, s, "B")
	})
	scenario("When a resource is updated, receive response for only that resource", every, func(c target, s string) {
		c.put(s, "1", "A", "B", "C")
		c.subscribe(s, "A", "B", "C")
		gets(c, s, "A", "B", "C")
		c.put(s, "2", "A")
		gets(c, s, "A")
	})
	scenario("Client is told if resource does not exist, and is notified if it is created", every, func(c target, s string) {
		c.put(s, "1", "A")
		c.subscribe(s, "A", "B")
		c.want(expect(s, "A") + " -B")
		c.ack(s)
		c.put(s, "1", "B")
		gets(c, s, "B")
	})
	scenario("Client is told when a resource is removed via removed_resources field", every, func(c target, s string) {
		c.put(s, "1", "A", "B")
		c.subscribe(s, "A", "B")
		gets(c, s, "A", "B")
		c.remove(s, "B")
		c.want(short(s) + " -B")
		c.ack(s)
		c.put(s, "2", "B")
		gets(c, s, "B")
	})
	scenario("Client can incrementally unsubscribe from resources", every, func(c target, s string) {
		c.put(s, "1", "A", "B")
		c.subscribe(s, "A", "B")
		gets(c, s, "A", "B")
		c.unsubscribe(s, "B")
		c.put(s, "2", "B")
		c.want()
		c.unsubscribe(s, "A")
		c.put(s, "2", "A")
	})
	for _, pair := range [][2]string{{cds, lds}, {lds, cds}, {rds, eds}, {eds, rds}} {
		scenario("Client can subscribe to multiple services via ADS, then "+short(pair[1]), pair[:1], func(c target, s string) {
			for _, one := range pair {
				c.put(one, "1", "A", "B", "C")
			}
			for _, one := range pair {
				c.subscribe(one, "B")
			}
			got := c.read()
			slices.Sort(got)
			want := []string{expect(pair[0], "B"), expect(pair[1], "B")}
			slices.Sort(want)
			if !slices.Equal(got, want) {
				c.deltaClient.w.t.Fatalf("got %q, want %q", got, want)
			}
			for _, one := range pair {
				c.ack(one)
			}
			for _, one := range pair {
				c.put(one, "2", "B")
				gets(c, one, "B")
			}
		})
	}
	if count != 26 {
		t.Errorf("%d scenarios, want 26", count)
	}
}
