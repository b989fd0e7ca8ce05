package proxy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// world is one sidecar with what it talks to, on an in-memory network in a bubble: a
// real variable authority behind a real cache, two versions of a model server, and a
// report server that keeps what arrives. Hosts are "pod", "control", "v1", "v2".
type world struct {
	t       *testing.T
	net     *memnet.Network
	policy  *policy.Policy
	v1, v2  *model
	reports *reports
	sidecar *proxy.Sidecar
	bridge  snakepit.BridgeServiceClient
	http    *http.Client

	upstreams atomic.Int64 // connections that HTTP servers behind the sidecar have open

	end   context.CancelFunc // begins the sidecar's end
	ended chan error         // receives what Run returned
	stops []func()
}

const address = "pod:50051"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// inWorld runs do; edit may change the sidecar's options.
func inWorld(t *testing.T, edit func(*world, *proxy.Options), do func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, net: memnet.New(), reports: &reports{}, ended: make(chan error, 1)}
		defer func() {
			for i := len(w.stops) - 1; i >= 0; i-- {
				w.stops[i]()
			}
		}()
		w.v1, w.v2 = w.model("v1"), w.model("v2")
		w.policy = newPolicy()
		control := w.control()
		start := time.Now()
		store, err := cache.New(cache.Options{Origin: control, Private: true, Node: outrigger.Node{ID: "pod", Region: "eu"},
			Clock: func() int64 { return int64(time.Since(start)) + int64(time.Hour) }})
		must(t, err)
		w.run(store.Run)
		o := proxy.Options{Node: outrigger.Node{ID: "pod", Kind: "sidecar", Region: "eu"}, Reader: store, Authority: store.Variables(), Reports: control,
			AutoCreateSessions: true, Start: start,
			Policy: func() (*policy.Policy, inference.PolicyStatus) { return w.policy, inference.PolicyStatus{Live: true} },
			Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
				return w.net.Dialer("pod")(ctx, address)
			}}
		if edit != nil {
			edit(w, &o)
		}
		w.sidecar, err = proxy.New(o)
		must(t, err)
		l, err := w.net.Listen("pod", address)
		must(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		w.end = cancel
		go func() { w.ended <- w.sidecar.Run(ctx, l) }()
		w.stops = append(w.stops, func() {
			cancel()
			must(t, <-w.ended)
			w.ended <- nil
		})
		app := w.dial(address)
		w.bridge = snakepit.NewBridgeServiceClient(app)
		w.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return w.net.Dialer("pod")(ctx, address)
		}}}
		w.stops = append(w.stops, w.http.CloseIdleConnections)
		w.warm(store)
		do(t, w)
	})
}

// warm waits until the cache keeps itself current.
func (w *world) warm(store *cache.Store) {
	time.Sleep(time.Second)
	_, err := store.Get(context.Background(), cache.Request{Key: outrigger.Key{Tenant: "t", Session: "warm", Name: "up"}, Encoding: -1})
	must(w.t, err)
	time.Sleep(time.Second)
}

// run starts something that ends with the world.
func (w *world) run(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- f(ctx) }()
	w.stops = append(w.stops, func() {
		cancel()
		must(w.t, <-ran)
	})
}

func (w *world) dial(to string) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+to, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return w.net.Dialer("pod")(ctx, a) }))
	must(w.t, err)
	w.stops = append(w.stops, func() { conn.Close() })
	return conn
}

// control is the variable authority and the report server.
func (w *world) control() *grpc.ClientConn {
	log := memory.New()
	w.stops = append(w.stops, func() { log.Close() })
	svc, err := variables.New(log, variables.Options{Region: "eu"})
	must(w.t, err)
	w.run(svc.Run)
	<-svc.Ready()
	w.serveGRPC("control:1", func(s *grpc.Server) {
		pb.RegisterVariablesServer(s, svc)
		pb.RegisterCoherenceServer(s, svc)
		pb.RegisterReportsServer(s, w.reports)
	})
	return w.dial("control:1")
}

func (w *world) serveGRPC(at string, register func(*grpc.Server)) {
	host, _, _ := strings.Cut(at, ":")
	l, err := w.net.Listen(host, at)
	must(w.t, err)
	s := grpc.NewServer()
	register(s)
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	w.stops = append(w.stops, func() {
		s.Stop()
		must(w.t, <-served)
	})
}

func (w *world) serveHTTP(at string, h http.Handler) {
	host, _, _ := strings.Cut(at, ":")
	l, err := w.net.Listen(host, at)
	must(w.t, err)
	s := &http.Server{Handler: h, ConnState: func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			w.upstreams.Add(1)
		case http.StateClosed, http.StateHijacked:
			w.upstreams.Add(-1)
		}
	}}
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	w.stops = append(w.stops, func() {
		s.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			w.t.Error(err)
		}
	})
}

