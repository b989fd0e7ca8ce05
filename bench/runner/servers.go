package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

func hitServers(e *env) []httpServer {
	return []httpServer{
		{us, func(ctx context.Context, cpus, _ string) (*running, error) {
			return e.startMesh(ctx, cpus, registerVariables)
		}},
		{"nginx", func(ctx context.Context, cpus, _ string) (*running, error) { return e.nginx(ctx, cpus, "") }},
		{"haproxy", func(ctx context.Context, cpus, _ string) (*running, error) { return e.haproxy(ctx, cpus, "") }},
		{"fasthttp", func(ctx context.Context, cpus, _ string) (*running, error) {
			return e.goPeer(ctx, "httphit", cpus, "-server", "fasthttp", "-keys", fmt.Sprint(hitKeys))
		}},
		{"net/http", func(ctx context.Context, cpus, _ string) (*running, error) {
			return e.goPeer(ctx, "httphit", cpus, "-server", "nethttp", "-keys", fmt.Sprint(hitKeys))
		}},
	}
}

func proxyServers(e *env) []httpServer {
	return []httpServer{
		{us, func(ctx context.Context, cpus, upstream string) (*running, error) {
			return e.startMesh(ctx, cpus, registerModel(upstream))
		}},
		{"nginx", e.nginx},
		{"haproxy", e.haproxy},
		{"envoy", e.envoy},
		{"fasthttp HostClient", func(ctx context.Context, cpus, upstream string) (*running, error) {
			return e.goPeer(ctx, "httpproxy", cpus, "-server", "fasthttp", "-upstream", upstream)
		}},
		{"httputil.ReverseProxy", func(ctx context.Context, cpus, upstream string) (*running, error) {
			return e.goPeer(ctx, "httpproxy", cpus, "-server", "nethttp", "-upstream", upstream)
		}},
	}
}

func (e *env) goPeer(ctx context.Context, program, cpus string, args ...string) (*running, error) {
	bin, err := e.peer(ctx, program)
	if err != nil {
		return nil, err
	}
	s, err := e.start(ctx, program, cpus, true, append([]string{bin}, args...)...)
	if err != nil {
		return nil, err
	}
	return &running{address: s.addresses["listen"], servers: []*server{s}}, nil
}

// workers is how many threads or worker processes a server gets: one per core it may use.
func workers(cpus string) int {
	if cpus == "" {
		return runtime.NumCPU()
	}
	return len(strings.Split(cpus, ","))
}

// configured starts a system program with a configuration file.
func (e *env) configured(ctx context.Context, program, cpus string, config func(dir, address string) string, args func(dir, file string) []string) (*running, error) {
	bin, err := tool(program)
	if err != nil {
		return nil, err
	}
	return e.onPort(ctx, program, cpus, ".conf", config, func(dir, file, _ string) []string { return append([]string{bin}, args(dir, file)...) })
}

