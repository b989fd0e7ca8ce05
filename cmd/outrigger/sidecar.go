package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/internal/coarse"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/relay"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// quickBackoff reconnects within the mesh: quickly at first, never a storm.
var quickBackoff = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second}

// minProcs is one event loop plus two.
const minProcs = 3

type sidecarFlags struct {
	listen, http, control, agentDir, nodeID, region, zone string
	fallback                                              []string
	tls                                                   dialTLS
	stateDir, upstreamHTTP, upstreamGRPC, upstreamTCP     string
	autoSessions, policyViaAgent                          bool
	maxPerHost                                            int
	memoryBytes                                           int64
	processBytes                                          int64
	grace                                                 time.Duration
	tokenKeyFile                                          string
	labels                                                map[string]string
	admin                                                 string
	pprof                                                 bool
	drainDelay, upgradeTimeout                            time.Duration

	intercept interceptFlags
	models    modelFlags
}

func sidecarCommand(g *globals) *cobra.Command {
	s := &sidecarFlags{}
	cmd := &cobra.Command{Use: "sidecar", Short: "Run a pod's sidecar", Args: exactArgs(),
		Long: `Sidecar serves one pod's variable and model calls. Point the application at it with
OPENAI_BASE_URL=http://<listen>/v1 and its variable server address, let it listen on
the port the application dials anyway, or have "outrigger init" redirect the pod's
connections to --intercept-outbound.

At SIGTERM it is not ready any more, serves on for --drain-delay, then accepts nothing,
closes what is idle and gives what is in flight --grace; what is left is cut and counted
in the log. As a Kubernetes native sidecar (an init container with restartPolicy: Always,
its readiness from /ready) it gets SIGTERM when the pod's other containers have ended, so
--drain-delay may stay 0; keep --drain-delay plus --grace below the pod's
terminationGracePeriodSeconds. SIGUSR2 or "sidecar upgrade" replaces the program without
losing a connection.`}
	f := cmd.Flags()
	f.StringVar(&s.listen, "listen", "127.0.0.1:50051", "where the application connects: HTTP/1 and gRPC on one port")
	f.StringVar(&s.http, "http", "127.0.0.1:0", "/metrics, /healthz, /readyz, /stats")
	f.StringVar(&s.control, "control", "127.0.0.1:7400", "control plane, host:port; several replicas with commas, of which every sidecar follows the policy of another one first")
	s.tls.bind(f)
	f.StringSliceVar(&s.fallback, "fallback", nil, "further control planes for policy, tried in order")
	f.StringVar(&s.agentDir, "agent-dir", "", "the node agent's --dir; empty = no agent, a private cache instead")
	f.BoolVar(&s.policyViaAgent, "policy-via-agent", false, "follow policy through the node agent, which keeps one stream for all its sidecars; while it is away or cut off, directly")
	f.StringVar(&s.nodeID, "node-id", hostname()+"/pod", "name of this sidecar, unique in the mesh")
	f.StringVar(&s.region, "region", "local", "region of this pod")
	f.StringVar(&s.zone, "zone", "", "zone within the region")
	f.StringToStringVar(&s.labels, "labels", nil, "labels policy can select on, key=value")
	f.StringVar(&s.stateDir, "state-dir", "", "where the last good policy is kept; empty = nowhere")
	f.IntVar(&s.maxPerHost, "upstream-connections", 0, "HTTP connections to one address outside of models, requests beyond wait (default 1024)")
	f.StringVar(&s.upstreamHTTP, "upstream-http", "", "base URL for HTTP requests and models the mesh does not know")
	f.StringVar(&s.upstreamGRPC, "upstream-grpc", "", "host:port for gRPC calls the sidecar does not serve (tools)")
	f.StringVar(&s.upstreamTCP, "upstream-tcp", "", "host:port for connections that are neither HTTP nor gRPC")
	f.BoolVar(&s.autoSessions, "auto-create-sessions", true, "create a session at its first use")
	f.Int64Var(&s.processBytes, "process-bytes", 32<<20, "size of the process tier")
	f.StringVar(&s.tokenKeyFile, "token-key-file", "", tokenKeyUsage)
	f.DurationVar(&s.grace, "grace", 10*time.Second, "limit for requests in flight at the end")
	f.StringVar(&s.admin, "admin", "", "the admin page on a socket of this user's only, unix:path; "+adminPaths+"; empty = none")
	f.BoolVar(&s.pprof, "pprof", false, "profiles under /debug/pprof/ of the admin socket")
	f.DurationVar(&s.drainDelay, "drain-delay", 0, "how long to serve on, not ready, after SIGTERM, until those who send traffic have heard of it")
	f.DurationVar(&s.upgradeTimeout, "upgrade-timeout", time.Minute, "limit for a new process to become ready in an upgrade")
	f.Int64Var(&s.memoryBytes, "memory-bytes", -1, "memory this process may have: model calls it has no room for are answered 503; 0 = any amount, -1 = what its cgroup (the container) may have")
	s.intercept.flags(f)
	s.models.bind(f)
	cmd.AddCommand(upgradeCommand(g))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := g.configure(cmd, "sidecar"); err != nil {
			return err
		}
		if err := s.validate(); err != nil {
			return configError{err}
		}
		return s.run(cmd, g)
	}
	return cmd
}

