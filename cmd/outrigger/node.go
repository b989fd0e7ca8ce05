package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shelf"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/report"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/relay"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Sockets of a node agent inside its --dir.
const (
	agentSocket = "agent.sock" // gRPC: variables and origin reads
	tableSocket = "table.sock" // hands out the read-only shared table
)

type nodeFlags struct {
	control, dir, http, nodeID, region string
	tableBytes, answerBytes            int64
	lease, heartbeat, grace            time.Duration
	checkEvery                         time.Duration
	tokenKeyFile                       string
	tls                                dialTLS
	tenant                             string
	tenantUsers, tenantGroups          map[string]string
	tableIdle                          time.Duration
}

const minTableBytes = 1 << 20

func nodeCommand(g *globals) *cobra.Command {
	n := &nodeFlags{}
	cmd := &cobra.Command{Use: "node", Short: "Run a node agent", Args: exactArgs(),
		Long: `Node runs the agent of one node: it owns the node's shared cache table and one change
feed for all pods on the node. Sidecars reach it through Unix sockets in --dir, whose
permissions (0700) say who may.

Sidecars with --policy-via-agent follow policy through the agent, too: one stream to the
control plane, opened for the first of them, serves them all. "outrigger xds status" still
names each of them. In a configuration canary the node is the unit: name it by --node-id.

Pods of tenants that must not see each other run as users of their own, and
--tenant-users 1001=acme,1002=umbra says whose they are. Each tenant then has a table of
its own, an equal part of --table-bytes, which the agent hands as an open descriptor to
processes of its users only: there is no path under which anybody else could open it. The
kernel says who connected. The agent's own user and root may operate it ("outrigger
cache"); everybody else is refused.`}
	f := cmd.Flags()
	f.StringVar(&n.control, "control", "127.0.0.1:7400", "control plane, host:port; several replicas with commas, tried in order")
	n.tls.bind(f)
	f.StringVar(&n.dir, "dir", "outrigger-node", "directory for the agent's sockets")
	f.StringVar(&n.http, "http", "127.0.0.1:0", "/metrics, /healthz, /readyz")
	f.StringVar(&n.nodeID, "node-id", hostname(), "name of this node, unique in the mesh")
	f.StringVar(&n.region, "region", "local", "region of this node")
	f.Int64Var(&n.tableBytes, "table-bytes", 64<<20, "size of the shared table's arena")
	f.Int64Var(&n.answerBytes, "answer-cache-bytes", 0, "memory for answers of models that the node's pods share, at least 4 MiB for each tenant; 0 = none are kept")
	f.DurationVar(&n.lease, "feed-lease", 300*time.Millisecond, "how long readers trust the table after the last proof that the feed is live")
	f.DurationVar(&n.heartbeat, "heartbeat", 100*time.Millisecond, "how often that proof is asked for")
	f.DurationVar(&n.checkEvery, "check-every", time.Second, "how often the freshness monitor compares one entry with the origin; 0 = never")
	f.StringVar(&n.tenant, "tenant", "", "serve this tenant only and deny the others; run one agent with a --dir of its own per tenant (default: every tenant, one table)")
	f.StringToStringVar(&n.tenantUsers, "tenant-users", nil, "the tenant each user's processes belong to, uid=tenant; one table per tenant, and everybody else is refused")
	f.StringToStringVar(&n.tenantGroups, "tenant-groups", nil, "the same by group, gid=tenant; a user's tenant counts before its group's")
	f.DurationVar(&n.tableIdle, "table-idle", 10*time.Minute, "a tenant's table is given up when nobody used it for this long")
	f.StringVar(&n.tokenKeyFile, "token-key-file", "", tokenKeyUsage)
	f.DurationVar(&n.grace, "grace", 5*time.Second, "limit for draining at the end")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := g.configure(cmd, "node"); err != nil {
			return err
		}
		if err := n.validate(); err != nil {
			return configError{err}
		}
		return n.run(cmd, g)
	}
	return cmd
}

func hostname() string {
	h, err := os.Hostname()
	if err != nil {
		return "node"
	}
	return h
}

