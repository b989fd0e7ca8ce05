//go:build !dataplane

package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spf13/pflag"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// tlsFlags say how the endpoints of a version are reached over TLS.
type tlsFlags struct {
	on                         bool
	serverName, ca, clientCert string
	subjectNames, alpn         []string
	urls                       int // endpoints given as https://
}

func (t *tlsFlags) bind(f *pflag.FlagSet) {
	f.BoolVar(&t.on, "tls", false, "reach the endpoints over TLS, verified by the trust store of the machine that calls")
	f.StringVar(&t.serverName, "tls-server-name", "", "name sent as SNI and verified (default: each endpoint's host)")
	f.StringVar(&t.ca, "tls-ca", "", "verify by the trust bundle NAME.ca of the control plane's --secrets instead")
	f.StringVar(&t.clientCert, "tls-client-cert", "", "show the certificate NAME.crt with NAME.key of the control plane's --secrets")
	f.StringSliceVar(&t.subjectNames, "tls-san", nil, "DNS name or IP address of which the certificate must have one, instead of the server name; repeatable")
	f.StringSliceVar(&t.alpn, "tls-alpn", nil, "protocols offered, h2 and http/1.1 (default: HTTP/1.1, and HTTP/2 for gRPC)")
}

// address is host:port of what was given as an endpoint.
func (t *tlsFlags) address(given string) (string, error) {
	scheme, _, isURL := strings.Cut(given, "://")
	if !isURL {
		return given, nil
	}
	u, err := url.Parse(given)
	if err != nil || scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return "", fmt.Errorf("--endpoint %s is not https://host[:port]; without TLS give host:port, and a path is the application's", given)
	}
	t.urls++
	if u.Port() == "" {
		return u.Host + ":443", nil
	}
	return u.Host, nil
}

// message is nil without TLS.
func (t *tlsFlags) message(endpoints int) (*pb.EndpointTLS, error) {
	detail := t.serverName != "" || t.ca != "" || t.clientCert != "" || len(t.subjectNames) > 0 || len(t.alpn) > 0
	switch {
	case t.urls > 0 && t.urls < endpoints && !t.on:
		return nil, errors.New("some of the endpoints are https:// and some are not; a version is reached over TLS as a whole: give --tls or register two versions")
	case !t.on && t.urls == 0 && detail:
		return nil, errors.New("--tls-… without --tls; give it, or the endpoints as https://host[:port]")
	case !t.on && t.urls == 0:
		return nil, nil
	}
	return &pb.EndpointTLS{ServerName: t.serverName, Ca: t.ca, ClientCertificate: t.clientCert, SubjectNames: t.subjectNames, Alpn: t.alpn}, nil
}
