package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func versionCommand(g *globals) *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version of this binary", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if g.output == "json" {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "{\"version\":%q}\n", buildVersion())
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "outrigger", buildVersion())
			return err
		}}
}
