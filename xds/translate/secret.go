package translate

import (
	"maps"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Secrets are all secrets of a control plane, by resource name: what BundleSecret and
// CertificateSecret made. They are not modified once they are given to an Encoder, which
// publishes those that the clusters of its set name and no others.
type Secrets map[string]proto.Message

// BundleSecret is the Secret resource of a trust bundle, a sequence of PEM certificates.
func BundleSecret(name string, pem []byte) proto.Message {
	return &tls.Secret{Name: xds.BundleName(name), Type: &tls.Secret_ValidationContext{
		ValidationContext: &tls.CertificateValidationContext{TrustedCa: inline(pem)},
	}}
}

// CertificateSecret is the Secret resource of a client certificate: its chain and its
// private key, in PEM. Dump and RedactAny leave the key out.
func CertificateSecret(name string, chain, key []byte) proto.Message {
	return &tls.Secret{Name: xds.CertificateName(name), Type: &tls.Secret_TlsCertificate{
		TlsCertificate: &tls.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)},
	}}
}

func inline(b []byte) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
}

// Confidential reports whether a resource holds a private key, by its name alone.
func Confidential(typeURL, name string) bool {
	return typeURL == xds.TypeSecret && strings.HasPrefix(name, xds.CertificateName(""))
}

// SecretsOf lists the secrets a resource names; only clusters do. The set that has the
// resource may lack them: their files may be missing, and then whatever needs them fails
// and nothing else.
func SecretsOf(m proto.Message) (names []string) {
	c, ok := m.(*cluster.Cluster)
	if !ok || c.GetTransportSocket() == nil {
		return nil
	}
	var up tls.UpstreamTlsContext
	if c.GetTransportSocket().GetTypedConfig().UnmarshalTo(&up) != nil {
		return nil
	}
	common := up.GetCommonTlsContext()
	for _, s := range common.GetTlsCertificateSdsSecretConfigs() {
		names = append(names, s.GetName())
	}
	if s := common.GetCombinedValidationContext().GetValidationContextSdsSecretConfig(); s != nil {
		names = append(names, s.GetName())
	}
	return names
}

// SecretNames lists the resource names of what a model's versions name, with repetitions.
func SecretNames(m *policy.Model) (names []string) {
	for i := range m.Versions {
		ca, certificate := m.Versions[i].TLS.Names()
		if ca != "" {
			names = append(names, xds.BundleName(ca))
		}
		if certificate != "" {
			names = append(names, xds.CertificateName(certificate))
		}
	}
	return names
}

// secrets brings the Secret resources of a set up to date: those that models name, as far
// as they are known. gRPC clients get none.
func (e *Encoder) secrets(res *Resources, all Secrets) {
	if e.kind == KindGRPC {
		return
	}
	for _, name := range res.Names(xds.TypeSecret) {
		if e.named[name] == 0 || all[name] == nil {
			res.Delete(xds.TypeSecret, name)
		}
	}
	for name := range e.named {
		s, had := all[name], res.Get(xds.TypeSecret, name)
		if s != nil && had != s && (had == nil || !proto.Equal(had, s)) {
			res.Put(xds.TypeSecret, name, s)
		}
	}
}

// names counts what models name: n is 1 for a model that comes and -1 for one that goes.
func (e *Encoder) names(m *encoded, n int) {
	if m == nil {
		return
	}
	for _, name := range m.secrets {
		if e.named[name] += n; e.named[name] == 0 {
			delete(e.named, name)
		}
	}
}

// checkSecret is what the generated rules of a Secret do not say: that it holds what its
// name says, and that a certificate and its key are a pair. Errors never hold key material.
func checkSecret(s *tls.Secret) error {
	if name, ok := strings.CutPrefix(s.GetName(), xds.BundleName("")); ok {
		_, err := identity.ParseBundle(name, s.GetValidationContext().GetTrustedCa().GetInlineBytes())
		return err
	}
	if name, ok := strings.CutPrefix(s.GetName(), xds.CertificateName("")); ok {
		c := s.GetTlsCertificate()
		_, err := identity.ParseKeyPair(name, c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		return err
	}
	return outrigger.Errorf(outrigger.Invalid, "a secret is named %sNAME or %sNAME", xds.BundleName(""), xds.CertificateName(""))
}

// DecodeSecrets returns the material of a set whose secrets came through Unmarshal. What
// prev already has of the same content is taken from there.
func DecodeSecrets(res *Resources, prev *identity.Material) *identity.Material {
	out := &identity.Material{Bundles: map[string]*identity.Bundle{}, Pairs: map[string]*identity.KeyPair{}}
	if prev == nil {
		prev = out
	}
	for _, resource := range res.Names(xds.TypeSecret) {
		s, _ := res.Get(xds.TypeSecret, resource).(*tls.Secret)
		if name, ok := strings.CutPrefix(resource, xds.BundleName("")); ok {
			b, err := identity.ParseBundle(name, s.GetValidationContext().GetTrustedCa().GetInlineBytes())
			if old := prev.Bundles[name]; err == nil && old != nil && old.Digest == b.Digest {
				b = old
			}
			if err == nil {
				out.Bundles[name] = b
			}
		}
		if name, ok := strings.CutPrefix(resource, xds.CertificateName("")); ok {
			c := s.GetTlsCertificate()
			p, err := identity.ParseKeyPair(name, c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
			if old := prev.Pairs[name]; err == nil && old != nil && old.Digest == p.Digest {
				p = old
			}
			if err == nil {
				out.Pairs[name] = p
			}
		}
	}
	return out
}

// Same reports whether two sets of secrets hold the same messages.
func (s Secrets) Same(o Secrets) bool {
	return maps.EqualFunc(s, o, func(a, b proto.Message) bool { return proto.Equal(a, b) })
}
