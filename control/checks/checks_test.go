package checks

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// ledger folds a log, as the facts do.
type ledger struct {
	t   *testing.T
	log *memory.Log
}

func (l ledger) fold() (r deploy.Rollout) {
	for ev, err := range l.log.Read(context.Background(), "rollout/r", 1) {
		if err == nil {
			err = r.Apply(ev)
		}
		if err != nil {
			l.t.Error(err)
		}
	}
	return r
}

func (l ledger) RunningRollouts() []deploy.Rollout {
	if r := l.fold(); r.Live() {
		return []deploy.Rollout{r}
	}
	return nil
}

func question1() question {
	return questionOf(&deploy.Rollout{ID: "r", Model: "m", Candidate: "v2", LastGood: "v1", State: deploy.Running,
		Phases: []deploy.Phase{{Name: "canary", Weight: 100}}}, &pb.RolloutCheck{Metadata: map[string]string{"k": "v"}})
}

// TestAnswers: what each sort of answer means.
func TestAnswers(t *testing.T) {
	var got question
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewDecoder(r.Body).Decode(&got)
		switch r.URL.Path {
		case "/200":
		case "/201":
			w.WriteHeader(201)
		case "/202":
			w.WriteHeader(202)
		case "/204":
			w.WriteHeader(204)
		case "/302":
			http.Redirect(w, r, "/200", http.StatusFound)
		default:
			http.Error(w, strings.Repeat("no ", 1000), 500)
		}
	}))
	defer web.Close()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gs, hs := grpc.NewServer(), grpchealth.NewServer()
	healthpb.RegisterHealthServer(gs, hs)
	hs.SetServingStatus("good", healthpb.HealthCheckResponse_SERVING)
	hs.SetServingStatus("bad", healthpb.HealthCheckResponse_NOT_SERVING)
	go func() { _ = gs.Serve(lis) }()
	defer gs.Stop()
	dead := httptest.NewServer(nil)
	dead.Close()
	allowed, err := New(Options{Log: memory.New(), Rollouts: ledger{t, memory.New()}, AllowExec: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		check  *pb.RolloutCheck
		want   deploy.Outcome
		reason string
	}{
		{&pb.RolloutCheck{Url: web.URL + "/200"}, deploy.Pass, "status 200"},
		{&pb.RolloutCheck{Url: web.URL + "/201"}, deploy.Pass, "status 201"},
		{&pb.RolloutCheck{Url: web.URL + "/202"}, deploy.Pass, "status 202"},
		{&pb.RolloutCheck{Url: web.URL + "/204"}, deploy.Fail, "status 204"},
		{&pb.RolloutCheck{Url: web.URL + "/302"}, deploy.Fail, "status 302"},
		{&pb.RolloutCheck{Url: web.URL + "/500"}, deploy.Fail, "status 500 no no"},
		{&pb.RolloutCheck{Url: dead.URL}, deploy.Inconclusive, "refused"},
		{&pb.RolloutCheck{Url: "grpc://" + lis.Addr().String() + "/good"}, deploy.Pass, "SERVING"},
		{&pb.RolloutCheck{Url: "grpc://" + lis.Addr().String() + "/bad"}, deploy.Fail, "NOT_SERVING"},
		{&pb.RolloutCheck{Url: "grpc://" + lis.Addr().String() + "/unknown"}, deploy.Fail, "unknown service"},
		{&pb.RolloutCheck{Command: []string{"sh", "-c", "cat | grep -q v2"}}, deploy.Pass, "exit code 0"},
		{&pb.RolloutCheck{Command: []string{"sh", "-c", "echo broken; exit 3"}}, deploy.Fail, "exit code 3: broken"},
		{&pb.RolloutCheck{Command: []string{"/no/such/program"}}, deploy.Inconclusive, "no such file"},
		{&pb.RolloutCheck{Command: []string{"sh", "-c", "read x; read y < /dev/zero"}, Timeout: durationpb.New(50 * time.Millisecond)}, deploy.Inconclusive, "timeout"},
	} {
		got = question{}
		outcome, reason := allowed.askOne(t.Context(), c.check, question1())
		if outcome != c.want || !strings.Contains(reason, c.reason) || len(reason) > maxReason+4 {
			t.Errorf("%v: %s %q, want %s with %q", c.check, outcome, reason, c.want, c.reason)
		}
		if c.check.GetUrl() == web.URL+"/200" && (got.Name != "m" || got.Checksum != "v2" || got.Phase != "Progressing" || got.Metadata["k"] != "v" || got.Metadata["last_good"] != "v1") {
			t.Errorf("the hook was told %+v", got)
		}
	}
	refuses, err := New(Options{Log: memory.New(), Rollouts: ledger{t, memory.New()}})
	if err != nil {
		t.Fatal(err)
	}
	if outcome, _ := refuses.askOne(t.Context(), &pb.RolloutCheck{Command: []string{"true"}}, question1()); outcome != deploy.Inconclusive {
		t.Errorf("a command ran where none is allowed: %s", outcome)
	}
}

// TestRunner: a check is asked until it passes and not again; each new answer is one event.
func TestRunner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ledger{t, memory.New()}
		gate := &pb.RolloutGate{Name: "g", Kind: deploy.GateTest, Check: &pb.RolloutCheck{Url: "http://x", Hook: deploy.HookConfirmIncrease, Interval: durationpb.New(10 * time.Second)}}
		l.append(&pb.Event{Payload: &pb.Event_RolloutStarted{RolloutStarted: &pb.RolloutStarted{Model: "m", Candidate: "v2", LastGood: "v1",
			Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 100, Gates: []*pb.RolloutGate{gate}}}}}})
		r, err := New(Options{Log: l.log, Rollouts: l})
		if err != nil {
			t.Fatal(err)
		}
		answers, asked := []deploy.Outcome{deploy.Inconclusive, deploy.Fail, deploy.Fail, deploy.Pass, deploy.Fail}, 0
		r.ask = func(context.Context, *pb.RolloutCheck, question) (deploy.Outcome, string) {
			asked++
			return answers[asked-1], "because"
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(5 * time.Minute)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if asked != 4 || l.log.Head() != 3 || l.fold().Decided["g"].GetOutcome() != string(deploy.Pass) {
			t.Errorf("asked %d times, %d events, decided %v", asked, l.log.Head(), l.fold().Decided)
		}
	})
}

func (l ledger) append(e *pb.Event) {
	if _, err := l.log.Append(context.Background(), "", eventlog.Write{Aggregate: "rollout/r", Expect: eventlog.Any, Events: []*pb.Event{e}}); err != nil {
		l.t.Fatal(err)
	}
}
