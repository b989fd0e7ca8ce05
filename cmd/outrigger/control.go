//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/alerts"
	"github.com/outrigger-mesh/outrigger/control/artifacts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/control/secrets"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/region"
	"github.com/outrigger-mesh/outrigger/region/consul"
	"github.com/outrigger-mesh/outrigger/region/probe"
	"github.com/outrigger-mesh/outrigger/region/static"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// controlFlags are the settings of a control plane.
type controlFlags struct {
	listen, http, data string
	tls                listenTLS
	dial               dialTLS
	tokenFile          string
	tokenKeyFile       string
	accessFile         string
	hosts              []string
	region             string
	latitude           float64
	longitude          float64
	gateway            string
	regionsFile        string
	consul             string
	consulTokenFile    string
	deployment         string
	artifacts          string
	alertRoutes        string
	secrets            string
	replica            replicaFlags
	allowExec          bool
	adopt              bool
	envoy              translate.EnvoyOptions
	deadMan            time.Duration
	tick               time.Duration
	late               time.Duration
	grace              time.Duration
}

func controlCommand(g *globals) *cobra.Command {
	c := &controlFlags{}
	cmd := &cobra.Command{Use: "control", Short: "Run a control plane", Args: exactArgs(),
		Long: `Control runs one replica of a region's control plane over an embedded durable log:
variables, models, experiments, rollouts, monitoring and rollback, xDS, the admin API,
REST and the status page.

With --leader it serves another control plane's log: it keeps a durable copy, answers reads,
feeds and xDS from it, and passes writes and evidence on to the leader. Give clients the
addresses of all replicas. With the leader away it serves what it has and refuses writes; a
candidate version is given up after --dead-man. When the leader's disk is lost, --promote
makes the copy a log of its own.`}
	f := cmd.Flags()
	f.StringVar(&c.listen, "listen", "127.0.0.1:7400", "gRPC: xDS, variables, reports, admin")
	f.StringVar(&c.http, "http", "127.0.0.1:7401", "REST, status page, /metrics, /healthz, /readyz")
	c.tls.bind(f)
	c.dial.bind(f)
	f.StringVar(&c.data, "data", "outrigger-data", "directory of the event log; one process at a time")
	f.StringVar(&c.tokenFile, "token-file", "", "file with the operators' bearer token; without one only this machine may operate")
	f.StringVar(&c.accessFile, "access-file", "", "file with people, their roles and the digests of their tokens, see outrigger access; looked at every 2 s")
	f.StringVar(&c.tokenKeyFile, "token-key-file", "", "file with the keys of session tokens (default: token.key in --data, made when missing); handed to processes on this machine")
	f.StringSliceVar(&c.hosts, "hosts", nil, "host names beside localhost that the status page may be opened under")
	f.StringVar(&c.region, "region", "local", "name of this region")
	f.Float64Var(&c.latitude, "region-latitude", 0, "degrees, north positive")
	f.Float64Var(&c.longitude, "region-longitude", 0, "degrees, east positive")
	f.StringVar(&c.gateway, "gateway", "", "host:port other regions reach this one under (default: the gRPC address)")
	f.StringVar(&c.regionsFile, "regions-file", "", "file that lists the regions, when there is no Consul")
	f.StringVar(&c.consul, "consul", "", "address of the Consul agent; registers this region and follows the others")
	f.StringVar(&c.consulTokenFile, "consul-token-file", "", "file with the Consul ACL token")
	f.StringVar(&c.deployment, "deployment", "", "deployment plan that rollouts follow which name no phases; looked at every 2 s, a bad file changes nothing")
	f.StringVar(&c.artifacts, "artifacts", "", "store of model artifacts, file:///DIRECTORY or s3://BUCKET?region=… (default: the directory artifacts in --data)")
	f.StringVar(&c.alertRoutes, "alert-routes", "", "file with who is told about alerts: webhooks, Alertmanager, Slack; without one they are only logged and shown; read again every 2 s")
	f.StringVar(&c.secrets, "secrets", "", "directory with NAME.crt and NAME.key (client certificates) and NAME.ca (trust bundles) for endpoints over TLS; looked at every 2 s, a bad file changes nothing")
	f.StringVar(&c.replica.leader, "leader", "", "serve the log of the control plane at this host:port: keep a copy in --data, write there")
	f.StringVar(&c.replica.leaderTokenFile, "leader-token-file", "", "file with an administrator's token at the leader")
	f.StringVar(&c.replica.name, "replica", "", "name of this replica, unique among those of a leader (default: host name and port)")
	f.BoolVar(&c.replica.promote, "promote", false, "make the copy in --data a log of its own, once, when its leader is lost for good")
	f.BoolVar(&c.allowExec, "allow-exec-checks", false, "let gates of rollouts run programs on this machine")
	f.BoolVar(&c.adopt, "adopt-clients", false, "have clients drop configuration this log never had; without it they keep it, are sent nothing else, and an alert says so")
	f.StringVar(&c.envoy.Egress, "envoy-egress", "", "host:port at which Envoys take the application's requests (default "+translate.DefaultEgress+")")
	f.StringVar(&c.envoy.Capture, "envoy-capture", "", "host:port at which Envoys take connections redirected by the kernel (default "+translate.DefaultCapture+")")
	f.StringVar(&c.envoy.TrustStore, "envoy-trust-store", "", "file with the certificates that Envoys trust where a version names no trust bundle (default "+translate.DefaultTrustStore+")")
	f.DurationVar(&c.deadMan, "dead-man", 10*time.Second, "how long a cut-off sidecar or Envoy may go on serving a candidate")
	f.DurationVar(&c.tick, "monitor-tick", time.Second, "how often evidence is weighed; failures are weighed at once")
	f.DurationVar(&c.late, "late-outcomes", 10*time.Minute, "how long after its end an experiment takes outcomes; its units stay in memory")
	f.DurationVar(&c.grace, "grace", 10*time.Second, "limit for draining at the end")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := g.configure(cmd, "control"); err != nil {
			return err
		}
		if err := c.validate(); err != nil {
			return configError{err}
		}
		return c.run(cmd, g)
	}
	return cmd
}

