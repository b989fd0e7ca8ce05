// Package control is the control plane of one region, assembled over one event log.
//
//	s, err := control.New(control.Options{Log: log, Region: &pb.Region{Name: "eu"}})
//	s.RegisterGRPC(grpcServer)            // Variables, Coherence, Reports, Outcomes, Admin, Delivery, ADS
//	httpServer.Handler = s.Handler()      // REST, status page, health
//	err = s.Run(ctx)                      // owns every goroutine; <-s.Ready() when it serves
//
// # What it does
//
// Facts (package facts) are folded from the log. Admin verbs decide on them and append
// events; the monitor does the same for rollouts. Whenever facts that policy depends on
// change, they are compiled (package compile), encoded as xDS and pushed. So the one way
// to change anything is an event, and the policy in force is a function of the log: any
// number of Servers over one log compile the same bytes. With Options.Follow a Server has a copy
// of another one's log (package replicate): it answers, compiles and watches its own clients,
// and leaves weighing evidence and deciding to the Server that owns the log.
//
// # Promises
//
//   - A verb answers after its events are durable and this replica shows them.
//   - Decisions of several replicas on the same model, experiment or rollout never mix:
//     every append expects the sequences it was decided on. A verb that lost such a race
//     decides once more and then fails with kind Conflict.
//   - A lone change is pushed at once; bursts are pushed at most every Options.Debounce.
//   - One model that cannot be served is left out and shown as an alert. A policy that
//     cannot be compiled or pushed at all leaves the last good one in force, and raises
//     the alert "policy" once.
//   - A log that lost its disk takes nothing away: clients that come back with models it
//     never had keep them, are sent nothing, and are the alert "unknown-configuration",
//     until it has had those models again or Options.AdoptClients says that it is right.
//   - A rejection by a client is an alert at once, one per rejected resource, that names
//     the node and its reason and is resolved when nobody rejects it any more.
//
// # Who may call
//
// The admin API, the REST interface and the status page are for operators: see
// internal/authz for the rules (this machine, or a bearer token of a person with a role).
// Who is acting is who the credential says; a change that is refused, for its caller or
// for its moment, is recorded as action_refused and changes nothing. The services of the
// mesh itself (Variables, Coherence, Reports, Outcomes, OTLP metrics, ADS) are not judged here: whoever owns the
// listener decides who connects, by mutual TLS or by binding to a private address.
//
// # Failure
//
// If the log fails, Run returns its error and everything that would write fails with
// kind Unavailable; reads go on from memory until the process ends. Overload is the log's
// back-pressure and bounded bodies, lists and streams. Bad input fails with kind Invalid
// and names the field, the value and what is allowed.
//
// All methods may be called concurrently; Run may be called once.
package control

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/alerts"
	"github.com/outrigger-mesh/outrigger/control/artifacts"
	"github.com/outrigger-mesh/outrigger/control/checks"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/dashboard"
	"github.com/outrigger-mesh/outrigger/control/delivery"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/mlflow"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/control/otlp"
	"github.com/outrigger-mesh/outrigger/control/replicate"
	"github.com/outrigger-mesh/outrigger/control/secrets"
	"github.com/outrigger-mesh/outrigger/control/trials"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// DefaultDebounce is the longest pause between the pushes of a burst.
const DefaultDebounce = 10 * time.Millisecond

