package netfilter

import (
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/netnstest"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// full uses every kind of set, match and verdict there is.
func full(mode rules.Mode) rules.Config {
	return rules.Config{Mode: mode, OutboundPort: 15001, InboundPort: 15006, LoopbackPorts: []uint16{50051, 8080},
		UIDs: []uint32{1337}, GIDs: []uint32{1337}, Marks: []uint32{0x4f},
		OutboundSkipPorts: []rules.Range{{Lo: 25, Hi: 25}, {Lo: 9000, Hi: 65535}},
		OutboundSkipNets: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/25"), netip.MustParsePrefix("10.1.0.128/25"),
			netip.MustParsePrefix("255.0.0.0/8"), netip.MustParsePrefix("fd01::/64")},
		OutboundOnlyPorts: []rules.Range{{Lo: 1, Hi: 8999}},
		InboundSkipPorts:  []rules.Range{{Lo: 22, Hi: 22}}, InboundSkipNets: []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("fe80::/10")},
		InboundOnlyPorts: []rules.Range{{Lo: 80, Hi: 90}}}
}

func build(t *testing.T, c rules.Config) rules.Ruleset {
	t.Helper()
	r, err := rules.Build(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Every kind of rule installs, reads back as written, replaces an older installation,
// and leaves nothing behind.
func TestLifecycle(t *testing.T) {
	for _, mode := range []rules.Mode{rules.Redirect, rules.TProxy} {
		t.Run(string(mode), func(t *testing.T) {
			ns := netnstest.New(t)
			small := build(t, rules.Config{OutboundPort: 1, UIDs: []uint32{1}})
			r := build(t, full(mode))
			ns.Do(func() {
				if diff, err := Verify(r); err != nil || len(diff) != 1 || !strings.Contains(diff[0], "not installed") {
					t.Errorf("before: %q, %v", diff, err)
				}
				if found, err := Uninstall(r); found || err != nil {
					t.Errorf("uninstall of nothing: %v, %v", found, err)
				}
				for _, step := range []rules.Ruleset{small, r, r} { // installed, replaced, repeated
					if err := Install(step); err != nil {
						t.Errorf("install: %v", err)
						return
					}
					if diff, err := Verify(step); err != nil || len(diff) > 0 {
						t.Errorf("differences after install: %q, %v", diff, err)
					}
				}
				if diff, err := Verify(small); err != nil || len(diff) == 0 {
					t.Errorf("verify does not tell one installation from another: %v", err)
				}
				if found, err := Uninstall(r); !found || err != nil {
					t.Errorf("uninstall: %v, %v", found, err)
				}
				nothingLeft(t, r)
			})
		})
	}
}

// nothingLeft runs in the namespace.
func nothingLeft(t *testing.T, r rules.Ruleset) {
	c, err := nftables.New()
	if err != nil {
		t.Error(err)
		return
	}
	if tables, err := c.ListTables(); err != nil || len(tables) > 0 {
		t.Errorf("tables left: %v, %v", tables, err)
	}
	for _, p := range r.Routes {
		rule, err1 := hasRule(p)
		route, err2 := hasRoute(p)
		if rule || route || err1 != nil || err2 != nil {
			t.Errorf("policy routes left: rule %v, route %v, %v, %v", rule, route, err1, err2)
		}
	}
}

// Verify names what somebody else changed.
func TestVerifyFindsTampering(t *testing.T) {
	f := func(name, want string, tamper func(c *nftables.Conn, tab *nftables.Table)) {
		t.Run(name, func(t *testing.T) {
			ns := netnstest.New(t)
			r := build(t, full(rules.Redirect))
			ns.Do(func() {
				if err := Install(r); err != nil {
					t.Error(err)
					return
				}
				c, err := nftables.New()
				if err != nil {
					t.Error(err)
					return
				}
				tamper(c, table(r.Table))
				if err := c.Flush(); err != nil {
					t.Error(err)
				}
				if diff, err := Verify(r); err != nil || !slices.ContainsFunc(diff, func(s string) bool { return strings.Contains(s, want) }) {
					t.Errorf("got %q, %v; want %q", diff, err, want)
				}
			})
		})
	}
	f("a rule more", "chain outbound has 13 rules, want 12", func(c *nftables.Conn, tab *nftables.Table) {
		c.InsertRule(&nftables.Rule{Table: tab, Chain: &nftables.Chain{Table: tab, Name: "outbound"}, Exprs: exprs(rules.Rule{Then: rules.Verdict{Do: rules.Return}})})
	})
	f("rules gone", "chain outbound has 0 rules", func(c *nftables.Conn, tab *nftables.Table) {
		c.FlushChain(&nftables.Chain{Table: tab, Name: "outbound"})
	})
	f("an element gone", "set own_uids holds other elements", func(c *nftables.Conn, tab *nftables.Table) {
		c.FlushSet(&nftables.Set{Table: tab, Name: "own_uids"})
	})
	f("a chain more", "chain extra is not ours", func(c *nftables.Conn, tab *nftables.Table) {
		c.AddChain(&nftables.Chain{Table: tab, Name: "extra"})
	})
}

// Another table is neither read nor removed.
func TestOthersStay(t *testing.T) {
	ns := netnstest.New(t)
	r := build(t, full(rules.Redirect))
	ns.Do(func() {
		c, err := nftables.New()
		if err != nil {
			t.Error(err)
			return
		}
		c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "theirs"})
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
		if err := Install(r); err != nil {
			t.Error(err)
		}
		if _, err := Uninstall(r); err != nil {
			t.Error(err)
		}
		if tables, err := c.ListTables(); err != nil || len(tables) != 1 || tables[0].Name != "theirs" {
			t.Errorf("tables: %v, %v", tables, err)
		}
	})
}

