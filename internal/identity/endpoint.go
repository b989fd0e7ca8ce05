package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// Endpoint says how a server somewhere else is talked to over TLS.
type Endpoint struct {
	// ServerName is the SNI; "" leaves it to whoever dials, who then sets the host's name.
	ServerName string
	// Names are those of which the server's certificate must have one; empty = the SNI.
	Names []string
	// Roots verify the server; nil = the trust store of this machine.
	Roots *Bundle
	// Pair is shown to the server if it asks; nil = nothing is.
	Pair *KeyPair
	// Protocols are offered by ALPN, best first.
	Protocols []string
}

// sessions is how many servers' TLS sessions one configuration remembers, to resume them.
const sessions = 64

// Client returns the configuration of the client's side: TLS 1.2 or later, sessions
// resumed. The caller owns it; its sessions are of this material and must not be shared
// with others.
func (e Endpoint) Client() *tls.Config {
	out := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: e.ServerName, NextProtos: e.Protocols, ClientSessionCache: tls.NewLRUClientSessionCache(sessions)}
	if e.Roots != nil {
		out.RootCAs = e.Roots.pool
	}
	if e.Pair != nil {
		out.Certificates = []tls.Certificate{e.Pair.certificate}
	}
	if len(e.Names) > 0 {
		// The library knows one name, the SNI. So its check is replaced by the same one for
		// each of several names; it also runs when a session is resumed.
		out.InsecureSkipVerify = true
		roots, names := out.RootCAs, e.Names
		out.VerifyConnection = func(s tls.ConnectionState) error { return verify(s, roots, names, time.Now()) }
	}
	return out
}

// verify checks the chain and that the certificate is for one of the names.
func verify(s tls.ConnectionState, roots *x509.CertPool, names []string, now time.Time) error {
	if len(s.PeerCertificates) == 0 {
		return outrigger.Errorf(outrigger.Unauthorised, "the server showed no certificate")
	}
	leaf, between := s.PeerCertificates[0], x509.NewCertPool()
	for _, c := range s.PeerCertificates[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now}); err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: s.PeerCertificates, Err: err}
	}
	for _, name := range names {
		if leaf.VerifyHostname(name) == nil {
			return nil
		}
	}
	return &tls.CertificateVerificationError{UnverifiedCertificates: s.PeerCertificates, Err: x509.HostnameError{Certificate: leaf, Host: strings.Join(names, " or ")}}
}

// Fault says, for the people who call, why TLS with a server failed: in words of ours,
// which hold no name of files, no address and nothing that the server wrote. "" for errors
// that are of something else.
func Fault(err error) string {
	if err == nil {
		return ""
	}
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &authority):
		return faultAuthority
	case errors.As(err, &host):
		return faultName
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return faultExpired
	case errors.As(err, &invalid):
		return "its certificate may not be used for this"
	case errors.As(err, &record):
		return faultNoTLS
	}
	return faultOf(err.Error())
}

const (
	faultAuthority = "its certificate is from an unknown authority"
	faultName      = "its certificate is for another name"
	faultExpired   = "its certificate has expired or is not valid yet"
	faultNoTLS     = "it does not speak TLS"
)

// faultOf is Fault for errors that came through a library that kept their text only, and
// for alerts (RFC 8446 §6), of which the standard library exports no type.
func faultOf(text string) string {
	for _, f := range [...]struct{ said, text string }{
		{"certificate signed by unknown authority", faultAuthority}, {"certificate is valid for ", faultName}, {"certificate is not valid for any names", faultName},
		{"certificate has expired or is not yet valid", faultExpired}, {"first record does not look like a TLS handshake", faultNoTLS},
		{"remote error: tls: certificate required", "it demands a client certificate"}, {"remote error: tls: unknown certificate authority", "it does not trust the client certificate"},
		{"remote error: tls: bad certificate", "it does not accept the client certificate"}, {"remote error: tls: expired certificate", "it says that the client certificate has expired"},
		{"remote error: tls: ", "it refused the handshake"},
	} {
		if strings.Contains(text, f.said) {
			return f.text
		}
	}
	return ""
}