// onPort starts a server that reads a configuration file and binds a port chosen
// beforehand. Somebody may take the port in between; then the start fails and is tried
// on another.
func (e *env) onPort(ctx context.Context, name, cpus, suffix string, config func(dir, address string) string, argv func(dir, file, address string) []string) (*running, error) {
	var failed error
	for range 3 {
		dir, err := e.dir(name)
		if err != nil {
			return nil, err
		}
		address, err := freePort()
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, name+suffix)
		if err := os.WriteFile(file, []byte(config(dir, address)), 0o600); err != nil {
			return nil, err
		}
		s, err := e.start(ctx, name, cpus, false, argv(dir, file, address)...)
		if err != nil {
			return nil, err
		}
		err = s.until(ctx, accepts("tcp4", address))
		if err == nil {
			return &running{address: address, servers: []*server{s}}, nil
		}
		s.stop()
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

// nginx answers by itself, or forwards over kept-alive connections when upstream is set.
func (e *env) nginx(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.nginxWith(ctx, cpus, upstream, "on")
}

// nginxStreaming passes on what the model says as it comes.
func (e *env) nginxStreaming(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.nginxWith(ctx, cpus, upstream, "off")
}

func (e *env) nginxWith(ctx context.Context, cpus, upstream, buffering string) (*running, error) {
	perWorker := 16384
	if buffering == "off" {
		perWorker *= 2 // each stream has a connection on either side, and one worker may get most of them
	}
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;\n" // its workers must reach the scratch directory
	}
	return e.configured(ctx, "nginx", cpus, func(dir, address string) string {
		location, pool := fmt.Sprintf("default_type application/json; return 200 %q;", strings.Repeat("v", valueBytes)), ""
		if upstream != "" {
			pool = fmt.Sprintf("upstream model { server %s; keepalive %d; keepalive_requests 100000000; }", upstream, 2*connections)
			location = `proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_read_timeout 300s; proxy_buffering ` + buffering + ";"
		}
		return fmt.Sprintf(`%sdaemon off;
worker_processes %d;
worker_rlimit_nofile %[7]d;
pid %[3]s/nginx.pid;
error_log %[3]s/error.log warn;
events { worker_connections %[8]d; }
http {
  access_log off;
  keepalive_requests 100000000;
  keepalive_timeout 300s;
  tcp_nodelay on;
  client_body_temp_path %[3]s/body; proxy_temp_path %[3]s/proxy; fastcgi_temp_path %[3]s/fastcgi;
  uwsgi_temp_path %[3]s/uwsgi; scgi_temp_path %[3]s/scgi;
  %[4]s
  server { listen %[5]s backlog=1024; location / { %[6]s } }
}
`, user, workers(cpus), dir, pool, address, location, wantOpen, perWorker)
	}, func(dir, file string) []string { return []string{"-p", dir, "-c", file} })
}

// haproxy answers by itself, or forwards over reused connections when upstream is set.
func (e *env) haproxy(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.haproxyWith(ctx, cpus, upstream, "")
}

// haproxyStreaming passes on what the model says as it comes: without the option haproxy
// tells the kernel that more follows, which then keeps a lone event back for 200 ms.
func (e *env) haproxyStreaming(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.haproxyWith(ctx, cpus, upstream, "  option http-no-delay\n")
}

func (e *env) haproxyWith(ctx context.Context, cpus, upstream, options string) (*running, error) {
	return e.configured(ctx, "haproxy", cpus, func(_, address string) string {
		answer := fmt.Sprintf("  http-request return status 200 content-type application/json string %s\n", strings.Repeat("v", valueBytes))
		if upstream != "" {
			answer = fmt.Sprintf("%[1]s  default_backend model\nbackend model\n%[1]s  http-reuse always\n  server model %[2]s pool-max-conn %[3]d\n", options, upstream, 2*connections)
		}
		return haproxyConfig(cpus, "http", address, answer)
	}, func(_, file string) []string { return []string{"-db", "-f", file} })
}

// haproxyTCP passes connections through, in the kernel where it can.
func (e *env) haproxyTCP(ctx context.Context, cpus, upstream string) (*running, error) {
	return e.configured(ctx, "haproxy", cpus, func(_, address string) string {
		return haproxyConfig(cpus, "tcp", address, "  option splice-auto\n  default_backend model\nbackend model\n  option splice-auto\n  server model "+upstream+"\n")
	}, func(_, file string) []string { return []string{"-db", "-f", file} })
}

// haproxyConfig allows as many connections as a row may open. It does not insist on two
// descriptors and two pipes for each, which it hardly ever needs.
func haproxyConfig(cpus, mode, address, rest string) string {
	return fmt.Sprintf(`global
  nbthread %d
  no strict-limits
  maxconn 16384
defaults
  mode %s
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
frontend in
  bind %s
%s`, workers(cpus), mode, address, rest)
}