// Options of a Server. Log and Region.Name are required; zero values of the rest get the
// defaults named.
type Options struct {
	// Log is the region's event log. The Server does not close it.
	Log eventlog.Log
	// Region is this region: its name, and where its gateway is. It is registered in the
	// log when Run starts, unless it is there already.
	Region *pb.Region
	// AdminToken is what operators must present; empty = only this machine is served.
	AdminToken string
	// Access are the people that may operate and what they may do, asked at every call, so
	// that they can change while the server runs; nil = nobody beside AdminToken.
	Access func() authz.Policy
	// RequirePeer refuses everybody without a verified client certificate (package
	// internal/identity), but for operators with a token and health. ServerOptions and
	// Credentials must be the gRPC server's then.
	RequirePeer bool
	// Hosts are names beside localhost that HTTP callers may use for this server.
	Hosts []string
	// Debounce is the longest pause between pushes of a burst; 0 = DefaultDebounce.
	Debounce time.Duration
	// DeadMan is how long a sidecar may be cut off while a candidate is live; 0 =
	// compile.DefaultDeadMan. Replicas over one log must agree on it.
	DeadMan time.Duration
	// Regions is the live view of all regions and its source ("consul", "file"); nil =
	// the regions registered in the log, "self".
	Regions func() ([]*pb.Region, string)
	// Metrics serves /metrics; nil = 404.
	Metrics http.Handler
	// AllowExec lets automated_test gates run commands on this machine. Off by default:
	// whoever may start a rollout could run anything.
	AllowExec bool
	// Artifacts keeps the files of model versions; nil = there is no such store. The Server
	// does not close it.
	Artifacts *artifacts.Store
	// Follow makes this replica follow another one's log, which must be Log then; nil = this
	// replica owns the log, and others may follow it.
	Follow *Following
	// GlassFile is where emergency kills are kept until the log has them; "" = in memory.
	GlassFile string
	// Monitor, ADS and Variables tune the parts; what the Server wires itself (logs,
	// ledgers, projections, meters) is overwritten.
	Monitor   monitor.Options
	ADS       adsserver.Options
	Variables variables.Options
	// AdoptClients has clients drop what they come back with and this log never had. Without it
	// they keep that, and are sent nothing else: see strangers.go.
	AdoptClients bool
	// Envoy is where Envoys take requests; replicas over one log must agree on it.
	Envoy translate.EnvoyOptions
	// Secrets are the certificates and trust bundles that versions may name; nil = there are
	// none. The Server runs the watch.
	Secrets *secrets.Watch
	// AlertRoutes are who is told about alerts beside the log: see package control/alerts.
	// AlertRoutesAgain, if it is not nil, reads them again every 2 s.
	AlertRoutes      []alerts.Route
	AlertRoutesAgain func() ([]alerts.Route, error)
	// Late is how long after its end an experiment takes reports and outcomes; 0 = 10 min.
	Late time.Duration

	Now    func() time.Time // nil = time.Now
	Logger *slog.Logger     // nil = discard
	Meter  metric.Meter     // nil = no metrics
}

// Server is one replica of the control plane.
type Server struct {
	opts      Options
	facts     *facts.Projection
	vars      *variables.Service
	ads       *adsserver.Server
	monitor   *monitor.Monitor
	trials    *trials.Service
	otlp      *otlp.Receiver
	checks    *checks.Runner
	alerts    *alerts.Service
	glass     *breakGlass
	fleet     *fleet
	leader    *replicate.Leader // nil on a follower
	lease     *lease            // nil on a leader
	publisher *publisher
	nacks     *nackWatch
	strangers *strangerWatch
	admin     *admin
	delivery  *deliveryAPI
	canary    *canaryWatch
	guard     *guard
	dashboard *dashboard.Dashboard
	ready     chan struct{} // closed when everything answers and a policy was tried
}

// New wires the parts; it starts nothing and reads nothing. Errors have kind Invalid.
func New(o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noop.Meter{}
	}
	o.Debounce = cmp.Or(o.Debounce, DefaultDebounce)
	if o.Log == nil {
		return nil, invalid("control: Options.Log is nil")
	}
	if err := outrigger.CheckName("Options.Region.Name", o.Region.GetName()); err != nil {
		return nil, err
	}
	rules, err := authz.New(o.AdminToken)
	if err != nil {
		return nil, err
	}
	s := &Server{opts: o, facts: facts.NewProjection(o.Log), ready: make(chan struct{})}
	s.guard = &guard{rules: func() authz.Policy { return rules }, hosts: o.Hosts, ready: s.isReady, current: s.current,
		refusals: &refusals{log: o.Log, now: o.Now, logger: o.Logger}, sessions: newSessions(o.Now)}
	if o.Access != nil {
		s.guard.rules = func() authz.Policy { return authz.Join(rules, o.Access()) }
	}
	if err := s.wireParts(); err != nil {
		return nil, err
	}
	if err := s.wirePublisher(); err != nil {
		return nil, err
	}
	return s, s.wireAdmin()
}

