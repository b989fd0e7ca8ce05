package netfilter

import (
	"errors"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// fullMask compares every bit of a mark.
const fullMask = 0xffffffff

func rule(r rules.Route) *netlink.Rule {
	out := netlink.NewRule()
	out.Family, out.Mark, out.Table, out.Priority = unix.AF_INET, r.Mark, int(r.Table), r.Priority
	if r.IPv6 {
		out.Family = unix.AF_INET6
	}
	mask := uint32(fullMask)
	out.Mask = &mask
	return out
}

// route is `local default dev lo` in the table of r.
func route(r rules.Route) (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if r.IPv6 {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: all, Table: int(r.Table), Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}, nil
}

func addRoutes(all []rules.Route) error {
	for _, r := range all {
		have, err := hasRule(r)
		if err != nil {
			return err
		}
		if !have {
			if err := netlink.RuleAdd(rule(r)); err != nil {
				return err
			}
		}
		rt, err := route(r)
		if err != nil {
			return err
		}
		if err := netlink.RouteReplace(rt); err != nil {
			return err
		}
	}
	return nil
}

func removeRoutes(all []rules.Route) (found bool, err error) {
	for _, r := range all {
		have, err := hasRule(r)
		if err != nil {
			return found, err
		}
		if have {
			found = true
			if err := netlink.RuleDel(rule(r)); err != nil && !errors.Is(err, unix.ENOENT) {
				return found, err
			}
		}
		rt, err := route(r)
		if err != nil {
			return found, err
		}
		switch err := netlink.RouteDel(rt); {
		case err == nil:
			found = true
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.ENODEV):
		default:
			return found, err
		}
	}
	return found, nil
}

func hasRule(r rules.Route) (bool, error) {
	want := rule(r)
	all, err := netlink.RuleList(want.Family)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(all, func(h netlink.Rule) bool {
		return h.Mark == want.Mark && h.Table == want.Table && h.Priority == want.Priority
	}), nil
}

func hasRoute(r rules.Route) (bool, error) {
	want, err := route(r)
	if err != nil {
		return false, err
	}
	f := unix.AF_INET
	if r.IPv6 {
		f = unix.AF_INET6
	}
	all, err := netlink.RouteListFiltered(f, &netlink.Route{Table: want.Table}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(all, func(h netlink.Route) bool {
		ones := 0
		if h.Dst != nil {
			ones, _ = h.Dst.Mask.Size()
		}
		return h.Type == want.Type && h.LinkIndex == want.LinkIndex && ones == 0
	}), nil
}