func (s *sidecarFlags) validate() error {
	if s.nodeID == "" {
		return errors.New("--node-id is empty")
	}
	if s.policyViaAgent && s.agentDir == "" {
		return errors.New("--policy-via-agent needs --agent-dir: there is no agent to follow policy through")
	}
	if s.maxPerHost < 0 {
		return fmt.Errorf("--upstream-connections is %d; give at least 1, or 0 for 1024", s.maxPerHost)
	}
	if s.upstreamHTTP != "" {
		u, err := url.Parse(s.upstreamHTTP)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return fmt.Errorf("--upstream-http is %q; give http://host:port or https://host", s.upstreamHTTP)
		}
	}
	for flag, v := range map[string]string{"upstream-grpc": s.upstreamGRPC, "upstream-tcp": s.upstreamTCP} {
		if v == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(v); err != nil {
			return fmt.Errorf("--%s is %q; give host:port", flag, v)
		}
	}
	if s.memoryBytes > 0 && s.memoryBytes < minMemory || s.memoryBytes < -1 {
		return fmt.Errorf("--memory-bytes is %d; give at least %d (48 MiB), 0 for no limit or -1 for that of the cgroup", s.memoryBytes, minMemory)
	}
	if s.processBytes < 1<<20 {
		return fmt.Errorf("--process-bytes is %d; give at least 1 MiB", s.processBytes)
	}
	if path, ok := strings.CutPrefix(s.admin, "unix:"); s.admin != "" && (!ok || path == "") {
		return fmt.Errorf("--admin is %q; give unix:path", s.admin)
	}
	if s.pprof && s.admin == "" {
		return errors.New("--pprof needs --admin: profiles are shown on that socket only")
	}
	if s.drainDelay < 0 || s.grace <= 0 || s.upgradeTimeout <= 0 {
		return fmt.Errorf("--drain-delay is %v, --grace %v and --upgrade-timeout %v; give 0 or more, and for the last two more than 0", s.drainDelay, s.grace, s.upgradeTimeout)
	}
	return s.intercept.validate()
}

