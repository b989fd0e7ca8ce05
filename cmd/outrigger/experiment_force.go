//go:build !dataplane

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
)

// experimentForce signs a grant. It needs no control plane, only the mesh's key: whoever
// may read that file may grant.
func experimentForce() *cobra.Command {
	var keyFile string
	var lasts time.Duration
	cmd := &cobra.Command{Use: "force NAME ARM", Short: "Print a header field that sends a tester's requests to an arm; they are no samples", Args: exactArgs("NAME", "ARM")}
	cmd.Flags().StringVar(&keyFile, "token-key-file", "", "the mesh's key (token.key in the control plane's data directory)")
	cmd.Flags().DurationVar(&lasts, "for", time.Hour, "how long it holds, at most 24h")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if keyFile == "" {
			return usageError{fmt.Errorf("--token-key-file is missing; the control plane keeps its key in token.key of its data directory")}
		}
		keys, err := identity.LoadKeys(keyFile)
		if err != nil {
			return err
		}
		now := time.Now()
		text, err := keys.SignGrant(identity.Grant{Experiment: args[0], Arm: args[1], Until: now.Add(lasts)}, now)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", inference.HeaderForce, text)
		return err
	}
	return cmd
}
