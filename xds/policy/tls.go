package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// TLS says how the endpoints of a version are reached over TLS, by names only: what a
// trust bundle or a client certificate of a name holds travels as a Secret resource.
type TLS struct {
	// ServerName is sent as SNI (RFC 6066 §3), named in the Host field, and what the
	// server's certificate must be for, unless SANs says otherwise. Empty = each
	// endpoint's own host, which must be a DNS name then.
	ServerName string
	// CA names the trust bundle that the server's certificate must come from; empty = the
	// trust store of the machine that dials.
	CA string
	// SANs are DNS names and IP addresses of which the certificate must have one, instead
	// of the server name.
	SANs []string
	// ClientCert names the certificate shown to the server; empty = none.
	ClientCert string
	// ALPN are the protocols offered (RFC 7301), of ALPNHTTP1 and ALPNHTTP2; empty = HTTP/1.1
	// for HTTP and HTTP/2 for gRPC. HTTP is spoken over HTTP/2 only if that is listed.
	ALPN []string
}

// Protocols of TLS.ALPN.
const (
	ALPNHTTP1 = "http/1.1"
	ALPNHTTP2 = "h2"
)

// MaxSANs bounds TLS.SANs, MaxServerName the length of a DNS name (RFC 1035 §2.3.4).
const (
	MaxSANs       = 32
	MaxServerName = 253
)

// Names returns the secrets t refers to: trust bundles and client certificates. Both are
// empty for nil.
func (t *TLS) Names() (ca, certificate string) {
	if t == nil {
		return "", ""
	}
	return t.CA, t.ClientCert
}

// ServerNameOf is the name an endpoint is known by to its clients: of the SNI and of the
// certificate.
func (t *TLS) ServerNameOf(address string) string {
	if t.ServerName != "" {
		return t.ServerName
	}
	host, _, _ := SplitAddress(address) // a policy's address is one
	return host
}

// Authority is what the Host field of requests to an endpoint says: its server name, and
// its port unless that is HTTPS's own.
func (t *TLS) Authority(address string) string {
	_, port, _ := SplitAddress(address)
	if port == 443 {
		return t.ServerNameOf(address)
	}
	return JoinAddress(t.ServerNameOf(address), port)
}

// SoleHost is the host all endpoints of v share, "" if they do not.
func (v *Version) SoleHost() string {
	sole := ""
	for i, e := range v.Endpoints {
		host, _, _ := SplitAddress(e.Address)
		if i > 0 && host != sole {
			return ""
		}
		sole = host
	}
	return sole
}

// Validate checks t as part of a version with these endpoints; nil is valid. Errors have
// kind Invalid and name the field, the value and the remedy.
func (t *TLS) Validate(endpoints []Endpoint) error {
	if t == nil {
		return nil
	}
	if t.ServerName != "" && !dnsName(t.ServerName) {
		return outrigger.Errorf(outrigger.Invalid, "tls server_name %q is not a DNS name of at most %d letters, digits, '-' and '.'; SNI knows no other", t.ServerName, MaxServerName)
	}
	for _, n := range [...]struct{ field, name string }{{"tls ca", t.CA}, {"tls client_certificate", t.ClientCert}} {
		if n.name == "" {
			continue
		}
		if err := outrigger.CheckName(n.field, n.name); err != nil {
			return err
		}
	}
	if err := limit("tls subject_names", len(t.SANs), MaxSANs); err != nil {
		return err
	}
	for i, s := range t.SANs {
		if _, err := netip.ParseAddr(s); err != nil && !dnsName(s) {
			return outrigger.Errorf(outrigger.Invalid, "tls subject_names[%d] %q is neither a DNS name nor an IP address", i, s)
		}
		if slices.Contains(t.SANs[:i], s) {
			return outrigger.Errorf(outrigger.Invalid, "tls subject_names has %q twice; give each name once", s)
		}
	}
	for i, p := range t.ALPN {
		if p != ALPNHTTP1 && p != ALPNHTTP2 || slices.Contains(t.ALPN[:i], p) {
			return outrigger.Errorf(outrigger.Invalid, "tls alpn %q is unknown or there twice; allowed are %s and %s", p, ALPNHTTP2, ALPNHTTP1)
		}
	}
	if t.ServerName != "" {
		return nil
	}
	for _, e := range endpoints {
		host, _, err := SplitAddress(e.Address)
		if err != nil {
			return err
		}
		if !dnsName(host) {
			return outrigger.Errorf(outrigger.Invalid, "endpoint %s has no DNS name that its certificate could be for; set tls server_name", e.Address)
		}
	}
	return nil
}

// dnsName: a host name as TLS takes it (RFC 6066 §3): no IP address, no final dot. '_' is
// no letter of host names, but of names that are in use.
func dnsName(s string) bool {
	if len(s) == 0 || len(s) > MaxServerName {
		return false
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
		for i := range len(label) {
			c := label[i]
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

// normaliseTLS returns the one form of what v's TLS means, sharing nothing with it: the
// server name written out where there is one, and names in order. The order of ALPN is a
// preference and stays.
func (v *Version) normaliseTLS() *TLS {
	if v.TLS == nil {
		return nil
	}
	out := *v.TLS
	if out.ServerName == "" {
		out.ServerName = v.SoleHost()
	}
	out.SANs, out.ALPN = cloneOrNil(out.SANs), cloneOrNil(out.ALPN)
	slices.Sort(out.SANs)
	if len(out.SANs) == 1 && out.SANs[0] == out.ServerName {
		out.SANs = nil // what is asked for anyway
	}
	return &out
}
