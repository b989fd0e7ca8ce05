//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/xds"
)

// With what `xds bootstrap` prints an Envoy and a proxyless gRPC client follow a control plane
// that serves nobody without a certificate, over TLS and with certificates of their own; and an
// Envoy that believes another CA does not.
func TestBootstrapsOverTLS(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	program := envoyProgram(t)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	dir := t.TempDir()
	certs := filepath.Join(dir, "certs")
	outrigger := func(args ...string) (int, string) {
		var out, errs bytes.Buffer
		code := Main{Stdout: &out, Stderr: &errs, Environ: []string{}}.Run(ctx, args)
		return code, out.String() + errs.String()
	}
	verb := func(args ...string) string {
		t.Helper()
		code, out := outrigger(args...)
		if code != 0 {
			t.Fatalf("%q: exit code %d\n%s", args, code, out)
		}
		return out
	}
	file := func(name string) string { return filepath.Join(certs, name) }
	verb("cert", "create", "--dir", certs, "--hosts", "localhost,127.0.0.1")
	verb("cert", "create", "--dir", filepath.Join(dir, "others"), "--hosts", "localhost")
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", "data",
		"--envoy-egress", quietPort(t), "--envoy-capture", quietPort(t),
		"--tls-cert", file("control.crt"), "--tls-key", file("control.key"), "--tls-client-ca", file("ca.crt"), "--tls-require-client")
	as := func(who string) []string {
		return []string{"--control-ca", file("ca.crt"), "--control-cert", file(who + ".crt"), "--control-key", file(who + ".key")}
	}
	operator := append([]string{"--server", control}, as("operator")...)
	verb(append([]string{"model", "register", "chat", "v1", "--endpoint", "127.0.0.1:9", "--wait", "60s"}, operator...)...)
	printed := func(kind, node string, how []string) string {
		return verb(append([]string{"xds", "bootstrap", "--kind", kind, "--node", node, "--control", control}, how...)...)
	}

	said := startEnvoy(t, program, printed("envoy", "stranger", append(as("sidecar"), "--control-ca", filepath.Join(dir, "others", "ca.crt"))))
	startEnvoy(t, program, printed("envoy", "envoy-1", as("sidecar")))
	startEnvoy(t, program, printed("envoy", "envoy-2", append(as("sidecar"), "--control-server-name", "spiffe://outrigger.test/con*")))
	res, err := xds.NewXDSResolverWithConfigForTesting([]byte(printed("grpc", "grpc-1", as("sidecar"))))
	must(t, err)
	conn, err := grpc.NewClient("xds:///model/chat", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(res))
	must(t, err)
	defer conn.Close()
	conn.Connect()

	patient := time.After(patience)
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	until := func(what string, so func() bool) {
		t.Helper()
		for !so() {
			select {
			case <-look.C:
			case <-patient:
				_, out := outrigger(append([]string{"xds", "status"}, operator...)...)
				t.Fatalf("not within %v: %s\n%s", patience, what, out)
			}
		}
	}
	following := func() (ids string) {
		var status struct {
			Nodes []struct {
				Node  struct{ ID string }
				Acked string `json:"acked_position"`
			}
		}
		out := verb(append([]string{"xds", "status", "--output", "json"}, operator...)...)
		must(t, json.Unmarshal([]byte(out), &status))
		for _, n := range status.Nodes {
			if n.Acked != "" && n.Acked != "0" {
				ids += " " + n.Node.ID
			}
		}
		return ids
	}
	until("Envoys and a gRPC client follow the control plane", func() bool {
		ids := following()
		return strings.Contains(ids, "envoy-1") && strings.Contains(ids, "envoy-2") && strings.Contains(ids, "grpc-1")
	})
	until("an Envoy refuses a control plane of another CA", func() bool {
		raw, err := os.ReadFile(said)
		must(t, err)
		return strings.Contains(string(raw), "CERTIFICATE_VERIFY_FAILED")
	})
	if ids := following(); strings.Contains(ids, "stranger") {
		t.Errorf("%s follow the control plane", ids)
	}
}

// startEnvoy runs one until the test ends or this process does, and returns the file with what
// it says.
func startEnvoy(t *testing.T, program, bootstrap string) (log string) {
	t.Helper()
	dir := t.TempDir()
	config, log := filepath.Join(dir, "envoy.json"), filepath.Join(dir, "envoy.log")
	must(t, os.WriteFile(config, []byte(bootstrap), 0o600))
	out, err := os.Create(log)
	must(t, err)
	defer out.Close() // the process has its own
	// The shell kills it when its input closes, however this process ends.
	const guard = `"$@" & child=$!; cat >/dev/null; kill -9 $child; wait $child`
	cmd := exec.Command("sh", "-c", guard, "sh", program, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "debug") // a failed handshake is a warning only later
	cmd.Stdout, cmd.Stderr = out, out
	input, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		input.Close()
		_ = cmd.Wait() // the status is that of the kill
		if raw, err := os.ReadFile(log); t.Failed() && err == nil {
			t.Logf("Envoy said:\n%s", tail(raw, 4000))
		}
	})
	return log
}
