// Command xdsstock is what a user would pick for an xDS server: go-control-plane's ADS
// server over one of its caches. It serves the resources of a file and pushes as told on
// standard input, a line each; see xdsReport of the runner.
//
// -cache snapshot keeps one snapshot for the whole fleet and sets the next one whole;
// -cache linear keeps one linear cache per type and updates the resources that differ.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	// Filters within the resources.
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
)

// fleet is the one key.
type fleet struct{}

func (fleet) ID(*core.Node) string { return "fleet" }

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	kind := flag.String("cache", "snapshot", "snapshot or linear")
	file := flag.String("resources", "", "two sets, written by the runner")
	flag.Parse()
	raw, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var sets []set
	if err := json.Unmarshal(raw, &sets); err != nil {
		return err
	}
	var c source
	switch *kind {
	case "snapshot":
		c, err = newSnapshots(sets)
	case "linear":
		c, err = newLinear(sets)
	default:
		err = fmt.Errorf("-cache is %q; give snapshot or linear", *kind)
	}
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	gs := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(gs, server.NewServer(context.Background(), c.cache(), nil))
	go func() { _ = gs.Serve(l) }() // ends with the process
	say := json.NewEncoder(os.Stdout).Encode
	if err := say(map[string]any{"address": l.Addr().String()}); err != nil {
		return err
	}
	turn := 0
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			return err
		}
		report := map[string]any{"cpu_us": float64(u.Utime.Nano()+u.Stime.Nano()) / 1e3}
		if sc.Text() == "push" {
			turn++
			start := time.Now()
			if err := c.push(turn % len(sets)); err != nil {
				return err
			}
			report["at"], report["set_us"] = start.UnixNano(), float64(time.Since(start).Nanoseconds())/1e3
		}
		if err := say(report); err != nil {
			return err
		}
	}
	return nil
}

// set is a configuration: type URL → name → bytes.
type set map[string]map[string][]byte

// source is a cache that pushes one of the sets.
type source interface {
	cache() cache.Cache
	push(set int) error
}

type snapshots struct {
	sets []*cache.Snapshot
	all  cache.SnapshotCache
}

func newSnapshots(sets []set) (source, error) {
	s := &snapshots{all: cache.NewSnapshotCache(false, fleet{}, nil)}
	for i, set := range sets {
		all := map[resource.Type][]types.Resource{}
		for typeURL, byName := range set {
			for name, raw := range byName {
				m, err := message(typeURL, name, raw)
				if err != nil {
					return nil, err
				}
				all[typeURL] = append(all[typeURL], m)
			}
		}
		snapshot, err := cache.NewSnapshot(fmt.Sprint("v", i), all)
		if err != nil {
			return nil, err
		}
		s.sets = append(s.sets, snapshot)
	}
	return s, s.push(0)
}

func (s *snapshots) cache() cache.Cache { return s.all }

// push gives each set a version of its own, as a user does; what differs is found by hash.
func (s *snapshots) push(i int) error {
	next := *s.sets[i]
	next.VersionMap = nil
	return s.all.SetSnapshot(context.Background(), "fleet", &next)
}

type linear struct {
	byType map[string]*cache.LinearCache
	// What differs between one set and the next, by the set that is pushed.
	updates []map[string]map[string]types.Resource
}

func newLinear(sets []set) (source, error) {
	l := &linear{byType: map[string]*cache.LinearCache{}}
	for i, set := range sets {
		update := map[string]map[string]types.Resource{}
		before := sets[(i+len(sets)-1)%len(sets)]
		for typeURL, byName := range set {
			whole := map[string]types.Resource{}
			for name, raw := range byName {
				m, err := message(typeURL, name, raw)
				if err != nil {
					return nil, err
				}
				whole[name] = m
				if string(before[typeURL][name]) == string(raw) {
					continue
				}
				if update[typeURL] == nil {
					update[typeURL] = map[string]types.Resource{}
				}
				update[typeURL][name] = m
			}
			if i == 0 {
				l.byType[typeURL] = cache.NewLinearCache(typeURL, cache.WithInitialResources(whole))
			}
		}
		l.updates = append(l.updates, update)
	}
	return l, nil
}

func (l *linear) cache() cache.Cache {
	mux := &cache.MuxCache{
		Classify:      func(r *cache.Request) string { return r.GetTypeUrl() },
		ClassifyDelta: func(r *cache.DeltaRequest) string { return r.GetTypeUrl() },
		Caches:        map[string]cache.Cache{},
	}
	for typeURL, c := range l.byType {
		mux.Caches[typeURL] = c
	}
	return mux
}

func (l *linear) push(i int) error {
	for typeURL, update := range l.updates[i] {
		if err := l.byType[typeURL].UpdateResources(update, nil); err != nil {
			return err
		}
	}
	return nil
}

// message decodes one resource.
func message(typeURL, name string, raw []byte) (types.Resource, error) {
	m, err := newMessage(typeURL)
	if err == nil {
		err = proto.Unmarshal(raw, m)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", typeURL, name, err)
	}
	return m, nil
}

func newMessage(typeURL string) (types.Resource, error) {
	switch typeURL {
	case resource.ClusterType:
		return &cluster.Cluster{}, nil
	case resource.EndpointType:
		return &endpoint.ClusterLoadAssignment{}, nil
	case resource.ListenerType:
		return &listener.Listener{}, nil
	case resource.RouteType:
		return &route.RouteConfiguration{}, nil
	}
	return nil, fmt.Errorf("unexpected type %s", typeURL)
}
