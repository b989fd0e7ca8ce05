//go:build dataplane

package main

import "github.com/spf13/cobra"

// addCommands gives the program what runs beside applications and nothing else: a sidecar
// per pod should not keep the control plane's storage and object stores in memory.
func addCommands(root *cobra.Command, g *globals) {
	root.Use, root.Short = "outrigger-dataplane", "Outrigger's sidecar and node agent"
	root.Long = `Outrigger-dataplane is what runs beside applications: the sidecar of every pod, the
agent of every node and what sets up redirection. It is the program outrigger without
control plane and operator's verbs, and takes the same flags, environment and file.

Settings come from flags, then OUTRIGGER_<SECTION>_<FLAG> in the environment, then the
file given by --config, then defaults; the first that has a value wins.`
	for _, c := range []*cobra.Command{nodeCommand(g), sidecarCommand(g), initCommand(g)} {
		c.GroupID = "run"
		root.AddCommand(c)
	}
	c := versionCommand(g)
	c.GroupID = "ops"
	root.AddCommand(c)
}
