package proxy_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	oip "github.com/outrigger-mesh/outrigger/api/inference"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/identity/identitytest"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// provider is a model behind TLS as a provider has it: real sockets, real handshakes.
type provider struct {
	address     string
	certificate atomic.Pointer[tls.Certificate]
	demand      atomic.Bool // a client certificate
	clients     []*identitytest.CA

	mu      sync.Mutex
	host    string // Host, SNI, protocol and Authorization of the last request
	sni     string
	proto   string
	auth    string
	shown   string // common name of the client certificate
	resumed bool
}

func startProvider(t *testing.T, certificate identitytest.Certificate, clients ...*identitytest.CA) *provider {
	t.Helper()
	p := &provider{clients: clients}
	p.present(certificate)
	s := httptest.NewUnstartedServer(http.HandlerFunc(p.serve))
	s.EnableHTTP2 = true
	s.Config.ErrorLog = quiet()
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return p.config("h2", "http/1.1"), nil }}
	s.StartTLS()
	t.Cleanup(s.Close)
	p.address = s.Listener.Addr().String()
	return p
}

func (p *provider) config(protocols ...string) *tls.Config {
	out := &tls.Config{Certificates: []tls.Certificate{*p.certificate.Load()}, NextProtos: protocols, ClientCAs: identitytest.Pool(p.clients...)}
	if p.demand.Load() {
		out.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return out
}

func (p *provider) present(c identitytest.Certificate) {
	pair := c.TLS()
	p.certificate.Store(&pair)
}

func (p *provider) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.host, p.sni, p.proto, p.auth, p.shown, p.resumed = r.Host, r.TLS.ServerName, r.Proto, r.Header.Get("Authorization"), "", r.TLS.DidResume
	if len(r.TLS.PeerCertificates) > 0 {
		p.shown = r.TLS.PeerCertificates[0].Subject.CommonName
	}
	p.mu.Unlock()
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"object":"chat.completion","choices":[]}`)
}

func (p *provider) last() (host, sni, proto, shown string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.host, p.sni, p.proto, p.shown
}

// pod is a sidecar that gets policy and secrets from an xDS server, all over sockets.
type pod struct {
	t        *testing.T
	xds      *adsserver.Server
	policy   *adsclient.Client
	address  string
	http     *http.Client
	position uint64
}

func startPod(t *testing.T, p *policy.Policy, secrets translate.Secrets) *pod {
	t.Helper()
	out := &pod{t: t, xds: adsserver.New(adsserver.Options{}), http: &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 8}}}
	t.Cleanup(out.http.CloseIdleConnections)
	control := listenGRPC(t, out.xds.Register)
	node := outrigger.Node{ID: "pod", Kind: "sidecar", Region: "eu"}
	var err error
	out.policy, err = adsclient.New(adsclient.Options{Node: node, Dial: []adsclient.Dialer{func(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
		c, err := grpc.NewClient("passthrough:///"+control, grpc.WithTransportCredentials(insecure.NewCredentials()))
		return c, c, err
	}}})
	must(t, err)
	conn, err := grpc.NewClient("passthrough:///127.0.0.1:1", grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	store, err := cache.New(cache.Options{Origin: conn, Private: true, Node: node, Clock: func() int64 { return 1 }})
	must(t, err)
	sidecar, err := proxy.New(proxy.Options{Node: node, Reader: store, Authority: store.Variables(), Material: out.policy.Material, Grace: time.Second,
		Policy: func() (*policy.Policy, inference.PolicyStatus) {
			return out.policy.Policy(), inference.PolicyStatus{Live: true}
		}})
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	out.address = l.Addr().String()
	out.run(out.policy.Run)
	out.run(func(ctx context.Context) error { return sidecar.Run(ctx, l) })
	out.put(p, secrets)
	return out
}

func (p *pod) run(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	p.t.Cleanup(func() {
		cancel()
		must(p.t, <-ended)
	})
}

// put publishes and waits until the sidecar has accepted it.
func (p *pod) put(pol *policy.Policy, secrets translate.Secrets) {
	p.t.Helper()
	p.position++
	pol.Position = p.position
	res, err := translate.Encode(pol, translate.Options{Secrets: secrets})
	must(p.t, err)
	must(p.t, p.xds.Publish(adsserver.DefaultGroup, res, pol.Position))
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	for {
		changed := p.xds.Changed()
		if acked, _, done := p.xds.Acked(p.position); done && len(acked) == 1 {
			return
		}
		select {
		case <-changed:
		case <-deadline.C:
			p.t.Fatalf("the sidecar has not accepted position %d: %+v", p.position, p.xds.Ledger())
		}
	}
}

// ask makes one call of the model; text is the error's code and message, "" for none.
func (p *pod) ask() (status int, text string) {
	req, err := http.NewRequest(http.MethodPost, "http://"+p.address+"/v1/chat/completions", strings.NewReader(`{"model":"chat","messages":[]}`))
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set("Authorization", "Bearer app-key")
	resp, err := p.http.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	var body struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, strings.TrimSpace(body.Error.Code + " " + body.Error.Message)
}

func listenGRPC(t *testing.T, register func(grpc.ServiceRegistrar), o ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := grpc.NewServer(o...)
	register(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		must(t, <-served)
	})
	return l.Addr().String()
}

// anyFault stands for errors whose words depend on what arrives first.
const anyFault = "*"

// over is model chat at one address, reached as tls says.
func over(tls *policy.TLS, addresses ...string) *policy.Policy {
	v := policy.Version{Name: "v1", TLS: tls, ConsecutiveFailures: 1_000_000}
	for _, a := range addresses {
		v.Endpoints = append(v.Endpoints, policy.Endpoint{Address: a, Region: "eu", Weight: 1})
	}
	return &policy.Policy{Models: []policy.Model{{Name: "chat", Salt: "s", Unit: experiments.UnitUser, MaxAttempts: 1, Versions: []policy.Version{v},
		Arms: []policy.Arm{{Name: "all", Version: "v1", Ranges: []experiments.Range{{Start: 0, End: experiments.Buckets}}}}}}}
}

// material is what a control plane's directory of secrets makes.
func material(bundles map[string][]byte, pairs map[string]identitytest.Certificate) translate.Secrets {
	out := translate.Secrets{}
	for name, pem := range bundles {
		out[xds.BundleName(name)] = translate.BundleSecret(name, pem)
	}
	for name, c := range pairs {
		out[xds.CertificateName(name)] = translate.CertificateSecret(name, c.Chain, c.Key)
	}
	return out
}

// A sidecar reaches a provider over TLS by what the control plane delivered, refuses one it
// cannot verify, and says why.
func TestProviderOverTLS(t *testing.T) {
	ca, other := identitytest.NewCA("ca"), identitytest.NewCA("other")
	const name = "api.provider.example"
	good := startProvider(t, ca.Issue(name))
	stale := startProvider(t, ca.IssueFor(time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour), name))
	closed := startProvider(t, ca.Issue(name), ca)
	closed.demand.Store(true)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	_, port, err := net.SplitHostPort(good.address)
	must(t, err)
	secrets := material(map[string][]byte{"corp": ca.PEM, "other": other.PEM}, map[string]identitytest.Certificate{"pod": ca.Issue("pod.example"), "stranger": other.Issue("stranger.example")})
	corp := func(edit func(*policy.TLS)) *policy.TLS {
		out := &policy.TLS{ServerName: name, CA: "corp"}
		if edit != nil {
			edit(out)
		}
		return out
	}
	w := startPod(t, over(corp(nil), good.address), secrets)

	for _, c := range []struct {
		what    string
		tls     *policy.TLS
		address string
		status  int
		text    string // what the error must say
	}{
		{"verified by the trust bundle", corp(nil), good.address, 200, ""},
		{"by a name beside the server name", corp(func(t *policy.TLS) { t.ServerName, t.SANs = "else.example", []string{"x.example", name} }), good.address, 200, ""},
		{"over HTTP/2 as asked", corp(func(t *policy.TLS) { t.ALPN = []string{policy.ALPNHTTP2} }), good.address, 200, ""},
		{"another authority", corp(func(t *policy.TLS) { t.CA = "other" }), good.address, 503, "unknown authority"},
		{"the machine's trust store", corp(func(t *policy.TLS) { t.CA = "" }), good.address, 503, "unknown authority"},
		{"another name", corp(func(t *policy.TLS) { t.ServerName = "else.example" }), good.address, 503, "for another name"},
		{"none of the names", corp(func(t *policy.TLS) { t.SANs = []string{"x.example", "10.0.0.1"} }), good.address, 503, "for another name"},
		{"names do not replace the authority", corp(func(t *policy.TLS) { t.CA, t.SANs = "other", []string{name, "x.example"} }), good.address, 503, "unknown authority"},
		{"an expired certificate", corp(nil), stale.address, 503, "expired"},
		{"no TLS there", corp(nil), plain.Listener.Addr().String(), 503, "does not speak TLS"},
		{"nobody in the clear", nil, good.address, 400, ""},
		{"no client certificate", corp(nil), closed.address, 503, anyFault},
		{"one of a stranger", corp(func(t *policy.TLS) { t.ClientCert = "stranger" }), closed.address, 503, anyFault},
		{"the right one", corp(func(t *policy.TLS) { t.ClientCert = "pod" }), closed.address, 200, ""},
		{"a bundle nobody has", corp(func(t *policy.TLS) { t.CA = "lost" }), good.address, 503, `trust bundle "lost" has not been delivered`},
		{"a certificate nobody has", corp(func(t *policy.TLS) { t.ClientCert = "lost" }), closed.address, 503, `client certificate "lost" has not been delivered`},
	} {
		t.Run(c.what, func(t *testing.T) {
			w.t = t
			w.put(over(c.tls, c.address), secrets)
			status, text := w.ask()
			if c.tls == nil {
				if status == 200 {
					t.Fatal("a server over TLS answered in the clear")
				}
				return
			}
			if c.text == anyFault {
				// With TLS 1.3 the refusal may overtake the request or be lost with its connection.
				if status != c.status {
					t.Fatalf("answered %d %q, want %d", status, text, c.status)
				}
				return
			}
			if status != c.status || !strings.Contains(text, c.text) || status == 200 && text != "" {
				t.Fatalf("answered %d %q, want %d with %q", status, text, c.status, c.text)
			}
			if status != 200 && !strings.HasPrefix(text, "upstream_tls ") {
				t.Errorf("the error's code is not upstream_tls: %q", text)
			}
			if strings.Contains(text, "127.0.0.1") || strings.Contains(text, name) {
				t.Errorf("the caller is told where the endpoint is: %q", text)
			}
		})
	}
	if host, sni, proto, _ := good.last(); host != name+":"+port && host != "else.example:"+port || sni == "" || proto == "" {
		t.Errorf("the provider saw Host %q, SNI %q, %s", host, sni, proto)
	}
	w.t = t
	w.put(over(corp(nil), good.address), secrets)
	if status, text := w.ask(); status != 200 {
		t.Fatal(status, text)
	}
	if host, sni, proto, _ := good.last(); host != name+":"+port || sni != name || proto != "HTTP/1.1" || good.auth != "Bearer app-key" {
		t.Errorf("the provider saw Host %q, SNI %q, %s, Authorization %q", host, sni, proto, good.auth)
	}
	w.put(over(corp(func(t *policy.TLS) { t.ALPN = []string{policy.ALPNHTTP2, policy.ALPNHTTP1} }), good.address), secrets)
	if status, text := w.ask(); status != 200 {
		t.Fatal(status, text)
	}
	if _, _, proto, _ := good.last(); proto != "HTTP/2.0" {
		t.Errorf("HTTP/2 was asked for and offered, and %s was spoken", proto)
	}
	if _, _, _, shown := closed.last(); shown != "pod.example" {
		t.Errorf("the provider saw client certificate %q", shown)
	}
}

// Both sides rotate everything under load: the trust bundle, the server's certificate and
// the client's. No request fails, and new connections use what is new.
func TestCertificatesRotateUnderLoad(t *testing.T) {
	const name = "api.provider.example"
	was, next := identitytest.NewCA("was"), identitytest.NewCA("next")
	p := startProvider(t, was.Issue(name), was, next)
	p.demand.Store(true)
	how := &policy.TLS{ServerName: name, CA: "corp", ClientCert: "pod"}
	give := func(bundle []byte, client identitytest.Certificate) translate.Secrets {
		return material(map[string][]byte{"corp": bundle}, map[string]identitytest.Certificate{"pod": client})
	}
	first, second := was.Issue("first.example"), next.Issue("second.example")
	w := startPod(t, over(how, p.address), give(was.PEM, first))

	var asked, failed atomic.Int64
	var why atomic.Pointer[string]
	stop := make(chan struct{})
	var load sync.WaitGroup
	defer load.Wait()
	var once sync.Once
	end := func() { once.Do(func() { close(stop) }) }
	defer end()
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if status, text := w.ask(); status != 200 {
					failed.Add(1)
					why.Store(&text)
				}
				asked.Add(1)
			}
		})
	}
	more := func() { // some requests begin and end from here on
		deadline, from := time.Now().Add(time.Minute), asked.Load()
		for asked.Load() < from+20 {
			if time.Now().After(deadline) {
				t.Fatal("the load stands still")
			}
			w.ask()
		}
	}
	more()
	both := append(append([]byte{}, was.PEM...), next.PEM...)
	w.put(over(how, p.address), give(both, first))
	more()
	p.present(next.Issue(name))
	w.put(over(how, p.address), give(both, second))
	more()
	w.put(over(how, p.address), give(next.PEM, second))
	more()
	end()
	load.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d requests failed, one of them: %s", n, asked.Load(), *why.Load())
	}
	if status, text := w.ask(); status != 200 {
		t.Fatal(status, text)
	}
	if _, _, _, shown := p.last(); shown != "second.example" {
		t.Errorf("after the rotation the server is shown %q", shown)
	}
}

// inferenceServer is a model that speaks the Open Inference Protocol over gRPC.
type inferenceServer struct {
	oip.UnimplementedGRPCInferenceServiceServer
	authority atomic.Pointer[string]
}

func (s *inferenceServer) ModelInfer(ctx context.Context, r *oip.ModelInferRequest) (*oip.ModelInferResponse, error) {
	if md, ok := metadata.FromIncomingContext(ctx); ok && len(md[":authority"]) == 1 {
		s.authority.Store(&md[":authority"][0])
	}
	return &oip.ModelInferResponse{ModelName: r.GetModelName(), Id: r.GetId()}, nil
}

// Calls over gRPC take the same road.
func TestGRPCProviderOverTLS(t *testing.T) {
	const name = "models.corp.example"
	ca, other := identitytest.NewCA("ca"), identitytest.NewCA("other")
	certificate := ca.Issue(name).TLS()
	server := &inferenceServer{}
	address := listenGRPC(t, func(r grpc.ServiceRegistrar) { oip.RegisterGRPCInferenceServiceServer(r, server) },
		grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{certificate}, ClientCAs: identitytest.Pool(ca), ClientAuth: tls.RequireAndVerifyClientCert})))
	secrets := material(map[string][]byte{"corp": ca.PEM, "other": other.PEM}, map[string]identitytest.Certificate{"pod": ca.Issue("pod.example")})
	w := startPod(t, over(&policy.TLS{ServerName: name, CA: "corp", ClientCert: "pod"}, address), secrets)
	conn, err := grpc.NewClient("passthrough:///"+w.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	app := oip.NewGRPCInferenceServiceClient(conn)
	if r, err := app.ModelInfer(ctx, &oip.ModelInferRequest{ModelName: "chat", Id: "7"}); err != nil || r.GetId() != "7" {
		t.Fatalf("%v, %v", r, err)
	}
	_, port, err := net.SplitHostPort(address)
	must(t, err)
	if got := server.authority.Load(); got == nil || *got != name+":"+port {
		t.Errorf("the server saw authority %v", got)
	}
	w.put(over(&policy.TLS{ServerName: name, CA: "other", ClientCert: "pod"}, address), secrets)
	if _, err := app.ModelInfer(ctx, &oip.ModelInferRequest{ModelName: "chat"}); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("with another authority: %v", err)
	}
}

// quiet drops what servers log about handshakes that are meant to fail.
func quiet() *log.Logger { return log.New(io.Discard, "", 0) }
