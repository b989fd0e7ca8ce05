//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMLflowClient drives MLflow's own client, from PyPI, against a control plane with
// people and roles, and then asks the log what it made of that.
func TestMLflowClient(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	python := pythonEnvironment(t, "mlflow")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	access := filepath.Join(dir, "access.json")
	var tokens []string
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(dir, "outrigger")); err != nil {
		t.Fatal(err)
	}
	for _, person := range [][]string{{"root", "admin"}, {"vera", "viewer"}} {
		out, err := exec.CommandContext(ctx, filepath.Join(dir, "outrigger"), "access", "add", person[0], "--role", person[1], "--file", access).Output()
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, strings.TrimSpace(string(out)))
	}
	said := startProcess(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"), "--access-file", access)
	client := exec.CommandContext(ctx, python, filepath.Join("testdata", "mlflow_client.py"), "http://"+said.Listening["http"], tokens[0], tokens[1])
	client.Env = append(os.Environ(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES=0", "MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true", "HOME="+dir)
	client.Dir, err = os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	out, err := client.CombinedOutput()
	if err != nil || !bytes.HasSuffix(bytes.TrimSpace(out), []byte("PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte(tokens[1]), 0o600); err != nil {
		t.Fatal(err)
	}
	served, err := exec.CommandContext(ctx, filepath.Join(dir, "outrigger"), "model", "served-at", "chat", "now", "--server", said.Listening["listen"], "--token-file", token).CombinedOutput()
	if err != nil || !strings.Contains(string(served), "2 ") || !strings.Contains(string(served), " root ") {
		t.Errorf("who answers now: %v\n%s", err, served)
	}
}
