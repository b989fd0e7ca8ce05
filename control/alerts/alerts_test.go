package alerts_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/alerts"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

// secret is in every URL and token of these tests and must be nowhere else.
const secret = "T0P-S3CRET"

// nobody is a mesh without rollouts and sidecars.
type nobody struct{}

func (nobody) RunningRollouts() []deploy.Rollout                  { return nil }
func (nobody) Acked(uint64) (acked, laggards []string, done bool) { return nil, nil, false }

// mesh is a log, its facts, a monitor and the service under test.
type mesh struct {
	t       *testing.T
	log     *memory.Log
	facts   *facts.Projection
	monitor *monitor.Monitor
	service *alerts.Service
	logged  *bytes.Buffer // what was logged; read it after stop
	pushes  uint64
	stop    func()
}

// run starts the service over a log; stop ends it.
func run(t *testing.T, log *memory.Log, tick time.Duration, transport http.RoundTripper, routes ...alerts.Route) *mesh {
	t.Helper()
	return runWith(t, log, tick, transport, nil, routes...)
}

// runWith is run with routes that are read again.
func runWith(t *testing.T, log *memory.Log, tick time.Duration, transport http.RoundTripper, again func() ([]alerts.Route, error), routes ...alerts.Route) *mesh {
	t.Helper()
	m := &mesh{t: t, log: log, facts: facts.NewProjection(log), logged: new(bytes.Buffer)}
	var err error
	if m.monitor, err = monitor.New(monitor.Options{Log: log, Rollouts: nobody{}, Ledger: nobody{}}); err != nil {
		t.Fatal(err)
	}
	m.service, err = alerts.New(alerts.Options{Log: log, Facts: m.facts, Subjects: m.monitor.Subjects, Spent: m.monitor.Spent, Routes: routes, Reread: again, Region: "eu",
		Tick: tick, Transport: transport, Logger: slog.New(slog.NewJSONHandler(m.logged, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, part := range []func(context.Context) error{m.facts.Run, m.service.Run} {
		group.Go(func() {
			if err := part(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		})
	}
	stopped := false
	m.stop = func() {
		if !stopped {
			stopped = true
			cancel()
			group.Wait()
		}
	}
	t.Cleanup(m.stop)
	<-m.facts.Ready()
	return m
}

func (m *mesh) append(id string, e *pb.Event) {
	m.t.Helper()
	e.At = timestamppb.Now()
	done, err := m.log.Append(context.Background(), "", eventlog.Write{Aggregate: id, Expect: eventlog.Any, Events: []*pb.Event{e}})
	if err == nil {
		_, err = m.facts.Wait(context.Background(), done.Last)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *mesh) raise(id, severity string) {
	m.append("alert/"+id, &pb.Event{Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{Severity: severity,
		Summary: id + " <is> wrong", Numbers: map[string]string{"rule": "error_rate", "model": "chat", "error_rate": "0.05"}}}})
}

func (m *mesh) resolve(id string) {
	m.append("alert/"+id, &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{}}})
}

// plan configures a deployment plan.
func (m *mesh) plan(text string) {
	m.append(facts.DeploymentAggregate, &pb.Event{Payload: &pb.Event_DeploymentConfigured{DeploymentConfigured: &pb.DeploymentConfigured{
		Name: "plan.yaml", Text: []byte(text), Sha256: fmt.Sprint(len(text))}}})
}

const contacts = "deployment:\n  rollback:\n    emergency_contacts:\n      - {team: product, oncall: false}\n      - {team: engineering, oncall: true}\n"

// report counts requests of chat v2, so many of which failed for users of their own.
func (m *mesh) report(requests, failures int) {
	m.t.Helper()
	m.pushes++
	o := &pb.OutcomeDelta{Model: "chat", Version: "v2", Arm: "v2", Region: "eu", WeightEpoch: 1, Requests: uint64(requests), Failures: uint64(failures)}
	for i := range failures {
		o.FailedUnits = append(o.FailedUnits, uint32(m.pushes)*100_000+uint32(i))
	}
	if err := m.monitor.Ingest(context.Background(), &pb.Delta{Reporter: "pod", Sequence: m.pushes, Outcomes: []*pb.OutcomeDelta{o}}); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mesh) alert(id string) *facts.Alert { return m.facts.Facts().Alert(id) }

// events are the kinds of an alert's events, with the severity or what was told.
func (m *mesh) events(id string) (out []string) {
	for e, err := range m.log.Read(context.Background(), "alert/"+id, 1) {
		if err != nil {
			m.t.Fatal(err)
		}
		switch p := e.GetPayload().(type) {
		case *pb.Event_AlertRaised:
			out = append(out, "raised "+p.AlertRaised.GetSeverity())
		case *pb.Event_AlertResolved:
			out = append(out, "resolved")
		case *pb.Event_AlertNotified:
			n := p.AlertNotified
			out = append(out, fmt.Sprintf("%s told %s %v after %d", n.GetRoute(), n.GetTold(), n.GetDelivered(), n.GetAttempts()))
		}
	}
	return out
}

// A version that begins to fail raises one alert with its numbers, which gets worse as more
// is certain, survives a restart, and is over when the version is well again:
//
//  1. 100 requests a second, one in twenty fails for another user
//  2. the published rule: certainly above 1 % at first, certainly above 2 % later
//  3. another service over the same log takes the alert over and does not raise it again
//  4. no failures any more: a minute later certainly below 1 %, resolved
func TestRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const id = "rule-error_rate-chat-v2"
		log := memory.New()
		m := run(t, log, time.Second, nil)
		m.report(1, 1) // proves nothing
		time.Sleep(3 * time.Second)
		if a := m.alert(id); a != nil {
			t.Fatalf("one failure raised %+v", a)
		}
		for range 60 {
			m.report(100, 5)
			time.Sleep(time.Second)
		}
		a := m.alert(id)
		if a == nil || a.Severity != "critical" || !a.ResolvedAt.IsZero() {
			t.Fatalf("%+v", a)
		}
		for name, want := range map[string]string{"rule": "error_rate", "condition": "error_rate > 0.01", "warning": "0.01", "critical": "0.02", "model": "chat", "version": "v2", "window": "60s"} {
			if a.Numbers[name] != want {
				t.Errorf("%s is %q, want %q", name, a.Numbers[name], want)
			}
		}
		for _, name := range []string{"error_rate", "error_rate low", "error_rate high", "error_rate n", "requests"} {
			if a.Numbers[name] == "" {
				t.Errorf("no number %q in %v", name, a.Numbers)
			}
		}
		was := m.events(id)
		if len(was) < 2 || was[0] == "raised critical" || slices.Contains(was, "resolved") {
			t.Errorf("it did not get worse: %q", was)
		}
		m.stop()

		m = run(t, log, time.Second, nil)
		for range 30 {
			m.report(100, 5)
			time.Sleep(time.Second)
		}
		if got := m.events(id); !slices.Equal(got, was) {
			t.Fatalf("after a restart %q, before %q", got, was)
		}
		for range 120 {
			m.report(100, 0)
			time.Sleep(time.Second)
		}
		if got := m.events(id); !slices.Equal(got, append(was, "resolved")) {
			t.Fatalf("at the end %q", got)
		}
		if n := len(m.facts.Facts().Alerts()); n != 1 {
			t.Errorf("%d alerts", n)
		}
		m.stop()
	})
}