func (c *controlFlags) validate() error {
	if c.consul != "" && c.regionsFile != "" {
		return errors.New("--consul and --regions-file exclude each other; keep one")
	}
	if err := c.replica.validate(c); err != nil {
		return err
	}
	if c.deployment != "" {
		if _, _, err := loadPlan(c.deployment); err != nil {
			return err
		}
	}
	if c.alertRoutes != "" {
		if _, err := alerts.ReadRoutes(c.alertRoutes); err != nil {
			return fmt.Errorf("--alert-routes: %w", err)
		}
	}
	if c.tick < 50*time.Millisecond || c.tick > time.Minute {
		return fmt.Errorf("--monitor-tick is %v; give 50ms to 1m", c.tick)
	}
	if c.deadMan < time.Second {
		return fmt.Errorf("--dead-man is %v; give at least 1s, several heartbeats must fit", c.deadMan)
	}
	if c.late <= 0 || c.late > 90*24*time.Hour {
		return fmt.Errorf("--late-outcomes is %v; give more than 0 and at most 2160h", c.late)
	}
	for flag, addr := range map[string]string{"envoy-egress": c.envoy.Egress, "envoy-capture": c.envoy.Capture} {
		if _, err := netip.ParseAddrPort(addr); addr != "" && err != nil {
			return fmt.Errorf("--%s is %q; give an IP address and a port, as in 127.0.0.1:50051", flag, addr)
		}
	}
	if c.tokenFile == "" && c.accessFile == "" {
		for flag, addr := range map[string]string{"listen": c.listen, "http": c.http} {
			if !isLoopback(addr) {
				return fmt.Errorf("--%s is %s, which other machines can reach, and there is neither --access-file nor --token-file; give one or listen on 127.0.0.1", flag, addr)
			}
		}
	}
	if err := c.tls.validate(c); err != nil {
		return err
	}
	i := region.Info{Name: c.region, Gateway: cmp.Or(c.gateway, "unset:1"), Location: region.Location{Latitude: c.latitude, Longitude: c.longitude}}
	return i.Validate()
}

