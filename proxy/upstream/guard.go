package upstream

import (
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// Rule matches destinations: every address of Prefix, on Port (0 = any port).
type Rule struct {
	Prefix netip.Prefix
	Port   uint16
}

// ParseRule reads "10.0.0.0/8", "10.1.2.3", "127.0.0.1:8000", "fd00::/8" or
// "[fd00::/8]:443". Errors have kind Invalid.
func ParseRule(s string) (Rule, error) {
	host, port := s, ""
	if rest, ok := strings.CutPrefix(s, "["); ok {
		var after string
		if host, after, ok = strings.Cut(rest, "]"); !ok {
			return Rule{}, outrigger.Errorf(outrigger.Invalid, "rule %q: ']' is missing", s)
		}
		if after != "" {
			if port, ok = strings.CutPrefix(after, ":"); !ok {
				return Rule{}, outrigger.Errorf(outrigger.Invalid, "rule %q: write [prefix]:port", s)
			}
		}
	} else if strings.Count(s, ":") == 1 {
		host, port, _ = strings.Cut(s, ":")
	}
	r := Rule{}
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Rule{}, outrigger.Errorf(outrigger.Invalid, "rule %q: port %q is not 1..65535", s, port)
		}
		r.Port = uint16(n)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		a = canonical(a)
		r.Prefix = netip.PrefixFrom(a, a.BitLen())
		return r, nil
	}
	p, err := netip.ParsePrefix(host)
	if err != nil {
		return Rule{}, outrigger.Errorf(outrigger.Invalid, "rule %q: %q is neither an address nor a prefix such as 10.0.0.0/8", s, host)
	}
	if p.Addr().Is4In6() {
		return Rule{}, outrigger.Errorf(outrigger.Invalid, "rule %q: write the IPv4 prefix without ::ffff:", s)
	}
	r.Prefix = p.Masked()
	return r, nil
}

// Matches reports whether r names d, which must be without ::ffff: mapping.
func (r Rule) Matches(d netip.AddrPort) bool {
	return (r.Port == 0 || r.Port == d.Port()) && r.Prefix.Contains(d.Addr())
}

// GuardOptions configure a Guard. The zero value refuses special addresses and allows
// the rest.
type GuardOptions struct {
	// Own are the sidecar's listeners. Their ports are refused on the listener's
	// address, or on every local address if it is unspecified. Nothing allows them.
	Own []netip.AddrPort
	// Local are this machine's addresses besides loopback; needed to recognise an own
	// listener bound to the unspecified address.
	Local []netip.Addr
	// Allow overrides Deny and the built-in refusals.
	Allow []Rule
	// Deny refuses more than the built-in list.
	Deny []Rule
	// AllowListed refuses everything that Allow does not name (explicit-proxy mode).
	AllowListed bool
	// Sockets is told of every connection GuardedDial opens; nil = nobody is.
	Sockets *Sockets
	// Mark is put on every socket GuardedDial opens (SO_MARK, which takes CAP_NET_ADMIN;
	// without it dials fail); 0 = none.
	Mark uint32
}

// Guard decides which destinations may be dialled. A nil Guard allows everything. It
// is immutable and safe for concurrent use.
type Guard struct {
	o     GuardOptions
	local map[netip.Addr]bool
}

// NewGuard copies the options into a Guard.
func NewGuard(o GuardOptions) *Guard {
	g := &Guard{o: o, local: make(map[netip.Addr]bool, len(o.Local))}
	g.o.Own = make([]netip.AddrPort, len(o.Own))
	for i, own := range o.Own {
		g.o.Own[i] = netip.AddrPortFrom(canonical(own.Addr()), own.Port())
	}
	g.o.Allow = append([]Rule(nil), o.Allow...)
	g.o.Deny = append([]Rule(nil), o.Deny...)
	for _, a := range o.Local {
		g.local[canonical(a)] = true
	}
	return g
}