func (n *nodeFlags) validate() error {
	if n.tenant != "" {
		if err := outrigger.CheckName("--tenant", n.tenant); err != nil {
			return err
		}
	}
	switch {
	case n.nodeID == "":
		return errors.New("--node-id is empty")
	case n.heartbeat < 10*time.Millisecond || n.lease < 3*n.heartbeat:
		return fmt.Errorf("--feed-lease is %v and --heartbeat %v; the lease must be at least three heartbeats, a heartbeat at least 10ms", n.lease, n.heartbeat)
	case n.checkEvery < 0:
		return fmt.Errorf("--check-every is %v; give a time between two checks, or 0 for none", n.checkEvery)
	case n.tableIdle < time.Second:
		return fmt.Errorf("--table-idle is %v; give at least 1s", n.tableIdle)
	case n.answerBytes < 0:
		return fmt.Errorf("--answer-cache-bytes is %d; give 0, or at least %d", n.answerBytes, shelf.MinBytes)
	case n.tableBytes < minTableBytes || n.tableBytes > 64<<30:
		return fmt.Errorf("--table-bytes is %d; give 1 MiB to 64 GiB", n.tableBytes)
	}
	return nil
}

// meshPings is how often one part of the mesh asks another for a sign of life, at most; it
// is also what gRPC takes if told to do it more often.
const meshPings = 10 * time.Second

// takesPings has a server accept them: by default gRPC's ends connections that are pinged
// more than every five minutes while it has nothing to say.
func takesPings() grpc.ServerOption {
	return grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: meshPings / 2, PermitWithoutStream: true})
}

// dialMesh opens a connection to another part of the mesh, a server that takesPings; it
// connects when used.
func (p *process) dialMesh(target string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return p.dialGRPC(target, append([]grpc.DialOption{grpc.WithKeepaliveParams(keepalive.ClientParameters{
		Time: meshPings, Timeout: meshPings / 2, PermitWithoutStream: true})}, more...)...)
}

// dialGRPC opens a connection to any server. No pings: see takesPings. A call to a tool may be
// silent for as long as it takes.
func (p *process) dialGRPC(target string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	o := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), p.tel.GRPCClient(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quickBackoff, MinConnectTimeout: 2 * time.Second})}
	if p.dialTCP != nil && !strings.HasPrefix(target, "unix:") {
		o = append(o, grpc.WithContextDialer(p.dialTCP))
	}
	if several := targets(target); len(several) > 1 {
		target = "replicas:///control"
		o = append(o, replicas(several))
	}
	conn, err := grpc.NewClient(target, append(o, more...)...)
	if err != nil {
		return nil, configError{fmt.Errorf("%s: %w", target, err)}
	}
	return conn, nil
}

// feedDialer opens connections for the feed to where dialMesh's go; nil when only gRPC knows
// where that is.
func (p *process) feedDialer(target string) func(context.Context) (net.Conn, error) {
	if several := targets(target); len(several) > 1 {
		return p.feedDialers(several)
	}
	network, address := "tcp", strings.TrimPrefix(strings.TrimPrefix(target, "dns:///"), "passthrough:///")
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		network, address = "unix", strings.TrimPrefix(path, "//")
	} else if _, _, err := net.SplitHostPort(address); err != nil {
		return nil
	} else if p.dialTCP != nil {
		return p.encrypted(address, func(ctx context.Context) (net.Conn, error) { return p.dialTCP(ctx, address) })
	}
	dial := func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, network, address) }
	if network == "unix" {
		return dial
	}
	return p.encrypted(address, dial)
}

// feedDialers tries replicas in order.
func (p *process) feedDialers(targets []string) func(context.Context) (net.Conn, error) {
	var dials []func(context.Context) (net.Conn, error)
	for _, t := range targets {
		if d := p.feedDialer(t); d != nil {
			dials = append(dials, d)
		}
	}
	if len(dials) == 0 {
		return nil
	}
	return func(ctx context.Context) (net.Conn, error) {
		var failed []error
		for _, dial := range dials {
			conn, err := dial(ctx)
			if err == nil {
				return conn, nil
			}
			failed = append(failed, err)
		}
		return nil, errors.Join(failed...)
	}
}