// The plan's rules replace the published ones; "for" waits, and a rule that is gone takes
// its alert along.
func TestRulesOfThePlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := run(t, memory.New(), time.Second, nil)
		m.plan("deployment:\n  monitoring:\n    alerts:\n      busy: {condition: requests > 50, severity: medium, for: 30s}\n")
		for range 25 {
			m.report(100, 50)
			time.Sleep(time.Second)
		}
		if all := m.facts.Facts().Alerts(); len(all) != 0 {
			t.Fatalf("too early, or by another rule: %+v", all[0])
		}
		for range 10 {
			m.report(100, 50)
			time.Sleep(time.Second)
		}
		if a := m.alert("rule-busy-chat-v2"); a == nil || a.Severity != "medium" || a.Numbers["for"] != "30s" {
			t.Fatalf("%+v", a)
		}
		m.plan("deployment:\n  monitoring:\n    alerts:\n      idle: {condition: requests < 1, severity: low}\n")
		time.Sleep(2 * time.Second)
		if a := m.alert("rule-busy-chat-v2"); a.ResolvedAt.IsZero() {
			t.Errorf("stands without its rule: %+v", a)
		}
		m.stop()
	})
}

// receiver answers by a script, one answer per attempt, the last one for ever.
type receiver struct {
	mu     sync.Mutex
	script map[string][]int // status by host; 0 = no answer before the time is up, -1 = refused
	header http.Header
	got    []received
}

type received struct {
	host, body, key, auth string
	at                    time.Time
}

