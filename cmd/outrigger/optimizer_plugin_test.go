//go:build !dataplane

package main

import (
	"bufio"
	"bytes"
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// An optimiser in another language: it passes its examination, tunes a variable, is
// remembered, and one that does not go by its seed is refused with the reason.
func TestPythonOptimizer(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	python := pythonEnvironment(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	dir, stubs := t.TempDir(), t.TempDir()
	generate := exec.CommandContext(ctx, python, "-m", "grpc_tools.protoc", "-I", filepath.Join("..", "..", "api"),
		"--python_out="+stubs, "--grpc_python_out="+stubs, "outrigger/v1/optimizer.proto")
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("generate stubs: %v\n%s", err, out)
	}
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	verb := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, filepath.Join(dir, "outrigger"), append(args, "--server", control)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(want string, args ...string) {
		t.Helper()
		if out, err := verb(args...); err != nil || !strings.Contains(out, want) {
			t.Fatalf("%v: %v, want %q:\n%s", args, err, want, out)
		}
	}
	coin := pythonPlugin(t, ctx, python, stubs, "coin")
	if out, err := verb("optimizer", "register", coin); err == nil || !strings.Contains(out, "is not registered") || !strings.Contains(out, "the same seed gave different trials") {
		t.Errorf("a plugin that tosses coins: %v\n%s", err, out)
	}
	plugin := pythonPlugin(t, ctx, python, stubs)
	must("py_evolution", "optimizer", "register", plugin, "--reason", "ours")
	must("version 0", "var", "register", "s/x", "float", "9", "--constraints", `{"min":-10,"max":10}`)
	must("done after 40 trials", "optimize", "s", "one", "x", "--algorithm", "py_evolution", "--budget", "40",
		"--objective", `awk {v=$0;gsub(/[^0-9.e-]/,"",v);d=v-3;print(d*d)}`)
	must(plugin, "optimizer", "list")
	must("tuning     py_evolution  1", "optimizer", "list")
	must("removed py_evolution", "optimizer", "remove", "py_evolution")
	if out, err := verb("optimize", "s", "two", "x", "--algorithm", "py_evolution", "--objective", "echo 1"); err == nil || !strings.Contains(out, `algorithm "py_evolution" not found`) {
		t.Errorf("a removed plugin: %v\n%s", err, out)
	}
}

// pythonPlugin starts the plugin and returns its address.
func pythonPlugin(t *testing.T, ctx context.Context, python string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, python, append([]string{filepath.Join("testdata", "optimizer_plugin.py")}, args...)...)
	var log bytes.Buffer
	cmd.Stderr = &log
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("plugin: %v\n%s", err, &log)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the plugin said %q, %v\n%s", line, err, &log)
	}
	return strings.TrimSpace(line)
}
