package main

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
)

// envoyProgram is the Envoy of the wheel in the Python environment that .ci/venv makes.
func (e *env) envoyProgram() (string, error) {
	pattern := filepath.Join(e.root, ".cache", "venv", "lib", "python3*", "site-packages", "envoy", "_bin", "envoy")
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("envoy is not installed: %d programs at %s; make deps installs it", len(found), pattern)
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

// envoy forwards by HTTP: one route, one cluster, defaults otherwise, but no request
// ids and no limits that the row would reach.
func (e *env) envoy(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.envoyWith(ctx, cpus, upstream, `envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: HTTP1
          generate_request_id: false
          route_config:
            virtual_hosts:
            - {name: all, domains: ["*"], routes: [{match: {prefix: "/"}, route: {cluster: model, timeout: 0s}}]}
          http_filters:
          - {name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}`)
}

// envoyTCP passes connections through.
func (e *env) envoyTCP(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.envoyWith(ctx, cpus, upstream, `envoy.filters.network.tcp_proxy
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: in, cluster: model}`)
}

// envoyWith runs an Envoy with one listener, that filter and one cluster.
func (e *env) envoyWith(ctx context.Context, cpus, upstream, filter string) (*running, error) {
	bin, err := e.envoyProgram()
	if err != nil {
		return nil, err
	}
	toHost, toPort, err := net.SplitHostPort(upstream)
	if err != nil {
		return nil, err
	}
	return e.onPort(ctx, "envoy", cpus, ".yaml", func(_, address string) string {
		host, port, _ := net.SplitHostPort(address) // freePort's
		return fmt.Sprintf(`static_resources:
  listeners:
  - address: {socket_address: {address: %s, port_value: %s}}
    filter_chains:
    - filters:
      - name: %s
  clusters:
  - name: model
    connect_timeout: 5s
    circuit_breakers: {thresholds: [{max_connections: 20000, max_pending_requests: 20000, max_requests: 20000}]}
    load_assignment:
      cluster_name: model
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %s}}}}]}]
`, host, port, filter, toHost, toPort)
	}, func(_, file, _ string) []string {
		return []string{bin, "-c", file, "--concurrency", fmt.Sprint(workers(cpus)), "--disable-hot-restart", "-l", "error"}
	})
}

// portkey is the LLM gateway of .ci/gateway, told by headers which model to call. It
// listens on every address.
func (e *env) portkey(ctx context.Context, cpus, upstream string) (*running, error) {
	node, err := tool("node")
	if err != nil {
		return nil, err
	}
	script := filepath.Join(e.root, ".cache", "gateway", "node_modules", "@portkey-ai", "gateway", "build", "start-server.js")
	if found, err := filepath.Glob(script); err != nil || len(found) == 0 {
		return nil, fmt.Errorf("portkey is not installed: nothing at %s; make bench installs it", script)
	}
	run, err := e.onPort(ctx, "portkey", cpus, ".env", func(_, _ string) string { return "NODE_ENV=production\n" }, func(_, _, address string) []string {
		_, port, _ := net.SplitHostPort(address) // freePort's
		return []string{"env", "NODE_ENV=production", node, script, "--headless", "--port=" + port}
	})
	if err != nil {
		return nil, err
	}
	run.headers = []string{"x-portkey-provider: openai", "x-portkey-custom-host: http://" + upstream + "/v1", "authorization: Bearer bench"}
	return run, nil
}