// RoundTrip implements http.RoundTripper.
func (r *receiver) RoundTrip(q *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		return nil, err
	}
	host := q.URL.Hostname()
	r.mu.Lock()
	r.got = append(r.got, received{host, string(body), q.Header.Get("idempotency-key"), q.Header.Get("authorization"), time.Now()})
	code := 200
	if s := r.script[host]; len(s) > 0 {
		if code = s[0]; len(s) > 1 {
			r.script[host] = s[1:]
		}
	}
	header := r.header.Clone()
	r.mu.Unlock()
	switch code {
	case 0:
		<-q.Context().Done()
		return nil, q.Context().Err()
	case -1:
		return nil, errors.New("connection refused")
	}
	return &http.Response{StatusCode: code, Header: header, Body: io.NopCloser(strings.NewReader("answer with " + secret)), Request: q}, nil
}

func (r *receiver) hosts() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.got {
		out = append(out, x.host)
	}
	return out
}

func hook(name string, contacts ...string) alerts.Route {
	return alerts.Route{Name: name, Kind: alerts.Webhook, URL: "https://" + name + "/" + secret, Token: secret, AtLeast: alerting.Medium, Contacts: contacts}
}

// checkNoSecret looks at everything people can see.
func (m *mesh) checkNoSecret() {
	m.t.Helper()
	if strings.Contains(m.logged.String(), secret) {
		m.t.Errorf("the log has the secret: %s", m.logged)
	}
	for e, err := range m.log.ReadAll(context.Background(), 1) {
		if err != nil {
			m.t.Fatal(err)
		}
		if strings.Contains(e.String(), secret) {
			m.t.Errorf("an event has the secret: %v", e)
		}
	}
}

// A receiver that fails for a while is told in the end; one that refuses, or never recovers,
// is given up; the pauses double and the log says everything but the secrets.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{script: map[string][]int{"flaky": {500, -1, 429, 200}, "refuses": {403}, "dead": {503}, "silent": {0, 200}}}
		m := run(t, memory.New(), time.Second, r, hook("flaky"), hook("refuses"), hook("dead"), hook("silent"))
		start := time.Now()
		m.raise("a", "high")
		time.Sleep(3 * time.Second)
		if _, told := m.service.Deliveries(m.facts.Facts(), m.alert("a")); len(told) != 3 || told[0].GetRoute() != "dead" || told[0].GetError() != "status 503" || told[0].GetDelivered() {
			t.Errorf("while it is tried: %v", told)
		}
		time.Sleep(20 * time.Minute)
		m.resolve("a") // only those that were told are told that it is over
		time.Sleep(time.Minute)
		m.stop()
		var got []string
		for _, e := range m.events("a") {
			if !strings.HasPrefix(e, "raised") && e != "resolved" {
				got = append(got, e)
			}
		}
		slices.Sort(got)
		want := []string{"dead told high false after 15", "flaky told high true after 4", "flaky told resolved true after 1",
			"refuses told high false after 1", "silent told high true after 2", "silent told resolved true after 1"}
		if !slices.Equal(got, want) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		var dead []time.Duration
		for _, x := range r.got {
			if x.host == "dead" {
				dead = append(dead, x.at.Sub(start))
			}
			if x.auth != "Bearer "+secret || !strings.HasPrefix(x.key, "a/") {
				t.Fatalf("%+v", x)
			}
		}
		for i := 2; i < 6; i++ { // doubled, a fifth more or less, looked at each second
			if a, b := dead[i-1]-dead[i-2], dead[i]-dead[i-1]; b < a {
				t.Errorf("pauses do not grow: %v", dead)
			}
		}
		if last := dead[14] - dead[13]; last < 48*time.Second || last > 74*time.Second {
			t.Errorf("the last pause is %v", last)
		}
		if !strings.Contains(m.logged.String(), "given up") {
			t.Errorf("the log does not say what was given up: %s", m.logged)
		}
		m.checkNoSecret()
	})
}

// Retry-After is obeyed, within a minute.
func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{script: map[string][]int{"busy": {429, 200}}, header: http.Header{"Retry-After": {"40"}}}
		m := run(t, memory.New(), time.Second, r, hook("busy"))
		m.raise("a", "high")
		time.Sleep(2 * time.Minute)
		m.stop()
		if len(r.got) != 2 || r.got[1].at.Sub(r.got[0].at) < 40*time.Second {
			t.Errorf("%+v", r.got)
		}
	})
}

