package policy_test

import (
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/policy/policytest"
)

func sample() *policy.Policy {
	return &policy.Policy{Position: 7,
		Models: []policy.Model{{
			Name: "chat", Salt: "s1", Unit: experiments.UnitSession, LastGood: "v1", DeadMan: 10 * time.Second, MaxAttempts: 2,
			Arms: []policy.Arm{
				{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: 1000, End: experiments.Buckets}}},
				{Name: "canary", Version: "v2", Ranges: []experiments.Range{{Start: 0, End: 1000}}},
			},
			Versions: []policy.Version{
				{Name: "v1", Upstream: "m-1", Endpoints: []policy.Endpoint{{Address: "10.0.0.1:80", Region: "eu", Weight: 1}}},
				{Name: "v2", Upstream: "m-2"},
			},
		}},
		Regions: []policy.Region{{Name: "eu", Gateway: "gw:443", Latitude: 48, Longitude: 11, Healthy: true}},
	}
}

func enrolled(gates ...policy.Gate) policy.Enrolment {
	return policy.Enrolment{Gates: gates, Version: "v1"}
}

// Every rule: a valid policy with one thing broken, and what the message must name.
func TestValidate(t *testing.T) {
	if err := sample().Validate(); err != nil {
		t.Fatalf("sample: %v", err)
	}
	model := func(f func(*policy.Model)) func(*policy.Policy) {
		return func(p *policy.Policy) { f(&p.Models[0]) }
	}
	cases := []struct {
		name, want string
		breakIt    func(*policy.Policy)
	}{
		{"unsorted models", "sorted by name", func(p *policy.Policy) {
			second := p.Models[0]
			second.Name = "a"
			p.Models = append(p.Models, second)
		}},
		{"duplicate model", "sorted by name", func(p *policy.Policy) { p.Models = append(p.Models, p.Models[0]) }},
		{"reserved arm name", "reserved", model(func(m *policy.Model) { m.Arms[0].Name = policy.ArmUnassigned })},
		{"reserved arm name", "reserved", model(func(m *policy.Model) { m.Arms[0].Name = policy.ArmLastGood })},
		{"empty model name", "name", model(func(m *policy.Model) { m.Name = "" })},
		{"control character", "control", model(func(m *policy.Model) { m.Name = "a\nb" })},
		{"salt", "salt is empty", model(func(m *policy.Model) { m.Salt = "" })},
		{"unit", `unit "device"`, model(func(m *policy.Model) { m.Unit = "device" })},
		{"timeout", "timeout", model(func(m *policy.Model) { m.Timeout = -1 })},
		{"dead man too long", "dead_man", model(func(m *policy.Model) { m.DeadMan = 25 * time.Hour })},
		{"dead man without last good", "last_good", model(func(m *policy.Model) { m.LastGood = "" })},
		{"no attempts", "max_attempts 0", model(func(m *policy.Model) { m.MaxAttempts = 0 })},
		{"unknown last good", `last_good "v9"`, model(func(m *policy.Model) { m.LastGood = "v9" })},
		{"quarantined last good", "quarantined", model(func(m *policy.Model) { m.Versions[0].Quarantined = true })},
		{"quarantined without fallback", "no last_good", model(func(m *policy.Model) { m.LastGood, m.DeadMan, m.Versions[1].Quarantined = "", 0, true })},
		{"slash in version", "version", model(func(m *policy.Model) { m.Versions[1].Name = "a/b" })},
		{"duplicate version", "twice", model(func(m *policy.Model) { m.Versions[1].Name = "v1" })},
		{"unknown arm version", `"v9"`, model(func(m *policy.Model) { m.Arms[0].Version = "v9" })},
		{"duplicate arm", "twice", model(func(m *policy.Model) { m.Arms[1].Name = "stable" })},
		{"overlap", "bucket 999 belongs to arm \"stable\" and arm \"canary\"", model(func(m *policy.Model) { m.Arms[0].Ranges[0].Start = 999 })},
		{"gap", "bucket 1000 belongs to no arm", model(func(m *policy.Model) { m.Arms[0].Ranges[0].Start = 1001 })},
		{"empty range", "[5,5)", model(func(m *policy.Model) { m.Arms[0].Ranges = []experiments.Range{{Start: 5, End: 5}} })},
		{"range past the end", "10001", model(func(m *policy.Model) { m.Arms[0].Ranges[0].End = 10001 })},
		{"no arms", "bucket 0", model(func(m *policy.Model) { m.Arms = nil })},
		{"no port", "no port", model(func(m *policy.Model) { m.Versions[0].Endpoints[0].Address = "host" })},
		{"zero weight", "weight 0", model(func(m *policy.Model) { m.Versions[0].Endpoints[0].Weight = 0 })},
		{"duplicate address", "twice", model(func(m *policy.Model) {
			m.Versions[0].Endpoints = append(m.Versions[0].Endpoints, m.Versions[0].Endpoints[0])
		})},
		{"duplicate region", "twice", func(p *policy.Policy) { p.Regions = append(p.Regions, p.Regions[0]) }},
		{"latitude", "latitude", func(p *policy.Policy) { p.Regions[0].Latitude = 91 }},
		{"not a number", "longitude", func(p *policy.Policy) { p.Regions[0].Longitude = math.NaN() }},
		{"gateway", "gateway", func(p *policy.Policy) { p.Regions[0].Gateway = "host:0" }},
		{"version of an enrolment", `enrolment version "v9"`, model(func(m *policy.Model) { m.Enrolment = policy.Enrolment{Target: "true", Version: "v9"} })},
		{"enrolment of everybody", "everybody takes part", model(func(m *policy.Model) { m.Enrolment.Version = "v1" })},
		{"long target", "the limit is 1024", model(func(m *policy.Model) {
			m.Enrolment = policy.Enrolment{Target: strings.Repeat("x", 1025), Version: "v1"}
		})},
		{"gate of the arms' salt", `salt "s1" is that of the arms`, model(func(m *policy.Model) {
			m.Enrolment = enrolled(policy.Gate{Salt: "s1", Range: experiments.Range{End: 5}})
		})},
		{"empty gate", "[5,5)", model(func(m *policy.Model) {
			m.Enrolment = enrolled(policy.Gate{Salt: "c", Range: experiments.Range{Start: 5, End: 5}})
		})},
		{"gate past the end", "10001", model(func(m *policy.Model) {
			m.Enrolment = enrolled(policy.Gate{Salt: "c", Range: experiments.Range{End: 10_001}})
		})},
		{"gate twice", "twice", model(func(m *policy.Model) {
			g := policy.Gate{Salt: "c", Range: experiments.Range{End: 5}}
			m.Enrolment = enrolled(g, g)
		})},
		{"reserved arm name", "reserved", model(func(m *policy.Model) { m.Arms[0].Name = policy.ArmForced })},
		{"too many regions", "the limit is 1024", func(p *policy.Policy) { p.Regions = make([]policy.Region, 1025) }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := sample()
			c.breakIt(p)
			err := p.Validate()
			if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an Invalid error with %q", err, c.want)
			}
		})
	}
}

