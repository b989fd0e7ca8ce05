package translate

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// tlsSocket is the one name of the transport socket that gRPC accepts.
const tlsSocket = "envoy.transport_sockets.tls"

// ProviderInstance is the certificate provider that gRPC clients verify endpoints with:
// they have no SDS, and take certificates from what their bootstrap says under this name
// (gRFC A29, https://github.com/grpc/proposal/blob/master/A29-xds-tls-security.md).
const ProviderInstance = "outrigger"

// systemRoots is what the provider is asked for where no trust bundle is named.
const systemRoots = "system"

// DefaultTrustStore is where Envoys find the certificates of their machine: that of
// Debian, Ubuntu, Alpine and the images of Envoy.
const DefaultTrustStore = "/etc/ssl/certs/ca-certificates.crt"

// secure adds to a cluster what TLS takes. Plain versions have no transport socket.
func (e *encoder) secure(c *cluster.Cluster, v *policy.Version) error {
	if v.TLS == nil {
		return nil
	}
	cfg, err := pack(e.upstreamTLS(v))
	if err != nil {
		return err
	}
	c.TransportSocket = &core.TransportSocket{Name: tlsSocket, ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: cfg}}
	return nil
}

func (e *encoder) upstreamTLS(v *policy.Version) *tls.UpstreamTlsContext {
	t := v.TLS
	common := &tls.CommonTlsContext{AlpnProtocols: t.ALPN}
	out := &tls.UpstreamTlsContext{CommonTlsContext: common, Sni: t.ServerName, AutoHostSni: t.ServerName == "", AutoSniSanValidation: t.ServerName == "" && len(t.SANs) == 0}
	check := &tls.CertificateValidationContext{}
	if e.kind == KindGRPC {
		e.provided(common, check, v)
		return out
	}
	names := t.SANs
	if len(names) == 0 && t.ServerName != "" {
		names = []string{t.ServerName}
	}
	for _, name := range names {
		check.MatchTypedSubjectAltNames = append(check.MatchTypedSubjectAltNames, subjectName(name))
	}
	if t.ClientCert != "" {
		common.TlsCertificateSdsSecretConfigs = []*tls.SdsSecretConfig{{Name: xds.CertificateName(t.ClientCert), SdsConfig: adsSource()}}
	}
	switch {
	case t.CA != "":
		common.ValidationContextType = &tls.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tls.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext:         check,
			ValidationContextSdsSecretConfig: &tls.SdsSecretConfig{Name: xds.BundleName(t.CA), SdsConfig: adsSource()},
		}}
		return out
	case e.kind == KindEnvoy: // which has no word for the machine's own
		check.TrustedCa = &core.DataSource{Specifier: &core.DataSource_Filename{Filename: cmp.Or(e.opt.Envoy.TrustStore, DefaultTrustStore)}}
	default:
		check.SystemRootCerts = &tls.CertificateValidationContext_SystemRootCerts{}
	}
	common.ValidationContextType = &tls.CommonTlsContext_ValidationContext{ValidationContext: check}
	return out
}

// provided says the same in the words gRPC knows. It takes every certificate that no
// name is demanded of, so names are always written.
func (e *encoder) provided(common *tls.CommonTlsContext, check *tls.CertificateValidationContext, v *policy.Version) {
	t := v.TLS
	names := slices.Clone(t.SANs)
	if len(names) == 0 {
		for _, p := range v.Endpoints {
			names = append(names, t.ServerNameOf(p.Address))
		}
	}
	if len(names) == 0 {
		names = []string{t.ServerName}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		//lint:ignore SA1019 gRPC reads this field and not its successor
		check.MatchSubjectAltNames = append(check.MatchSubjectAltNames, exactly(name))
	}
	check.CaCertificateProviderInstance = &tls.CertificateProviderPluginInstance{InstanceName: ProviderInstance, CertificateName: cmp.Or(t.CA, systemRoots)}
	if t.ClientCert != "" {
		common.TlsCertificateProviderInstance = &tls.CertificateProviderPluginInstance{InstanceName: ProviderInstance, CertificateName: t.ClientCert}
	}
	common.ValidationContextType = &tls.CommonTlsContext_ValidationContext{ValidationContext: check}
}

func exactly(s string) *matcher.StringMatcher {
	return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: s}}
}

// subjectName matches as host names are matched, wildcards of certificates included, or
// as addresses are.
func subjectName(name string) *tls.SubjectAltNameMatcher {
	kind := tls.SubjectAltNameMatcher_DNS
	if _, err := netip.ParseAddr(name); err == nil {
		kind = tls.SubjectAltNameMatcher_IP_ADDRESS
	}
	return &tls.SubjectAltNameMatcher{SanType: kind, Matcher: exactly(name)}
}

