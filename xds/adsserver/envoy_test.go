package adsserver_test

import (
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// arms is model chat with canary percent ten on v2, served by the given endpoints.
func arms(v1, v2 []policy.Endpoint) *policy.Policy {
	return &policy.Policy{Models: []policy.Model{{
		Name: "chat", Salt: "exp 1\"ü", Unit: experiments.UnitUser, MaxAttempts: 1, LastGood: "v1",
		Arms: []policy.Arm{
			{Name: "canary", Version: "v2", Ranges: []experiments.Range{{Start: 0, End: 1000}}},
			{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: 1000, End: experiments.Buckets}}},
		},
		Versions: []policy.Version{{Name: "v1", Endpoints: v1}, {Name: "v2", Endpoints: v2}},
	}}}
}

func at(us ...*upstream) (out []policy.Endpoint) {
	for _, u := range us {
		out = append(out, policy.Endpoint{Address: u.addr, Region: "eu", Weight: 1})
	}
	return out
}

// A real Envoy obeys the published policy: every claim of translate's capability table
// for Envoy, over one Envoy that lives through all of it.
func TestRealEnvoy(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	srv := adsserver.New(adsserver.Options{})
	control := listen(t, srv.Register)
	v1, v2 := startUpstream(t, "v1"), startUpstream(t, "v2")
	start := arms(at(v1), at(v2))
	start.Position = 1
	e := startEnvoy(t, srv, control, start)
	eventually(t, func() (string, bool) { a := e.ask(); return "no answer yet", a.status == 200 }, nil)

	// Each scenario leaves the Envoy with the policy it started from.
	for _, s := range []struct {
		name string
		run  func(*testing.T, *envoy, *upstream, *upstream)
	}{
		{"split and sticky arms as in a sidecar", envoySplit},
		{"units and buckets", envoyUnits},
		{"new versions under load", envoyMoves},
		{"kill switch", envoyKill},
		{"circuit breaker", envoyBreaker},
		{"ejection", envoyEjection},
		{"localities 75 to 25", envoyLocalities},
		{"failover by priority", envoyPriority},
		{"failover to the last good version", envoyLastGood},
		{"faults and shedding", envoyFaults},
		{"access", envoyAccess},
	} {
		t.Run(s.name, func(t *testing.T) {
			e.t = t
			s.run(t, e, v1, v2)
			v1.fail.Store(0)
			v2.fail.Store(0)
			e.put(arms(at(v1), at(v2)))
		})
	}
}

// many sends n requests over a few connections and returns the answers by index.
func (e *envoy) many(n int, headers func(i int) []string) []answer {
	out := make([]answer, n)
	const clients = 8
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := c; i < n; i += clients {
				out[i] = e.ask(headers(i)...)
			}
		})
	}
	wg.Wait()
	return out
}

// envoyMoves: all traffic moves to a version the Envoy has never heard of, and back to none of
// it, several times, and not one request notices.
func envoyMoves(t *testing.T, e *envoy, v1, v2 *upstream) {
	var stop atomic.Bool
	var wg sync.WaitGroup
	var failed atomic.Pointer[answer]
	for c := range 4 {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if a := e.ask(user(4*i + c)...); a.status != 200 {
					failed.CompareAndSwap(nil, &a)
				}
			}
		})
	}
	defer wg.Wait()
	defer stop.Store(true)
	for i := range 6 {
		p := arms(at(v1), at(v2))
		m := &p.Models[0]
		name := "fresh-" + itoa(i)
		m.Arms = []policy.Arm{{Name: "stable", Version: name, Ranges: []experiments.Range{{Start: 0, End: experiments.Buckets}}}}
		m.Versions, m.LastGood = []policy.Version{{Name: name, Endpoints: at(v2)}}, name
		e.put(p)
		if a := failed.Load(); a != nil {
			t.Fatalf("a request was answered %d (%v) while everything moved to %s", a.status, a.err, name)
		}
	}
}

func user(i int) []string { return []string{outrigger.HeaderUser, "user-" + itoa(i)} }