func (s *sidecarFlags) run(cmd *cobra.Command, g *globals) error {
	start := time.Now()
	// An event loop that waits in the kernel gives up its scheduler slot and has to queue
	// for one when it wakes; two more than there are loops keep that queue empty (on two
	// processors, measured: 1.3 times the requests at 0.7 times the CPU).
	if runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs)
	}
	p, err := g.start(cmd, "sidecar", s.nodeID, s.region)
	if err != nil {
		return err
	}
	p.drainDelay = s.drainDelay
	if p.inherited, err = inherit(g.environ); err != nil {
		return err
	}
	defer p.inherited.close()
	al, err := p.listen("listen", s.listen)
	if err != nil {
		return err
	}
	hl, err := p.listen("http", s.http)
	if err != nil {
		return err
	}
	taken, own, err := s.intercept.listen(p)
	if err != nil {
		return err
	}
	dl, err := s.listenAdmin(p)
	if err != nil {
		return err
	}
	own = append(own, ownListeners(al, hl)...)
	if err := p.useTLS(&s.tls); err != nil {
		return err
	}
	control, err := p.dialControl(s.control)
	if err != nil {
		return err
	}
	defer control.Close()
	self := outrigger.Node{ID: s.nodeID, Kind: "sidecar", Region: s.region, Zone: s.zone, Labels: s.labels}
	var agent *grpc.ClientConn
	if s.agentDir != "" {
		if agent, err = p.dialMesh("unix:" + filepath.Join(s.agentDir, agentSocket)); err != nil {
			return err
		}
		defer agent.Close()
	}
	var store *cache.Store
	tokens := variable.NewTokens(variable.TokenOptions{Logger: p.log, Era: func() uint64 { return store.Era() }})
	keys, err := openTokenKeys(p, s.tokenKeyFile, tokens.Use)
	if err != nil {
		return err
	}
	if keys != nil {
		tokens.Use(keys.Keys())
	}
	if store, err = s.cache(p, self, control, agent, tokens); err != nil {
		return err
	}
	ads, err := s.policyClient(p, self)
	if err != nil {
		return err
	}
	o := proxy.Options{Node: self, Reader: store, Hits: store, Authority: store.Variables(), Policy: policySource(ads), Material: ads.Material, Reports: control, Tokens: tokens,
		AutoCreateSessions: s.autoSessions, UpstreamTCP: s.upstreamTCP, MaxPerHost: s.maxPerHost, Own: own, Intercept: taken,
		Grace: s.grace, Start: start, Logger: p.log, Meter: p.tel.Meter("proxy")}
	if o.Models, err = s.models.options(s.room(p)); err != nil {
		return configError{err}
	}
	if agent != nil && o.Models.Answers != nil {
		o.Models.NodeAnswers = answers.NewNode(agent, p.log)
	}
	if p.tel.Tracing() {
		o.Tracing = &proxy.Tracing{Tracer: p.tel.Tracer.Tracer("proxy"), Propagator: p.tel.Propagator}
	}
	if s.upstreamHTTP != "" {
		if o.UpstreamHTTP, err = url.Parse(s.upstreamHTTP); err != nil {
			return configError{err}
		}
	}
	if s.upstreamGRPC != "" {
		conn, err := p.dialGRPC(s.upstreamGRPC)
		if err != nil {
			return err
		}
		defer conn.Close()
		o.UpstreamGRPC = conn
	}
	sc, err := proxy.New(o)
	if err != nil {
		return configError{err}
	}
	ended := make(chan struct{}) // the proxy has, and needs nothing any more
	p.until(ended, "cache", store.Run)
	if room := o.Models.Room; room != nil {
		p.until(ended, "memory limit", func(ctx context.Context) error { room.Run(ctx); return nil })
	}
	if keys != nil {
		p.until(ended, "session keys", keys.Run)
	} else {
		p.until(ended, "session keys", func(ctx context.Context) error { return tokens.Follow(ctx, keySources(agent, control)...) })
	}
	p.until(ended, "policy", ads.Run)
	p.becomeReady(ads.Ready())
	p.run("memory", func(ctx context.Context) error { return keepSmall(ctx, ads.Ready(), p.log) })
	up := s.upgrader(p, sc)
	serve := func() error {
		pages := map[string]http.Handler{"GET /stats": sc.Handler()}
		p.serveHTTP(hl, p.health(pages), s.grace)
		if dl != nil {
			p.serveHTTP(dl, up.admin(sc, ads), s.grace)
		}
		p.group.Go(func() error {
			defer close(ended)
			err := sc.Run(p.ctx, al)
			if err != nil && p.ctx.Err() == nil {
				return fmt.Errorf("sidecar: proxy: %w", err)
			}
			return nil
		})
		up.listeners = handed(s, hl, al, dl, taken)
		p.run("upgrades", up.run)
		return nil
	}
	if p.inherited == nil {
		if err := serve(); err != nil {
			return err
		}
		if err := p.announce(); err != nil {
			return err
		}
		return p.wait()
	}
	p.group.Go(func() error {
		err := p.inherited.takeOver(p.ctx, ads.Ready(), func() bool { return store.Stats().Attached }, serve, p.announce)
		if err != nil {
			close(ended)
		}
		return err
	})
	return p.wait()
}

// minMemory is the least --memory-bytes: a sidecar without traffic needs about half of it.
const minMemory = 48 << 20

