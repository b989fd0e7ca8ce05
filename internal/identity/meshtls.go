package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"path"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
)

// spiffeScheme begins ids of workloads (SPIFFE-ID.md, section 2).
const spiffeScheme = "spiffe://"

// Bounds of names.
const (
	maxServerName = 2048 // bytes, as SPIFFE has it for ids
	maxPeerName   = 512  // bytes of PeerName
	logEvery      = 10 * time.Second
)

// CheckServerName refuses what cannot be whom a dialler expects: besides hosts there is
// spiffe://DOMAIN/PATH, where a * in PATH stands for any characters but '/'. "" is allowed.
// Errors have kind Invalid.
func CheckServerName(name string) error {
	id, workload := strings.CutPrefix(name, spiffeScheme)
	domain, p, _ := strings.Cut(id, "/")
	switch {
	case len(name) > maxServerName:
		return outrigger.Errorf(outrigger.Invalid, "the server name has %d bytes; at most %d are allowed", len(name), maxServerName)
	case !workload && strings.ContainsAny(name, "*/ "):
		return outrigger.Errorf(outrigger.Invalid, "server name %q is neither a host nor spiffe://DOMAIN/PATH", name)
	case workload && (domain == "" || strings.ContainsAny(domain, `*?[\`)):
		return outrigger.Errorf(outrigger.Invalid, "server name %q does not name one trust domain; * is for the path only", name)
	case workload && (p == "" || strings.ContainsAny(p, `?[\`)):
		return outrigger.Errorf(outrigger.Invalid, "server name %q has no path, or one with ?, [ or \\; write spiffe://DOMAIN/PATH, * stands for part of a segment", name)
	}
	return nil
}

// ServerConfig are the settings of TLS at the end that is dialled: 1.3 at least, the newest
// certificate, and clients that show a certificate must have one of the CAs', if there are
// any. Whether a client must show one is for the protocol above to say, see PeerOf.
//
// Sessions are not resumed: each connection is checked against today's CAs.
func (c *Credentials) ServerConfig(protocols ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		m := c.now.Load()
		t := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: protocols, SessionTicketsDisabled: true, Certificates: []tls.Certificate{*m.cert},
			Time: c.o.Now}
		if m.roots != nil {
			t.ClientAuth, t.ClientCAs = tls.VerifyClientCertIfGiven, m.roots
		}
		return t, nil
	}}
}

// ClientConfig are the settings of TLS for one handshake with host.
func (c *Credentials) ClientConfig(host string, protocols ...string) *tls.Config {
	m := c.now.Load()
	t := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: protocols, RootCAs: m.roots, ServerName: c.expects(host), Time: c.o.Now}
	if m.cert != nil {
		// Also if the server names other CAs: it then says what is wrong, instead of both
		// going on as if there were no certificate.
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return m.cert, nil }
	}
	if id := c.o.ServerName; strings.HasPrefix(id, spiffeScheme) {
		// crypto/tls verifies host names only; what it does is done here, with the id instead.
		t.InsecureSkipVerify = true
		t.VerifyConnection = func(s tls.ConnectionState) error { return verifyWorkload(s, m.roots, id, c.o.Now()) }
	}
	return t
}

// expects is whom a dialler of host:port or host expects.
func (c *Credentials) expects(address string) string {
	if c.o.ServerName != "" {
		return c.o.ServerName
	}
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

// verifyWorkload is the verification of a server by its SPIFFE id (X509-SVID.md, section 5):
// a chain to one of the CAs, for servers, and exactly one URI.
func verifyWorkload(s tls.ConnectionState, pool *x509.CertPool, pattern string, now time.Time) error {
	leaf := s.PeerCertificates[0] // a server sends one, or there is no handshake
	o := x509.VerifyOptions{Roots: pool, Intermediates: x509.NewCertPool(), CurrentTime: now}
	for _, c := range s.PeerCertificates[1:] {
		o.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(o); err != nil { // the default use is serverAuth
		return err
	}
	if len(leaf.URIs) != 1 {
		return outrigger.Errorf(outrigger.Denied, "the server's certificate has %d URI names, wanted is one that matches %s", len(leaf.URIs), pattern)
	}
	if got := leaf.URIs[0].String(); !matchesWorkload(pattern, got) {
		return outrigger.Errorf(outrigger.Denied, "the server is %s, wanted is %s", printable(got), pattern)
	}
	return nil
}

// matchesWorkload reports whether an id matches a pattern that CheckServerName allows.
func matchesWorkload(pattern, id string) bool {
	domain, p, _ := strings.Cut(strings.TrimPrefix(pattern, spiffeScheme), "/")
	rest, workload := strings.CutPrefix(id, spiffeScheme)
	d, q, _ := strings.Cut(rest, "/")
	ok, err := path.Match(p, q)
	return workload && d == domain && ok && err == nil
}

// Server returns credentials for a gRPC server. A handshake that fails is counted, and logged
// at most every 10 s: whom it was with only learns that a certificate is not accepted.
func (c *Credentials) Server() credentials.TransportCredentials {
	// HTTP/1.1 is what feeds begin with, see package cache/feed.
	return &serverCredentials{credentials.NewTLS(c.ServerConfig("h2", "http/1.1")), c}
}

type serverCredentials struct {
	credentials.TransportCredentials
	c *Credentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (s *serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	patient := &lingering{Conn: raw}
	conn, info, err := s.TransportCredentials.ServerHandshake(patient)
	if err != nil {
		s.c.refused(raw.RemoteAddr(), err)
		return nil, nil, err
	}
	patient.up.Store(true)
	return conn, info, nil
}

// lingering is a connection whose peer hears why it is refused. In TLS 1.3 a client is done
// with its part before it is refused and speaks on; a socket that is closed with that unread
// is reset, and the client never sees the alert.
type lingering struct {
	net.Conn
	up atomic.Bool // the handshake succeeded: closing is closing
}

// Bounds of waiting for a refused client to go.
const (
	lingerTime  = time.Second
	lingerBytes = 64 << 10
)

// Close implements net.Conn.
func (l *lingering) Close() error {
	if half, ok := l.Conn.(interface{ CloseWrite() error }); ok && !l.up.Load() {
		// Best effort: whatever fails here, the connection is closed below.
		_ = half.CloseWrite()
		_ = l.Conn.SetReadDeadline(time.Now().Add(lingerTime))
		_, _ = io.CopyN(io.Discard, l.Conn, lingerBytes)
	}
	return l.Conn.Close()
}

// Clone implements credentials.TransportCredentials.
func (s *serverCredentials) Clone() credentials.TransportCredentials {
	return &serverCredentials{s.TransportCredentials.Clone(), s.c}
}

// refused notes a client that could not be talked to. One that only looked whether the port
// is open, as load balancers do, is none.
func (c *Credentials) refused(who net.Addr, err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return
	}
	c.count(c.metrics.refused)
	now := c.o.Now().UnixNano()
	if last := c.logged.Load(); now-last >= int64(logEvery) && c.logged.CompareAndSwap(last, now) {
		c.o.Logger.Warn("a connection was refused; others of the next 10 s are only counted", "peer", who.String(), "error", printable(err.Error()))
	}
}

// Client returns credentials for gRPC connections. Each handshake uses what is newest, and
// expects the host of the address dialled, or Options.ServerName.
func (c *Credentials) Client() credentials.TransportCredentials { return clientCredentials{c} }

type clientCredentials struct{ c *Credentials }

// ClientHandshake implements credentials.TransportCredentials.
func (d clientCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	// gRPC takes the name to expect from the authority alone, never from the configuration.
	conn, info, err := credentials.NewTLS(d.c.ClientConfig(authority)).ClientHandshake(ctx, d.c.expects(authority), raw)
	return conn, info, d.c.explain(err)
}

// ServerHandshake implements credentials.TransportCredentials; these are a client's.
func (d clientCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, outrigger.Errorf(outrigger.Internal, "credentials of a client cannot serve")
}

// Info implements credentials.TransportCredentials.
func (d clientCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (d clientCredentials) Clone() credentials.TransportCredentials { return d }

// OverrideServerName implements credentials.TransportCredentials.
func (d clientCredentials) OverrideServerName(string) error {
	return outrigger.Errorf(outrigger.Internal, "the name to expect is set when credentials are opened")
}

// Handshake makes raw, a connection to address, an encrypted one for HTTP/1.1. On an error it
// has closed raw.
func (c *Credentials) Handshake(ctx context.Context, address string, raw net.Conn) (net.Conn, error) {
	conn := tls.Client(raw, c.ClientConfig(address, "http/1.1"))
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, c.explain(err)
	}
	return conn, nil
}

// Transport makes t dial https addresses with these credentials.
func (c *Credentials) Transport(t *http.Transport) *http.Transport {
	t.DialTLSContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		raw, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return c.Handshake(ctx, address, raw)
	}
	return t
}

// Listener serves HTTPS on l. Clients are not asked for certificates there: browsers and
// probes have none, and what they may do is for their tokens to say.
func (c *Credentials) Listener(l net.Listener) net.Listener {
	t := c.ServerConfig("h2", "http/1.1")
	inner := t.GetConfigForClient
	t.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		one, err := inner(h)
		one.ClientAuth, one.ClientCAs = tls.NoClientCert, nil
		return one, err
	}
	return tls.NewListener(l, t)
}

// explain adds what to do to an error of a client's handshake. It is an answer: nothing of it
// passes with time.
func (c *Credentials) explain(err error) error {
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	var record tls.RecordHeaderError
	var invalid x509.CertificateInvalidError
	ca := c.files.CAName + " " + c.files.CA
	switch {
	case err == nil:
		return nil
	case errors.As(err, &authority):
		return outrigger.Errorf(outrigger.Unavailable, "the server's certificate is signed by none of the CAs in %s; add the CA that signed it", ca)
	case errors.As(err, &host):
		return outrigger.Errorf(outrigger.Unavailable, "%v; dial a name the certificate has, have it issued for this one, or give the name with --control-server-name", err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return outrigger.Errorf(outrigger.Unavailable, "the server's certificate has expired or is not valid yet: %v; renew it there, and look at both clocks", err)
	case errors.As(err, &record):
		return outrigger.Errorf(outrigger.Unavailable, "the server does not speak TLS; give it --tls-cert and --tls-key, or leave out %s", c.files.CAName)
	}
	return err
}

// PeerOf returns the identity of the peer of a connection, and whether its certificate was
// verified; without one there is no identity. What Credentials.Server returned made info.
func PeerOf(info credentials.AuthInfo) (string, bool) {
	t, ok := info.(credentials.TLSInfo)
	if !ok || len(t.State.VerifiedChains) == 0 || len(t.State.VerifiedChains[0]) == 0 {
		return "", false
	}
	return PeerName(t.State.VerifiedChains[0][0]), true
}

// PeerFrom is PeerOf for the caller of an RPC.
func PeerFrom(ctx context.Context) (string, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", false
	}
	return PeerOf(p.AuthInfo)
}

// PeerName is what a certificate calls its holder: the first URI among its names, else
// "dns:" and the first host, else "cn:" and the common name. The three cannot be taken for
// one another; what is not printable is shown as '?', and long names are cut.
func PeerName(c *x509.Certificate) string {
	switch {
	case len(c.URIs) > 0:
		return printable(c.URIs[0].String())
	case len(c.DNSNames) > 0:
		return printable("dns:" + c.DNSNames[0])
	}
	return printable("cn:" + c.Subject.CommonName)
}

func printable(s string) string {
	if len(s) > maxPeerName {
		s = s[:maxPeerName]
	}
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