// canaryUser is a user of the canary arm, by the rule of the sidecar.
func canaryUser(t *testing.T, m *policy.Model) []string {
	t.Helper()
	for i := range 10_000 {
		if u := user(i); experiments.Bucket(m.Salt, u[1]) < 1000 {
			return u
		}
	}
	t.Fatal("no user of the first 10,000 is in the canary arm")
	return nil
}

func share(as []answer, is func(answer) bool) float64 {
	n := 0
	for _, a := range as {
		if is(a) {
			n++
		}
	}
	return float64(n) / float64(len(as))
}

func near(t *testing.T, what string, got, want, within float64) {
	t.Helper()
	if math.Abs(got-want) > within {
		t.Errorf("%s: %.4f, want %.4f ± %.4f", what, got, want, within)
	} else {
		t.Logf("%s: %.4f", what, got)
	}
}

// 10,000 users nobody stamped, twice for some: each goes where a sidecar would send it.
func envoySplit(t *testing.T, e *envoy, v1, v2 *upstream) {
	m := &arms(at(v1), at(v2)).Models[0]
	got := e.many(10_000, user)
	for i, a := range append(got, e.many(500, user)...) {
		want, err := inference.Assign(m, user(i % 10_000)[1], inference.PolicyStatus{Live: true})
		if err != nil {
			t.Fatal(err)
		}
		if a.err != nil || a.status != 200 || a.arm != want.Arm || a.served != want.Version.Name || a.version != want.Version.Name {
			t.Fatalf("user %d: %+v, a sidecar says arm %s version %s", i%10_000, a, want.Arm, want.Version.Name)
		}
	}
	near(t, "canary", share(got, func(a answer) bool { return a.served == "v2" }), 0.10, 0.015)
}

// Where the unit comes from, and that a sidecar's stamp wins.
func envoyUnits(t *testing.T, e *envoy, v1, _ *upstream) {
	m := &arms(at(v1), nil).Models[0]
	u := canaryUser(t, m)[1]
	for _, c := range []struct {
		name, body string
		headers    []string
		arm        string
	}{
		{"stamped", `{"model":"chat"}`, []string{outrigger.HeaderBucket, "5"}, "canary"},
		{"stamp over unit", `{"model":"chat"}`, []string{outrigger.HeaderBucket, "5000", outrigger.HeaderUser, u}, "stable"},
		{"impossible stamp", `{"model":"chat"}`, []string{outrigger.HeaderBucket, "10000", outrigger.HeaderUser, u}, "canary"},
		{"user in the body", `{"model":"chat","user":"` + u + `"}`, nil, "canary"},
		{"metadata.user_id", `{"metadata":{"user_id":"` + u + `"},"model":"chat"}`, nil, "canary"},
		{"header over body", `{"model":"chat","user":"x"}`, []string{outrigger.HeaderUser, u}, "canary"},
		{"no unit", `{"model":"chat"}`, nil, policy.ArmUnassigned},
		{"session under rule user", `{"model":"chat"}`, []string{outrigger.HeaderSession, u}, policy.ArmUnassigned},
		{"claimed arm", `{"model":"chat"}`, []string{outrigger.HeaderArm, "canary", outrigger.HeaderUser, u}, "canary"},
		{"model in a header", `{}`, []string{outrigger.HeaderModel, "chat", outrigger.HeaderUser, u}, "canary"},
	} {
		if a := e.askBody(c.body, c.headers...); a.status != 200 || a.arm != c.arm {
			t.Errorf("%s: %+v, want arm %s", c.name, a, c.arm)
		}
	}
	if h := *v1.seen.Load(); h.Get("x-outrigger-scope") != "" || h.Get("x-outrigger-capture") != "" {
		t.Errorf("headers between Envoy's parts reached the endpoint: %v", h)
	}
	if a := e.askBody(`{"model":"other"}`); a.status != 404 {
		t.Errorf("unknown model: %+v, want 404", a)
	}
}