func TestNormaliseWritesOutTheOneForm(t *testing.T) {
	p := sample()
	m := &p.Models[0]
	m.Arms[0].Ranges = []experiments.Range{{Start: 5000, End: 10000}, {Start: 1000, End: 5000}}
	m.Versions[0].Endpoints = []policy.Endpoint{
		{Address: "b:1", Weight: 1, Priority: 7}, {Address: "c:1", Weight: 2, Priority: 3}, {Address: "a:1", Weight: 1, Priority: 7},
	}
	before := sample()
	before.Models[0].Arms[0].Ranges = append([]experiments.Range(nil), m.Arms[0].Ranges...)
	before.Models[0].Versions[0].Endpoints = append([]policy.Endpoint(nil), m.Versions[0].Endpoints...)

	n := p.Normalise()
	if !reflect.DeepEqual(p, before) {
		t.Fatal("Normalise changed its input")
	}
	got := n.Models[0]
	if got.Arms[0].Name != "canary" || !reflect.DeepEqual(got.Arms[1].Ranges, []experiments.Range{{Start: 1000, End: 10000}}) {
		t.Errorf("arms %+v", got.Arms)
	}
	want := []policy.Endpoint{{Address: "c:1", Weight: 2, Priority: 0}, {Address: "a:1", Weight: 1, Priority: 1}, {Address: "b:1", Weight: 1, Priority: 1}}
	if !reflect.DeepEqual(got.Versions[0].Endpoints, want) {
		t.Errorf("endpoints %+v", got.Versions[0].Endpoints)
	}
	if got.Timeout != policy.DefaultTimeout || got.Versions[1].MaxRequests != policy.DefaultMaxRequests ||
		got.Versions[1].ConsecutiveFailures != policy.DefaultConsecutiveFailures || got.Versions[1].OpenFor != policy.DefaultOpenFor {
		t.Errorf("defaults missing: %+v", got)
	}
	if !policy.Equal(p, n) {
		t.Error("a policy must equal its normal form")
	}
}

func TestNormaliseLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := policytest.Policy().Draw(t, "policy")
		if err := p.Validate(); err != nil {
			t.Fatalf("generator: %v", err)
		}
		n := p.Normalise()
		if err := n.Validate(); err != nil {
			t.Fatalf("normal form became invalid: %v", err)
		}
		if !reflect.DeepEqual(n, n.Normalise()) {
			t.Fatal("Normalise is not idempotent")
		}
		for i := range p.Models {
			for b := uint32(0); b < experiments.Buckets; b += 97 {
				if p.Models[i].ArmOf(b).Name != n.Models[i].ArmOf(b).Name {
					t.Fatalf("bucket %d changed its arm", b)
				}
			}
		}
	})
}

func TestEqualSeesEveryField(t *testing.T) {
	changes := map[string]func(*policy.Policy){
		"position": func(p *policy.Policy) { p.Position++ },
		"salt":     func(p *policy.Policy) { p.Models[0].Salt = "other" },
		"target":   func(p *policy.Policy) { p.Models[0].Enrolment = policy.Enrolment{Target: "true", Version: "v1"} },
		"gate": func(p *policy.Policy) {
			p.Models[0].Enrolment = enrolled(policy.Gate{Salt: "c", Range: experiments.Range{End: 5}})
		},
		"epoch":   func(p *policy.Policy) { p.Models[0].WeightEpoch++ },
		"range":   func(p *policy.Policy) { p.Models[0].Arms[0].Ranges[0].Start++ },
		"weight":  func(p *policy.Policy) { p.Models[0].Versions[0].Endpoints[0].Weight++ },
		"healthy": func(p *policy.Policy) { p.Regions[0].Healthy = false },
	}
	for name, change := range changes {
		p := sample()
		change(p)
		if policy.Equal(p, sample()) {
			t.Errorf("%s: change not seen", name)
		}
	}
	if policy.Equal(nil, sample()) || !policy.Equal(nil, nil) || !policy.Equal(sample(), sample()) {
		t.Error("nil or reflexive case wrong")
	}
}

func TestServing(t *testing.T) {
	m := &sample().Models[0]
	canary := &m.Arms[1]
	if got := m.Serving(canary).Name; got != "v2" {
		t.Errorf("serving %s, want v2", got)
	}
	m.Versions[1].Quarantined = true
	if got := m.Serving(canary).Name; got != "v1" {
		t.Errorf("quarantined: serving %s, want v1", got)
	}
	if w := canary.Weight(); w != 1000 {
		t.Errorf("weight %d, want 1000", w)
	}
	if m.Serving(&policy.Arm{Version: "v9"}) != nil {
		t.Error("unknown version must serve nothing")
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	p := sample()
	if n := testing.AllocsPerRun(100, func() {
		if m := p.Model("chat"); m.Serving(m.ArmOf(999)).Name != "v2" || p.Model("x") != nil {
			t.Fatal("wrong lookup")
		}
	}); n != 0 {
		t.Errorf("%v allocations per lookup, want 0", n)
	}
}

func FuzzSplitAddress(f *testing.F) {
	for _, s := range []string{"h:1", "[::1]:65535", "::1:80", "h:0", "h:080", ":1", "[h]:1", "a b:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, port, err := policy.SplitAddress(s)
		if err != nil {
			return
		}
		if got := policy.JoinAddress(host, port); got != s {
			t.Fatalf("%q became %q", s, got)
		}
	})
}
