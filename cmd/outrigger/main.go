// Command outrigger is the whole mesh in one binary: control plane, node agent,
// sidecar, a one-machine demonstration of all of them, and the operator's verbs.
//
// It is also the only place where parts are wired together and where processes,
// sockets, signals and exit codes are decided. Exit codes: 0 success, 1 failure, 2
// wrong usage, 64 bad configuration (nothing was bound), 69 a needed service is
// unreachable.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

func main() {
	variable.RegisterDeflate()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code := Main{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Environ: os.Environ()}.Run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// Main is one invocation of the program; tests run it with their own streams.
type Main struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Environ        []string // "KEY=value"
}

// Run executes the command line and returns the exit code. Errors go to Stderr.
func (m Main) Run(ctx context.Context, args []string) int {
	root := m.command()
	root.SetArgs(args)
	root.SetIn(m.Stdin)
	root.SetOut(m.Stdout)
	root.SetErr(m.Stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return status.ExitOK
	}
	var a answerError
	if errors.As(err, &a) {
		return status.ExitFailure
	}
	fmt.Fprintln(m.Stderr, "outrigger:", err)
	var u usageError
	var c configError
	switch {
	case errors.As(err, &u):
		return status.ExitUsage
	case errors.As(err, &c):
		return status.ExitConfig
	}
	return status.Exit(err)
}

// usageError is a mistake on the command line itself.
type usageError struct{ error }

// answerError is an answer of "no" that has been printed in full: exit code 1 without a word.
type answerError struct{}

func (answerError) Error() string { return "the answer is no" }

// configError is a bad setting from any source, found before anything was bound.
type configError struct{ error }

func (e usageError) Unwrap() error  { return e.error }
func (e configError) Unwrap() error { return e.error }

// sections are the parts of the configuration file, one per command that reads it.
var sections = []string{"control", "node", "sidecar", "init", "up", "client"}

// command builds the command tree anew, so that runs share no state.
func (m Main) command() *cobra.Command {
	g := &globals{environ: m.Environ}
	root := &cobra.Command{
		Use:   "outrigger",
		Short: "Coherent variables and safe model rollouts for LLM programs",
		Long: `Outrigger keeps the variables of LLM programs coherent across processes, nodes and
regions, and rolls model versions out and back by standard xDS, without a change to
the application.

Settings come from flags, then OUTRIGGER_<SECTION>_<FLAG> in the environment, then the
file given by --config, then defaults; the first that has a value wins.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(&g.config, "config", "", "configuration file (YAML, one mapping per section)")
	f.StringVarP(&g.output, "output", "o", "text", "output of verbs: text or json")
	f.StringVar(&g.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&g.logFormat, "log-format", "text", "text or json")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if g.output != "text" && g.output != "json" {
			return usageError{fmt.Errorf("--output is %q; one of text, json", g.output)}
		}
		return nil
	}
	root.AddGroup(&cobra.Group{ID: "run", Title: "Processes:"}, &cobra.Group{ID: "ops", Title: "Operator verbs:"})
	addCommands(root, g)
	return root
}

// globals are the flags every command has.
type globals struct {
	config, output      string
	logLevel, logFormat string
	environ             []string
}
