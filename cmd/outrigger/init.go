package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/outrigger-mesh/outrigger/internal/config"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/netfilter"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

// initFlags are a rules.Config as flags.
type initFlags struct {
	table, mode                      string
	outbound, inbound                uint16
	loopback                         []uint
	uids, gids, marks                []uint
	skipOut, onlyOut, skipIn, onlyIn []string
	skipOutNets, skipInNets          []string
	ipv6, dryRun                     bool
	routeMark, routeTable            uint32

	g      *globals
	parent *cobra.Command // owns the flags
}

func initCommand(g *globals) *cobra.Command {
	i := &initFlags{g: g}
	cmd := &cobra.Command{Use: "init", Short: "Redirect a pod's connections to its sidecar", Args: exactArgs(),
		Long: `Init programs the kernel's packet filter (nftables, one inet table of its own) in the
current network namespace, so that TCP connections of unmodified programs reach the
sidecar's --intercept-outbound and --intercept-inbound ports. It needs CAP_NET_ADMIN and
no other program. It replaces what an earlier init installed in one transaction; running
it again changes nothing. Run it in an init container before the sidecar.

Name the user, group or socket mark of the sidecar: its own connections are left alone.
Exit codes: 0 done or in force, 1 failed, no privilege or not in force, 64 bad settings.`,
		Example: `  outrigger init --own-uids 1337 --loopback-ports 50051
  outrigger init --own-uids 1337 --dry-run
  outrigger init verify --own-uids 1337
  outrigger init uninstall`}
	i.parent = cmd
	i.flags(cmd.PersistentFlags())
	cmd.Flags().BoolVar(&i.dryRun, "dry-run", false, "print the rules (nft syntax, or nft's JSON with --output json) and install nothing")
	cmd.RunE = i.verb(true, i.install)
	verify := &cobra.Command{Use: "verify", Short: "Compare the kernel's rules with these settings", Args: exactArgs(), RunE: i.verb(true, i.verify)}
	remove := &cobra.Command{Use: "uninstall", Short: "Remove everything init has installed", Args: exactArgs(), RunE: i.verb(false, i.uninstall)}
	cmd.AddCommand(verify, remove, i.watchCommand())
	return cmd
}

func (i *initFlags) flags(f *pflag.FlagSet) {
	f.StringVar(&i.table, "table", "outrigger", "name of the nftables table; everything in it is replaced")
	f.StringVar(&i.mode, "mode", "redirect", "redirect (nat) or tproxy (no address is rewritten; the sidecar needs CAP_NET_ADMIN)")
	f.Uint16Var(&i.outbound, "outbound-port", 15001, "where the sidecar takes outgoing connections; 0 = leave them alone")
	f.Uint16Var(&i.inbound, "inbound-port", 0, "where the sidecar takes incoming connections; 0 = leave them alone")
	f.UintSliceVar(&i.loopback, "loopback-ports", nil, "ports on localhost that the sidecar serves itself")
	f.UintSliceVar(&i.uids, "own-uids", nil, "users the sidecar runs as; what they send is left alone")
	f.UintSliceVar(&i.gids, "own-gids", nil, "groups the sidecar runs as")
	f.UintSliceVar(&i.marks, "own-marks", nil, "socket marks of the sidecar (its --intercept-mark)")
	f.StringSliceVar(&i.skipOut, "exclude-outbound-ports", nil, "destination ports left alone, such as 25 or 9000-9100")
	f.StringSliceVar(&i.skipOutNets, "exclude-outbound-cidrs", nil, "destinations left alone, such as 10.0.0.0/8 or fd00::/8")
	f.StringSliceVar(&i.onlyOut, "include-outbound-ports", nil, "destination ports intercepted; empty = all")
	f.StringSliceVar(&i.skipIn, "exclude-inbound-ports", nil, "ports of this pod left alone")
	f.StringSliceVar(&i.skipInNets, "exclude-inbound-cidrs", nil, "sources left alone")
	f.StringSliceVar(&i.onlyIn, "include-inbound-ports", nil, "ports of this pod intercepted; empty = all")
	f.BoolVar(&i.ipv6, "ipv6", true, "intercept IPv6 as well as IPv4")
	f.Uint32Var(&i.routeMark, "route-mark", 0x4f52, "packet mark used by mode tproxy")
	f.Uint32Var(&i.routeTable, "route-table", 133, "policy routing table used by mode tproxy")
}

// verb applies the configuration, builds the rules and calls do. Without strict, as for
// uninstall, the rules need not make sense: only their names and numbers are used.
func (i *initFlags) verb(strict bool, do func(cmd *cobra.Command, r rules.Ruleset) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		fs := pflag.NewFlagSet("init", pflag.ContinueOnError)
		fs.AddFlagSet(i.parent.PersistentFlags())
		fs.AddFlagSet(i.parent.Flags())
		if err := (config.Source{Path: i.g.config, Environ: i.g.environ, Sections: sections}).Apply(fs, "init"); err != nil {
			return configError{err}
		}
		c, err := i.config()
		if err != nil {
			return configError{err}
		}
		if !strict {
			// Routes of either mode and family are looked for.
			c = rules.Config{Table: c.Table, Mode: rules.TProxy, InboundPort: 1, RouteMark: c.RouteMark, RouteTable: c.RouteTable}
		}
		r, err := rules.Build(c)
		if err != nil {
			return configError{err}
		}
		return do(cmd, r)
	}
}

