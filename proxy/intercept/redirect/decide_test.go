package redirect

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// The whole table of what becomes of a connection.
func TestDecide(t *testing.T) {
	guard := upstream.NewGuard(upstream.GuardOptions{})
	app := netip.MustParseAddrPort("10.0.0.1:40000")
	ours := netip.MustParseAddrPort("10.0.0.1:40001")
	base := facts{own: []uint16{15001, 15006, 50051}, local: func(a netip.Addr) bool { return a == app.Addr() || a == netip.MustParseAddr("fd00::1") },
		mine:    func(from, _ netip.AddrPort) bool { return from == ours },
		allowed: guard.Check,
		routes:  []upstream.Rule{{Prefix: netip.MustParsePrefix("10.2.0.0/16"), Port: 8000}}}
	f := func(d Direction, from netip.AddrPort, to string, want action, why string) {
		t.Helper()
		dst := netip.AddrPort{}
		if to != "" {
			dst = netip.MustParseAddrPort(to)
		}
		got, reason := decide(d, from, dst, base)
		if got != want || !strings.Contains(reason, why) || (got == refuse) != (reason != "") {
			t.Errorf("%s to %s: %d %q, want %d %q", d, to, got, reason, want, why)
		}
	}
	f(Outbound, app, "93.184.216.34:443", pass, "")
	f(Outbound, app, "10.2.3.4:8000", look, "")
	f(Outbound, app, "10.2.3.4:8001", pass, "")
	f(Outbound, app, "127.0.0.1:6000", serve, "")
	f(Outbound, app, "[::1]:6000", serve, "")
	f(Inbound, app, "10.0.0.1:9000", pass, "")
	f(Inbound, app, "127.0.0.1:6000", refuse, "loopback")
	f(Outbound, app, "", refuse, "no destination")
	f(Outbound, app, "0.0.0.0:80", refuse, "no destination")
	f(Outbound, app, "10.9.9.9:0", refuse, "no destination")
	for _, to := range []string{"127.0.0.1:15001", "127.0.0.1:50051", "10.0.0.1:15001", "[fd00::1]:15006", "[::1]:15006"} {
		f(Outbound, app, to, refuse, "own listener")
	}
	f(Outbound, app, "10.2.3.4:15001", pass, "") // somebody else's port of that number
	f(Outbound, ours, "93.184.216.34:443", refuse, "do not leave out")
	f(Outbound, ours, "127.0.0.1:6000", refuse, "do not leave out")
	for _, to := range []string{"169.254.169.254:80", "169.254.170.2:80", "[fe80::1]:80", "[fd00:ec2::254]:80", "100.100.100.200:80", "[::ffff:169.254.169.254]:80", "224.0.0.1:80"} {
		f(Outbound, app, to, refuse, "refused")
	}
	base.allowed = func(netip.AddrPort) error { return errors.New("no") }
	f(Outbound, app, "93.184.216.34:443", refuse, "no")
	f(Outbound, app, "127.0.0.1:6000", serve, "")
}
