// Package rules decides which connections of a pod reach its sidecar: it turns a
// Config into a Ruleset, the tables, sets, chains and policy routes of the kernel, as a
// value. It touches nothing; proxy/intercept/netfilter installs what it returns, Text
// and JSON print it.
//
// The order of the rules is the contract. Outbound, for TCP of any process in the
// network namespace:
//
//  1. what the sidecar itself begins is left alone, told by user, group or socket mark;
//  2. the loopback ports listed are intercepted, although they are local: programs such
//     as snakepit dial localhost, and the sidecar serves these ports itself;
//  3. every other local destination is left alone;
//  4. excluded ports and prefixes are left alone, and everything outside the included
//     ports when there are any;
//  5. the rest goes to the outbound port.
//
// Inbound, for TCP that arrives on an interface other than lo for an address of this
// machine: excluded ports and sources, then the included ports, then the inbound port.
//
// Mode Redirect rewrites the destination (nat); the sidecar asks the kernel for the
// original one. Mode TProxy rewrites nothing (the accepted socket's local address is the
// original destination) but needs policy routes, and CAP_NET_ADMIN in the sidecar for
// IP_TRANSPARENT. One inet table covers IPv4 and IPv6.
//
// Both decide once for each connection, at its first packet. In mode Redirect that is how
// nat works; in mode TProxy the decision is kept as the connection's conntrack mark. The
// packets that follow cannot be told by their socket's user: one that is not accepted yet,
// and one that is closed but still sends, has none. So answers to connections that others
// began are left alone, whoever gives them, and so is what conntrack does not know: the
// connections that were there before the rules.
//
// A Config that would send the sidecar's own connections back to it is refused: one
// connection that loops becomes thousands within seconds.
package rules

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// Mode is how a connection is brought to the sidecar.
type Mode string

// The modes.
const (
	Redirect Mode = "redirect"
	TProxy   Mode = "tproxy"
)

// Limits of a Config. They keep one netlink batch well below the socket buffer.
const (
	MaxElements = 1024 // of each list
	maxName     = 32   // bytes of a table's name; the kernel takes 255
)

// Range is an inclusive range of ports.
type Range struct{ Lo, Hi uint16 }

// ParseRange reads "8080" or "8000-8999". Errors have kind Invalid.
func ParseRange(s string) (Range, error) {
	lo, hi, two := strings.Cut(s, "-")
	if !two {
		hi = lo
	}
	a, errA := strconv.ParseUint(lo, 10, 16)
	b, errB := strconv.ParseUint(hi, 10, 16)
	if errA != nil || errB != nil || a == 0 || b < a {
		return Range{}, outrigger.Errorf(outrigger.Invalid, "port %q: give a port 1..65535 or a range such as 8000-8999", s)
	}
	return Range{uint16(a), uint16(b)}, nil
}

// Config says what to intercept. The zero value intercepts nothing and is refused.
type Config struct {
	Table string // of nftables, default "outrigger"; all of it is ours
	Mode  Mode   // default Redirect

	// OutboundPort and InboundPort are where the sidecar listens; 0 = that direction is
	// left alone.
	OutboundPort, InboundPort uint16
	// LoopbackPorts are served by the sidecar: connections to them on 127.0.0.0/8 and ::1
	// are intercepted. They need OutboundPort.
	LoopbackPorts []uint16

	// UIDs, GIDs and Marks tell the sidecar's own sockets; outbound needs one of them.
	UIDs, GIDs, Marks []uint32

	OutboundSkipPorts []Range
	OutboundSkipNets  []netip.Prefix // destinations
	OutboundOnlyPorts []Range        // empty = all
	InboundSkipPorts  []Range
	InboundSkipNets   []netip.Prefix // sources
	InboundOnlyPorts  []Range        // empty = all

	NoIPv6 bool // leave IPv6 alone

	// RouteMark marks packets on their way to the sidecar and RouteTable is the policy
	// routing table they use, in mode TProxy; default 0x4f52 and 133. The conntrack mark of
	// intercepted connections is RouteMark too.
	RouteMark, RouteTable uint32
}

// Ruleset is what the kernel is to hold.
type Ruleset struct {
	Table  string
	Sets   []Set
	Chains []Chain
	Routes []Route
}

// Type is what the elements of a set are.
type Type string

// The types, named as nft names them.
const (
	TypePort Type = "inet_service"
	TypeUID  Type = "uid"
	TypeGID  Type = "gid"
	TypeMark Type = "mark"
	TypeIPv4 Type = "ipv4_addr"
	TypeIPv6 Type = "ipv6_addr"
)

// Set is a named set: Ports, Numbers or Nets is used, as Type says. Elements are sorted
// and do not overlap; sets of ports and prefixes are interval sets.
type Set struct {
	Name    string
	Type    Type
	Ports   []Range
	Numbers []uint32
	Nets    []netip.Prefix
}

// Interval reports whether the set holds ranges.
func (s Set) Interval() bool { return s.Type == TypePort || s.Type == TypeIPv4 || s.Type == TypeIPv6 }

// Chain is a base chain; its policy is accept.
type Chain struct {
	Name     string
	Kind     string // nat, route or filter
	Hook     string // output or prerouting
	Priority int32
	Rules    []Rule
}

// Rule is conditions, all of which must hold, and what then happens.
type Rule struct {
	If   []Match
	Then Verdict
}

// Field is what a Match looks at.
type Field string

