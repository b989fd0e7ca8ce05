package alerts

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

// How a route is tried: the limit of one attempt, the pauses after failures, and how many
// attempts a message gets.
const (
	attemptTimeout = 10 * time.Second
	firstPause     = time.Second
	longestPause   = time.Minute
	maxAttempts    = 15
)

// Alertmanager forgets an alert that is not repeated: it is told every repeatEvery that the
// alert goes on for another repeatFor.
const (
	repeatEvery = time.Minute
	repeatFor   = 4 * time.Minute
)

// resolved is what is told when an alert is over; otherwise its severity is.
const resolved = "resolved"

// target is one message's addressee and subject: an alert since it was raised.
type target struct {
	route, alert string
	since        time.Time
}

// try is what is remembered about a target beside the facts.
type try struct {
	told     string // what was tried last
	had      string // the severity that was delivered last; "" = none
	attempts uint32
	err      string
	settled  bool      // delivered or given up; the facts may not have it yet
	sent     time.Time // the last delivery
}

// road is a route and how it fares.
type road struct {
	*Route
	busy     bool
	failures int // in a row
	next     time.Time
}

// message is one notification under way.
type message struct {
	target
	*Route
	a        *facts.Alert
	told     string
	before   string   // the severity told before, "" if none
	contacts []string // reached by the route, those on call first
	attempts uint32   // including this one
	repeat   bool     // nothing new: nothing to record
	at       time.Time
}

// result is how a message went.
type result struct {
	message
	err   string // "" = delivered
	final bool   // no further attempt
	pause time.Duration
}

// notify tells the routes what is due until ctx ends.
func (s *Service) notify(ctx context.Context) error {
	results := make(chan result, MaxRoutes)
	tick := time.NewTicker(s.opts.Tick)
	defer tick.Stop()
	under := 0
	for {
		f := s.opts.Facts.Facts()
		s.repave()
		s.log(f)
		s.forget(f)
		under += s.dispatch(ctx, f, results)
		select {
		case r := <-results:
			under--
			s.settle(ctx, r)
		case <-tick.C:
		case <-ctx.Done():
			for ; under > 0; under-- { // their requests end with ctx
				<-results
			}
			return nil
		}
	}
}

// dispatch starts what is due, one message per idle route, the most severe first.
func (s *Service) dispatch(ctx context.Context, f *facts.Facts, results chan<- result) (started int) {
	now := s.opts.Now()
	for i := range s.roads {
		r := s.roads[i]
		if r.busy || now.Before(r.next) {
			continue
		}
		m, ok := s.pick(f, r.Route, now)
		if !ok {
			continue
		}
		r.busy = true
		started++
		go func() { results <- s.attempt(ctx, m) }()
	}
	return started
}

// pick chooses the most severe message that is due to a route.
func (s *Service) pick(f *facts.Facts, r *Route, now time.Time) (best message, found bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rank alerting.Severity
	for _, a := range f.Alerts() {
		m, ok := s.due(f, a, r, now)
		if !ok || found && severityOf(a) <= rank {
			continue
		}
		best, found, rank = m, true, severityOf(a)
	}
	return best, found
}

// due says what a route has to be told about an alert now. s.mu is held.
func (s *Service) due(f *facts.Facts, a *facts.Alert, r *Route, now time.Time) (message, bool) {
	contacts, used := reach(r, contactsOf(f, a))
	if !used || now.Before(a.SilencedUntil) {
		return message{}, false
	}
	t := target{r.Name, a.ID, a.Since}
	x := s.last(t, a)
	m := message{target: t, Route: r, a: a, told: a.Severity, before: x.had, contacts: names(contacts), attempts: 1, at: now}
	if !a.ResolvedAt.IsZero() {
		m.told = resolved
	}
	if x.told == m.told && !x.settled {
		m.attempts = x.attempts + 1
	}
	known, err := alerting.ParseSeverity(x.told)
	switch {
	case m.told == resolved: // only whoever knows that it began
		return m, x.had != "" && !(x.settled && x.told == resolved)
	case severityOf(a) < r.AtLeast:
		return m, false
	case x.settled && err == nil && known >= severityOf(a):
		m.repeat = r.Kind == Alertmanager && x.had == a.Severity && now.Sub(x.sent) >= repeatEvery
		return m, m.repeat
	}
	return m, s.turn(f, a, r, contacts)
}

