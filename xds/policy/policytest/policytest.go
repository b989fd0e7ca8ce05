// Package policytest generates valid policies for property tests of everything that
// carries or obeys a policy. Generators draw from rapid, so failures shrink and
// replay; they are safe for concurrent use.
package policytest

import (
	"fmt"
	"slices"
	"time"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Policy generates valid policies of up to 4 models and 4 regions. They are sorted
// where Validate demands it but not otherwise normalised: defaults stay zero, ranges
// and lists come in any order.
func Policy() *rapid.Generator[*policy.Policy] {
	return rapid.Custom(func(t *rapid.T) *policy.Policy {
		p := &policy.Policy{Position: rapid.Uint64().Draw(t, "position")}
		for _, name := range names(t, "model", 0, 4, true) {
			p.Models = append(p.Models, Model(name).Draw(t, "model"))
		}
		slices.SortFunc(p.Models, func(a, b policy.Model) int {
			if a.Name < b.Name {
				return -1
			}
			return 1
		})
		for _, name := range names(t, "region", 0, 4, false) {
			p.Regions = append(p.Regions, policy.Region{
				Name: name, Gateway: rapid.SampledFrom([]string{"", "gw.example:443", "[2001:db8::1]:9"}).Draw(t, "gateway"),
				Latitude: rapid.Float64Range(-90, 90).Draw(t, "lat"), Longitude: rapid.Float64Range(-180, 180).Draw(t, "lon"),
				Healthy: rapid.Bool().Draw(t, "healthy"),
			})
		}
		return p
	})
}

// Model generates valid models of the given name.
func Model(name string) *rapid.Generator[policy.Model] {
	return rapid.Custom(func(t *rapid.T) policy.Model {
		m := policy.Model{
			Name: name, Salt: label(t, "salt", false),
			Unit:        rapid.SampledFrom([]experiments.Unit{experiments.UnitUser, experiments.UnitSession, experiments.UnitRequest}).Draw(t, "unit"),
			WeightEpoch: rapid.Uint64().Draw(t, "epoch"),
			Timeout:     durations(t, "timeout"), MaxAttempts: rapid.Uint32Range(1, policy.MaxAttempts).Draw(t, "attempts"),
		}
		for _, v := range names(t, "version", 1, 3, false) {
			m.Versions = append(m.Versions, version(t, v))
		}
		if i := rapid.IntRange(-1, len(m.Versions)-1).Draw(t, "last_good"); i >= 0 {
			m.Versions[i].Quarantined = false
			m.LastGood, m.DeadMan = m.Versions[i].Name, durations(t, "dead_man")
		} else {
			for i := range m.Versions {
				m.Versions[i].Quarantined = false
			}
		}
		m.Arms = arms(t, m.Versions)
		m.Fault, m.Access = fault(t), access(t)
		m.Enrolment = enrolment(t, m)
		m.Shadows = shadows(t, m)
		return m
	})
}

func enrolment(t *rapid.T, m policy.Model) (e policy.Enrolment) {
	if !rapid.Bool().Draw(t, "enrolment") {
		return e
	}
	e.Target = rapid.SampledFrom([]string{"", `attributes.plan == "pro"`}).Draw(t, "target")
	for _, salt := range names(t, "gate", 0, 2, false) {
		start := rapid.Uint32Range(0, experiments.Buckets-1).Draw(t, "gate_start")
		e.Gates = append(e.Gates, policy.Gate{Salt: "gate:" + salt, Range: experiments.Range{Start: start, End: rapid.Uint32Range(start+1, experiments.Buckets).Draw(t, "gate_end")}})
	}
	if !e.Limited() {
		return policy.Enrolment{}
	}
	e.Version = m.LastGood
	if e.Version == "" {
		e.Version = m.Versions[0].Name
	}
	return e
}

// shadows are some of the versions that serve no arm.
func shadows(t *rapid.T, m policy.Model) (out []policy.Shadow) {
	for _, v := range m.Versions {
		if !v.Quarantined && !slices.ContainsFunc(m.Arms, func(a policy.Arm) bool { return a.Version == v.Name }) && rapid.Bool().Draw(t, "shadow") {
			out = append(out, policy.Shadow{Version: v.Name, Share: rapid.Uint32Range(1, experiments.Buckets).Draw(t, "share")})
		}
	}
	return out
}

func fault(t *rapid.T) (f policy.Fault) {
	if rapid.Bool().Draw(t, "aborts") {
		f.AbortShare, f.AbortStatus = rapid.Uint32Range(0, experiments.Buckets).Draw(t, "abort_share"), rapid.Uint32Range(200, 599).Draw(t, "abort_status")
	}
	if rapid.Bool().Draw(t, "delays") {
		f.DelayShare = rapid.Uint32Range(0, experiments.Buckets).Draw(t, "delay_share")
		f.Delay = time.Duration(rapid.Int64Range(int64(time.Millisecond), int64(policy.MaxDelay)).Draw(t, "delay"))
	}
	return f
}

func access(t *rapid.T) (out []policy.Access) {
	for _, value := range names(t, "access", 0, 2, true) {
		out = append(out, policy.Access{Header: rapid.SampledFrom([]string{"x-team", "x-outrigger-tenant"}).Draw(t, "header"), Value: value})
	}
	return out
}

func version(t *rapid.T, name string) policy.Version {
	v := policy.Version{
		Name: name, Upstream: rapid.SampledFrom([]string{"", "org/model-7b", "m"}).Draw(t, "upstream"),
		Quarantined: rapid.Bool().Draw(t, "quarantined"),
		MaxRequests: rapid.Uint32().Draw(t, "max_requests"), ConsecutiveFailures: rapid.Uint32().Draw(t, "failures"),
		MaxConnections: rapid.Uint32().Draw(t, "max_connections"), MaxPending: rapid.Uint32().Draw(t, "max_pending"), MaxRetries: rapid.Uint32().Draw(t, "max_retries"),
		OpenFor: durations(t, "open_for"), Shed: rapid.SampledFrom([]uint32{0, 1, experiments.Buckets}).Draw(t, "shed"),
	}
	for i := range rapid.IntRange(0, 2).Draw(t, "pins") {
		v.Pins = append(v.Pins, fmt.Sprintf("session/v%d", 9-i))
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "endpoints") {
		host := rapid.SampledFrom([]string{"10.0.0.%d", "host-%d.example", "[2001:db8::%d]"}).Draw(t, "host")
		v.Endpoints = append(v.Endpoints, policy.Endpoint{
			Address:  fmt.Sprintf(host, i+1) + ":" + fmt.Sprint(rapid.IntRange(1, 65535).Draw(t, "port")),
			Region:   rapid.SampledFrom([]string{"", "eu", "us"}).Draw(t, "region"),
			Weight:   rapid.Uint32Range(1, policy.MaxWeight).Draw(t, "weight"),
			Priority: rapid.Uint32Range(0, 9).Draw(t, "priority"),
		})
	}
	v.TLS = transport(t, &v)
	return v
}

// transport is nil half of the time.
func transport(t *rapid.T, v *policy.Version) *policy.TLS {
	if !rapid.Bool().Draw(t, "tls") {
		return nil
	}
	out := &policy.TLS{
		ServerName: rapid.SampledFrom([]string{"", "api.example", "host-1.example"}).Draw(t, "server_name"),
		CA:         rapid.SampledFrom([]string{"", "corp"}).Draw(t, "ca"), ClientCert: rapid.SampledFrom([]string{"", "pod"}).Draw(t, "client_certificate"),
		SANs: rapid.SampledFrom([][]string{nil, {"host-1.example"}, {"b.example", "10.0.0.1"}, {"2001:db8::1"}}).Draw(t, "subject_names"),
		ALPN: rapid.SampledFrom([][]string{nil, {policy.ALPNHTTP2, policy.ALPNHTTP1}, {policy.ALPNHTTP1}}).Draw(t, "alpn"),
	}
	if out.Validate(v.Endpoints) != nil {
		out.ServerName = "api.example" // an endpoint's host is an IP address
	}
	return out
}

// arms cuts the buckets at random places and deals the pieces out; arms may stay empty.
func arms(t *rapid.T, versions []policy.Version) []policy.Arm {
	out := make([]policy.Arm, 0, 4)
	for _, name := range names(t, "arm", 1, 4, false) {
		out = append(out, policy.Arm{Name: name, Version: versions[rapid.IntRange(0, len(versions)-1).Draw(t, "arm_version")].Name})
		for _, s := range names(t, "setting", 0, 3, false) {
			a := &out[len(out)-1]
			a.Settings = append(a.Settings, policy.Setting{Name: s, JSON: rapid.SampledFrom([]string{"true", `"x"`, "1.5", `{"a":[1]}`}).Draw(t, "json")})
		}
	}
	cuts := rapid.SliceOfN(rapid.Uint32Range(1, experiments.Buckets-1), 0, 5).Draw(t, "cuts")
	cuts = append(cuts, 0, experiments.Buckets)
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	for i := range len(cuts) - 1 {
		a := &out[rapid.IntRange(0, len(out)-1).Draw(t, "owner")]
		a.Ranges = append(a.Ranges, experiments.Range{Start: cuts[i], End: cuts[i+1]})
	}
	return out
}

func durations(t *rapid.T, what string) time.Duration {
	return time.Duration(rapid.Int64Range(0, int64(policy.MaxDuration)).Draw(t, what))
}

func names(t *rapid.T, what string, least, most int, slash bool) []string {
	n := rapid.IntRange(least, most).Draw(t, what+"s")
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s%d", label(t, what, slash), i) // the index keeps them unique
	}
	return out
}

// label draws identifiers with the characters that break careless encodings.
func label(t *rapid.T, what string, slash bool) string {
	alphabet := []rune("abz-_.:%*ü \"\\")
	if slash {
		alphabet = append(alphabet, '/')
	}
	return rapid.StringOfN(rapid.RuneFrom(alphabet), 1, 8, 64).Draw(t, what)
}
