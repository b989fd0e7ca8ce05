// Package netfilter puts a rules.Ruleset into the kernel of the current network
// namespace, compares the two, and takes it out again. It speaks netlink itself: no
// nft, iptables or ip program is needed, and neither are the xtables modules that newer
// kernels leave out.
//
// Promises. Install is one nftables transaction: the table of an earlier Install is
// replaced in it, so every connection sees either the old rules or the new ones, and a
// failure leaves the old ones. Policy routes (mode TProxy) are outside that transaction
// and come before it, when nothing carries their mark yet. Install twice is Install
// once. Uninstall leaves nothing: neither the table nor the policy routes; without
// anything installed it does nothing. Verify reads everything back and compares element
// by element. Connections that exist already are not touched by either.
//
// Whoever calls needs CAP_NET_ADMIN in the user namespace that owns the network
// namespace; without it the error has kind Denied and says so. Tables of others are
// never read beyond their names. Calls are synchronous and must run on a thread that is
// in the namespace meant; nothing is kept between them. Only on Linux.
package netfilter

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// Install makes r the rules in force. Errors have kind Denied without privilege and
// Unavailable when the kernel lacks something.
func Install(r rules.Ruleset) error {
	if err := addRoutes(r.Routes); err != nil {
		return explain("add policy routes", err)
	}
	c, err := nftables.New()
	if err != nil {
		return explain("open netlink", err)
	}
	t := c.AddTable(table(r.Table))
	c.DelTable(t) // succeeds because of the line before, whether there was one or not
	c.AddTable(t)
	for _, s := range r.Sets {
		if err := c.AddSet(set(t, s), elements(s)); err != nil {
			return explain("add set "+s.Name, err)
		}
	}
	for _, ch := range r.Chains {
		into := c.AddChain(chain(t, ch))
		for _, rule := range ch.Rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: into, Exprs: exprs(rule)})
		}
	}
	if err := c.Flush(); err != nil {
		return explain("install table inet "+r.Table, err)
	}
	return nil
}

// Uninstall removes the table and the policy routes of r; found says whether there was
// any of them.
func Uninstall(r rules.Ruleset) (found bool, err error) {
	c, err := nftables.New()
	if err != nil {
		return false, explain("open netlink", err)
	}
	t, err := lookup(c, r.Table)
	if err != nil {
		return false, explain("list tables", err)
	}
	if t != nil {
		c.DelTable(t)
		if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) { // somebody else was quicker
			return false, explain("delete table inet "+r.Table, err)
		}
	}
	routes, err := removeRoutes(r.Routes)
	if err != nil {
		return t != nil, explain("remove policy routes", err)
	}
	return t != nil || routes, nil
}

func table(name string) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
}

// lookup returns the table, nil if there is none.
func lookup(c *nftables.Conn, name string) (*nftables.Table, error) {
	all, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		if t.Name == name {
			return t, nil
		}
	}
	return nil, nil
}

// explain says what a person can do about err.
func explain(what string, err error) error {
	var no syscall.Errno
	if errors.As(err, &no) {
		switch no {
		case unix.EPERM, unix.EACCES:
			return outrigger.Wrap(outrigger.Denied, err, fmt.Sprintf("%s: CAP_NET_ADMIN is missing in this network namespace; run as root or grant the capability", what))
		case unix.ENOENT, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT:
			return outrigger.Wrap(outrigger.Unavailable, err, fmt.Sprintf("%s: this kernel lacks a part of nftables (nf_tables_inet, nft_redir, nft_fib, and nft_tproxy for mode tproxy)", what))
		}
	}
	return outrigger.Wrap(outrigger.Unavailable, err, what)
}