// refused are never legitimate destinations of an application, or give away
// credentials of the machine: link-local holds 169.254.169.254 (AWS, GCP, Azure) and
// 169.254.170.2 (ECS); the single addresses are the metadata services that sit
// elsewhere.
var refused = [...]struct {
	prefix netip.Prefix
	why    string
}{
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local (metadata)"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fd00:ec2::/32"), "metadata (AWS)"},
	{netip.MustParsePrefix("fd20:ce::254/128"), "metadata (GCP)"},
	{netip.MustParsePrefix("100.100.100.200/32"), "metadata (Alibaba)"},
	{netip.MustParsePrefix("168.63.129.16/32"), "metadata (Azure)"},
	{netip.MustParsePrefix("192.0.0.192/32"), "metadata (Oracle)"},
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
}

// embedded are the IPv6 prefixes whose last 32 bits are an IPv4 address that a gateway
// or the kernel would go on to: NAT64 (RFC 6052) and the deprecated IPv4-compatible form.
var embedded = [...]netip.Prefix{netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("::/96")}

// canonical strips what makes one address look like two: ::ffff:a.b.c.d and zones. A
// guard that compared without it once let a proxy dial itself until it ran out of
// file descriptors.
func canonical(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// effective resolves embedded IPv4 addresses.
func effective(a netip.Addr) netip.Addr {
	a = canonical(a)
	if !a.Is6() || a.IsUnspecified() || a.IsLoopback() {
		return a
	}
	for _, p := range embedded {
		if p.Contains(a) {
			b := a.As16()
			return netip.AddrFrom4([4]byte(b[12:]))
		}
	}
	return a
}

// Check returns nil if d may be dialled, else an error of kind Denied that says why.
func (g *Guard) Check(d netip.AddrPort) error {
	if g == nil {
		return nil
	}
	if !d.IsValid() || d.Port() == 0 {
		return outrigger.Errorf(outrigger.Denied, "destination %s is not an address and port", d)
	}
	d = netip.AddrPortFrom(effective(d.Addr()), d.Port())
	for _, own := range g.o.Own {
		if g.isOwn(own, d) {
			return outrigger.Errorf(outrigger.Denied, "destination %s is the sidecar's own listener; a request there would loop", d)
		}
	}
	for _, r := range g.o.Allow {
		if r.Matches(d) {
			return nil
		}
	}
	if g.o.AllowListed {
		return outrigger.Errorf(outrigger.Denied, "destination %s is not on the allow list", d)
	}
	for _, r := range g.o.Deny {
		if r.Matches(d) {
			return outrigger.Errorf(outrigger.Denied, "destination %s is denied by rule %s port %d", d, r.Prefix, r.Port)
		}
	}
	for _, r := range refused {
		if r.prefix.Contains(d.Addr()) {
			return outrigger.Errorf(outrigger.Denied, "destination %s is refused: %s; allow it by rule if it is meant", d, r.why)
		}
	}
	return nil
}

func (g *Guard) isOwn(own, d netip.AddrPort) bool {
	if own.Port() != d.Port() {
		return false
	}
	a := d.Addr()
	if own.Addr() == a {
		return true
	}
	// The unspecified address listens on, and as a destination means, this machine.
	here := a.IsLoopback() || a.IsUnspecified() || g.local[a]
	return here && (own.Addr().IsUnspecified() || a.IsUnspecified())
}

// checkText applies Check to "host:port" when host is a literal address; names are
// checked after resolution, at dial time.
func (g *Guard) checkText(address string) error {
	if g == nil {
		return nil
	}
	d, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil
	}
	return g.Check(d)
}

// checkConn applies Check to the peer of an established connection, for dialers that
// resolve names themselves. A peer without an IP address (in-memory, Unix socket) has
// no special addresses to protect.
func (g *Guard) checkConn(c net.Conn) error {
	if g == nil {
		return nil
	}
	t, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return nil
	}
	return g.Check(t.AddrPort())
}
