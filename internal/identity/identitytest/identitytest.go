// Package identitytest makes certificate authorities and certificates for tests: real ones,
// of a few hours, that nobody outside of the test trusts. Making one takes about a
// millisecond. A CA may be used from several goroutines.
package identitytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"time"
)

// CA is a certificate authority.
type CA struct {
	// PEM is its certificate: a trust bundle of one.
	PEM  []byte
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Certificate is one that a CA issued, with its key, in PEM.
type Certificate struct{ Chain, Key []byte }

// NewCA makes an authority. It panics if the machine has no randomness.
func NewCA(name string) *CA {
	ca := &CA{key: newKey()}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der := must(x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key))
	ca.cert = must(x509.ParseCertificate(der))
	ca.PEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return ca
}

// Issue makes a certificate for servers and clients under the names, which are DNS names
// and IP addresses; the first is also its common name. It is valid for 30 days.
func (ca *CA) Issue(names ...string) Certificate {
	now := time.Now()
	return ca.IssueFor(now.Add(-time.Hour), now.Add(30*24*time.Hour), names...)
}

// IssueFor is Issue with a validity.
func (ca *CA) IssueFor(notBefore, notAfter time.Time, names ...string) Certificate {
	key := newKey()
	template := &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: names[0]}, NotBefore: notBefore, NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der := must(x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key))
	return Certificate{
		Chain: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))}),
	}
}

// TLS is the certificate as servers take it.
func (c Certificate) TLS() tls.Certificate { return must(tls.X509KeyPair(c.Chain, c.Key)) }

// Pool is what authorities make a trust store of.
func Pool(cas ...*CA) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, ca := range cas {
		pool.AddCert(ca.cert)
	}
	return pool
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func serial() *big.Int { return must(rand.Int(rand.Reader, big.NewInt(1<<62))) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
