package inference

import (
	"context"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/shelf"
	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// nodeWorld is one node agent's shelf and two sidecars, each with policy and models of its own.
type nodeWorld struct {
	t      *testing.T
	agent  *bufconn.Listener
	server *grpc.Server
	old    bool   // the agent knows no flights
	stop   func() // ends what the pods run
	a, b   *podWorld
}

type podWorld struct {
	h    *Handler
	rt   *scripted
	gate *gated // in place of rt, if the test is about answers on their way
	src  *source
}

func inNodeWorld(t *testing.T, steps []step, do func(t *testing.T, w *nodeWorld)) {
	t.Helper()
	inNodeWorldOf(t, func(p *podWorld) http.RoundTripper {
		p.rt = &scripted{steps: map[string][]step{"a:1": steps, "b:1": {{status: 200, body: `{"v":2}`}}}}
		return p.rt
	}, do)
}

func inNodeWorldOf(t *testing.T, models func(*podWorld) http.RoundTripper, do func(t *testing.T, w *nodeWorld)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(context.Background())
		w := &nodeWorld{t: t, stop: stop}
		w.start()
		var conns []*grpc.ClientConn
		ended := make(chan error, 2)
		pod := func() *podWorld {
			conn, err := grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.agent.DialContext(ctx) }))
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
			p := &podWorld{src: newSource(newPolicy(5000, eps("a:1"), eps("b:1")))}
			p.h = mustNew(t, Options{Policy: p.src.get, Transport: models(p), Answers: newAnswers(t), NodeAnswers: answers.NewNode(conn, nil)})
			go func() { ended <- p.h.RunAnswers(ctx) }()
			return p
		}
		w.a, w.b = pod(), pod()
		do(t, w)
		stop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		for _, c := range conns {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		w.server.Stop()
	})
}

// start begins an agent with an empty shelf.
func (w *nodeWorld) start() {
	begun := time.Now()
	s, err := shelf.New(shelf.Options{Bytes: 64 << 20, Clock: func() int64 { return int64(time.Since(begun)) + 1 }})
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent, w.server = bufconn.Listen(1<<20), grpc.NewServer()
	var service pb.NodeAnswersServer = s
	if w.old {
		service = withoutFlights{s}
	}
	pb.RegisterNodeAnswersServer(w.server, service)
	go func(l net.Listener, g *grpc.Server) { _ = g.Serve(l) }(w.agent, w.server) // its end is Stop's
}

// withoutFlights is an agent of an earlier version.
type withoutFlights struct{ *shelf.Store }

func (withoutFlights) JoinFlight(grpc.BidiStreamingServer[pb.FlightSend, pb.FlightReceive]) error {
	return gstatus.Error(codes.Unimplemented, "unknown method JoinFlight")
}

// ask returns what a pod answered: body, and "hit node", "miss" and the like.
func (w *nodeWorld) ask(p *podWorld, body string, header ...string) (string, string) {
	w.t.Helper()
	r := post(p.h, chatPath, body, header...)
	synctest.Wait() // what it shares is shared
	return r.Body.String(), strings.TrimSpace(r.Header().Get("x-outrigger-cache") + " " + r.Header().Get("x-outrigger-tier"))
}

func (w *nodeWorld) want(p *podWorld, how, body string, asked int, header ...string) {
	w.t.Helper()
	got, from := w.ask(p, zero, header...)
	if got != body || from != how || len(p.rt.log) != asked {
		w.t.Errorf("%q from %q, its models were asked %d times; want %q from %q, %d", got, from, len(p.rt.log), body, how, asked)
	}
}

func users() (stable, candidate string) {
	return unitIn("salt-1", 5000, 10000), unitIn("salt-1", 0, 5000)
}

// What one pod was told another finds, under the rules of the process tier.
func TestPodsShareAnswers(t *testing.T) {
	stable, candidate := users()
	inNodeWorld(t, []step{{status: 200, body: `{"v":1}`, header: http.Header{"X-Kept": {"k"}}}}, func(t *testing.T, w *nodeWorld) {
		w.want(w.a, "miss", `{"v":1}`, 1, "x-user-id", stable)
		w.want(w.b, "hit node", `{"v":1}`, 0, "x-user-id", stable)
		w.want(w.b, "hit process", `{"v":1}`, 0, "x-user-id", stable)
		if r := post(w.b.h, chatPath, zero, "x-user-id", stable); r.Header().Get("X-Kept") != "k" || r.Header().Get("Age") != "0" {
			t.Errorf("header %v", r.Header())
		}
		for name, header := range map[string][]string{
			"other arm":      {"x-user-id", candidate},
			"other tenant":   {"x-user-id", stable, "authorization", "Bearer b"},
			"other pins":     {"x-user-id", stable, "x-outrigger-pins", "t@2"},
			"no-store asked": {"x-user-id", stable, "cache-control", "no-store"},
		} {
			before := len(w.b.rt.log)
			if _, how := w.ask(w.b, zero, header...); strings.HasPrefix(how, "hit") || len(w.b.rt.log) != before+1 {
				t.Errorf("%s: %s, asked %d times", name, how, len(w.b.rt.log)-before)
			}
		}
		if s := w.b.h.LocalStats().NodeAnswers; s.Hits != 1 || s.Failed != 0 {
			t.Errorf("counted %+v", s)
		}
	})
	for name, answered := range map[string]step{
		"no-store answered": {status: 200, body: `{}`, header: http.Header{"Cache-Control": {"no-store"}}},
		"an error":          {status: 400, body: `{}`},
		"too large":         {status: 200, body: `{"v":"` + strings.Repeat("x", shelf.MaxAnswer) + `"}`},
	} {
		inNodeWorld(t, []step{answered}, func(t *testing.T, w *nodeWorld) {
			w.ask(w.a, zero, "x-user-id", stable)
			if _, how := w.ask(w.b, zero, "x-user-id", stable); strings.HasPrefix(how, "hit") {
				t.Errorf("%s is shared: %s", name, how)
			}
		})
	}
}

