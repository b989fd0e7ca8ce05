package consul

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/outrigger-mesh/outrigger/region"
)

// agent is a strict stand-in for a Consul agent: it implements the four endpoints used
// with real blocking semantics, and can be told to misbehave in the ways real agents
// do: an index that goes backwards, returns without change, 500s, forgotten services.
type agent struct {
	t  *testing.T
	mu sync.Mutex

	index    uint64
	services map[string]*api.AgentServiceRegistration
	status   map[string]string // check id → status
	changed  chan struct{}
	fail     bool
	queries  []uint64 // WaitIndex of each query
	renewals int
}

func newAgent(t *testing.T) (*agent, string) {
	a := &agent{t: t, index: 10, services: map[string]*api.AgentServiceRegistration{}, status: map[string]string{}, changed: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /v1/agent/service/register", a.register)
	mux.HandleFunc("PUT /v1/agent/service/deregister/{id}", a.deregister)
	mux.HandleFunc("PUT /v1/agent/check/update/{id}", a.update)
	mux.HandleFunc("GET /v1/health/service/{name}", a.health)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		fail := a.fail
		a.mu.Unlock()
		if fail {
			http.Error(w, "No cluster leader", http.StatusInternalServerError)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return a, s.Listener.Addr().String()
}

// edit changes the agent's state and wakes blocked queries.
func (a *agent) edit(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	a.index++
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *agent) register(w http.ResponseWriter, r *http.Request) {
	var reg api.AgentServiceRegistration
	if err := json.NewDecoder(r.Body).Decode(&reg); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.edit(func() {
		a.services[reg.ID] = &reg
		if reg.Check != nil {
			a.status[reg.Check.CheckID] = reg.Check.Status
		}
	})
}

func (a *agent) deregister(_ http.ResponseWriter, r *http.Request) {
	a.edit(func() { delete(a.services, r.PathValue("id")) })
}

func (a *agent) update(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := r.PathValue("id")
	if _, ok := a.status[id]; !ok {
		http.Error(w, "Unknown check ID "+id, http.StatusNotFound)
		return
	}
	a.renewals++
}

func (a *agent) health(w http.ResponseWriter, r *http.Request) {
	want, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
	wait, _ := time.ParseDuration(r.URL.Query().Get("wait"))
	a.mu.Lock()
	a.queries = append(a.queries, want)
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for want > 0 && a.index == want {
		ch := a.changed
		a.mu.Unlock()
		select {
		case <-ch:
		case <-timeout.C:
			a.mu.Lock()
			goto answer
		case <-r.Context().Done():
			return
		}
		a.mu.Lock()
	}
answer:
	defer a.mu.Unlock()
	var out []*api.ServiceEntry
	for id, s := range a.services {
		st := api.HealthPassing
		if s.Check != nil {
			st = a.status[s.Check.CheckID]
		}
		out = append(out, &api.ServiceEntry{
			Node:    &api.Node{Address: "10.9.9.9"},
			Service: &api.AgentService{ID: id, Service: s.Name, Address: s.Address, Port: s.Port, Meta: s.Meta},
			Checks:  api.HealthChecks{{Status: st}},
		})
	}
	w.Header().Set("X-Consul-Index", strconv.FormatUint(a.index, 10))
	if err := json.NewEncoder(w).Encode(out); err != nil {
		a.t.Error(err)
	}
}

func (a *agent) add(id, name string, lat string, st string) {
	a.edit(func() {
		a.services[id] = &api.AgentServiceRegistration{ID: id, Name: Service, Address: "10.0.0.1", Port: 7400,
			Meta: map[string]string{"region": name, "lat": lat, "lon": "1"}, Check: &api.AgentServiceCheck{CheckID: "c:" + id}}
		a.status["c:"+id] = st
	})
}

// start runs a directory until the test ends.
func start(t *testing.T, addr string, self region.Info) *Directory {
	t.Helper()
	d, err := New(Options{Address: addr, Self: self, Instance: "gw-1", TTL: 300 * time.Millisecond, Wait: 2 * time.Second, MinPeriod: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return d
}

// eventually polls until ok, for a minute at most.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		<-tick.C
	}
}

var self = region.Info{Name: "eu", Gateway: "10.0.0.7:7400", Location: region.Location{Latitude: 53, Longitude: -6}}

// The gateway registers with its place on Earth, renews its check, registers again
// when the agent forgets it, and deregisters at the end.
func TestRegistration(t *testing.T) {
	a, addr := newAgent(t)
	d, err := New(Options{Address: addr, Self: self, Instance: "gw-1", Version: "v9", TTL: 60 * time.Millisecond, MinPeriod: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	get := func() *api.AgentServiceRegistration {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.services["gw-1"]
	}
	eventually(t, "registered", func() bool { return get() != nil })
	if s := get(); s.Name != Service || s.Port != 7400 || s.Meta["region"] != "eu" || s.Meta["lat"] != "53" || s.Meta["version"] != "v9" {
		t.Fatalf("registered as %+v", s)
	}
	eventually(t, "renewed", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.renewals > 1 })
	a.edit(func() { clear(a.services); clear(a.status) }) // agent restarted with an empty state
	eventually(t, "registered again", func() bool { return get() != nil })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if get() != nil {
		t.Fatal("still registered after the end")
	}
}

// Regions appear, lose health with their last passing instance, and disappear; bad
// metadata of one entry hides only that entry.
func TestFollow(t *testing.T) {
	a, addr := newAgent(t)
	d := start(t, addr, region.Info{})
	a.add("us-1", "us", "37", api.HealthPassing)
	a.add("us-2", "us", "37", api.HealthCritical)
	a.add("bad", "xx", "north", api.HealthPassing)
	see := func(want int, healthy bool) func() bool {
		return func() bool {
			rs, stale := d.Regions()
			return !stale && len(rs) == want && (want == 0 || rs[0].Name == "us" && rs[0].Healthy == healthy)
		}
	}
	eventually(t, "us is healthy by one of two instances", see(1, true))
	a.edit(func() { a.status["c:us-1"] = api.HealthCritical })
	eventually(t, "us is unhealthy", see(1, false))
	a.edit(func() { clear(a.services) })
	eventually(t, "us is gone", see(0, false))
}

// Consul down: the last known regions stay and are marked stale; up again: fresh.
func TestStale(t *testing.T) {
	a, addr := newAgent(t)
	d := start(t, addr, region.Info{})
	a.add("us-1", "us", "37", api.HealthPassing)
	eventually(t, "fresh", func() bool { rs, stale := d.Regions(); return len(rs) == 1 && !stale })
	a.edit(func() { a.fail = true })
	eventually(t, "stale", func() bool { rs, stale := d.Regions(); return len(rs) == 1 && stale })
	a.edit(func() { a.fail = false })
	eventually(t, "fresh again", func() bool { rs, stale := d.Regions(); return len(rs) == 1 && !stale })
}

// An index that goes backwards (restored snapshot, new leader) makes the next query
// start from 0 instead of blocking on an index that may never come.
func TestIndexBackwards(t *testing.T) {
	a, addr := newAgent(t)
	d := start(t, addr, region.Info{})
	<-d.First()
	a.edit(func() { a.index = 3 })
	a.add("us-1", "us", "37", api.HealthPassing)
	eventually(t, "the new region is seen", func() bool { rs, _ := d.Regions(); return len(rs) == 1 })
	eventually(t, "a query starts over", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return slices.Contains(a.queries[1:], 0)
	})
}

// The index rules as a table.
func TestNextIndex(t *testing.T) {
	for _, c := range []struct{ have, got, want uint64 }{{0, 0, 1}, {0, 7, 7}, {7, 7, 7}, {7, 9, 9}, {9, 3, 0}} {
		if got := nextIndex(c.have, c.got); got != c.want {
			t.Errorf("nextIndex(%d, %d) = %d, want %d", c.have, c.got, got, c.want)
		}
	}
}

// Bad options are refused before anything is contacted.
func TestBadOptions(t *testing.T) {
	bad := self
	bad.Gateway = "nowhere"
	if _, err := New(Options{Address: "127.0.0.1:1", Self: bad, Instance: "x"}); err == nil {
		t.Error("a gateway without a port was accepted")
	}
	if _, err := New(Options{Address: "127.0.0.1:1", Self: self}); err == nil {
		t.Error("an empty instance was accepted")
	}
}