// last is what a target was told last: what is remembered, else what the facts say.
func (s *Service) last(t target, a *facts.Alert) try {
	if x, ok := s.tries[t]; ok {
		return x
	}
	if d := a.Delivery(t.route); d != nil {
		x := try{told: d.GetTold(), attempts: d.GetAttempts(), err: d.GetError(), settled: true}
		if d.GetDelivered() && x.told != resolved {
			x.had = x.told
		}
		return x
	}
	return try{}
}

// turn reports whether a route may be told now: one that reaches nobody on call waits until
// those that do were tried once.
func (s *Service) turn(f *facts.Facts, a *facts.Alert, r *Route, contacts []contact) bool {
	if onCall(contacts) {
		return true
	}
	for i := range s.roads {
		o := s.roads[i].Route
		reached, used := reach(o, contactsOf(f, a))
		if o == r || !used || !onCall(reached) || severityOf(a) < o.AtLeast {
			continue
		}
		if x := s.last(target{o.Name, a.ID, a.Since}, a); x.told != a.Severity {
			return false
		}
	}
	return true
}

// settle takes note of how a message went.
func (s *Service) settle(ctx context.Context, r result) {
	now := s.opts.Now()
	what := "delivered"
	for i := range s.roads {
		if road := s.roads[i]; road.Route == r.Route {
			road.busy = false
			if r.pause == 0 {
				road.failures = 0
				continue
			}
			road.failures++
			road.next = now.Add(r.pause)
		}
	}
	s.mu.Lock()
	x := s.tries[r.target]
	switch {
	case r.err == "":
		x = try{told: r.told, had: r.told, attempts: r.attempts, settled: true, sent: now}
		if r.told == resolved {
			x.had = r.before
		}
	case r.repeat: // what was told still was; it is repeated after the pause
		what = "retried"
	default:
		x = try{told: r.told, had: r.before, attempts: r.attempts, err: r.err, settled: r.final}
		if what = "retried"; r.final {
			what = "failed"
		}
	}
	s.tries[r.target] = x
	s.mu.Unlock()
	s.inst.notifications.Add(ctx, 1, metric.WithAttributes(attribute.String("route", r.Route.Name), attribute.String("result", what)))
	log := s.opts.Logger.With("alert", r.alert, "route", r.Route.Name, "kind", r.Kind, "told", r.told)
	switch what {
	case "retried":
		log.Warn("route not told; retrying", "attempts", r.attempts, "pause", r.pause, "error", r.err)
	case "failed":
		log.Error("route not told; given up", "attempts", r.attempts, "error", r.err)
	default:
		if !r.repeat {
			log.Info("route told", "attempts", r.attempts)
		}
	}
}

// attempt sends one message and records its end in the log. It runs beside the loop.
func (s *Service) attempt(ctx context.Context, m message) result {
	out := result{message: m, final: true}
	wait, permanent, err := s.send(ctx, m)
	if err != nil {
		out.err = err.Error()
		out.final = permanent || m.attempts >= maxAttempts
		out.pause = pause(m.attempts, wait)
	}
	if ctx.Err() != nil || m.repeat || !out.final {
		return out
	}
	told := &pb.AlertNotified{Route: m.Route.Name, Kind: m.Kind, Contacts: m.contacts, Told: m.told, Delivered: out.err == "", Attempts: m.attempts, Error: out.err}
	if err := s.append(ctx, m.alert, &pb.Event{Payload: &pb.Event_AlertNotified{AlertNotified: told}}); err != nil {
		s.opts.Logger.Warn("the log does not have that a route was told; after a restart it is told again", "alert", m.alert, "route", m.Route.Name, "error", err)
	}
	return out
}

// pause is how long a route waits after a failure: doubling, a fifth more or less so that
// replicas do not come back together, and not less than it asked for.
func pause(attempts uint32, wait time.Duration) time.Duration {
	d := min(firstPause<<min(attempts-1, 6), longestPause)
	d += time.Duration((rand.Float64() - 0.5) * 0.4 * float64(d))
	return max(d, min(wait, longestPause))
}

// log writes every alert's beginnings and ends once.
func (s *Service) log(f *facts.Facts) {
	for _, a := range f.Alerts() {
		state := a.Severity
		if !a.ResolvedAt.IsZero() {
			state = resolved
		}
		before, known := s.logged[a.ID]
		if before == state || !known && state == resolved {
			continue
		}
		s.logged[a.ID] = state
		if state == resolved {
			s.opts.Logger.Info("alert resolved", "alert", a.ID)
			continue
		}
		s.opts.Logger.Warn("alert", "alert", a.ID, "severity", a.Severity, "summary", a.Summary, "silenced", s.opts.Now().Before(a.SilencedUntil))
	}
}

