//go:build !dataplane

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

var update = flag.Bool("update", false, "rewrite expected outputs in the scripts")

// TestMain makes this test binary stand in for the outrigger binary: scripts and the
// processes `up` starts run it under its own name.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"outrigger": func() { // as main
			variable.RegisterDeflate()
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			code := Main{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Environ: os.Environ()}.Run(ctx, os.Args[1:])
			stop()
			os.Exit(code)
		},
		"picky":      picky,
		"soak-model": soakModel,
	})
}

// TestScripts runs testdata/script/*.txtar: they are the manual of the command line, run.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"), UpdateScripts: *update, RequireUniqueNames: true,
		// [long] begins lines for the long slice.
		Condition: func(cond string) (bool, error) {
			if cond != "long" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return os.Getenv("OUTRIGGER_LONG") == "1", nil
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("USER", "ada")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"json": cmdJSON, "exits": cmdExits, "quiet": cmdQuiet},
	})
}
