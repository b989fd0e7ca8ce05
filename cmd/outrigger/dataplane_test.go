//go:build !dataplane

package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// buildDataplane compiles the program that runs beside applications.
func buildDataplane(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	out, err := exec.Command("go", "build", "-tags", "dataplane", "-o", filepath.Join(dir, "outrigger-dataplane"), ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// TestDataplaneScripts runs testdata/dataplane/*.txtar with outrigger-dataplane as sidecars and
// node agents.
func TestDataplaneScripts(t *testing.T) {
	dir := buildDataplane(t)
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "dataplane"), UpdateScripts: *update, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("USER", "ada")
			e.Setenv("PATH", dir+string(filepath.ListSeparator)+e.Getenv("PATH"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"json": cmdJSON, "exits": cmdExits},
	})
}

// A pod does not pay for what only a control plane or an operator needs.
func TestDataplaneIsLean(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-tags", "dataplane", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	all, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"github.com/outrigger-mesh/outrigger/control", "github.com/cockroachdb/pebble", "github.com/aws/", "gocloud.dev", "github.com/openai/", "github.com/hashicorp/consul/"} {
		if strings.Contains(string(out), part) {
			t.Errorf("outrigger-dataplane contains %s", part)
		}
		if !strings.Contains(string(all), part) {
			t.Errorf("outrigger does not contain %s: this test looks for the wrong thing", part)
		}
	}
}