// forget drops what is remembered about alerts that are gone from the facts or were raised
// anew.
func (s *Service) forget(f *facts.Facts) {
	since := make(map[string]time.Time)
	for _, a := range f.Alerts() {
		since[a.ID] = a.Since
	}
	for id := range s.logged {
		if _, ok := since[id]; !ok {
			delete(s.logged, id)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.tries {
		if !since[t.alert].Equal(t.since) {
			delete(s.tries, t)
		}
	}
}

// contact is somebody an alert is for.
type contact struct {
	name   string
	onCall bool
}

func names(cs []contact) (out []string) {
	for _, c := range cs {
		out = append(out, c.name)
	}
	return out
}

func onCall(cs []contact) bool {
	return slices.ContainsFunc(cs, func(c contact) bool { return c.onCall })
}

// contactsOf are whom an alert is for: those it names, else those of the deployment plan
// in force; those on call first.
func contactsOf(f *facts.Facts, a *facts.Alert) (out []contact) {
	if d := f.Deployment(); d != nil {
		for _, c := range d.File.Rollback.Contacts {
			if len(a.Notify) == 0 || slices.Contains(a.Notify, c.Team) {
				out = append(out, contact{c.Team, c.OnCall})
			}
		}
	}
	for i, name := range a.Notify {
		if !slices.ContainsFunc(out, func(c contact) bool { return c.name == name }) {
			out = append(out, contact{name, i == 0}) // of an older plan; its first was on call
		}
	}
	slices.SortStableFunc(out, func(x, y contact) int {
		switch {
		case x.onCall == y.onCall:
			return 0
		case x.onCall:
			return -1
		}
		return 1
	})
	return out
}

// reach is whom of an alert's contacts a route reaches, and whether it is used at all. One
// that names no contacts reaches all; an alert that is for nobody in particular uses every
// route.
func reach(r *Route, all []contact) (out []contact, used bool) {
	if len(r.Contacts) == 0 || len(all) == 0 {
		return all, true
	}
	for _, c := range all {
		if slices.Contains(r.Contacts, c.name) {
			out = append(out, c)
		}
	}
	return out, len(out) > 0
}

// Deliveries says whom an alert is for and what became of telling them: every route that
// was tried, and every contact that no route reaches.
func (s *Service) Deliveries(f *facts.Facts, a *facts.Alert) (notify []string, out []*pb.AlertDelivery) {
	contacts := contactsOf(f, a)
	unreached := slices.Clone(contacts)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.routes {
		r := &s.routes[i]
		reached, _ := reach(r, contacts)
		unreached = slices.DeleteFunc(unreached, func(c contact) bool { return slices.Contains(reached, c) })
		d, x := a.Delivery(r.Name), s.tries[target{r.Name, a.ID, a.Since}]
		switch {
		case x.told != "" && !x.settled:
			out = append(out, &pb.AlertDelivery{Route: r.Name, Kind: r.Kind, Contacts: names(reached), Told: x.told, Attempts: x.attempts, Error: x.err})
		case d != nil:
			out = append(out, deliveryPB(d))
		}
	}
	for i := range a.Deliveries { // by routes there are no more
		if d := &a.Deliveries[i]; !slices.ContainsFunc(s.routes, func(r Route) bool { return r.Name == d.GetRoute() }) {
			out = append(out, deliveryPB(d))
		}
	}
	for _, c := range unreached {
		out = append(out, &pb.AlertDelivery{Contacts: []string{c.name}, Error: "no route reaches " + c.name})
	}
	slices.SortStableFunc(out, func(x, y *pb.AlertDelivery) int {
		return cmp.Or(strings.Compare(x.GetRoute(), y.GetRoute()))
	})
	return names(contacts), out
}

func deliveryPB(d *facts.Delivery) *pb.AlertDelivery {
	return &pb.AlertDelivery{Route: d.GetRoute(), Kind: d.GetKind(), Contacts: d.GetContacts(), Told: d.GetTold(),
		Delivered: d.GetDelivered(), Attempts: d.GetAttempts(), Error: d.GetError(), At: timestamppb.New(d.At)}
}
