package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/proxyproto"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/redirect"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// interceptFlags are the sidecar's side of `outrigger init`.
type interceptFlags struct {
	outbound, inbound string
	transparent       bool
	routes, allow     []string
	names             map[string]string
	proxyFrom         []string
	proxyOut          string
	idle              time.Duration
	maxConns          int
	mark              uint32

	o proxy.Interception // what validate made of them
}

func (i *interceptFlags) flags(f *pflag.FlagSet) {
	f.StringVar(&i.outbound, "intercept-outbound", "", "where redirected outgoing connections arrive (init --outbound-port), such as :15001; empty = none")
	f.StringVar(&i.inbound, "intercept-inbound", "", "where redirected incoming connections arrive (init --inbound-port), such as :15006; empty = none")
	f.BoolVar(&i.transparent, "intercept-transparent", false, "they arrive by init --mode tproxy; needs CAP_NET_ADMIN")
	f.StringSliceVar(&i.routes, "intercept-routes", nil, "destinations that carry model or variable traffic, whose HTTP is served by policy: 8000, 10.0.0.0/8 or 10.1.2.3:8000")
	f.StringToStringVar(&i.names, "intercept-names", nil, "TLS server names at those destinations that go elsewhere: api.example.com=10.1.2.3:443 or *.example.com=…")
	f.StringSliceVar(&i.allow, "intercept-allow", nil, "link-local or metadata destinations that may be dialled nevertheless")
	f.StringSliceVar(&i.proxyFrom, "proxy-protocol-from", nil, "peers whose incoming connections begin with a PROXY header")
	f.StringVar(&i.proxyOut, "proxy-protocol-to-app", "", "put a PROXY header before incoming connections: v1 or v2; empty = none")
	f.DurationVar(&i.idle, "intercept-idle", time.Hour, "silence after which a passed-on connection ends")
	f.IntVar(&i.maxConns, "intercept-max-connections", 16384, "redirected connections at once; more wait")
	f.Uint32Var(&i.mark, "intercept-mark", 0, "mark put on the sidecar's own sockets (init --own-marks); needs CAP_NET_ADMIN; 0 = none")
}

func (i *interceptFlags) validate() error {
	var errs []error
	wrap := func(flag string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
		}
	}
	o := &i.o
	*o = proxy.Interception{Transparent: i.transparent, Idle: i.idle, MaxConns: i.maxConns, Mark: i.mark, Sockets: new(upstream.Sockets)}
	for _, s := range i.routes {
		r, err := routeRules(s)
		wrap("intercept-routes", err)
		o.Routes = append(o.Routes, r...)
	}
	for _, s := range i.allow {
		r, err := upstream.ParseRule(s)
		wrap("intercept-allow", err)
		o.Allow = append(o.Allow, r)
	}
	for name, to := range i.names {
		a, err := netip.ParseAddrPort(to)
		wrap("intercept-names", err)
		o.Names = append(o.Names, redirect.Name{Pattern: strings.ToLower(name), To: a})
	}
	var err error
	o.ProxyFrom, err = prefixes("proxy-protocol-from", i.proxyFrom)
	errs = append(errs, err)
	switch i.proxyOut {
	case "":
	case "v1":
		o.ProxyOut = proxyproto.V1
	case "v2":
		o.ProxyOut = proxyproto.V2
	default:
		wrap("proxy-protocol-to-app", fmt.Errorf("%q; one of v1, v2", i.proxyOut))
	}
	if i.idle <= 0 || i.maxConns <= 0 {
		wrap("intercept-idle", errors.New("it and --intercept-max-connections must be more than 0"))
	}
	return errors.Join(errs...)
}

// routeRules reads a rule; a bare port means that port everywhere.
func routeRules(s string) ([]upstream.Rule, error) {
	if !strings.ContainsAny(s, ".:/") {
		v4, err := upstream.ParseRule("0.0.0.0/0:" + s)
		return []upstream.Rule{v4, {Prefix: netip.MustParsePrefix("::/0"), Port: v4.Port}}, err
	}
	r, err := upstream.ParseRule(s)
	return []upstream.Rule{r}, err
}

// listen binds the interception listeners. taken is nil if there are none; own are their
// addresses.
func (i *interceptFlags) listen(p *process) (taken *proxy.Interception, own []netip.AddrPort, err error) {
	if i.outbound == "" && i.inbound == "" {
		return nil, nil, nil
	}
	lc := net.ListenConfig{}
	// Go listens for multipath TCP, whose sockets do not know the original destination.
	lc.SetMultipathTCP(false)
	if i.transparent {
		lc.Control = redirect.Transparent
	}
	for _, d := range []struct {
		name, address string
		to            **net.TCPListener
	}{{"intercept-outbound", i.outbound, &i.o.Outbound}, {"intercept-inbound", i.inbound, &i.o.Inbound}} {
		if d.address == "" {
			continue
		}
		l, err := p.inherited.take(d.name, d.address)
		if l == nil && err == nil {
			l, err = lc.Listen(p.ctx, "tcp", d.address)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("sidecar: --%s: %w", d.name, err)
		}
		p.bound[d.name] = l.Addr().String()
		*d.to = l.(*net.TCPListener)
		own = append(own, ownListeners(l)...)
	}
	// The sidecar's own connections to the mesh are known like those it passes on.
	dial := upstream.GuardedDial(nil, upstream.NewGuard(upstream.GuardOptions{Sockets: i.o.Sockets, Mark: i.mark,
		Allow: []upstream.Rule{{Prefix: netip.MustParsePrefix("0.0.0.0/0")}, {Prefix: netip.MustParsePrefix("::/0")}}}), 5*time.Second)
	p.dialTCP = func(ctx context.Context, address string) (net.Conn, error) { return dial(ctx, "tcp", address) }
	return &i.o, own, nil
}
