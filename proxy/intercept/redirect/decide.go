package redirect

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// Direction is which way an intercepted connection goes, as seen from the pod.
type Direction uint8

// The directions.
const (
	Outbound Direction = iota // a program of this pod dialled somebody
	Inbound                   // somebody dialled a program of this pod
)

// String returns a lower-case word.
func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// action is what becomes of a connection.
type action uint8

const (
	refuse action = iota // reset
	serve                // the sidecar is the server
	look                 // find out the protocol first
	pass                 // dial the original destination at once
)

// facts are what decide is given besides the connection.
type facts struct {
	own     []uint16 // ports of the sidecar's listeners
	local   func(netip.Addr) bool
	mine    func(from, to netip.AddrPort) bool // one of the sidecar's own connections
	allowed func(netip.AddrPort) error
	routes  []upstream.Rule
}

// decide says what becomes of a connection from one address to another, and why it is
// refused. The addresses are without ::ffff: mapping: compared with it, an address is
// not equal to itself, and a guard that did so once turned one connection into 3,336.
func decide(d Direction, from, to netip.AddrPort, f facts) (action, string) {
	a := to.Addr()
	switch {
	case !to.IsValid() || to.Port() == 0 || a.IsUnspecified():
		return refuse, "it has no destination"
	case slices.Contains(f.own, to.Port()) && (a.IsLoopback() || f.local(a)):
		return refuse, "its destination is the sidecar's own listener"
	case f.mine(from, to):
		return refuse, "it is the sidecar's own and was sent back: the interception rules do not leave out the sidecar's user, group or mark"
	case a.IsLoopback() && d == Outbound:
		return serve, "" // only loopback ports that were listed are redirected
	case a.IsLoopback():
		return refuse, "it claims to arrive from outside for a loopback address"
	}
	if err := f.allowed(to); err != nil {
		return refuse, fmt.Sprint(err)
	}
	if slices.ContainsFunc(f.routes, func(r upstream.Rule) bool { return r.Matches(to) }) {
		return look, ""
	}
	return pass, ""
}
