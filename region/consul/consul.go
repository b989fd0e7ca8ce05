// Package consul registers this region's gateway in Consul and follows the others.
//
// Every gateway instance registers the service "region-gateway" with a TTL check and
// the metadata region, lat, lon and version. The directory is the set of distinct
// regions over all instances; a region is healthy while at least one instance passes.
//
// Behaviour: the registration is renewed every third of the TTL and made again when
// the agent forgot it; an instance that is gone for a minute is removed by Consul.
// With Consul unreachable the last known regions are served and marked stale; nothing
// fails. Consul's own failure detection across datacentres takes tens of seconds, so
// region fail-over is decided by region/probe, not here. Blocking queries follow the
// documented rules: reset to 0 when the index goes backwards, never below 1, and at
// most one query per second on average (burst two).
package consul

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/region"
)

// Service is the Consul service name gateways register under.
const Service = "region-gateway"

// Options configure a Directory.
type Options struct {
	Address    string // of the Consul agent, host:port
	Token      string // ACL token; never logged
	Datacenter string
	Self       region.Info // what to register; an empty Name registers nothing
	Instance   string      // unique per gateway process
	Version    string
	TTL        time.Duration // of the health check, default 10 s
	Wait       time.Duration // of a blocking query, default 60 s
	MinPeriod  time.Duration // between queries on average, default 1 s
	Logger     *slog.Logger
}

// Directory is a live view of the regions Consul knows.
type Directory struct {
	opts   Options
	client *api.Client

	mu    sync.Mutex
	known []region.Info // sorted by name
	stale bool
	first chan struct{} // closed after the first good answer
}

// New checks the options; it contacts nobody.
func New(o Options) (*Directory, error) {
	if o.TTL == 0 {
		o.TTL = 10 * time.Second
	}
	if o.Wait == 0 {
		o.Wait = time.Minute
	}
	if o.MinPeriod == 0 {
		o.MinPeriod = time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Self.Name != "" {
		if err := o.Self.Validate(); err != nil {
			return nil, err
		}
		if err := outrigger.CheckName("instance", o.Instance); err != nil {
			return nil, err
		}
	}
	cfg := api.DefaultConfig()
	cfg.Address, cfg.Token, cfg.Datacenter = o.Address, o.Token, o.Datacenter
	c, err := api.NewClient(cfg)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "consul address "+o.Address)
	}
	return &Directory{opts: o, client: c, stale: true, first: make(chan struct{})}, nil
}

// Regions returns the known regions sorted by name, and whether they are only the last
// known ones because Consul cannot be reached now.
func (d *Directory) Regions() (rs []region.Info, stale bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.known), d.stale
}

// First is closed after the first good answer from Consul.
func (d *Directory) First() <-chan struct{} { return d.first }

// Run registers, renews and follows until ctx ends, then deregisters (within two
// seconds, best effort).
func (d *Directory) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if d.opts.Self.Name != "" {
		g.Go(func() error { return d.keepRegistered(ctx) })
	}
	g.Go(func() error { return d.follow(ctx) })
	return g.Wait()
}

func (d *Directory) checkID() string { return "service:" + d.opts.Instance }

func (d *Directory) register(ctx context.Context) error {
	s := d.opts.Self
	host, port, err := splitGateway(s.Gateway)
	if err != nil {
		return err
	}
	reg := &api.AgentServiceRegistration{
		ID: d.opts.Instance, Name: Service, Address: host, Port: port,
		Meta: map[string]string{
			"region": s.Name, "version": d.opts.Version,
			"lat": strconv.FormatFloat(s.Location.Latitude, 'f', -1, 64),
			"lon": strconv.FormatFloat(s.Location.Longitude, 'f', -1, 64),
		},
		Check: &api.AgentServiceCheck{
			CheckID: d.checkID(), TTL: d.opts.TTL.String(), Status: api.HealthPassing,
			DeregisterCriticalServiceAfter: "1m", // Consul's minimum
		},
	}
	return d.client.Agent().ServiceRegisterOpts(reg, api.ServiceRegisterOpts{ReplaceExistingChecks: true}.WithContext(ctx))
}

