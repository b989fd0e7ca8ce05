package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// Authority is a certificate authority for trying the mesh out and for tests: one key, no
// intermediates, nothing that renews or revokes. Where it matters, have certificates issued
// by what your organisation runs; Credentials reads those all the same.
type Authority struct {
	cert *x509.Certificate
	raw  []byte
	key  crypto.Signer
}

// Leaf is what Authority.Issue certifies.
type Leaf struct {
	Name         string   // common name
	Hosts        []string // DNS names and IP addresses it may serve; none = it is for a client only
	URI          string   // spiffe://DOMAIN/PATH; "" = none
	Begin, Until time.Time
}

// NewAuthority makes a CA with a new P-256 key.
func NewAuthority(name string, begin, until time.Time) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "key of the CA")
	}
	t, err := template(name, begin, until)
	if err != nil {
		return nil, err
	}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	raw, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "certificate of the CA")
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "certificate of the CA")
	}
	return &Authority{cert: cert, raw: raw, key: key}, nil
}

// ParseAuthority reads a CA as Text wrote it. Errors have kind Invalid and show nothing of
// the key.
func ParseAuthority(cert, key []byte) (*Authority, error) {
	p, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "the CA's certificate and key cannot be read or do not belong together")
	}
	signer, ok := p.PrivateKey.(crypto.Signer)
	if !ok || p.Leaf == nil || !p.Leaf.IsCA {
		return nil, outrigger.Errorf(outrigger.Invalid, "the certificate is not a CA's")
	}
	return &Authority{cert: p.Leaf, raw: p.Certificate[0], key: signer}, nil
}

// Text returns the CA's certificate, which is for everybody, and its key, which is for nobody
// who does not issue certificates.
func (a *Authority) Text() (cert, key []byte, err error) {
	key, err = keyText(a.key)
	return certText(a.raw), key, err
}

// Until is when the CA's certificate ends.
func (a *Authority) Until() time.Time { return a.cert.NotAfter }

// Issue returns a certificate and its new P-256 key. Errors have kind Invalid.
func (a *Authority) Issue(l Leaf) (cert, key []byte, err error) {
	t, err := template(l.Name, l.Begin, l.Until)
	if err != nil {
		return nil, nil, err
	}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for _, h := range l.Hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
			continue
		}
		t.DNSNames = append(t.DNSNames, h)
	}
	if len(l.Hosts) > 0 {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if l.URI != "" {
		if err := CheckServerName(l.URI); err != nil {
			return nil, nil, err
		}
		u, err := url.Parse(l.URI)
		if err != nil || u.Scheme != "spiffe" {
			return nil, nil, outrigger.Errorf(outrigger.Invalid, "%q is not spiffe://DOMAIN/PATH", l.URI)
		}
		t.URIs = []*url.URL{u}
	}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, outrigger.Wrap(outrigger.Internal, err, "key of "+l.Name)
	}
	raw, err := x509.CreateCertificate(rand.Reader, t, a.cert, signer.Public(), a.key)
	if err != nil {
		return nil, nil, outrigger.Wrap(outrigger.Invalid, err, "certificate of "+l.Name)
	}
	key, err = keyText(signer)
	return certText(raw), key, err
}

func template(name string, begin, until time.Time) (*x509.Certificate, error) {
	if name == "" || !until.After(begin) {
		return nil, outrigger.Errorf(outrigger.Invalid, "a certificate needs a name and an end after its beginning; these are %q, %v and %v", name, begin, until)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "serial number")
	}
	return &x509.Certificate{SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name}, NotBefore: begin, NotAfter: until}, nil
}

func certText(raw []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})
}

func keyText(key crypto.Signer) ([]byte, error) {
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "private key")
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), nil
}
