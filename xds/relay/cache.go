package relay

import (
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
)

// cache is what the control plane sent, byte for byte. It outlives streams, so that a new
// one transfers what changed only. It has one owner.
type cache struct {
	types map[string]map[string]*discovery.Resource // by type URL and name
	// number counts the sets that pods were given; 0 = none yet.
	number uint64
	bytes  int
	limit  int
	// leases are the dead-man leases of models that have a candidate live.
	leases map[string]time.Duration
}

func newCache(limit int) cache {
	c := cache{types: make(map[string]map[string]*discovery.Resource), limit: limit, leases: make(map[string]time.Duration)}
	for _, t := range xds.Followed() {
		c.types[t] = make(map[string]*discovery.Resource)
	}
	return c
}

// take applies one response and reports whether it changed anything. The error has kind
// Exhausted; then nothing of r that is above the limit is kept.
func (c *cache) take(r *discovery.DeltaDiscoveryResponse) (changed bool, err error) {
	set := c.types[r.GetTypeUrl()]
	for _, res := range r.GetResources() {
		old := set[res.GetName()]
		if old != nil && old.GetVersion() == res.GetVersion() {
			continue
		}
		grown := weight(res) - weight(old)
		if c.bytes+grown > c.limit {
			return changed, outrigger.Errorf(outrigger.Exhausted, "the configuration is larger than %d bytes, with %s %s; sidecars of this node have to follow the control plane directly", c.limit, xds.ShortType(r.GetTypeUrl()), res.GetName())
		}
		c.bytes += grown
		set[res.GetName()] = res
		c.lease(r.GetTypeUrl(), res)
		changed = true
	}
	for _, name := range r.GetRemovedResources() {
		if old := set[name]; old != nil {
			c.bytes -= weight(old)
			delete(set, name)
			if r.GetTypeUrl() == xds.TypeModelPolicy {
				delete(c.leases, name)
			}
			changed = true
		}
	}
	return changed, nil
}

// holds reports whether pods were given anything.
func (c *cache) holds() bool { return c.number > 0 }

// weight is what a resource counts for, in bytes.
func weight(r *discovery.Resource) int {
	if r == nil {
		return 0
	}
	const overhead = 256 // of the messages, and of the maps they are in
	return len(r.GetResource().GetValue()) + len(r.GetName()) + len(r.GetVersion()) + overhead
}

// lease reads what a model says about its dead-man lease; what cannot be read has none here,
// and is the sidecars' to reject.
func (c *cache) lease(typeURL string, r *discovery.Resource) {
	if typeURL != xds.TypeModelPolicy {
		return
	}
	delete(c.leases, r.GetName())
	m := &pb.ModelPolicy{}
	if proto.Unmarshal(r.GetResource().GetValue(), m) == nil && m.GetDeadManLease().AsDuration() > 0 {
		c.leases[r.GetName()] = m.GetDeadManLease().AsDuration()
	}
}

// pace is how much time lies between two probes.
func (c *cache) pace() time.Duration {
	out := probeIdle
	for _, d := range c.leases {
		out = min(out, d/probesPerDead)
	}
	return max(out, probeLeast)
}

// versions lists what is held of one type, for initial_resource_versions.
func (c *cache) versions(typeURL string) map[string]string {
	out := make(map[string]string, len(c.types[typeURL]))
	for name, r := range c.types[typeURL] {
		out[name] = r.GetVersion()
	}
	return out
}

func followed(typeURL string) bool { return slices.Contains(xds.Followed(), typeURL) }
