package translate

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// ControlTLS says how a client connects to control planes by TLS. The files, PEM, are the
// client's: it reads them where it runs, and a bootstrap only names them.
type ControlTLS struct {
	CA        string // of the CAs that sign control planes' certificates; required
	Cert, Key string // the client's own certificate and its key; both or neither
	// ServerName is whom the certificate must name: a host, or spiffe://DOMAIN/PATH with * in the
	// path; "" = one of the hosts that are dialled. Proxyless gRPC clients have no word for it.
	ServerName string
}

// check refuses what a client could not start with, or what would not keep anybody out.
func (t *ControlTLS) check(kind Kind) error {
	switch {
	case t.CA == "":
		return outrigger.Errorf(outrigger.Invalid, "TLS toward the control plane names no CA, so nobody could be believed to be it; give the CA's certificate")
	case (t.Cert == "") != (t.Key == ""):
		return outrigger.Errorf(outrigger.Invalid, "of the client's certificate and its key only one is named; give both or neither")
	case t.ServerName != "" && kind == KindGRPC:
		return outrigger.Errorf(outrigger.Invalid, "gRPC clients expect the host they dial in the control plane's certificate and nothing else; leave the server name %q out", t.ServerName)
	}
	return identity.CheckServerName(t.ServerName)
}

// certificateRefresh is how often gRPC clients look at their files. They are small; the default of
// ten minutes would have a certificate in use after it was replaced for a reason.
const certificateRefresh = "10s"

// channelCredentials are those of gRFC A65
// (https://github.com/grpc/proposal/blob/master/A65-xds-mtls-creds-in-bootstrap.md).
func (t *ControlTLS) channelCredentials() map[string]any {
	if t == nil {
		return map[string]any{"type": "insecure"}
	}
	config := map[string]any{"ca_certificate_file": t.CA, "refresh_interval": certificateRefresh}
	if t.Cert != "" {
		config["certificate_file"], config["private_key_file"] = t.Cert, t.Key
	}
	return map[string]any{"type": "tls", "config": config}
}

// transportSocket is how an Envoy says it. It reads the files when it starts.
func (t *ControlTLS) transportSocket(servers []string) (*core.TransportSocket, error) {
	check := &tls.CertificateValidationContext{TrustedCa: file(t.CA)}
	names := []string{t.ServerName}
	if t.ServerName == "" {
		names = hosts(servers)
	}
	for _, name := range names {
		check.MatchTypedSubjectAltNames = append(check.MatchTypedSubjectAltNames, controlName(name))
	}
	out := &tls.UpstreamTlsContext{CommonTlsContext: &tls.CommonTlsContext{
		// An Envoy stops at 1.2 unless it is told; gRPC servers want to hear the protocol.
		TlsParams:             &tls.TlsParameters{TlsMinimumProtocolVersion: tls.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tls.TlsParameters_TLSv1_3},
		AlpnProtocols:         []string{policy.ALPNHTTP2},
		ValidationContextType: &tls.CommonTlsContext_ValidationContext{ValidationContext: check},
	}}
	switch {
	case t.ServerName == "":
		// Only names are sent, and each server is sent its own.
		out.AutoHostSni = slices.ContainsFunc(names, func(n string) bool { return !isAddress(n) })
	case !strings.HasPrefix(t.ServerName, workloadScheme) && !isAddress(t.ServerName):
		out.Sni = t.ServerName
	}
	if t.Cert != "" {
		out.CommonTlsContext.TlsCertificates = []*tls.TlsCertificate{{CertificateChain: file(t.Cert), PrivateKey: file(t.Key)}}
	}
	cfg, err := pack(out)
	if err != nil {
		return nil, err
	}
	return &core.TransportSocket{Name: tlsSocket, ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: cfg}}, nil
}

func file(name string) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_Filename{Filename: name}}
}

// hosts are those of addresses that SplitAddress accepts, sorted.
func hosts(addresses []string) (out []string) {
	for _, a := range addresses {
		host, _, _ := policy.SplitAddress(a) // Bootstrap has checked it
		out = append(out, host)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// workloadScheme begins names of workloads.
const workloadScheme = "spiffe://"

// controlName matches a host, or the workloads that a pattern of identity.CheckServerName means,
// as sidecars do.
func controlName(name string) *tls.SubjectAltNameMatcher {
	if !strings.HasPrefix(name, workloadScheme) {
		return subjectName(name)
	}
	match := exactly(name)
	if strings.Contains(name, "*") {
		match = &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{
			Regex: strings.ReplaceAll(regexp.QuoteMeta(name), `\*`, `[^/]*`), // of the whole name: Envoy's matches are full
		}}}
	}
	return &tls.SubjectAltNameMatcher{SanType: tls.SubjectAltNameMatcher_URI, Matcher: match}
}
