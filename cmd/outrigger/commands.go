//go:build !dataplane

package main

import "github.com/spf13/cobra"

// addCommands gives the program everything.
func addCommands(root *cobra.Command, g *globals) {
	for _, c := range []*cobra.Command{upCommand(g), controlCommand(g), nodeCommand(g), sidecarCommand(g), initCommand(g)} {
		c.GroupID = "run"
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{varCommand(g), sessionCommand(g), cacheCommand(g), modelCommand(g), experimentCommand(g), rolloutCommand(g), drillCommand(g), alertCommand(g), configCommand(g),
		topCommand(g), tapCommand(g), explainCommand(g), whyCommand(g),
		accessCommand(), certCommand(), regionCommand(g), xdsCommand(g), auditCommand(g), statusCommand(g), versionCommand(g), optimizeCommand(g), optimizerCommand(g)} {
		c.GroupID = "ops"
		root.AddCommand(c)
	}
	root.AddCommand(demoModelCommand(g), demoAppCommand(g), drillHostCommand(g))
}