// What the kernel holds after Install is what nft makes of Text and of JSON: the same
// listing, whichever way it came in.
func TestAgreesWithNft(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		if nft, err = exec.LookPath("/usr/sbin/nft"); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal("nft is not installed")
			}
			t.Skip("skipped: nft is not installed; `make deps` installs it")
		}
	}
	for _, mode := range []rules.Mode{rules.Redirect, rules.TProxy} {
		t.Run(string(mode), func(t *testing.T) {
			r := build(t, full(mode))
			text := r.Text()
			raw, err := r.JSON()
			if err != nil || !json.Valid(raw) {
				t.Fatal(err)
			}
			listing := func(load func() error) string {
				ns := netnstest.New(t)
				var out []byte
				ns.Do(func() {
					if err := load(); err != nil {
						t.Errorf("load: %v", err)
						return
					}
					out, err = exec.Command(nft, "list", "ruleset").CombinedOutput()
				})
				if err != nil {
					t.Fatalf("nft list: %v\n%s", err, out)
				}
				return string(out)
			}
			pipe := func(in string, args ...string) func() error {
				return func() error {
					cmd := exec.Command(nft, append(args, "-f", "-")...)
					cmd.Stdin = strings.NewReader(in)
					out, err := cmd.CombinedOutput()
					if err != nil {
						t.Errorf("%s", out)
					}
					return err
				}
			}
			ours := listing(func() error { return Install(r) })
			if theirs := listing(pipe(text)); ours != theirs {
				t.Errorf("installed:\n%s\nfrom text:\n%s", ours, theirs)
			}
			if theirs := listing(pipe(string(raw), "-j")); ours != theirs {
				t.Errorf("installed:\n%s\nfrom JSON:\n%s", ours, theirs)
			}
		})
	}
}

// Without the capability the error says which one is missing.
func TestNoPrivilege(t *testing.T) {
	for _, mode := range []rules.Mode{rules.Redirect, rules.TProxy} {
		netnstest.New(t).Unprivileged(func() {
			err := Install(build(t, full(mode)))
			if !outrigger.IsKind(err, outrigger.Denied) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
				t.Errorf("%s: got %v", mode, err)
			}
		})
	}
}
