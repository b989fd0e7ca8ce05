//go:build !dataplane

package main

import (
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// interopCases are the cases of gRPC's interoperability client but for eight that grpc-go's own
// server of the suite fails whichever way it is called: it never says who the caller is, which
// the seven with credentials of Google ask, nor who it is itself, which pick_first_unary asks.
// https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md
var interopCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response", "custom_metadata",
	"status_code_and_message", "special_status_message", "unimplemented_method", "unimplemented_service",
	"rpc_soak", "channel_soak", "orca_per_rpc", "orca_oob",
}

// interop runs the suite's own two programs, in the clear and over TLS, by way of an address
// that is looked into (TLS by the name it asks for) and of one whose bytes pass.
func (p *pod) interop(t *testing.T) {
	dir := t.TempDir()
	const suite = "google.golang.org/grpc/interop/"
	if out, err := exec.Command("go", "build", "-o", dir+string(filepath.Separator), suite+"client", suite+"server").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, security := range []struct {
		name           string
		server, client []string
	}{
		{name: "clear"},
		{"TLS", []string{"-use_tls"}, []string{"-use_tls", "-use_test_ca", "-server_host_override", "foo.test.google.fr"}},
	} {
		for _, to := range []struct{ name, host, port string }{{"looked into", server6, "8000"}, {"passed", server4, "8002"}} {
			t.Run(security.name+", "+to.name, func(t *testing.T) {
				p.interopServer(t, filepath.Join(dir, "server"), to.port, security.server)
				before := p.counts()
				t.Run("cases", func(t *testing.T) {
					for _, name := range interopCases {
						args := append([]string{"-server_host", to.host, "-server_port", to.port, "-test_case", name}, security.client...)
						if strings.HasPrefix(name, "orca_") {
							args = append(args, "-service_config_json", `{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}`)
						}
						if strings.HasSuffix(name, "_soak") { // how long it takes is another matter
							args = append(args, "-soak_per_iteration_max_acceptable_latency_ms", "60000", "-soak_overall_timeout_seconds", "120")
						}
						t.Run(name, func(t *testing.T) {
							t.Parallel()
							if out, err := p.ns.Run(exec.CommandContext(t.Context(), filepath.Join(dir, "client"), args...)); err != nil {
								t.Errorf("%v\n%s", err, out)
							}
						})
					}
				})
				after := p.counts()
				ways := map[string]int64{"looked into": after.Looked - before.Looked, "passed": after.Passed - before.Passed}
				if ways[to.name] < int64(len(interopCases)) {
					t.Errorf("%d connections were %s, want one or more for each of %d cases", ways[to.name], to.name, len(interopCases))
				}
			})
		}
	}
}

// interopServer runs the suite's server in the other namespace until t ends.
func (p *pod) interopServer(t *testing.T, program, port string, args []string) {
	t.Helper()
	cmd := exec.Command(program, append([]string{"-port", port}, args...)...)
	log := newSyncBuffer()
	cmd.Stderr = log
	if err := p.server.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Errorf("%v\n%s", err, log)
		}
		_ = cmd.Wait() // killed
	})
	eventually(t, "the server listens", func() bool {
		c, err := p.server.DialContext(t.Context(), net.Dialer{}, "tcp", net.JoinHostPort(server4, port))
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
}