// A stream that one pod had another gets event for event.
func TestPodsShareStreams(t *testing.T) {
	sse := step{status: 200, ctype: "text/event-stream", body: streamOf("gpt-v1", "a b c")}
	body := strings.Replace(zero, "{", `{"stream":true,`, 1)
	stable, _ := users()
	inNodeWorld(t, []step{sse}, func(t *testing.T, w *nodeWorld) {
		w.ask(w.a, body, "x-user-id", stable)
		r := post(w.b.h, chatPath, body, "x-user-id", stable)
		if r.Body.String() != sse.body || r.Header().Get("Content-Type") != "text/event-stream" || r.Header().Get("x-outrigger-tier") != "node" {
			t.Errorf("replayed %q with %v", r.Body, r.Header())
		}
	})
}

// A version that one pod saw quarantined, or at another upstream name, has no answers on the
// node any more: not for a pod that heard nothing of it, nor when it comes back, nor from a
// pod that offers what it was told before.
func TestRollbackEmptiesTheNode(t *testing.T) {
	_, candidate := users()
	user := []string{"x-user-id", candidate}
	for name, change := range map[string]func(*policy.Model){
		"quarantined": func(m *policy.Model) { m.Versions[1].Quarantined = true },
		"moved":       func(m *policy.Model) { m.Versions[1].Upstream = "elsewhere" },
	} {
		inNodeWorld(t, nil, func(t *testing.T, w *nodeWorld) {
			w.want(w.a, "miss", `{"v":2}`, 1, user...)
			was := w.a.src.p.Load()
			changed := newPolicy(5000, eps("a:1"), eps("b:1"))
			change(&changed.Models[0])
			w.a.src.p.Store(changed)
			time.Sleep(2 * planEvery) // nobody asks meanwhile
			synctest.Wait()
			w.want(w.b, "miss", `{"v":2}`, 1, user...) // b has not heard of it
			back := *was
			w.a.src.p.Store(&back)
			w.want(w.a, "miss", `{"v":2}`, 2, user...)
			if s := w.b.h.LocalStats().NodeAnswers; s.Hits != 0 || s.Stored != 0 {
				t.Errorf("%s: b counted %+v: it brought something back", name, s)
			}
			// With the next change of weights the node shares again.
			next := newPolicy(5000, eps("a:1"), eps("b:1"))
			next.Models[0].WeightEpoch += 10
			w.a.src.p.Store(next)
			w.b.src.p.Store(next)
			if _, how := w.ask(w.a, other, user...); how != "miss" {
				t.Errorf("%s: after new weights: %s", name, how)
			}
			if _, how := w.ask(w.b, other, user...); how != "hit node" {
				t.Errorf("%s: after new weights b: %s", name, how)
			}
		})
	}
}

const other = `{"model":"gpt","temperature":0,"messages":[{"content":"three"}]}`

// Without the agent questions go to the models; with the next one answers are shared again,
// from nothing.
func TestAgentRestart(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inNodeWorld(t, []step{{status: 200, body: `{"v":1}`}}, func(t *testing.T, w *nodeWorld) {
		w.want(w.a, "miss", `{"v":1}`, 1, user...)
		w.server.Stop()
		w.want(w.b, "miss", `{"v":1}`, 1, user...)
		if s := w.b.h.LocalStats().NodeAnswers; s.Failed == 0 {
			t.Errorf("counted %+v", s)
		}
		w.start()
		time.Sleep(10 * time.Second) // gRPC connects again
		if _, how := w.ask(w.a, other, user...); how != "miss" {
			t.Errorf("the new agent has an old answer: %s", how)
		}
		if _, how := w.ask(w.b, other, user...); how != "hit node" {
			t.Errorf("nothing is shared over the new agent: %s", how)
		}
	})
}

// While the agent does not know that a stretch has ended, it is neither asked nor told
// anything else.
func TestAgentThatDoesNotKnowIsNotAsked(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inNodeWorld(t, []step{{status: 200, body: `{"v":1}`}}, func(t *testing.T, w *nodeWorld) {
		w.want(w.a, "miss", `{"v":1}`, 1, user...)
		agent := w.agent
		w.server.Stop()
		changed := newPolicy(5000, eps("a:1"), eps("b:1"))
		changed.Models[0].Versions[1].Quarantined = true
		w.b.src.p.Store(changed)
		w.want(w.b, "miss", `{"v":1}`, 1, user...)
		if !w.b.h.o.NodeAnswers.Waiting() {
			t.Error("the end is taken for confirmed without an agent")
		}
		w.start()
		if agent == w.agent {
			t.Fatal("no new agent")
		}
		time.Sleep(10 * time.Second)
		if w.b.h.o.NodeAnswers.Waiting() {
			t.Error("the new agent was not told what has ended")
		}
	})
}
