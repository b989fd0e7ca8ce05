package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

func rules(t *testing.T, texts ...string) []Rule {
	t.Helper()
	var out []Rule
	for _, s := range texts {
		r, err := ParseRule(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

func TestGuard(t *testing.T) {
	own := []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001"), netip.MustParseAddrPort("127.0.0.1:15000"), netip.MustParseAddrPort("[::ffff:10.77.0.2]:15006")}
	local := []netip.Addr{netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("fd00::2")}
	plain := NewGuard(GuardOptions{Own: own, Local: local})
	ruled := NewGuard(GuardOptions{Own: own, Local: local, Allow: rules(t, "127.0.0.1:8000", "169.254.10.0/24", "127.0.0.1:15001"), Deny: rules(t, "10.9.0.0/16", "[fd99::/16]:443")})
	listed := NewGuard(GuardOptions{Allow: rules(t, "203.0.113.0/24"), AllowListed: true})
	tests := []struct {
		name  string
		guard *Guard
		to    string
		ok    bool
	}{
		{"public", plain, "203.0.113.9:443", true},
		{"private", plain, "10.1.2.3:80", true},
		{"public IPv6", plain, "[2001:db8::1]:80", true},
		{"nil guard", nil, "127.0.0.1:80", true},
		{"loopback", plain, "127.0.0.1:8000", false},
		{"loopback, other", plain, "127.8.8.8:8000", false},
		{"loopback IPv6", plain, "[::1]:8000", false},
		{"loopback, mapped", plain, "[::ffff:127.0.0.1]:8000", false},
		{"metadata", plain, "169.254.169.254:80", false},
		{"metadata, mapped", plain, "[::ffff:169.254.169.254]:80", false},
		{"metadata through NAT64", plain, "[64:ff9b::169.254.169.254]:80", false},
		{"metadata, IPv4-compatible", plain, "[::169.254.169.254]:80", false},
		{"ECS credentials", plain, "169.254.170.2:80", false},
		{"AWS over IPv6", plain, "[fd00:ec2::254]:80", false},
		{"Alibaba", plain, "100.100.100.200:80", false},
		{"Azure", plain, "168.63.129.16:80", false},
		{"link-local IPv6 with zone", plain, "[fe80::1%eth0]:80", false},
		{"unspecified", plain, "0.0.0.0:80", false},
		{"unspecified IPv6", plain, "[::]:80", false},
		{"multicast", plain, "224.0.0.1:80", false},
		{"port 0", plain, "203.0.113.9:0", false},
		{"own listener by its address", plain, "127.0.0.1:15000", false},
		{"own listener, mapped text", plain, "[::ffff:10.77.0.2]:15006", false},
		{"own listener, unmapped", plain, "10.77.0.2:15006", false},
		{"wildcard listener at a local address", plain, "10.77.0.2:15001", false},
		{"wildcard listener at a local IPv6 address", plain, "[fd00::2]:15001", false},
		{"same port elsewhere", plain, "10.77.0.3:15001", true},
		{"local address, other port", plain, "10.77.0.2:9090", true},
		{"allowed loopback port", ruled, "127.0.0.1:8000", true},
		{"loopback beside it", ruled, "127.0.0.1:8001", false},
		{"allowed link-local prefix", ruled, "169.254.10.9:80", true},
		{"own listener cannot be allowed", ruled, "127.0.0.1:15001", false},
		{"denied by rule", ruled, "10.9.1.1:80", false},
		{"denied port", ruled, "[fd99::5]:443", false},
		{"other port of that prefix", ruled, "[fd99::5]:80", true},
		{"listed", listed, "203.0.113.9:443", true},
		{"not listed", listed, "198.51.100.1:443", false},
	}
	for _, tt := range tests {
		err := tt.guard.Check(netip.MustParseAddrPort(tt.to))
		if (err == nil) != tt.ok {
			t.Errorf("%s: %s gives %v, want ok=%v", tt.name, tt.to, err, tt.ok)
		}
		if err != nil && !outrigger.IsKind(err, outrigger.Denied) {
			t.Errorf("%s: kind %v", tt.name, outrigger.KindOf(err))
		}
	}
}

func TestParseRule(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.0/8": "10.0.0.0/8 0", "10.1.2.3": "10.1.2.3/32 0", "10.1.2.3:80": "10.1.2.3/32 80", "10.1.0.0/16:443": "10.1.0.0/16 443",
		"fd00::/8": "fd00::/8 0", "[fd00::/8]:443": "fd00::/8 443", "[::1]": "::1/128 0", "::ffff:10.0.0.1": "10.0.0.1/32 0", "10.1.2.3/8": "10.0.0.0/8 0",
	} {
		r, err := ParseRule(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		port := "0"
		if r.Port > 0 {
			port = map[uint16]string{80: "80", 443: "443"}[r.Port]
		}
		if got := r.Prefix.String() + " " + port; got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	for _, in := range []string{"", "host", "10.0.0.0/33", "10.0.0.1:0", "10.0.0.1:70000", "[fd00::/8", "[fd00::/8]443", "::ffff:10.0.0.0/104"} {
		if r, err := ParseRule(in); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%q: %v %v, want invalid", in, r, err)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	f.Add("10.0.0.0/8:80")
	f.Add("[fd00::/8]:1")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err == nil && (!r.Prefix.IsValid() || !r.Matches(netip.AddrPortFrom(r.Prefix.Addr(), max(r.Port, 1)))) {
			t.Fatalf("%q gives %+v, which does not match its own address", s, r)
		}
	})
}

// The built-in dialer checks the resolved address before connecting: the listener sees
// nothing. An injected dialer's literal addresses are checked before, its peers after.
func TestGuardedDial(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, address := range []string{l.Addr().String(), "localhost:" + port} {
		_, err := GuardedDial(nil, NewGuard(GuardOptions{}), time.Second)(t.Context(), "tcp", address)
		if !outrigger.IsKind(err, outrigger.Denied) {
			t.Errorf("%s: %v, want denied", address, err)
		}
	}
	accepted := make(chan struct{})
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
		}
		close(accepted)
	}()
	select {
	case <-accepted:
		t.Error("a refused dial reached the listener")
	default:
	}

	called := 0
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		called++
		var d net.Dialer
		return d.DialContext(ctx, network, l.Addr().String()) // as a rebound name would
	}
	guarded := GuardedDial(dial, NewGuard(GuardOptions{}), time.Second)
	if _, err := guarded(t.Context(), "tcp", "169.254.169.254:80"); !outrigger.IsKind(err, outrigger.Denied) || called != 0 {
		t.Errorf("literal: %v after %d dials", err, called)
	}
	if _, err := guarded(t.Context(), "tcp", "innocent.example:80"); !outrigger.IsKind(err, outrigger.Denied) || called != 1 {
		t.Errorf("rebound name: %v after %d dials", err, called)
	}
	slow := func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	if _, err := GuardedDial(slow, nil, time.Millisecond)(t.Context(), "tcp", "a:1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("slow dial: %v", err)
	}
}