// keepRegistered renews the check; whatever goes wrong, it registers anew with backoff.
func (d *Directory) keepRegistered(ctx context.Context) error {
	registered := false
	failures := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			d.deregister(ctx)
			return nil
		case <-timer.C:
		}
		var err error
		if registered {
			err = d.client.Agent().UpdateTTLOpts(d.checkID(), "", api.HealthPassing, (&api.QueryOptions{}).WithContext(ctx))
		} else {
			err = d.register(ctx)
		}
		if err == nil {
			registered, failures = true, 0
			timer.Reset(d.opts.TTL / 3)
			continue
		}
		if registered { // the agent may have restarted and forgotten us: register again at once
			registered = false
			timer.Reset(0)
			continue
		}
		failures++
		d.opts.Logger.Warn("consul registration failed", "error", err, "failures", failures)
		timer.Reset(backoff(failures))
	}
}

func (d *Directory) deregister(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := d.client.Agent().ServiceDeregisterOpts(d.opts.Instance, (&api.QueryOptions{}).WithContext(ctx)); err != nil {
		d.opts.Logger.Warn("consul deregistration failed; the check will expire", "error", err)
	}
}

// follow runs blocking queries for ever.
func (d *Directory) follow(ctx context.Context) error {
	var index uint64
	failures := 0
	budget := 2.0 // token bucket, burst two
	last := time.Now()
	for ctx.Err() == nil {
		now := time.Now()
		budget = min(2, budget+now.Sub(last).Seconds()/d.opts.MinPeriod.Seconds())
		last = now
		if budget < 1 {
			if !pause.For(ctx, time.Duration((1-budget)*float64(d.opts.MinPeriod))) {
				return nil
			}
			continue
		}
		budget--
		q := (&api.QueryOptions{WaitIndex: index, WaitTime: d.opts.Wait}).WithContext(ctx)
		entries, meta, err := d.client.Health().Service(Service, "", false, q)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			failures++
			index = 0
			d.markStale(err, failures)
			if !pause.For(ctx, backoff(failures)) {
				return nil
			}
			continue
		}
		failures = 0
		index = nextIndex(index, meta.LastIndex)
		d.publish(entries)
	}
	return nil
}

// nextIndex applies the documented rules: backwards ⇒ start over; 0 would not block ⇒ 1.
func nextIndex(have, got uint64) uint64 {
	if got < have {
		return 0
	}
	return max(got, 1)
}

func (d *Directory) markStale(err error, failures int) {
	d.mu.Lock()
	changed := !d.stale
	d.stale = true
	d.mu.Unlock()
	if changed || failures == 1 {
		d.opts.Logger.Warn("consul is unreachable; serving the last known regions", "error", err)
	}
}

func (d *Directory) publish(entries []*api.ServiceEntry) {
	byName := map[string]region.Info{}
	for _, e := range entries {
		i, err := infoOf(e)
		if err != nil {
			d.opts.Logger.Warn("consul entry ignored", "instance", e.Service.ID, "error", err)
			continue
		}
		have, ok := byName[i.Name]
		// Of several instances the first healthy one by address speaks for the region.
		if !ok || (i.Healthy && !have.Healthy) || (i.Healthy == have.Healthy && i.Gateway < have.Gateway) {
			byName[i.Name] = i
		}
	}
	known := make([]region.Info, 0, len(byName))
	for _, i := range byName {
		known = append(known, i)
	}
	slices.SortFunc(known, func(a, b region.Info) int { return strings.Compare(a.Name, b.Name) })

	d.mu.Lock()
	defer d.mu.Unlock()
	d.known, d.stale = known, false
	select {
	case <-d.first:
	default:
		close(d.first)
	}
}

func infoOf(e *api.ServiceEntry) (region.Info, error) {
	if e == nil || e.Service == nil {
		return region.Info{}, errors.New("entry without a service")
	}
	m := e.Service.Meta
	lat, laterr := strconv.ParseFloat(m["lat"], 64)
	lon, lonerr := strconv.ParseFloat(m["lon"], 64)
	if laterr != nil || lonerr != nil {
		return region.Info{}, fmt.Errorf("metadata lat=%q lon=%q are not numbers", m["lat"], m["lon"])
	}
	addr := e.Service.Address
	if addr == "" && e.Node != nil {
		addr = e.Node.Address
	}
	i := region.Info{
		Name: m["region"], Gateway: joinGateway(addr, e.Service.Port),
		Location: region.Location{Latitude: lat, Longitude: lon},
		Healthy:  e.Checks.AggregatedStatus() == api.HealthPassing,
	}
	return i, i.Validate()
}

// backoff is 200 ms doubling to 30 s, half of it random.
func backoff(failures int) time.Duration {
	d := min(30*time.Second, 200*time.Millisecond<<min(failures, 8))
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
}