// keepAnswers has the agent keep answers of models, within tenants where there are any.
func (n *nodeFlags) keepAnswers(p *process, gs *grpc.Server, access *node.Access) error {
	if n.answerBytes == 0 {
		return nil
	}
	o := shelf.Options{Bytes: n.answerBytes, Clock: node.Clock(), Meter: p.tel.Meter("cache/shelf")}
	if access != nil {
		o.Tenants, o.Tenant = access.Tenants(), access.Caller
	}
	s, err := shelf.New(o)
	if err != nil {
		return fmt.Errorf("--answer-cache-bytes: %w", err)
	}
	pb.RegisterNodeAnswersServer(gs, s)
	return nil
}

func (n *nodeFlags) run(cmd *cobra.Command, g *globals) error {
	p, err := g.start(cmd, "node", n.nodeID, n.region)
	if err != nil {
		return err
	}
	keys, err := openTokenKeys(p, n.tokenKeyFile, nil)
	if err != nil {
		return err
	}
	access, err := n.access()
	if err != nil {
		return configError{err}
	}
	if err := makeDir(n.dir, access); err != nil {
		return configError{fmt.Errorf("--dir: %w", err)}
	}
	gl, err := p.listen("agent", "unix:"+filepath.Join(n.dir, agentSocket))
	if err != nil {
		return err
	}
	tl, err := p.listen("table", "unix:"+filepath.Join(n.dir, tableSocket))
	if err != nil {
		return err
	}
	if err := openSockets(n.dir, access); err != nil {
		return err
	}
	hl, err := p.listen("http", n.http)
	if err != nil {
		return err
	}
	if err := p.useTLS(&n.tls); err != nil {
		return err
	}
	origin, err := p.dialControl(n.control, node.TransportOptions()...)
	if err != nil {
		return err
	}
	defer origin.Close()
	self := outrigger.Node{ID: n.nodeID, Kind: "agent", Region: n.region}
	if n.checkEvery == 0 {
		n.checkEvery = -1 // the agent's word for never
	}
	var sessionKeys func() *identity.Keys
	if keys != nil {
		sessionKeys = keys.Keys
		p.run("session keys", keys.Run)
	}
	a, err := node.New(node.Options{Node: self, SessionKeys: sessionKeys, RepairEvery: n.checkEvery, Origin: origin, DialFeed: p.feedDialer(n.control), FeedHost: targets(n.control)[0], Table: shm.Options{Bytes: n.tableBytes, Name: "outrigger"},
		Access: access, TableIdle: n.tableIdle, Lease: n.lease, Heartbeat: n.heartbeat, Logger: p.log, Meter: p.tel.Meter("cache/node")})
	if err != nil {
		return err
	}
	relayed, err := relay.New(relay.Options{Node: self, Dial: policyDialers(p.dialControl, translate.Servers(n.control, n.nodeID)), Logger: p.log, Meter: p.tel.Meter("xds/relay")})
	if err != nil {
		return err
	}
	so := append(adsserver.TransportOptions(), grpc.MaxRecvMsgSize(16<<20), p.tel.GRPCServer(), takesPings())
	if n.tenant != "" {
		so = append(so, node.BindTenant(n.tenant)...)
	}
	if access != nil {
		so = append(so, access.ServerOptions()...)
	}
	gs := grpc.NewServer(so...)
	pb.RegisterVariablesServer(gs, a)
	pb.RegisterCoherenceServer(gs, a)
	pb.RegisterNodeAdminServer(gs, a.Admin())
	relayed.Register(gs)
	if err := n.keepAnswers(p, gs, access); err != nil {
		return configError{err}
	}
	p.serveGRPC(gl, gs, n.grace)
	p.serveHTTP(hl, p.health(map[string]http.Handler{}), n.grace)
	p.run("agent", a.Run)
	p.run("policy relay", relayed.Run)
	p.run("heap", func(ctx context.Context) error { heap.Keep(ctx, 32<<20); return nil })
	p.run("memory", func(ctx context.Context) error { return keepSmall(ctx, a.Ready(), p.log) })
	p.run("table", func(ctx context.Context) error { return a.ServeTable(ctx, tl) })
	p.run("reports", report.New(report.Options{Conn: origin, Node: wire.NodePB(self), Start: time.Now(), Logger: p.log,
		Collect: func(_ time.Time, d *pb.Delta) bool { d.Cache = a.CacheDelta(); return d.Cache != nil }}).Run)
	p.becomeReady(a.Ready())
	if err := p.announce(); err != nil {
		return err
	}
	return p.wait()
}