// room is the memory the process may have, nil if there is no limit.
func (s *sidecarFlags) room(p *process) *heap.Room {
	limit := s.memoryBytes
	if limit < 0 {
		var err error
		if limit, err = heap.Allowed(); err != nil {
			p.log.Warn("no limit on this process's memory: its cgroup's is not known; set --memory-bytes", "error", err)
		}
	}
	if limit <= 0 {
		return nil
	}
	p.log.Info("memory is limited", "bytes", limit)
	return heap.NewRoom(limit)
}

// cache builds the tiers: the node agent's table when there is one.
func (s *sidecarFlags) cache(p *process, self outrigger.Node, control, agent *grpc.ClientConn, tokens *variable.Tokens) (*cache.Store, error) {
	o := cache.Options{Origin: control, Encoders: tokens.Encoders(), Node: self, ProcessBytes: s.processBytes, Logger: p.log, Meter: p.tel.Meter("cache"), Clock: node.Clock()}
	o.Coarse = coarse.New(o.Clock)
	if agent == nil {
		o.Private = true
		return cache.New(o)
	}
	o.Agent, o.TablePath = agent, filepath.Join(s.agentDir, tableSocket)
	return cache.New(o)
}

func (s *sidecarFlags) policyClient(p *process, self outrigger.Node) (*adsclient.Client, error) {
	return s.policyFollower(p, self, nil)
}

// policyFollower is the policy client with somebody who is told of every policy put in
// force, see adsclient.Options.OnPolicy; nil tells nobody.
func (s *sidecarFlags) policyFollower(p *process, self outrigger.Node, told func(*policy.Policy)) (*adsclient.Client, error) {
	o := adsclient.Options{Node: self, Dir: s.stateDir, Logger: p.log, Meter: p.tel.Meter("xds/adsclient"), OnPolicy: told,
		Dial: policyDialers(p.dialControl, append(translate.Servers(s.control, s.nodeID), s.fallback...))}
	if s.policyViaAgent {
		o.Relay = policyDialers(p.dialMesh, []string{"unix:" + filepath.Join(s.agentDir, agentSocket)})[0]
	}
	return adsclient.New(o)
}

// policyDialers connect by dial to each target, for a policy stream of its own.
func policyDialers(dial func(string, ...grpc.DialOption) (*grpc.ClientConn, error), targets []string) (out []relay.Dialer) {
	for _, target := range targets {
		out = append(out, func(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
			conn, err := dial(target)
			if err != nil {
				return nil, nil, err
			}
			return conn, conn, nil
		})
	}
	return out
}

// policySource is the policy in force and how far to trust it, as inference asks for it.
func policySource(ads *adsclient.Client) func() (*policy.Policy, inference.PolicyStatus) {
	return func() (*policy.Policy, inference.PolicyStatus) {
		return ads.Policy(), inference.PolicyStatus{Live: ads.Status().Live, DeadManExpired: ads.DeadManExpired(time.Now())}
	}
}

func ownListeners(ls ...net.Listener) []netip.AddrPort {
	var out []netip.AddrPort
	for _, l := range ls {
		if a, err := netip.ParseAddrPort(l.Addr().String()); err == nil {
			out = append(out, a)
		}
	}
	return out
}

const tokenKeyUsage = "file with the keys of session tokens, the same for every process of the mesh; empty = the control plane's, on one machine"

// openTokenKeys reads a key file, which is looked at again while its Run runs; nil for
// none.
func openTokenKeys(p *process, path string, changed func(*identity.Keys)) (*identity.KeyFile, error) {
	if path == "" {
		return nil, nil
	}
	f, err := identity.OpenKeyFile(path, identity.KeyFileOptions{Changed: changed, Logger: p.log, Meter: p.tel.Meter("identity")})
	if err != nil {
		return nil, configError{fmt.Errorf("--token-key-file: %w", err)}
	}
	return f, nil
}

// keySources are who may know the mesh's session keys: the agent, which may have been
// given some, then the control plane.
func keySources(agent, control *grpc.ClientConn) (out []pb.CoherenceClient) {
	for _, c := range []*grpc.ClientConn{agent, control} {
		if c != nil {
			out = append(out, pb.NewCoherenceClient(c))
		}
	}
	return out
}