// wireParts builds what serves sidecars.
func (s *Server) wireParts() (err error) {
	v := s.opts.Variables
	v.FeedPeers = s.feedPeer
	v.Region, v.Now, v.Logger, v.Meter = s.opts.Region.GetName(), s.opts.Now, s.opts.Logger, s.opts.Meter
	if f := s.opts.Follow; f != nil {
		v.SweepEvery, v.Confirm = -1, f.Log.Confirm // the leader knows which sessions are used
	} else if s.leader, err = replicate.NewLeader(replicate.LeaderOptions{Log: s.opts.Log, Shown: s.shown, Now: s.opts.Now, Logger: s.opts.Logger}); err != nil {
		return err
	}
	if s.vars, err = variables.New(s.opts.Log, v); err != nil {
		return err
	}
	a := s.opts.ADS
	a.Logger, a.Meter = s.opts.Logger, s.opts.Meter
	s.lease = newLease(s.opts.Follow, s.opts.DeadMan, s.opts.Now)
	a.Lease = s.lease.left
	s.ads = adsserver.New(a)
	s.fleet = newFleet(s.ads, s.leader, s.opts.Now)
	m := s.opts.Monitor
	m.Log, m.Rollouts, m.Ledger, m.Touch = s.opts.Log, rolloutSource{s.facts}, s.fleet, s.vars.Touch
	m.Now, m.Logger, m.Meter = s.opts.Now, s.opts.Logger, s.opts.Meter
	if s.trials, err = trials.New(trials.Options{Log: s.opts.Log, Facts: s.facts.Facts, Ready: s.facts.Ready(), Snapshots: s.opts.Log, Late: s.opts.Late, Answers: s.answer, Now: s.opts.Now, Logger: s.opts.Logger}); err != nil {
		return err
	}
	m.Cost = s.cost
	m.Outcomes = s.trials.Ingest
	s.otlp = otlp.New(otlp.Options{Sink: s.trials, Ready: s.takesOTLP, Now: s.opts.Now})
	m.Experiment = s.experiment
	if s.checks, err = checks.New(checks.Options{Log: s.opts.Log, Rollouts: rolloutSource{s.facts}, Ended: s.endedRollout,
		AllowExec: s.opts.AllowExec, Now: s.opts.Now, Logger: s.opts.Logger}); err != nil {
		return err
	}
	if s.glass, err = newBreakGlass(s.opts.GlassFile, s.opts.Log, s.facts, s.opts.Now, s.opts.Logger); err != nil {
		return err
	}
	if s.monitor, err = monitor.New(m); err != nil {
		return err
	}
	s.alerts, err = alerts.New(alerts.Options{Log: s.opts.Log, Facts: s.facts, Subjects: s.monitor.Subjects, Spent: s.monitor.Spent, Routes: s.opts.AlertRoutes, Reread: s.opts.AlertRoutesAgain,
		Region: s.opts.Region.GetName(), Tick: m.Tick, Now: s.opts.Now, Logger: s.opts.Logger, Meter: s.opts.Meter})
	return err
}

func (s *Server) wirePublisher() (err error) {
	encode := translate.Options{Envoy: s.opts.Envoy}
	s.publisher = &publisher{facts: s.facts, log: s.opts.Log, out: s.fleet, elsewhere: s.fleet.elsewhere, compile: s.compileOptions(), glass: s.glass, lease: s.lease, secrets: s.opts.Secrets, debounce: s.opts.Debounce,
		logger: s.opts.Logger, first: make(chan struct{}), pushed: make(chan struct{}, 1),
		adopt: s.opts.AdoptClients, translate: encode, compiler: compile.NewCompiler(encode), linter: translate.NewLinter()}
	s.canary = &canaryWatch{out: s.fleet, facts: s.facts, log: s.opts.Log, lease: leaseOf(s.compileOptions()), now: s.opts.Now, logger: s.opts.Logger}
	s.strangers = &strangerWatch{out: s.ads, facts: s.facts, log: s.opts.Log, now: s.opts.Now, logger: s.opts.Logger}
	s.nacks = &nackWatch{out: s.ads, facts: s.facts, log: s.opts.Log, now: s.opts.Now, logger: s.opts.Logger}
	if s.publisher.took, err = s.opts.Meter.Float64Histogram("outrigger.control.compile",
		metric.WithDescription("Time to compile, encode and hand over one policy"), metric.WithUnit("s")); err != nil {
		return err
	}
	s.publisher.pushes, err = s.opts.Meter.Int64Counter("outrigger.control.pushes",
		metric.WithDescription("Policies handed to the ADS server"), metric.WithUnit("{push}"))
	return err
}

func (s *Server) wireAdmin() (err error) {
	s.admin = &admin{log: s.opts.Log, facts: s.facts, region: s.opts.Region, now: s.opts.Now, started: s.opts.Now(), allowExec: s.opts.AllowExec, glass: s.glass,
		regions: s.opts.Regions, monitor: s.monitor, told: s.alerts.Deliveries, trials: s.trials, ledger: s.fleet, feeds: s.vars, position: s.publisher.published.Load,
		problems: func(f *facts.Facts) []problem { return problems(f, s.compileOptions()) }}
	if err := s.admin.observe(s.opts.Meter); err != nil {
		return err
	}
	s.delivery = &deliveryAPI{Service: delivery.New(s.ads, s.opts.Now), admin: s.admin, watch: s.canary}
	s.dashboard, err = dashboard.New(dashboard.Options{Region: s.opts.Region.GetName(), Logger: s.opts.Logger, View: s.admin.view, Who: s.who, Act: s.decide})
	return err
}