// The kill switch by RTDS alone (routes unchanged), its way back by the old value, and
// the quarantine of a version.
func envoyKill(t *testing.T, e *envoy, v1, v2 *upstream) {
	p := arms(at(v1), at(v2))
	u := canaryUser(t, &p.Models[0])
	const key = "outrigger.serve.chat/v2"
	dead := arms(at(v1), at(v2))
	dead.Models[0].Versions[1].Quarantined = true
	layer := func(of *policy.Policy) {
		t.Helper()
		e.position++
		p.Position, of.Position = e.position, e.position
		res, err := translate.EncodeFor(translate.KindEnvoy, p, e.opt)
		if err != nil {
			t.Fatal(err)
		}
		other, err := translate.EncodeFor(translate.KindEnvoy, of, e.opt)
		if err != nil {
			t.Fatal(err)
		}
		res.Put(xds.TypeRuntime, xds.RuntimeName, other.Get(xds.TypeRuntime, xds.RuntimeName))
		if err := e.srv.Publish(adsserver.KindGroup(translate.KindEnvoy), res, e.position); err != nil {
			t.Fatal(err)
		}
		e.settled()
	}
	served := func(version, arm string) {
		t.Helper()
		eventually(t, func() (string, bool) { a := e.ask(u...); return "served by " + a.served, a.served == version }, nil)
		for range 100 {
			if a := e.ask(u...); a.served != version || a.arm != arm {
				t.Fatalf("%+v, want %s of arm %s", a, version, arm)
			}
		}
	}
	served("v2", "canary")
	layer(dead)
	if got := e.runtimeValue(key); got != "0" {
		t.Errorf("%s is %q in Envoy's runtime, want 0", key, got)
	}
	served("v1", policy.ArmLastGood)
	layer(arms(at(v1), at(v2)))
	served("v2", "canary")
	if got := e.runtimeValue(key); got != "100" {
		t.Errorf("%s is %q in Envoy's runtime, want the old value written back", key, got)
	}
	e.put(dead)
	served("v1", policy.ArmLastGood)
}

// Three requests may be under way; nine more are refused at once.
func envoyBreaker(t *testing.T, e *envoy, v1, v2 *upstream) {
	p := arms(at(v1), at(v2))
	p.Models[0].Versions[0].MaxRequests = 3
	e.put(p)
	hold := make(chan struct{})
	v1.block.Store(&hold)
	defer v1.block.Store(nil)
	results := make(chan answer, 12)
	for range 12 {
		go func() { results <- e.ask() }()
	}
	refused := 0
	for range 9 {
		if a := <-results; a.status == 503 {
			refused++
		}
	}
	close(hold)
	ok := 0
	for range 3 {
		if a := <-results; a.status == 200 {
			ok++
		}
	}
	if refused != 9 || ok != 3 || len(v1.entered) != 3 {
		t.Errorf("%d refused, %d answered, %d reached the endpoint; want 9, 3, 3", refused, ok, len(v1.entered))
	}
}

// An endpoint that fails is left out after the configured number of failures.
func envoyEjection(t *testing.T, e *envoy, v1, v2 *upstream) {
	bad := startUpstream(t, "bad")
	bad.fail.Store(500)
	p := arms(at(v1, bad), at(v2))
	p.Models[0].Versions[0].ConsecutiveFailures, p.Models[0].Versions[0].OpenFor = 5, time.Minute
	e.put(p)
	eventually(t, func() (string, bool) { e.ask(); return "the bad endpoint is never asked", bad.calls.Load() >= 5 }, nil)
	before := bad.calls.Load()
	// The failure is counted where the request is served, and acted on by another thread.
	eventually(t, func() (string, bool) { return "the bad endpoint is not ejected", e.ejected(bad.addr) }, nil)
	for range 300 {
		if a := e.ask(); a.status != 200 {
			t.Fatalf("after the ejection: %+v", a)
		}
	}
	if before != 5 || bad.calls.Load() != 5 {
		t.Errorf("the bad endpoint was asked %d times before and %d in all, want exactly 5", before, bad.calls.Load())
	}
}