// httpOptions are the protocols an Envoy speaks to endpoints: those of ALPN, or that of
// the application.
func httpOptions(t *policy.TLS) *upstreamhttp.HttpProtocolOptions {
	explicit := func(c *upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig) *upstreamhttp.HttpProtocolOptions {
		return &upstreamhttp.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: c}}
	}
	var offered []string
	if t != nil {
		offered = t.ALPN
	}
	switch {
	case len(offered) > 1:
		return &upstreamhttp.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_AutoConfig{
			AutoConfig: &upstreamhttp.HttpProtocolOptions_AutoHttpConfig{HttpProtocolOptions: &core.Http1ProtocolOptions{}, Http2ProtocolOptions: &core.Http2ProtocolOptions{}},
		}}
	case len(offered) == 1 && offered[0] == policy.ALPNHTTP2:
		return explicit(&upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{}}})
	case len(offered) == 1:
		return explicit(&upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &core.Http1ProtocolOptions{}}})
	}
	return &upstreamhttp.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_UseDownstreamProtocolConfig{
		UseDownstreamProtocolConfig: &upstreamhttp.HttpProtocolOptions_UseDownstreamHttpConfig{
			HttpProtocolOptions: &core.Http1ProtocolOptions{}, Http2ProtocolOptions: &core.Http2ProtocolOptions{},
		},
	}}
}

// hostnameOf is what an Envoy writes into the Host field of requests to an endpoint. Where
// the SNI follows it, it is a name without a port.
func hostnameOf(v *policy.Version, address string) string {
	switch {
	case v.TLS == nil:
		return ""
	case v.TLS.ServerName == "":
		return v.TLS.ServerNameOf(address)
	}
	return v.TLS.Authority(address)
}

// usesTLS: requests of the model may go to an endpoint that wants its own name in Host.
func usesTLS(m *policy.Model) bool {
	return slices.ContainsFunc(m.Versions, func(v policy.Version) bool { return v.TLS != nil })
}

// decodeTLS is the inverse of secure for sets of sidecars. What it does not understand is
// refused: to go on in the clear, or to verify less, is not what was meant.
func decodeTLS(c *cluster.Cluster) (*policy.TLS, error) {
	socket := c.GetTransportSocket()
	if socket == nil {
		return nil, nil
	}
	var up tls.UpstreamTlsContext
	if err := socket.GetTypedConfig().UnmarshalTo(&up); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "transport socket %q is not an UpstreamTlsContext", socket.GetName())
	}
	common := up.GetCommonTlsContext()
	out := &policy.TLS{ServerName: up.GetSni(), ALPN: common.GetAlpnProtocols()}
	if out.ServerName == "" && !up.GetAutoHostSni() {
		return nil, outrigger.Errorf(outrigger.Invalid, "TLS without a server name")
	}
	check := common.GetValidationContext()
	if combined := common.GetCombinedValidationContext(); combined != nil {
		name, ok := strings.CutPrefix(combined.GetValidationContextSdsSecretConfig().GetName(), xds.BundleName(""))
		if !ok || name == "" {
			return nil, outrigger.Errorf(outrigger.Invalid, "trust bundle %q is not named %sNAME", combined.GetValidationContextSdsSecretConfig().GetName(), xds.BundleName(""))
		}
		check, out.CA = combined.GetDefaultValidationContext(), name
	} else if check.GetSystemRootCerts() == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "TLS without anything to verify the server by")
	}
	for _, m := range check.GetMatchTypedSubjectAltNames() {
		out.SANs = append(out.SANs, m.GetMatcher().GetExact())
	}
	if len(out.SANs) == 0 && !up.GetAutoSniSanValidation() {
		return nil, outrigger.Errorf(outrigger.Invalid, "TLS that takes a certificate for any name")
	}
	switch certs := common.GetTlsCertificateSdsSecretConfigs(); {
	case len(certs) > 1:
		return nil, outrigger.Errorf(outrigger.Invalid, "%d client certificates, want one at most", len(certs))
	case len(certs) == 1:
		name, ok := strings.CutPrefix(certs[0].GetName(), xds.CertificateName(""))
		if !ok || name == "" {
			return nil, outrigger.Errorf(outrigger.Invalid, "client certificate %q is not named %sNAME", certs[0].GetName(), xds.CertificateName(""))
		}
		out.ClientCert = name
	}
	return out, nil
}