func (s *Server) compileOptions() compile.Options { return compile.Options{DeadMan: s.opts.DeadMan} }

// rolloutSource is the latest facts as the monitor sees them.
type rolloutSource struct{ *facts.Projection }

// RunningRollouts implements monitor.RolloutSource. Nothing runs before the log has been
// applied: half of a rollout's events would be judged as if they were all.
func (r rolloutSource) RunningRollouts() []deploy.Rollout {
	select {
	case <-r.Ready():
		return r.Facts().RunningRollouts()
	default:
		return nil
	}
}

// endedRollout is the rollout of that id if it has ended.
func (s *Server) endedRollout(id string) (deploy.Rollout, bool) {
	r := s.facts.Facts().Rollout(id)
	if r == nil || !r.State.Ended() {
		return deploy.Rollout{}, false
	}
	return r.Rollout, true
}

// experiment is what an experiment gate asks: it passes when the experiment was concluded
// with the candidate as the arm that gets the traffic.
func (s *Server) experiment(name, model, candidate string) (deploy.Outcome, string) {
	e := s.facts.Facts().Experiment(name)
	switch {
	case e == nil:
		return deploy.Inconclusive, "experiment " + name + " is unknown"
	case e.Model != model:
		return deploy.Inconclusive, "experiment " + name + " is about model " + e.Model
	case e.Life.Outcome == "":
		return deploy.Inconclusive, "experiment " + name + " is " + e.State
	case e.Life.Outcome == experiments.OutcomeInconclusive:
		return deploy.Inconclusive, "experiment " + name + " ended inconclusive"
	}
	for _, arm := range e.Arms {
		if arm.Name == e.Life.Serve && arm.Version == candidate {
			return deploy.Pass, "experiment " + name + " was concluded for " + candidate
		}
	}
	return deploy.Fail, "experiment " + name + " was concluded for arm " + e.Life.Serve
}

// Admin returns the admin API for callers inside the process, who need no admission.
// Its errors are outrigger.Errors, not gRPC statuses.
func (s *Server) Admin() pb.AdminServer { return s.admin }

// Delivery returns what is known of configuration delivery, like Admin.
func (s *Server) Delivery() pb.DeliveryServer { return s.delivery }

// RegisterGRPC adds Variables, Coherence, Reports, Outcomes, Admin, Delivery, client status (CSDS), load reports (LRS) and ADS to a gRPC server.
func (s *Server) RegisterGRPC(r grpc.ServiceRegistrar) {
	v := r
	if s.opts.Follow != nil {
		v = currently{r, s.vars}
	}
	pb.RegisterVariablesServer(v, s.vars.WithTokens())
	pb.RegisterCoherenceServer(v, s.vars)
	s.registerEvidence(r)
	pb.RegisterAdminServer(registrar{r, s.guard}, s.admin)
	pb.RegisterDeliveryServer(registrar{r, s.guard}, s.delivery)
	s.ads.RegisterStatus(registrar{r, s.guard})
	s.ads.Register(r)
}

// Credentials are inner, for a gRPC server on whose port nodes may have their feeds without
// gRPC: see package cache/feed. Without them the feed is a gRPC stream.
func (s *Server) Credentials(inner credentials.TransportCredentials) credentials.TransportCredentials {
	return s.vars.Credentials(inner)
}