// The fields.
const (
	Proto     Field = "proto"      // Number is the IP protocol
	Family    Field = "family"     // Number is 4 or 6
	Socket    Field = "uid"        // user of the sending socket, in Set
	Group     Field = "gid"        // its group, in Set
	Mark      Field = "mark"       // packet mark, in Set or equal to Number
	DstPort   Field = "dport"      // TCP, in Set
	DstIPv4   Field = "daddr4"     // in Set or Net
	DstIPv6   Field = "daddr6"     // in Set or Net
	SrcIPv4   Field = "saddr4"     // in Set
	SrcIPv6   Field = "saddr6"     // in Set
	DstLocal  Field = "dlocal"     // the destination is an address of this machine
	FromLocal Field = "iifname lo" // arrived on the loopback interface
	Answer    Field = "reply"      // goes back to who began the connection
	Known     Field = "ct mark"    // mark of the connection, equal to Number
	First     Field = "new"        // of a connection nobody has answered yet
)

// Match is one condition.
type Match struct {
	Field  Field
	Not    bool
	Set    string // name; "" = Number or Net
	Number uint32
	Net    netip.Prefix // of whole bytes
}

// Action is what a rule does.
type Action string

// The actions. ToMark also accepts, which ends the chain; ToKnown is ToMark for all that
// the connection sends from here on.
const (
	Return   Action = "return"
	ToPort   Action = "redirect"
	ToMark   Action = "mark"
	ToKnown  Action = "ct mark"
	ToSocket Action = "tproxy"
)

// Verdict is an action and its argument: a port, or a mark.
type Verdict struct {
	Do    Action
	Value uint32
}

// Route delivers marked packets of one family to this machine: a rule (fwmark → table)
// and a local default route in that table.
type Route struct {
	IPv6        bool
	Mark, Table uint32
	Priority    int // of the rule
}

// rulePriority is before the main table's 32766 and after the local table's 0.
const rulePriority = 1330

// Priorities as nft names them: dstnat and mangle.
const (
	dstnat = -100
	mangle = -150
)

// Build returns the Ruleset of c. Errors have kind Invalid and name the setting.
func Build(c Config) (Ruleset, error) {
	c.Table = cmp.Or(c.Table, "outrigger")
	c.Mode = cmp.Or(c.Mode, Redirect)
	c.RouteMark = cmp.Or(c.RouteMark, 0x4f52)
	c.RouteTable = cmp.Or(c.RouteTable, 133)
	if err := c.check(); err != nil {
		return Ruleset{}, err
	}
	b := &builder{c: c, r: Ruleset{Table: c.Table}}
	if c.OutboundPort != 0 {
		b.outbound()
	}
	if c.Mode == TProxy {
		b.divert()
		b.r.Routes = []Route{{Mark: c.RouteMark, Table: c.RouteTable, Priority: rulePriority}}
		if !c.NoIPv6 {
			b.r.Routes = append(b.r.Routes, Route{IPv6: true, Mark: c.RouteMark, Table: c.RouteTable, Priority: rulePriority})
		}
	} else if c.InboundPort != 0 {
		b.inboundRedirect()
	}
	return b.r, nil
}

func (c Config) check() error {
	bad := func(format string, args ...any) error { return outrigger.Errorf(outrigger.Invalid, format, args...) }
	switch {
	case !validName(c.Table):
		return bad("table %q: 1 to %d of a-z, 0-9, - and _, starting with a letter", c.Table, maxName)
	case c.Mode != Redirect && c.Mode != TProxy:
		return bad("mode %q; one of redirect, tproxy", c.Mode)
	case c.OutboundPort == 0 && c.InboundPort == 0:
		return bad("neither an outbound nor an inbound port is given; there is nothing to intercept")
	case c.OutboundPort == c.InboundPort:
		return bad("outbound and inbound port are both %d; the sidecar tells the directions by port", c.OutboundPort)
	case c.OutboundPort != 0 && len(c.UIDs)+len(c.GIDs)+len(c.Marks) == 0:
		return bad("outbound interception needs the sidecar's uid, gid or mark to leave alone; its own connections would be sent back to it")
	case c.OutboundPort == 0 && len(c.LoopbackPorts) > 0:
		return bad("loopback ports need an outbound port")
	case slices.Contains(c.LoopbackPorts, c.OutboundPort) && c.OutboundPort != 0, slices.Contains(c.LoopbackPorts, c.InboundPort) && c.InboundPort != 0:
		return bad("a loopback port is the sidecar's own interception port")
	case slices.Contains(c.LoopbackPorts, 0):
		return bad("loopback port 0; give 1..65535")
	case slices.Contains(c.Marks, c.RouteMark) && c.Mode == TProxy:
		return bad("mark %#x is both the sidecar's and the one of packets on their way to it", c.RouteMark)
	case slices.Contains(c.Marks, 0):
		return bad("mark 0 is what every unmarked packet has")
	}
	for name, n := range map[string]int{"loopback ports": len(c.LoopbackPorts), "uids": len(c.UIDs), "gids": len(c.GIDs), "marks": len(c.Marks),
		"excluded outbound ports": len(c.OutboundSkipPorts), "excluded outbound prefixes": len(c.OutboundSkipNets), "included outbound ports": len(c.OutboundOnlyPorts),
		"excluded inbound ports": len(c.InboundSkipPorts), "excluded inbound prefixes": len(c.InboundSkipNets), "included inbound ports": len(c.InboundOnlyPorts)} {
		if n > MaxElements {
			return bad("%d %s; at most %d", n, name, MaxElements)
		}
	}
	for _, p := range slices.Concat(c.OutboundSkipNets, c.InboundSkipNets) {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return bad("prefix %s: write 10.0.0.0/8 or fd00::/8, without ::ffff: and zones", p)
		}
	}
	return nil
}

func validName(s string) bool {
	if s == "" || len(s) > maxName || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
}
