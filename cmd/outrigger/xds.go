//go:build !dataplane

package main

import (
	"cmp"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// xdsCommand is what concerns delivery of configuration, and clients that speak xDS
// themselves.
func xdsCommand(g *globals) *cobra.Command {
	cmd := group("xds", "What configuration is live where; Envoys and proxyless gRPC clients")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(xdsStatus(c), xdsConfig(c), xdsDiff(c), xdsPushLog(c), xdsExplain(c), xdsLoad(c), xdsCanary(c), xdsBootstrapCommand(c), xdsCapabilitiesCommand())
	return cmd
}

func xdsBootstrapCommand(c *clientFlags) *cobra.Command {
	var kind string
	var o translate.BootstrapOptions
	cmd := &cobra.Command{Use: "bootstrap", Short: "Print the file a client starts with", Args: exactArgs(),
		Long: `Bootstrap prints what envoy reads with --config-path, or what a gRPC client finds by
GRPC_XDS_BOOTSTRAP. It asks nobody; the control plane need not run.

With --control-ca (and --control-cert, --control-key) the client connects by TLS. The files are
named as they are given and read by the client, where it runs: gRPC clients look at them every
10 s, an Envoy reads them when it starts.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.tls != (dialTLS{}) {
				o.TLS = &translate.ControlTLS{CA: c.tls.ca, Cert: c.tls.cert, Key: c.tls.key, ServerName: c.tls.serverName}
			}
			if o.Node.ID == "" {
				host, err := os.Hostname()
				if err != nil {
					return err
				}
				o.Node.ID = host + "/" + kind
			}
			raw, err := translate.Bootstrap(translate.Kind(kind), o)
			if err != nil {
				return usageError{err}
			}
			_, err = cmd.OutOrStdout().Write(raw)
			return err
		}}
	f := cmd.Flags()
	f.StringVar(&kind, "kind", string(translate.KindEnvoy), "envoy or grpc")
	f.StringVar(&o.Control, "control", "127.0.0.1:7400", "the control plane's gRPC address; those of several replicas with commas")
	f.StringVar(&o.Node.ID, "node", "", "unique name that stays the same over restarts (default <host>/<kind>)")
	f.StringVar(&o.Node.Region, "region", "", "region of the client")
	f.StringVar(&o.Node.Zone, "zone", "", "zone of the client")
	f.StringVar(&o.Admin, "admin", "", "where an Envoy's admin interface listens, IP:port; empty = it has none")
	return cmd
}

func xdsCapabilitiesCommand() *cobra.Command {
	return &cobra.Command{Use: "capabilities", Short: "Print what each kind of client obeys of a policy", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, f := range translate.Features() {
				for _, kind := range translate.Kinds() {
					c := f.By[kind]
					if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%-38s %-8s %-12s %s\n", f.Name, kind, c.Support, cmp.Or(c.Note, "-")); err != nil {
						return err
					}
				}
			}
			return nil
		}}
}