// Handler returns REST under /v1, MLflow's model registry under /api/2.0/mlflow, the status page at "/", /healthz (the process is up),
// /readyz (it serves) and /metrics. Health is open to everybody and says nothing else.
func (s *Server) Handler() http.Handler {
	record := s.trials.Record
	if f := s.opts.Follow; f != nil {
		record = outcomeRelay{to: pb.NewOutcomesClient(f.Conn)}.record
	}
	api := http.NewServeMux()
	rest.Register(api, slices.Concat(rest.AdminRoutes(s.admin), rest.DeliveryRoutes(s.delivery), rest.VariableRoutes(s.vars.WithTokens()), rest.OutcomeRoutes(record)), s.guard.begin)
	api.Handle("POST /v1/metrics", s.otlp)
	if s.opts.Artifacts != nil {
		h := s.opts.Artifacts.Handler(s.guard.begin)
		api.Handle("/v1/artifacts", h)
		api.Handle("/v1/artifacts/", h)
	}
	api.HandleFunc("/v1/", func(w http.ResponseWriter, r *http.Request) {
		status.WriteHTTP(w, outrigger.Errorf(outrigger.NotFound, "%s %s not found", r.Method, r.URL.Path))
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { plain(w, nil) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { plain(w, s.isReady()) })
	if s.opts.Metrics != nil {
		mux.Handle("GET /metrics", s.guard.http(s.opts.Metrics))
	}
	mux.Handle("/v1/", s.guard.http(s.guard.whenReady(api)))
	mux.Handle(mlflow.Prefix, s.guard.http(s.guard.whenReady(mlflow.New(mlflow.Options{Registry: s.admin, Gate: s.guard.begin,
		All: func() []*pb.Model { return s.admin.models(s.facts.Facts(), MaxModels) }}))))
	login := s.guard.login(s.dashboard)
	mux.Handle("/login", login)
	mux.Handle("/logout", login)
	mux.Handle("GET /dashboard.css", s.guard.origin(s.dashboard.Handler())) // the sign-in page wants it, too
	mux.Handle("/", s.guard.http(s.guard.whenReady(s.dashboard.Handler())))
	return mux
}

// Drain hands the xDS clients of this replica over before it stops: see adsserver.Server.Drain.
// Run goes on meanwhile, so that those who are still here hear of changes.
func (s *Server) Drain(ctx context.Context, pause time.Duration) error {
	return s.ads.Drain(ctx, pause)
}

func plain(w http.ResponseWriter, err error) {
	if err != nil {
		status.WriteHTTP(w, err)
		return
	}
	w.Header().Set("content-type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("ok\n")) // nobody is left to tell
}

// Ready is closed once the log has been applied and its policy is published. If it cannot
// be published, the server is ready all the same, with the alert "policy" standing and no
// policy for sidecars (they keep their own last good one), so that it can be repaired.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) isReady() error {
	select {
	case <-s.ready:
		return nil
	default:
		return outrigger.Errorf(outrigger.Unavailable, "the control plane is catching up with its log (position %d of %d); retry", s.facts.Applied(), s.opts.Log.Head())
	}
}

// Run serves until ctx ends (then it returns nil) or a part fails (then it returns why),
// and returns when every goroutine has ended.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	tried := s.publisher.first
	s.catchUp(ctx, g)
	for _, part := range append(s.parts(), func(ctx context.Context) error { return s.open(ctx, tried) }) {
		g.Go(func() error {
			err := part(ctx)
			if errors.Is(err, context.Canceled) && ctx.Err() != nil {
				return nil
			}
			return err
		})
	}
	return g.Wait()
}

// open waits for the parts, registers the region and declares the server ready.
func (s *Server) open(ctx context.Context, tried <-chan struct{}) error {
	wait := []<-chan struct{}{s.facts.Ready(), s.vars.Ready(), tried}
	if s.opts.Follow == nil {
		wait = append(wait, s.trials.Loaded())
	}
	for _, c := range wait {
		select {
		case <-c:
		case <-ctx.Done():
			return nil
		}
	}
	if s.opts.Follow == nil {
		s.registerRegion(ctx)
	}
	close(s.ready)
	return nil
}

// registerRegion records this region if the log does not know it as it is. Losing the
// race to another replica is as good, and a log that takes no writes is no reason not to
// serve what is known.
func (s *Server) registerRegion(ctx context.Context) {
	f, own := s.facts.Facts(), s.opts.Region
	next := &pb.Region{Name: own.GetName(), Gateway: own.GetGateway(), Latitude: own.GetLatitude(), Longitude: own.GetLongitude(), Health: "passing"}
	if proto.Equal(f.Region(own.GetName()), next) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	e := &pb.Event{Actor: sourceControl, Source: sourceControl, Schema: 1,
		Payload: &pb.Event_RegionRegistered{RegionRegistered: &pb.RegionRegistered{Region: next}}}
	done, err := s.opts.Log.Append(ctx, "", write(f, facts.RegionPrefix+own.GetName(), e))
	if err == nil {
		_, err = s.facts.Wait(ctx, done.Last)
	}
	if err != nil {
		s.opts.Logger.Warn("region not registered in the log", "region", own.GetName(), "error", err)
	}
}
