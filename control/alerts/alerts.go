// Package alerts raises alerts about what sidecars report, and tells people about every
// alert of the log.
//
//	s, err := alerts.New(alerts.Options{Log: log, Facts: projection, Subjects: monitor.Subjects, Routes: routes})
//	go s.Run(ctx)
//
// # Rules
//
// Every Tick each rule of the deployment plan in force (alerting.Defaults without one) is
// read for each version that has answered requests in the last minute, and what
// alerting.Next decides is one event: the alert rule-<rule>-<model>-<version> is raised,
// raised again more severe, or resolved. The event has the numbers: value, interval and n of
// every metric, the condition, thresholds and subject. Alerts survive a restart: those that
// stand in the log are taken over. At most maxStanding of them stand at a time; more at once
// are one incident, and a log line says so.
//
// Objectives of the plan (monitoring.objectives) are read each tick, too, over what a model's
// requests came to in the windows of alerting.Burns: burn-<1h, 6h or 3d>-<model> is raised
// while the error budget is spent too fast and resolves when the short window says so.
//
// # Routes
//
// A Route is told about every alert of the log (rollbacks, rejections and freshness
// included) that is at least as severe as it asks for and not silenced: once, again when it
// gets more severe, and when it is over. Whom a route reaches are the contacts of the
// deployment plan (rollback.emergency_contacts, or the rollout's own); a route that names
// contacts is used only for them. Routes that reach somebody on call are tried first: the
// others follow when those were tried once. All alerts are logged, whatever the routes.
//
// What became of telling a route is an event, too (alert_notified), so nobody is told again
// after a restart. Delivery is at least once: a crash between the two, or several replicas
// over one log, tell twice; webhooks carry an Idempotency-Key. Routes may change while the
// service runs: one that is new or changed is told what stands and its name was not told yet.
//
// # Bounds and failure
//
// Nothing is queued: what is due follows from the alerts of the facts (facts.MaxAlerts) and
// what each route was told. One message is under way per route, of at most MaxRoutes. A
// failure (no answer in 10 s, status 408, 429 or 5xx) makes the route wait, from 1 s doubling
// to 1 min or as long as Retry-After says, and the message is given up after maxAttempts
// (about 10 min) with an event that says so; the next severity tries anew. Any other answer
// that is not 2xx gives up at once. Neither the monitor nor the log waits for a receiver.
// URLs and tokens are secrets: they are in no event, log line, metric or error.
//
// All methods may be called concurrently; Run may be called once and returns when its
// goroutines have ended.
package alerts

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"golang.org/x/sync/errgroup"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

// Options of a Service. Log, Facts and Subjects are required.
type Options struct {
	Log      eventlog.Appender
	Facts    *facts.Projection
	Subjects func() []monitor.Subject
	// Spent says what a model's requests came to in a window; nil = objectives of the plan
	// are not looked at.
	Spent func(model string, window time.Duration) alerting.Spent
	// Routes are who is told; ReadRoutes reads them from a file. Reread, if it is not nil, is
	// called every 2 s: what it returns replaces them, what it refuses is the alert
	// alert-routes.
	Routes []Route
	Reread func() ([]Route, error)
	// Region is where this is, for receivers.
	Region string
	// Tick is how often rules and routes are looked at. Default 1 s.
	Tick time.Duration
	// Transport carries notifications; nil = http.DefaultTransport.
	Transport http.RoundTripper
	Now       func() time.Time // nil = time.Now
	Logger    *slog.Logger     // nil = discard
	Meter     metric.Meter     // nil = no metrics
}

// Service raises alerts and tells people.
type Service struct {
	opts   Options
	client *http.Client
	inst   instruments

	// Only the goroutine of rules.
	tracked map[string]tracked
	rules   ruleSet
	burning map[string]alerting.Status // by alert

	// Only the goroutine of routes.
	logged map[string]string // what was logged about an alert, by its id
	roads  []*road

	mu     sync.Mutex
	routes []Route        // in force; replaced, never modified
	tries  map[target]try // messages that are not settled in the facts
}

// New starts nothing. Errors have kind Invalid, or are those of the Meter.
func New(o Options) (*Service, error) {
	if o.Log == nil || o.Facts == nil || o.Subjects == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "alerts needs Log, Facts and Subjects; one is nil")
	}
	if err := checkRoutes(o.Routes); err != nil {
		return nil, err
	}
	o.Tick = cmp.Or(o.Tick, time.Second)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noop.Meter{}
	}
	s := &Service{opts: o, tracked: make(map[string]tracked), burning: make(map[string]alerting.Status), logged: make(map[string]string), tries: make(map[target]try), routes: o.Routes}
	// A redirect would carry the token elsewhere.
	s.client = &http.Client{Timeout: attemptTimeout, Transport: o.Transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	var err error
	s.inst, err = newInstruments(o.Meter)
	return s, err
}

// Run looks at rules and routes until ctx ends and then returns nil.
func (s *Service) Run(ctx context.Context) error {
	select {
	case <-s.opts.Facts.Ready():
	case <-ctx.Done():
		return nil
	}
	s.adopt()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.every(ctx, s.lookAtAll) })
	g.Go(func() error { return s.notify(ctx) })
	if s.opts.Reread != nil {
		g.Go(func() error { return s.follow(ctx) })
	}
	return g.Wait()
}

func (s *Service) lookAtAll(ctx context.Context) {
	s.lookAtRules(ctx)
	s.lookAtBudgets(ctx)
}

func (s *Service) every(ctx context.Context, look func(context.Context)) error {
	tick := time.NewTicker(s.opts.Tick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			look(ctx)
		}
	}
}

// appendTimeout bounds one append, so that a stuck log delays other alerts by no more.
const appendTimeout = 5 * time.Second

// append writes one event of an alert and waits until the facts have it.
func (s *Service) append(ctx context.Context, id string, e *pb.Event) error {
	e.Actor, e.Source, e.Schema = source, source, 1
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	done, err := s.opts.Log.Append(ctx, "", eventlog.Write{Aggregate: facts.AlertPrefix + id, Expect: eventlog.Any, Events: []*pb.Event{e}})
	if err != nil {
		return err
	}
	_, err = s.opts.Facts.Wait(ctx, done.Last)
	return err
}

// source is the actor of what this package writes.
const source = "alerts"

// instruments are the package's own metrics.
type instruments struct {
	steps         metric.Int64Counter
	notifications metric.Int64Counter
}

func newInstruments(meter metric.Meter) (i instruments, err error) {
	if i.steps, err = meter.Int64Counter("outrigger.alerts.steps",
		metric.WithDescription("Steps of alerts by rules: raise, escalate, resolve"), metric.WithUnit("{step}")); err != nil {
		return i, err
	}
	i.notifications, err = meter.Int64Counter("outrigger.alerts.notifications",
		metric.WithDescription("Attempts to tell a route about an alert, by route and result: delivered, retried, failed"), metric.WithUnit("{attempt}"))
	return i, err
}