func envoyLocalities(t *testing.T, e *envoy, v1, v2 *upstream) {
	far := startUpstream(t, "far")
	es := append(at(v1), policy.Endpoint{Address: far.addr, Region: "us", Weight: 1})
	es[0].Weight = 3
	e.put(arms(es, at(v2)))
	eventually(t, func() (string, bool) { e.ask(); return "the far region is never asked", far.calls.Load() > 0 }, nil)
	near(t, "near region", share(e.many(4000, func(int) []string { return nil }), func(a answer) bool { return a.served == "v1" }), 0.75, 0.015)
}

// The first priority's endpoint does not exist: after its ejection all go to the second.
func envoyPriority(t *testing.T, e *envoy, v1, v2 *upstream) {
	es := append([]policy.Endpoint{{Address: freePort(t), Region: "eu", Weight: 1}}, at(v1)...)
	es[1].Priority, es[1].Region = 1, "us"
	p := arms(es, at(v2))
	p.Models[0].Versions[0].ConsecutiveFailures, p.Models[0].Versions[0].OpenFor = 3, time.Minute
	e.put(p)
	for i := range 3 {
		if a := e.ask(); a.status == 200 {
			t.Fatalf("answer %d before the failover: %+v", i, a)
		}
	}
	// The failure is counted where the request is served, and acted on by another thread.
	eventually(t, func() (string, bool) { return "the first priority is not ejected", e.ejected(es[0].Address) }, nil)
	eventually(t, func() (string, bool) { return "no answer by the second priority", e.ask().served == "v1" }, nil)
	for _, a := range e.many(500, func(int) []string { return nil }) {
		if a.served != "v1" {
			t.Fatalf("after the failover: %+v", a)
		}
	}
}

// The canary's only endpoint does not exist: its users get the last good version.
func envoyLastGood(t *testing.T, e *envoy, v1, _ *upstream) {
	p := arms(at(v1), []policy.Endpoint{{Address: freePort(t), Region: "eu", Weight: 1}})
	p.Models[0].Versions[1].ConsecutiveFailures, p.Models[0].Versions[1].OpenFor = 3, time.Minute
	e.put(p)
	u := canaryUser(t, &p.Models[0])
	eventually(t, func() (string, bool) {
		a := e.ask(u...)
		return "not served by the last good version", a.served == "v1"
	}, nil)
	for range 300 {
		if a := e.ask(u...); a.status != 200 || a.served != "v1" {
			t.Fatalf("after the failover: %+v", a)
		}
	}
}

func envoyFaults(t *testing.T, e *envoy, v1, v2 *upstream) {
	p := arms(at(v1), at(v2))
	p.Models[0].Fault = policy.Fault{AbortShare: 3000, AbortStatus: 418}
	e.put(p)
	eventually(t, func() (string, bool) { a := e.ask(); return "no fault", a.status == 418 }, nil)
	nobody := func(int) []string { return nil }
	near(t, "aborted", share(e.many(4000, nobody), func(a answer) bool { return a.status == 418 }), 0.30, 0.035)

	p = arms(at(v1), at(v2))
	p.Models[0].Versions[0].Shed = 4000
	e.put(p)
	eventually(t, func() (string, bool) { a := e.ask(); return "nothing shed", a.status == 503 }, nil)
	near(t, "shed", share(e.many(4000, nobody), func(a answer) bool { return a.status == 503 }), 0.40, 0.035)

	p = arms(at(v1), at(v2))
	p.Models[0].Fault = policy.Fault{DelayShare: experiments.Buckets, Delay: 150 * time.Millisecond}
	e.put(p)
	eventually(t, func() (string, bool) {
		began := time.Now()
		a := e.ask()
		return "no delay", a.status == 200 && time.Since(began) >= 150*time.Millisecond
	}, nil)
}

func envoyAccess(t *testing.T, e *envoy, v1, v2 *upstream) {
	p := arms(at(v1), at(v2))
	p.Models[0].Access = []policy.Access{{Header: "x-team", Value: "search"}}
	e.put(p)
	eventually(t, func() (string, bool) { a := e.ask(); return "still open", a.status == 403 }, nil)
	if a := e.ask("x-team", "search"); a.status != 200 {
		t.Errorf("with the header: %+v", a)
	}
	if a := e.ask("x-team", "ads"); a.status != 403 {
		t.Errorf("with another value: %+v", a)
	}
}
