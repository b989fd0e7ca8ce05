//go:build !dataplane

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A Python program that makes the calls of the published variable client, over Python's
// own gRPC and stubs generated from the bridge's .proto file, against a control plane
// and a sidecar that are processes of their own.
func TestPythonClient(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	python := pythonEnvironment(t)
	// Not the test's own context, which ends before its clean-ups: they end the processes.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	stubs := bridgeStubs(t, ctx, python)
	dir := t.TempDir()
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	sidecar := start(t, ctx, dir, "sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", control)
	client := exec.CommandContext(ctx, python, filepath.Join("testdata", "session_context.py"), stubs, sidecar)
	out, err := client.CombinedOutput()
	if err != nil || !bytes.HasSuffix(bytes.TrimSpace(out), []byte("PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// bridgeStubs returns a folder with Python's stubs of the bridge.
func bridgeStubs(t *testing.T, ctx context.Context, python string) string {
	t.Helper()
	stubs := t.TempDir()
	generate := exec.CommandContext(ctx, python, "-m", "grpc_tools.protoc", "-I", filepath.Join("..", "..", "api"),
		"--python_out="+stubs, "--grpc_python_out="+stubs, "snakepit/snakepit_bridge.proto")
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("generate stubs: %v\n%s", err, out)
	}
	return stubs
}

// pythonEnvironment returns the interpreter of .cache/venv, or of .cache/venv-NAME, which
// is made if need be.
// Where it cannot be had the test is skipped, except in CI.
func pythonEnvironment(t *testing.T, name ...string) string {
	t.Helper()
	root := filepath.Join("..", "..")
	out, err := exec.Command("bash", append([]string{filepath.Join(root, ".ci", "venv")}, name...)...).CombinedOutput()
	if err != nil {
		if reason := strings.TrimSpace(string(out)); os.Getenv("CI") == "true" {
			t.Fatalf("%v: %s", err, reason)
		} else {
			t.Skipf("%v: %s", err, reason)
		}
	}
	return filepath.Join(root, ".cache", strings.Join(append([]string{"venv"}, name...), "-"), "bin", "python")
}

// start runs a command of this binary as a process and returns where it listens.
func start(t *testing.T, ctx context.Context, dir string, args ...string) string {
	t.Helper()
	a := startProcess(t, ctx, dir, args...)
	if a.Listening["listen"] == "" {
		t.Fatalf("%s listens on %v only", args[0], a.Listening)
	}
	return a.Listening["listen"]
}

// startProcess is start for who wants to know all that the process says.
func startProcess(t *testing.T, ctx context.Context, dir string, args ...string) announcement {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary answers to the name of the program, see TestMain.
	program := filepath.Join(dir, "outrigger")
	if err := os.Symlink(self, program); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	var log bytes.Buffer
	cmd.Stderr = &log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("stop %s: %v", args[0], err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", args[0], err, &log)
		}
	})
	var said announcement
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &said)
	}
	if err != nil || len(said.Listening) == 0 {
		t.Fatalf("%s said %q, %v\n%s", args[0], line, err, &log)
	}
	return said
}