// Who is told, in which order: the contacts of the plan, those on call first; low alerts
// nobody but the log; a silenced one nobody; a worse one again, the same one not again.
func TestWhoIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{script: map[string][]int{"pager": {500, 200}}}
		m := run(t, memory.New(), time.Second, r, hook("desk", "product"), hook("legal", "lawyers"), hook("pager", "engineering"))
		m.plan(contacts + "      - {team: sales, oncall: false}\n")
		m.raise("a", "high")
		time.Sleep(30 * time.Second)
		if got := r.hosts(); !slices.Equal(got, []string{"pager", "desk", "pager"}) { // desk does not wait for the second try
			t.Fatalf("told %v", got)
		}
		notify, told := m.service.Deliveries(m.facts.Facts(), m.alert("a"))
		if !slices.Equal(notify, []string{"engineering", "product", "sales"}) || len(told) != 3 || told[0].GetError() != "no route reaches sales" ||
			told[1].GetRoute() != "desk" || !told[1].GetDelivered() || told[2].GetRoute() != "pager" || told[2].GetAttempts() != 2 {
			t.Errorf("%v, %v", notify, told)
		}
		before := len(r.hosts())
		m.raise("a", "high") // newer numbers, nothing worse
		m.raise("quiet", "low")
		m.raise("s", "medium")
		m.append("alert/s", &pb.Event{Payload: &pb.Event_AlertSilenced{AlertSilenced: &pb.AlertSilenced{Until: timestamppb.New(time.Now().Add(time.Minute))}}})
		// The look between the two events may have told it already; a fresh one is silenced.
		time.Sleep(30 * time.Second)
		for _, x := range r.got[before:] {
			if !strings.HasPrefix(x.key, "s/") {
				t.Errorf("told %+v", x)
			}
		}
		before = len(r.hosts())
		m.raise("a", "critical")
		time.Sleep(5 * time.Second)
		if got := r.hosts()[before:]; !slices.Equal(got, []string{"pager", "desk"}) {
			t.Errorf("when it got worse: %v", got)
		}
		m.stop()
		if !strings.Contains(m.logged.String(), `"quiet"`) {
			t.Error("the low alert is not in the log")
		}
	})
}

// While an alert is silenced nobody is told, also not that it got worse; afterwards they are.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		log := memory.New()
		m := run(t, log, time.Second, r) // no routes yet: the alert is silenced before anybody is told
		m.raise("a", "medium")
		m.append("alert/a", &pb.Event{Payload: &pb.Event_AlertSilenced{AlertSilenced: &pb.AlertSilenced{Until: timestamppb.New(time.Now().Add(time.Minute))}}})
		m.stop()
		m = run(t, log, time.Second, r, hook("pager"))
		time.Sleep(20 * time.Second)
		m.raise("a", "critical")
		time.Sleep(20 * time.Second)
		if got := r.hosts(); len(got) != 0 {
			t.Fatalf("told %v", got)
		}
		time.Sleep(time.Minute)
		m.stop()
		if got := m.events("a"); got[len(got)-1] != "pager told critical true after 1" || len(r.hosts()) != 1 {
			t.Errorf("%q", got)
		}
	})
}

// A receiver that never answers holds up neither the other routes nor the rules, and Run
// ends all the same.
func TestStuckReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{script: map[string][]int{"stuck": {0}}}
		m := run(t, memory.New(), time.Second, r, hook("stuck"), hook("good"))
		for range 5 {
			m.report(100, 50)
			time.Sleep(time.Second)
		}
		got := m.events("rule-error_rate-chat-v2")
		if !slices.Contains(got, "good told critical true after 1") {
			t.Errorf("%q", got)
		}
		m.stop()
	})
}

// What was told is in the log, so that a restart tells nobody again; only what stands for
// an Alertmanager is repeated, because it forgets.
func TestRestartTellsNobodyAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		log := memory.New()
		am := alerts.Route{Name: "am", Kind: alerts.Alertmanager, URL: "http://am:9093", AtLeast: alerting.Low}
		m := run(t, log, time.Second, r, hook("pager"), am)
		m.raise("a", "high")
		time.Sleep(10 * time.Second)
		m.stop()
		m = run(t, log, time.Second, r, hook("pager"), am)
		time.Sleep(150 * time.Second)
		m.stop()
		count := map[string]int{}
		for _, h := range r.hosts() {
			count[h]++
		}
		if count["pager"] != 1 || count["am"] != 4 { // first, after the restart, and twice in 150 s
			t.Errorf("%v", count)
		}
		if got := m.events("a"); len(got) != 3 {
			t.Errorf("repeats are in the log: %q", got)
		}
	})
}

