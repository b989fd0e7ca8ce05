package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// MaxPEMBytes bounds one file or resource of certificates or of a key. The trust store of
// an operating system is a fifth of it.
const MaxPEMBytes = 1 << 20

// Bundle is a set of certificates that others are trusted by. It is immutable.
type Bundle struct {
	Name     string
	Digest   string    // of the PEM bytes; equal for equal content on every machine
	NotAfter time.Time // when the last of its certificates ends
	pool     *x509.CertPool
}

// KeyPair is a certificate with its private key. It is immutable and never printed.
type KeyPair struct {
	Name                string
	Digest              string // of the PEM bytes of both
	NotBefore, NotAfter time.Time
	certificate         tls.Certificate
}

// String keeps the key out of logs.
func (p *KeyPair) String() string { return "certificate " + p.Name + " (" + p.Digest + ")" }

// GoString is String.
func (p *KeyPair) GoString() string { return p.String() }

// Material is what a process proves and verifies identities with, by name. It is replaced
// as a whole and never modified once it is in use. The zero value has nothing.
type Material struct {
	Bundles map[string]*Bundle
	Pairs   map[string]*KeyPair
}

// ParseBundle reads PEM certificates. Errors have kind Invalid and say what is wrong with
// which certificate.
func ParseBundle(name string, raw []byte) (*Bundle, error) {
	certs, err := parseCertificates("trust bundle "+name, raw)
	if err != nil {
		return nil, err
	}
	b := &Bundle{Name: name, Digest: digest(raw), pool: x509.NewCertPool()}
	for _, c := range certs {
		b.pool.AddCert(c)
		if c.NotAfter.After(b.NotAfter) {
			b.NotAfter = c.NotAfter
		}
	}
	return b, nil
}

// ParseKeyPair reads a certificate chain, the owner's certificate first, and its private
// key, both in PEM. Errors have kind Invalid, say what is wrong (also that the two are no
// pair) and hold nothing of the key.
func ParseKeyPair(name string, chain, key []byte) (*KeyPair, error) {
	what := "certificate " + name
	certs, err := parseCertificates(what, chain)
	if err != nil {
		return nil, err
	}
	switch {
	case len(key) > MaxPEMBytes:
		return nil, outrigger.Errorf(outrigger.Invalid, "%s: the key is %d bytes, the limit is %d", what, len(key), MaxPEMBytes)
	case !bytes.Contains(key, []byte("PRIVATE KEY-----")):
		return nil, outrigger.Errorf(outrigger.Invalid, `%s: no "PRIVATE KEY" in PEM among the key's %d bytes`, what, len(key))
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		why := strings.TrimPrefix(err.Error(), "tls: ")
		if strings.Contains(why, "does not match") {
			why = "the certificate and the key are not a pair"
		}
		return nil, outrigger.Errorf(outrigger.Invalid, "%s: %s", what, why)
	}
	pair.Leaf = certs[0]
	return &KeyPair{Name: name, Digest: digest(chain, key), NotBefore: certs[0].NotBefore, NotAfter: certs[0].NotAfter, certificate: pair}, nil
}

func parseCertificates(what string, raw []byte) ([]*x509.Certificate, error) {
	if len(raw) > MaxPEMBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is %d bytes, the limit is %d", what, len(raw), MaxPEMBytes)
	}
	var out []*x509.Certificate
	for rest := raw; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, outrigger.Errorf(outrigger.Invalid, "%s holds a %q; give certificates only", what, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "%s: its certificate %d cannot be read: %s", what, len(out)+1, strings.TrimPrefix(err.Error(), "x509: "))
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s: no certificate in PEM among its %d bytes", what, len(raw))
	}
	return out, nil
}

// digest names content without telling it.
func digest(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		sum := sha256.Sum256(p)
		h.Write(sum[:])
	}
	return hex.EncodeToString(h.Sum(nil)[:12])
}