// isLoopback reports whether only this machine can reach a listen address.
func isLoopback(addr string) bool {
	if strings.HasPrefix(addr, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (c *controlFlags) run(cmd *cobra.Command, g *globals) error {
	p, err := g.start(cmd, "control", c.region+"/control", c.region)
	if err != nil {
		return err
	}
	token, err := readSecret("--token-file", c.tokenFile)
	if err != nil {
		return err
	}
	access, err := openAccess(p, c.accessFile)
	if err != nil {
		return err
	}
	tls, err := c.tls.open(p)
	if err != nil {
		return err
	}
	if err := p.useTLS(c.tls.dial(c.dial)); err != nil {
		return err
	}
	gl, err := p.listen("listen", c.listen)
	if err != nil {
		return err
	}
	hl, err := p.listen("http", c.http)
	if err != nil {
		return err
	}
	if c.gateway == "" && gl.Addr().Network() == "tcp" {
		c.gateway = gl.Addr().String() // a Unix socket is out of other regions' reach
	}
	log, follow, closeLog, err := c.openLog(p, gl.Addr())
	if err != nil {
		return err
	}
	defer closeLog()
	// After the log's lock is held: the data directory is this process's alone.
	keys, err := c.sessionKeys(p, follow)
	if err != nil {
		return err
	}
	topo, err := c.topology(p)
	if err != nil {
		return configError{err}
	}
	store, err := c.openArtifacts(p)
	if err != nil {
		return err
	}
	defer store.Close()
	routes, again, err := c.routes()
	if err != nil {
		return err
	}
	material, err := c.openSecrets(p)
	if err != nil {
		return err
	}
	s, err := control.New(control.Options{
		Log: log, Follow: follow, AlertRoutes: routes, AlertRoutesAgain: again, Artifacts: store, AdminToken: token, Access: access.policy, RequirePeer: c.tls.requireClient, Hosts: c.hosts, DeadMan: c.deadMan, AllowExec: c.allowExec, AdoptClients: c.adopt, Envoy: c.envoy, GlassFile: filepath.Join(c.data, "emergency.json"), Late: c.late, Regions: topo.view, Metrics: p.tel.Handler(),
		Secrets:   material,
		Region:    &pb.Region{Name: c.region, Gateway: c.gateway, Latitude: c.latitude, Longitude: c.longitude},
		Variables: variables.Options{SessionKeys: keys.Keys},
		Monitor:   monitor.Options{Tick: c.tick}, Logger: p.log, Meter: p.tel.Meter("control")})
	if err != nil {
		return configError{err}
	}
	calls := newInFlight()
	p.serveReplica(gl, c.grpcServer(p, s, calls, grpcCredentials(tls, gl)), calls, s.Drain, c.grace)
	p.serveHTTP(httpListener(tls, hl), s.Handler(), c.grace)
	p.run("control", s.Run)
	p.run("heap", func(ctx context.Context) error { heap.Keep(ctx, 64<<20); return nil })
	p.run("session keys", keys.Run)
	p.run("access", access.run)
	p.run("regions", topo.run)
	if c.deployment != "" {
		plan := &planFile{path: c.deployment, ready: s.Ready(), apply: s.Admin().ConfigureDeployment, logger: p.log}
		p.run("deployment plan", plan.run)
	}
	p.becomeReady(s.Ready())
	if err := p.announce(); err != nil {
		return err
	}
	return p.wait()
}

// openArtifacts opens the store of model artifacts.
func (c *controlFlags) openArtifacts(p *process) (*artifacts.Store, error) {
	at := c.artifacts
	if at == "" {
		dir, err := filepath.Abs(filepath.Join(c.data, "artifacts"))
		if err != nil {
			return nil, err
		}
		at = (&url.URL{Scheme: "file", Path: dir}).String()
	}
	store, err := artifacts.Open(p.ctx, at, artifacts.Options{Logger: p.log})
	if err != nil {
		return nil, configError{fmt.Errorf("--artifacts: %w", err)}
	}
	return store, nil
}

// openSecrets looks at the directory of certificates for endpoints; nil for none.
func (c *controlFlags) openSecrets(p *process) (*secrets.Watch, error) {
	if c.secrets == "" {
		return nil, nil
	}
	w, err := secrets.Open(c.secrets, secrets.Options{Logger: p.log})
	if err != nil {
		return nil, configError{fmt.Errorf("--secrets: %w", err)}
	}
	return w, nil
}

// routes are who is told about alerts, and what reads them again.
func (c *controlFlags) routes() ([]alerts.Route, func() ([]alerts.Route, error), error) {
	if c.alertRoutes == "" {
		return nil, nil, nil
	}
	read := func() ([]alerts.Route, error) { return alerts.ReadRoutes(c.alertRoutes) }
	routes, err := read()
	if err != nil {
		return nil, nil, configError{fmt.Errorf("--alert-routes: %w", err)}
	}
	return routes, read, nil
}

// sessionKeys are the keys of session tokens: those of the file named, else the data
// directory's.
func (c *controlFlags) sessionKeys(p *process, follow *control.Following) (*identity.KeyFile, error) {
	if c.tokenKeyFile != "" {
		return openTokenKeys(p, c.tokenKeyFile, nil)
	}
	path := filepath.Join(c.data, "token.key")
	if follow != nil {
		if err := c.leaderKeys(p, follow.Conn, path); err != nil {
			return nil, err
		}
		return openTokenKeys(p, path, nil)
	}
	if _, err := identity.LoadOrCreateKeys(path); err != nil {
		return nil, configError{err}
	}
	return openTokenKeys(p, path, nil)
}

// grpcServer carries every service; keep-alives find peers that vanished.
func (c *controlFlags) grpcServer(p *process, s *control.Server, calls *inFlight, inner credentials.TransportCredentials) *grpc.Server {
	gs := grpc.NewServer(append(slices.Concat(variables.TransportOptions(), adsserver.TransportOptions(), s.ServerOptions()), p.tel.GRPCServer(), grpc.UnaryInterceptor(calls.count),
		grpc.Creds(s.Credentials(inner)),
		grpc.MaxRecvMsgSize(16<<20), grpc.MaxConcurrentStreams(4096),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		takesPings())...)
	s.RegisterGRPC(gs)
	healthpb.RegisterHealthServer(gs, health.NewServer())
	return gs
}

// readSecret reads a one-line secret file; its content never reaches a log.
func readSecret(flag, path string) (string, error) {
	if path == "" {
		return "", nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", configError{fmt.Errorf("%s: %w", flag, err)}
	}
	s := strings.TrimSpace(string(raw))
	if s == "" {
		return "", configError{fmt.Errorf("%s: %s is empty", flag, path)}
	}
	return s, nil
}

// topology is where the regions come from and how far they are.
type topology struct {
	source string
	local  string
	known  func() (rs []region.Info, stale bool)
	prober *probe.Prober
	dir    *consul.Directory // nil without Consul
}

func (c *controlFlags) topology(p *process) (*topology, error) {
	self := region.Info{Name: c.region, Gateway: c.gateway, Healthy: true, Location: region.Location{Latitude: c.latitude, Longitude: c.longitude}}
	t := &topology{source: "self", local: c.region, known: func() ([]region.Info, bool) { return []region.Info{self}, false }}
	switch {
	case c.consul != "":
		token, err := readSecret("--consul-token-file", c.consulTokenFile)
		if err != nil {
			return nil, err
		}
		host, err := os.Hostname()
		if err != nil {
			return nil, err
		}
		instance := fmt.Sprintf("%s-%s-%d", c.region, host, os.Getpid())
		t.dir, err = consul.New(consul.Options{Address: c.consul, Token: token, Self: self, Instance: instance, Version: buildVersion(), Logger: p.log})
		if err != nil {
			return nil, err
		}
		t.source, t.known = "consul", t.dir.Regions
	case c.regionsFile != "":
		rs, err := static.Load(c.regionsFile)
		if err != nil {
			return nil, err
		}
		t.source, t.known = "file", func() ([]region.Info, bool) { return rs, false }
	}
	t.prober = probe.New(probe.Options{Targets: t.targets, Credentials: probeCredentials(p), Logger: p.log})
	return t, nil
}

// targets are the other regions' gateways.
func (t *topology) targets() []probe.Target {
	rs, _ := t.known()
	var out []probe.Target
	for _, r := range rs {
		if r.Name != t.local {
			out = append(out, probe.Target{Region: r.Name, Gateway: r.Gateway})
		}
	}
	return out
}

// view is the topology as the API shows it.
func (t *topology) view() ([]*pb.Region, string) {
	rs, stale := t.known()
	out := make([]*pb.Region, 0, len(rs))
	for _, r := range rs {
		x := &pb.Region{Name: r.Name, Gateway: r.Gateway, Latitude: r.Location.Latitude, Longitude: r.Location.Longitude,
			Health: "passing", Local: r.Name == t.local, Stale: stale}
		if m, ok := t.prober.Result(r.Name); ok {
			x.RttMs, x.SeenAt = m.RTT.MeanMs, timestamp(m.At)
			if m.Health.Down {
				x.Health = "critical"
			}
		} else if !x.Local {
			x.Health = "unknown"
		}
		if !r.Healthy {
			x.Health = "critical"
		}
		out = append(out, x)
	}
	return out, t.source
}

func (t *topology) run(ctx context.Context) error {
	if t.dir == nil {
		return t.prober.Run(ctx)
	}
	done := make(chan error, 1)
	go func() { done <- t.dir.Run(ctx) }()
	return errors.Join(t.prober.Run(ctx), <-done)
}
