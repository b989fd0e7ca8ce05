package upstream

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// maxPools bounds the kinds of TLS that are kept apart; the one not used for longest makes room.
const maxPools = 1024

// How an HTTP/2 connection that fell silent is found out.
const (
	pingAfter   = 15 * time.Second
	pingTimeout = 5 * time.Second
)

// Secure has the pools of connections to endpoints over TLS: one per way of verifying and
// of proving oneself, because connections and sessions made in one way say nothing in
// another. When the material of a pool is replaced (a certificate or trust bundle rotates)
// a new pool takes over: requests under way end on their connections, which are then
// closed, and what begins is proved and verified with the new material. HTTP is version 1.1
// unless ALPN of the policy lists HTTP/2. It is safe for concurrent use.
type Secure struct {
	o        TransportOptions
	material func() *identity.Material
	clock    atomic.Uint64 // counts uses, to find the one longest ago

	mu    sync.RWMutex // never held during I/O
	pools map[wants]*securePool
}

// wants is what of a policy decides how a connection is made.
type wants struct{ serverName, names, ca, certificate, alpn string }

type securePool struct {
	digest    string // of the material
	transport *http.Transport
	used      atomic.Uint64
}

// NewSecure returns pools with o's dialer and limits; material is asked at every request
// for what is in force.
func NewSecure(o TransportOptions, material func() *identity.Material) *Secure {
	return &Secure{o: o, material: material, pools: map[wants]*securePool{}}
}

// For returns what sends requests as t says. Errors have kind Unavailable and name what is
// missing.
func (s *Secure) For(t *policy.TLS) (http.RoundTripper, error) {
	k, m := wantsOf(t), s.material()
	digest, err := digestOf(t, m)
	if err != nil {
		return nil, err
	}
	s.mu.RLock()
	p := s.pools[k]
	s.mu.RUnlock()
	if p == nil || p.digest != digest {
		p = s.replace(k, t, m, digest)
	}
	p.used.Store(s.clock.Add(1))
	return p.transport, nil
}

// replace makes the pool for a digest, unless somebody else just did.
func (s *Secure) replace(k wants, t *policy.TLS, m *identity.Material, digest string) *securePool {
	s.mu.Lock()
	old := s.pools[k]
	if old != nil && old.digest == digest {
		s.mu.Unlock()
		return old
	}
	next := &securePool{digest: digest, transport: s.transport(t, m)}
	if old == nil && len(s.pools) >= maxPools {
		old = s.evict()
	}
	s.pools[k] = next
	s.mu.Unlock()
	if old != nil {
		// What is in use is closed when its request has ended.
		old.transport.CloseIdleConnections()
	}
	return next
}

// evict takes out the pool not used for longest; s.mu is held.
func (s *Secure) evict() *securePool {
	var at wants
	var oldest *securePool
	for k, p := range s.pools {
		if oldest == nil || p.used.Load() < oldest.used.Load() {
			at, oldest = k, p
		}
	}
	delete(s.pools, at)
	return oldest
}

func (s *Secure) transport(t *policy.TLS, m *identity.Material) *http.Transport {
	offered := t.ALPN
	if len(offered) == 0 {
		offered = []string{policy.ALPNHTTP1}
	}
	out := NewTransport(s.o)
	out.TLSClientConfig = identity.Endpoint{ServerName: t.ServerName, Names: t.SANs, Roots: m.Bundles[t.CA], Pair: m.Pairs[t.ClientCert], Protocols: offered}.Client()
	out.Protocols = new(http.Protocols)
	for _, p := range offered {
		switch p {
		case policy.ALPNHTTP1:
			out.Protocols.SetHTTP1(true)
		case policy.ALPNHTTP2:
			out.Protocols.SetHTTP2(true)
			out.HTTP2 = &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout}
		}
	}
	return out
}

// CloseIdleConnections closes every connection that carries no request.
func (s *Secure) CloseIdleConnections() {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, p := range s.pools {
		p.transport.CloseIdleConnections()
	}
}

// grpcCredentials are for a connection to one endpoint; the server's name is the authority.
func grpcCredentials(t *policy.TLS, m *identity.Material) credentials.TransportCredentials {
	return credentials.NewTLS(identity.Endpoint{Names: t.SANs, Roots: m.Bundles[t.CA], Pair: m.Pairs[t.ClientCert]}.Client())
}

func wantsOf(t *policy.TLS) wants {
	return wants{t.ServerName, strings.Join(t.SANs, ","), t.CA, t.ClientCert, strings.Join(t.ALPN, ",")}
}

// digestOf names the content of what t refers to, "" if that is nothing.
func digestOf(t *policy.TLS, m *identity.Material) (digest string, err error) {
	if t.CA != "" {
		b := m.Bundles[t.CA]
		if b == nil {
			return "", outrigger.Errorf(outrigger.Unavailable, "trust bundle %q has not been delivered; the control plane needs %s.ca in its directory --secrets", t.CA, t.CA)
		}
		digest = b.Digest
	}
	if t.ClientCert != "" {
		p := m.Pairs[t.ClientCert]
		if p == nil {
			return "", outrigger.Errorf(outrigger.Unavailable, "client certificate %q has not been delivered; the control plane needs %s.crt and %s.key in its directory --secrets, and keys come over TLS, Unix sockets and loopback only", t.ClientCert, t.ClientCert, t.ClientCert)
		}
		digest += "/" + p.Digest
	}
	return digest, nil
}