// model is a server of one version, as slow and as bad as it is told.
type model struct {
	version string
	failing atomic.Bool
	gap     atomic.Int64 // ns between the five words of an answer
	calls   atomic.Int64
}

func (w *world) model(version string) *model {
	m := &model{version: version}
	w.serveHTTP(version+":80", m)
	return m
}

func (m *model) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.calls.Add(1)
	var in struct {
		Model  string
		Stream bool
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.Model != "chat-"+m.version {
		http.Error(w, `{"error":{"message":"wrong model","type":"invalid_request_error"}}`, http.StatusBadRequest)
		return
	}
	w.Header().Set("content-type", "application/json")
	if m.failing.Load() {
		w.WriteHeader(http.StatusInternalServerError)
		io.WriteString(w, `{"error":{"message":"broken","type":"server_error","param":null,"code":null}}`)
		return
	}
	if !in.Stream {
		m.wait(r.Context(), 5)
		fmt.Fprintf(w, `{"id":"c","object":"chat.completion","created":1,"model":%q,"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"w1 w2 w3 w4 w5 "}}],"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}}`, in.Model)
		return
	}
	w.Header().Set("content-type", "text/event-stream")
	for i := range 5 {
		if !m.wait(r.Context(), 1) {
			return
		}
		fmt.Fprintf(w, `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":%q,"choices":[{"index":0,"delta":{"content":"w%d "}}]}`+"\n\n", in.Model, i+1)
		w.(http.Flusher).Flush()
	}
	io.WriteString(w, "data: [DONE]\n\n")
}

func (m *model) wait(ctx context.Context, n int64) bool {
	t := time.NewTimer(time.Duration(n * m.gap.Load()))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// newPolicy splits model "chat" 90/10 between version v1, the last good one, and v2.
func newPolicy() *policy.Policy {
	endpoint := func(a string) []policy.Endpoint {
		return []policy.Endpoint{{Address: a, Region: "eu", Weight: 1}}
	}
	return &policy.Policy{Position: 1, Models: []policy.Model{{
		Name: "chat", Salt: "s", Unit: experiments.UnitUser, WeightEpoch: 1, LastGood: "v1", MaxAttempts: 2, DeadMan: 10 * time.Second,
		Versions: []policy.Version{{Name: "v1", Upstream: "chat-v1", Endpoints: endpoint("v1:80")}, {Name: "v2", Upstream: "chat-v2", Endpoints: endpoint("v2:80")}},
		Arms: []policy.Arm{{Name: "candidate", Version: "v2", Ranges: []experiments.Range{{Start: 0, End: 1000}}},
			{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: 1000, End: experiments.Buckets}}}},
	}}, Regions: []policy.Region{{Name: "eu", Healthy: true}}}
}

// userOf returns a user who belongs to an arm.
func userOf(arm string) string {
	for i := 0; ; i++ {
		u := fmt.Sprint("user-", i)
		if (experiments.Bucket("s", u) < 1000) == (arm == "candidate") {
			return u
		}
	}
}

// reports is a report server that keeps what arrives.
type reports struct {
	pb.UnimplementedReportsServer
	mu     sync.Mutex
	deltas []*pb.Delta
	at     []time.Time
}

func (r *reports) Push(stream grpc.BidiStreamingServer[pb.Delta, pb.DeltaAck]) error {
	for {
		d, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.deltas, r.at = append(r.deltas, d), append(r.at, time.Now())
		r.mu.Unlock()
		if err := stream.Send(&pb.DeltaAck{Sequence: d.Sequence}); err != nil {
			return err
		}
	}
}

func (r *reports) all() ([]*pb.Delta, []time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deltas, r.at
}

// total sums what was reported of one version.
func (r *reports) total(version string) (requests, failures, cancelled uint64) {
	deltas, _ := r.all()
	for _, d := range deltas {
		for _, o := range d.Outcomes {
			if o.Version == version {
				requests, failures, cancelled = requests+o.Requests, failures+o.Failures, cancelled+o.Cancelled
			}
		}
	}
	return requests, failures, cancelled
}

// response is an HTTP answer read to its end.
type response struct {
	code int
	head http.Header
	body string
	err  error // of reading the body
}

func (w *world) do(method, path, body string, kv ...string) response {
	w.t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, "http://sidecar"+path, strings.NewReader(body))
	must(w.t, err)
	req.Header.Set("content-type", "application/json")
	for i := 0; i < len(kv); i += 2 {
		req.Header.Set(kv[i], kv[i+1])
	}
	resp, err := w.http.Do(req)
	if err != nil {
		return response{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return response{resp.StatusCode, resp.Header, string(b), err}
}

func (w *world) chat(user string, stream bool) response {
	w.t.Helper()
	return w.do("POST", "/v1/chat/completions", fmt.Sprintf(`{"model":"chat","user":%q,"stream":%v,"messages":[{"role":"user","content":"hi"}]}`, user, stream))
}

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}