var labelName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)

// Real receivers over HTTP, one per format: each is told of the beginning, of getting worse
// and of the end in the form that it documents.
func TestReceivers(t *testing.T) {
	bodies := make(chan [2]string, 100)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.Header.Get("content-type") != "application/json" {
			t.Errorf("%s %v %v", r.Method, r.Header, err)
		}
		bodies <- [2]string{r.URL.Path, string(body)}
	}))
	defer srv.Close()
	m := run(t, memory.New(), 20*time.Millisecond, nil,
		alerts.Route{Name: "hook", Kind: alerts.Webhook, URL: srv.URL + "/hook", AtLeast: alerting.Medium},
		alerts.Route{Name: "am", Kind: alerts.Alertmanager, URL: srv.URL + "/prefix/", AtLeast: alerting.Medium},
		alerts.Route{Name: "chat", Kind: alerts.Slack, URL: srv.URL + "/services/" + secret, AtLeast: alerting.Medium})
	m.plan(contacts)
	got := map[string][]string{}
	collect := func(n int) {
		t.Helper()
		for range n {
			select {
			case b := <-bodies:
				got[b[0]] = append(got[b[0]], b[1])
			case <-time.After(time.Minute):
				t.Fatalf("nobody is told any more; so far %v", got)
			}
		}
	}
	m.raise("a", "medium")
	collect(3)
	m.raise("a", "critical")
	collect(3)
	m.resolve("a")
	collect(3)
	m.stop()
	m.checkNoSecret()

	var first, last alerts.Notification
	unmarshal(t, got["/hook"][0], &first)
	unmarshal(t, got["/hook"][2], &last)
	if first.Version != 1 || first.Status != "firing" || first.Severity != "medium" || first.Numbers["error_rate"] != "0.05" || first.Region != "eu" ||
		!slices.Equal(first.Notify, []string{"engineering", "product"}) || first.EndsAt != nil || last.Status != "resolved" || last.EndsAt == nil || last.EndsAt.Before(last.Since) {
		t.Errorf("webhook: %+v … %+v", first, last)
	}

	// Alertmanager, api/v2/openapi.yaml: postableAlerts is a list of alerts with labels
	// (required, names and values not empty), annotations, startsAt, endsAt.
	type am struct {
		Labels, Annotations map[string]string
		StartsAt, EndsAt    time.Time
	}
	var steps [3][]am
	for i, body := range got["/prefix/api/v2/alerts"] {
		unmarshal(t, body, &steps[i])
		for _, a := range steps[i] {
			for k, v := range a.Labels {
				if !labelName.MatchString(k) || v == "" {
					t.Errorf("label %q = %q", k, v)
				}
			}
			for k := range a.Annotations {
				if !labelName.MatchString(k) {
					t.Errorf("annotation %q", k)
				}
			}
			if a.EndsAt.Before(a.StartsAt) || a.Labels["alertname"] != "error_rate" || a.Labels["model"] != "chat" || a.Annotations["numbers"] == "" {
				t.Errorf("%+v", a)
			}
		}
	}
	now := time.Now()
	if len(steps[0]) != 1 || !steps[0][0].EndsAt.After(now) || steps[0][0].Labels["severity"] != "medium" {
		t.Errorf("begins with %+v", steps[0])
	}
	// Its alerts are told apart by labels: that of the old severity ends with the new one.
	if len(steps[1]) != 2 || steps[1][0].Labels["severity"] != "critical" || !steps[1][0].EndsAt.After(now) || steps[1][1].Labels["severity"] != "medium" || steps[1][1].EndsAt.After(now) {
		t.Errorf("gets worse with %+v", steps[1])
	}
	if len(steps[2]) != 1 || steps[2][0].Labels["severity"] != "critical" || steps[2][0].EndsAt.After(now) {
		t.Errorf("ends with %+v", steps[2])
	}

	for i, want := range []string{"[medium] error_rate in eu, for engineering, product", "[critical] ", "[resolved] "} {
		var s struct {
			Text        string
			Attachments []struct {
				Text   string
				Fields []struct{ Title, Value string }
			}
		}
		unmarshal(t, got["/services/"+secret][i], &s)
		if !strings.HasPrefix(s.Text, want) || len(s.Attachments) != 1 || s.Attachments[0].Text != "a &lt;is&gt; wrong" || len(s.Attachments[0].Fields) != 3 {
			t.Errorf("slack: %+v, want %s", s, want)
		}
	}
}

func unmarshal(t *testing.T, text string, to any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), to); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}