func (i *initFlags) config() (c rules.Config, err error) {
	c = rules.Config{Table: i.table, Mode: rules.Mode(i.mode), OutboundPort: i.outbound, InboundPort: i.inbound, NoIPv6: !i.ipv6,
		RouteMark: i.routeMark, RouteTable: i.routeTable}
	numbers := func(flag string, in []uint) (out []uint32) {
		for _, v := range in {
			if v > 1<<32-1 {
				err = errors.Join(err, fmt.Errorf("--%s: %d is more than 32 bits", flag, v))
			}
			out = append(out, uint32(v))
		}
		return out
	}
	ports := func(flag string, in []string) (out []rules.Range) {
		for _, s := range in {
			r, perr := rules.ParseRange(s)
			if perr != nil {
				err = errors.Join(err, fmt.Errorf("--%s: %w", flag, perr))
			}
			out = append(out, r)
		}
		return out
	}
	c.UIDs, c.GIDs, c.Marks = numbers("own-uids", i.uids), numbers("own-gids", i.gids), numbers("own-marks", i.marks)
	for _, v := range i.loopback {
		if v == 0 || v > 65535 {
			err = errors.Join(err, fmt.Errorf("--loopback-ports: %d is not 1..65535", v))
		}
		c.LoopbackPorts = append(c.LoopbackPorts, uint16(v))
	}
	c.OutboundSkipPorts, c.OutboundOnlyPorts = ports("exclude-outbound-ports", i.skipOut), ports("include-outbound-ports", i.onlyOut)
	c.InboundSkipPorts, c.InboundOnlyPorts = ports("exclude-inbound-ports", i.skipIn), ports("include-inbound-ports", i.onlyIn)
	var errOut, errIn error
	c.OutboundSkipNets, errOut = prefixes("exclude-outbound-cidrs", i.skipOutNets)
	c.InboundSkipNets, errIn = prefixes("exclude-inbound-cidrs", i.skipInNets)
	return c, errors.Join(err, errOut, errIn)
}

// prefixes reads "10.0.0.0/8" and "10.1.2.3".
func prefixes(flag string, in []string) (out []netip.Prefix, err error) {
	for _, s := range in {
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
			continue
		}
		p, perr := netip.ParsePrefix(s)
		if perr != nil {
			err = errors.Join(err, fmt.Errorf("--%s: %q is neither an address nor a prefix such as 10.0.0.0/8", flag, s))
			continue
		}
		out = append(out, p)
	}
	return out, err
}

// report prints a result: v as JSON, or text.
func (i *initFlags) report(cmd *cobra.Command, v any, text string) error {
	if i.g.output == "json" {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), text)
	return err
}

func (i *initFlags) install(cmd *cobra.Command, r rules.Ruleset) error {
	if i.dryRun {
		out := []byte(r.Text())
		if i.g.output == "json" {
			var err error
			if out, err = r.JSON(); err != nil {
				return err
			}
		}
		_, err := cmd.OutOrStdout().Write(out)
		return err
	}
	if err := netfilter.Install(r); err != nil {
		return err
	}
	n := 0
	for _, c := range r.Chains {
		n += len(c.Rules)
	}
	return i.report(cmd, map[string]any{"installed": true, "table": r.Table, "mode": i.mode, "outbound_port": i.outbound, "inbound_port": i.inbound, "rules": n},
		fmt.Sprintf("installed table inet %s: mode %s, outbound port %d, inbound port %d, %d rules", r.Table, i.mode, i.outbound, i.inbound, n))
}

func (i *initFlags) verify(cmd *cobra.Command, r rules.Ruleset) error {
	diff, err := netfilter.Verify(r)
	if err != nil {
		return err
	}
	text := "table inet " + r.Table + " is in force as these settings say"
	if len(diff) > 0 {
		text = strings.Join(diff, "\n")
	}
	if err := i.report(cmd, map[string]any{"table": r.Table, "in_force": len(diff) == 0, "differences": append([]string{}, diff...)}, text); err != nil {
		return err
	}
	if len(diff) > 0 {
		return fmt.Errorf("the rules in force differ from these settings in %d places; run outrigger init to replace them", len(diff))
	}
	return nil
}

func (i *initFlags) uninstall(cmd *cobra.Command, r rules.Ruleset) error {
	found, err := netfilter.Uninstall(r)
	if err != nil {
		return err
	}
	text := "nothing was installed"
	if found {
		text = "removed table inet " + r.Table + " and its policy routes"
	}
	return i.report(cmd, map[string]any{"table": r.Table, "removed": found}, text)
}
