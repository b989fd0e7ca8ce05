//go:build !dataplane

package main

import (
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/spf13/pflag"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// listenTLS is how a control plane serves: by TLS, and to whom.
type listenTLS struct {
	cert, key, clientCA string
	requireClient       bool
	insecure            bool
}

func (t *listenTLS) bind(f *pflag.FlagSet) {
	f.StringVar(&t.cert, "tls-cert", "", "file with the certificate of --listen and --http, PEM: both speak TLS then; looked at every 2 s")
	f.StringVar(&t.key, "tls-key", "", "file with the private key of --tls-cert, PEM")
	f.StringVar(&t.clientCA, "tls-client-ca", "", "file with the CAs whose client certificates are believed at --listen, PEM")
	f.BoolVar(&t.requireClient, "tls-require-client", false, "serve peers at --listen with such a certificate only; operators may present a token of --access-file or --token-file instead")
	f.BoolVar(&t.insecure, "insecure-listen", false, "let other machines connect without TLS: the network between is trusted")
}

func (t *listenTLS) on() bool { return t.cert != "" || t.key != "" || t.clientCA != "" }

// validate refuses what would be less safe than it looks.
func (t *listenTLS) validate(c *controlFlags) error {
	if t.requireClient {
		switch {
		case t.clientCA == "":
			return errors.New("--tls-require-client is given without --tls-client-ca; give the CAs that sign clients' certificates")
		case strings.HasPrefix(c.listen, "unix:"):
			return errors.New("--tls-require-client is given and --listen is a Unix socket, which speaks no TLS; listen on host:port")
		}
	}
	if t.on() || t.insecure {
		return nil
	}
	for _, l := range [][2]string{{"listen", c.listen}, {"http", c.http}} {
		if !isLoopback(l[1]) {
			return fmt.Errorf("--%s is %s, which other machines can reach, and without TLS whoever is on the way reads and changes everything; give --tls-cert and --tls-key (outrigger cert makes some to try), or --insecure-listen if the network is trusted", l[0], l[1])
		}
	}
	return nil
}

// open reads the files; nil = plaintext.
func (t *listenTLS) open(p *process) (*identity.Credentials, error) {
	if !t.on() {
		if t.insecure {
			p.log.Warn("other machines may connect without TLS (--insecure-listen): connections are neither encrypted nor authenticated")
		}
		return nil, nil
	}
	c, err := identity.OpenCredentials(identity.Files{Cert: t.cert, Key: t.key, CA: t.clientCA,
		CertName: "--tls-cert", KeyName: "--tls-key", CAName: "--tls-client-ca"},
		identity.CredentialsOptions{Use: identity.Serve, Logger: p.log, Meter: p.tel.Meter("identity")})
	if err != nil {
		return nil, configError{err}
	}
	p.run("server certificates", c.Run)
	return c, nil
}

// grpcCredentials are what l is served with; Unix sockets speak no TLS.
func grpcCredentials(c *identity.Credentials, l net.Listener) credentials.TransportCredentials {
	if c == nil || l.Addr().Network() == "unix" {
		return insecure.NewCredentials()
	}
	return c.Server()
}

// httpListener is l, encrypted unless it is a Unix socket.
func httpListener(c *identity.Credentials, l net.Listener) net.Listener {
	if c == nil || l.Addr().Network() == "unix" {
		return l
	}
	return c.Listener(l)
}

// probeCredentials are for the gateways of other regions; nil = plaintext.
func probeCredentials(p *process) credentials.TransportCredentials {
	if p.control == nil {
		return nil
	}
	return p.control.Client()
}

// dial is how this control plane proves itself to its leader and to other regions: with the
// certificate it serves with, unless it has one for that.
func (t *listenTLS) dial(d dialTLS) *dialTLS {
	if d.ca != "" && d.cert == "" && d.key == "" {
		d.cert, d.key = t.cert, t.key
	}
	return &d
}
