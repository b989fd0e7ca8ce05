package adsserver_test

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/outrigger-mesh/outrigger/internal/identity/identitytest"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// secureUpstream is an endpoint over TLS that demands a client certificate.
type secureUpstream struct {
	addr        string
	certificate atomic.Pointer[tls.Certificate]
	mu          sync.Mutex
	host, sni   string // of the last request
	shown       string // common name of its client certificate
}

func startSecureUpstream(t *testing.T, c identitytest.Certificate, clients ...*identitytest.CA) *secureUpstream {
	t.Helper()
	u := &secureUpstream{}
	u.present(c)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.mu.Lock()
		u.host, u.sni, u.shown = r.Host, r.TLS.ServerName, r.TLS.PeerCertificates[0].Subject.CommonName
		u.mu.Unlock()
		w.Header().Set("Connection", "close") // so that the next request shows what connections are made with now
		_, _ = io.WriteString(w, "secure")
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*u.certificate.Load()}, ClientCAs: identitytest.Pool(clients...), ClientAuth: tls.RequireAndVerifyClientCert}, nil
	}}
	s.StartTLS()
	t.Cleanup(s.Close)
	u.addr = s.Listener.Addr().String()
	return u
}

func (u *secureUpstream) present(c identitytest.Certificate) {
	pair := c.TLS()
	u.certificate.Store(&pair)
}

func (u *secureUpstream) last() (host, sni, shown string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.host, u.sni, u.shown
}

// A real Envoy calls an endpoint over TLS with what SDS brought it, in both directions, goes
// on while all of it rotates under load, and calls nothing it cannot verify.
func TestRealEnvoyTLS(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	const name = "models.corp.example"
	was, next := identitytest.NewCA("was"), identitytest.NewCA("next")
	u := startSecureUpstream(t, was.Issue(name), was, next)
	first, second := was.Issue("first.example"), next.Issue("second.example")
	secrets := func(bundle []byte, client identitytest.Certificate) translate.Secrets {
		return translate.Secrets{
			xds.BundleName("corp"):      translate.BundleSecret("corp", bundle),
			xds.CertificateName("pod"):  translate.CertificateSecret("pod", client.Chain, client.Key),
			xds.CertificateName("else"): translate.CertificateSecret("else", client.Chain, client.Key),
		}
	}
	over := func(how *policy.TLS) *policy.Policy {
		p := arms([]policy.Endpoint{{Address: u.addr, Region: "eu", Weight: 1}}, nil)
		m := &p.Models[0]
		m.Arms, m.Versions = m.Arms[1:], m.Versions[:1]
		m.Arms[0].Ranges[0].Start = 0
		m.Versions[0].TLS, m.Versions[0].ConsecutiveFailures = how, 1_000_000
		return p
	}
	how := &policy.TLS{ServerName: name, CA: "corp", ClientCert: "pod"}
	srv := adsserver.New(adsserver.Options{})
	control := listen(t, srv.Register)
	plain := startUpstream(t, "plain")
	start := arms(at(plain), at(plain))
	start.Position = 1
	e := startEnvoy(t, srv, control, start)
	eventually(t, func() (string, bool) { a := e.ask(); return "no answer yet", a.status == 200 }, nil)

	e.opt.Secrets = secrets(was.PEM, first)
	e.put(over(how))
	answers := func(what string) {
		t.Helper()
		eventually(t, func() (string, bool) {
			a := e.ask()
			return what + ": answered " + itoa(a.status), a.status == 200 && a.served == "secure"
		}, nil)
	}
	answers("over TLS")
	_, port, err := net.SplitHostPort(u.addr)
	if err != nil {
		t.Fatal(err)
	}
	if host, sni, shown := u.last(); host != name+":"+port || sni != name || shown != "first.example" {
		t.Errorf("the endpoint saw Host %q, SNI %q, certificate %q", host, sni, shown)
	}
	held, err := srv.Config("envoy-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range held {
		if h.Type == xds.TypeSecret && h.Version != "" && h.Name != xds.BundleName("corp") && h.Name != xds.CertificateName("pod") {
			t.Errorf("the Envoy was given %s, which nothing of its names", h.Name)
		}
	}

	var failed atomic.Pointer[answer]
	var stop atomic.Bool
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for !stop.Load() {
				if a := e.ask(); a.status != 200 {
					failed.CompareAndSwap(nil, &a)
				}
			}
		})
	}
	both := append(append([]byte{}, was.PEM...), next.PEM...)
	for _, step := range []func(){
		func() { e.opt.Secrets = secrets(both, first) },
		func() { e.opt.Secrets = secrets(both, second) },
		func() { u.present(next.Issue(name)) },
		func() { e.opt.Secrets = secrets(next.PEM, second) },
	} {
		step()
		e.put(over(how))
		for range 20 {
			e.ask()
		}
	}
	stop.Store(true)
	load.Wait()
	if a := failed.Load(); a != nil {
		t.Errorf("a request was answered %d %q (%v) during the rotation", a.status, a.served, a.err)
	}
	eventually(t, func() (string, bool) {
		a := e.ask()
		_, _, shown := u.last()
		return "the endpoint is shown " + shown, a.status == 200 && shown == "second.example"
	}, nil)

	for what, wrong := range map[string]*policy.TLS{
		"another name":              {ServerName: "else.example", CA: "corp", ClientCert: "pod"},
		"the machine's trust store": {ServerName: name, ClientCert: "pod"},
		"no certificate of its own": {ServerName: name, CA: "corp"},
	} {
		e.put(over(wrong))
		eventually(t, func() (string, bool) { a := e.ask(); return what + ": answered " + itoa(a.status), a.status == 503 }, nil)
		e.put(over(how))
		answers("after " + what)
	}
}
