package identity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/outrigger-mesh/outrigger"
)

// maxPEMBytes bounds each file of Files.
const maxPEMBytes = 1 << 20

// Use says which end of connections a certificate is for.
type Use string

// The uses there are.
const (
	Serve Use = "serve" // the end that is dialled; needs Cert and Key, CA is whose clients it verifies
	Dial  Use = "dial"  // the end that dials; needs CA, Cert and Key are what it shows
)

// Files are where a process finds what it proves itself with, PEM each, as cert-manager,
// SPIRE's helper or step write them into a directory. The names are those of the settings
// that gave the paths, for errors.
type Files struct {
	Cert, Key, CA             string // Cert: leaf first, then intermediates; CA: one or more
	CertName, KeyName, CAName string
}

// CredentialsOptions configure OpenCredentials. Zero values mean the defaults.
type CredentialsOptions struct {
	Use Use // required
	// ServerName is whom a dialler expects instead of the host it dials: a DNS name, an IP
	// address or a pattern of CheckServerName; "" = the host.
	ServerName string
	Every      time.Duration    // between two looks at the files [2 s]
	Now        func() time.Time // [time.Now]
	Logger     *slog.Logger     // [discarded]
	Meter      metric.Meter     // [none]
}

// Credentials are a certificate, its key and the CAs that are trusted, read from files and
// looked at again while Run runs. A handshake uses what is newest then, so certificates and
// CAs are replaced without a restart; connections that are up go on. Files that cannot be
// used (unreadable, no PEM, key of another certificate, expired) change nothing: what was
// read before stays in use, each kind of failure is logged once and every look that failed is
// counted. No error, log line or metric shows content of a file.
//
//	outrigger.tls.expires_in  s          until the certificate, or the last CA, ends; negative = has
//	outrigger.tls.reloads     {reload}   times other files came into use
//	outrigger.tls.failures    {look}     looks that could not use the files
//	outrigger.tls.refused     {connection}  handshakes with clients that failed
//
// with outrigger.tls.use and, for expires_in, outrigger.tls.what (certificate, ca). A log
// warning comes when less than a third of the certificate's life is left, an error when it
// has ended: whoever issues them should have renewed long before.
//
// Methods may be called concurrently; Run once.
type Credentials struct {
	files   Files
	o       CredentialsOptions
	now     atomic.Pointer[material]
	metrics credentialMetrics
	told    string       // the last failure logged; of Run alone
	age     age          // as last logged; of Run alone
	logged  atomic.Int64 // when a refused client was last logged, Unix nanoseconds
}

type credentialMetrics struct{ failures, reloads, refused metric.Int64Counter }

// material is one good content of the files.
type material struct {
	cert  *tls.Certificate // nil = none
	roots *x509.CertPool   // nil = none
	caEnd time.Time        // of the CA that ends last
	sum   [sha256.Size]byte
}

// OpenCredentials reads the files and starts nothing. Errors name the setting, the file and
// what to do; they have kind Invalid, or Unavailable for files there is no reading of.
func OpenCredentials(files Files, o CredentialsOptions) (*Credentials, error) {
	if o.Every <= 0 {
		o.Every = keyFileEvery
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noop.Meter{}
	}
	if err := files.complete(o.Use); err != nil {
		return nil, err
	}
	if err := CheckServerName(o.ServerName); err != nil {
		return nil, err
	}
	c := &Credentials{files: files, o: o}
	m, err := files.load(o.Use, o.Now())
	if err != nil {
		return nil, err
	}
	c.now.Store(m)
	c.heedAge()
	return c, c.measure()
}

// complete reports settings that lack their other half.
func (f Files) complete(u Use) error {
	switch {
	case f.Cert == "" && f.Key != "":
		return outrigger.Errorf(outrigger.Invalid, "%s is given without %s; give both", f.KeyName, f.CertName)
	case f.Cert != "" && f.Key == "":
		return outrigger.Errorf(outrigger.Invalid, "%s is given without %s; give both", f.CertName, f.KeyName)
	case u == Serve && f.Cert == "":
		return outrigger.Errorf(outrigger.Invalid, "%s is given without %s and %s; give all three", f.CAName, f.CertName, f.KeyName)
	case u == Dial && f.CA == "":
		return outrigger.Errorf(outrigger.Invalid, "%s is given without %s, so nobody could be believed to be the server; give the CA's certificate", f.CertName, f.CAName)
	}
	return nil
}

func (c *Credentials) measure() (err error) {
	use := metric.WithAttributeSet(attribute.NewSet(attribute.String("outrigger.tls.use", string(c.o.Use))))
	what := func(w string) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(attribute.String("outrigger.tls.use", string(c.o.Use)), attribute.String("outrigger.tls.what", w)))
	}
	certificate, ca := what("certificate"), what("ca")
	_, err = c.o.Meter.Float64ObservableGauge("outrigger.tls.expires_in", metric.WithUnit("s"),
		metric.WithDescription("time until the certificate, or the last CA that is trusted, ends"),
		metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			m, now := c.now.Load(), c.o.Now()
			if m.cert != nil {
				o.Observe(m.cert.Leaf.NotAfter.Sub(now).Seconds(), certificate)
			}
			if m.roots != nil {
				o.Observe(m.caEnd.Sub(now).Seconds(), ca)
			}
			return nil
		}))
	if err != nil {
		return err
	}
	for _, x := range []struct {
		to                *metric.Int64Counter
		name, unit, about string
	}{
		{&c.metrics.failures, "outrigger.tls.failures", "{look}", "looks at certificate files that could not use them"},
		{&c.metrics.reloads, "outrigger.tls.reloads", "{reload}", "times other certificates came into use"},
		{&c.metrics.refused, "outrigger.tls.refused", "{connection}", "handshakes with clients that failed"},
	} {
		if *x.to, err = c.o.Meter.Int64Counter(x.name, metric.WithUnit(x.unit), metric.WithDescription(x.about)); err != nil {
			return err
		}
		(*x.to).Add(context.Background(), 0, use) // shown as 0 from the start
	}
	return nil
}

func (c *Credentials) count(n metric.Int64Counter) {
	n.Add(context.Background(), 1, metric.WithAttributes(attribute.String("outrigger.tls.use", string(c.o.Use))))
}

// Run looks at the files until ctx ends; it returns nil.
func (c *Credentials) Run(ctx context.Context) error {
	tick := time.NewTicker(c.o.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			c.look()
		}
	}
}

// look takes over files that are good and new.
func (c *Credentials) look() {
	defer c.heedAge()
	m, err := c.files.load(c.o.Use, c.o.Now())
	if err != nil {
		c.count(c.metrics.failures)
		// Once for each failure: a directory that is replaced file by file passes through one.
		if err.Error() != c.told {
			c.told = err.Error()
			c.o.Logger.Error("certificate files cannot be used; what was read before stays in use", "error", err)
		}
		return
	}
	c.told = ""
	if m.sum == c.now.Load().sum {
		return
	}
	c.now.Store(m)
	c.count(c.metrics.reloads)
	if m.cert == nil {
		c.o.Logger.Info("another CA bundle is in use for new connections", "until", m.caEnd)
		return
	}
	c.o.Logger.Info("other certificates are in use for new connections", "until", m.cert.Leaf.NotAfter, "identity", PeerName(m.cert.Leaf))
}

// age is how far a certificate's life has gone.
type age int

const (
	fresh  age = iota
	ageing     // less than a third is left
	ended
)

// ageOf is the age of a certificate that is valid from begin to end.
func ageOf(begin, end, now time.Time) age {
	switch left := end.Sub(now); {
	case left <= 0:
		return ended
	case left < end.Sub(begin)/3:
		return ageing
	}
	return fresh
}

// heedAge logs when the certificate in use comes to an age.
func (c *Credentials) heedAge() {
	m := c.now.Load()
	if m.cert == nil {
		return
	}
	l := m.cert.Leaf
	was := c.age
	if c.age = ageOf(l.NotBefore, l.NotAfter, c.o.Now()); c.age == was {
		return
	}
	switch c.age {
	case ageing:
		c.o.Logger.Warn("less than a third of the certificate's life is left and it has not been renewed", c.files.CertName, c.files.Cert, "until", l.NotAfter)
	case ended:
		c.o.Logger.Error("the certificate has expired; peers refuse new connections until the file holds a new one", c.files.CertName, c.files.Cert, "until", l.NotAfter)
	}
}

// load reads and checks the files as of now.
func (f Files) load(u Use, now time.Time) (*material, error) {
	m, sum := &material{}, sha256.New()
	if f.Cert != "" {
		cert, err := readPEM(f.CertName, f.Cert, "certificate")
		if err != nil {
			return nil, err
		}
		key, err := readPEM(f.KeyName, f.Key, "private key")
		if err != nil {
			return nil, err
		}
		if m.cert, err = f.pair(cert, key, u, now); err != nil {
			return nil, err
		}
		sum.Write(cert)
		sum.Write([]byte{0})
		sum.Write(key)
	}
	if f.CA != "" {
		bundle, err := readPEM(f.CAName, f.CA, "certificate")
		if err != nil {
			return nil, err
		}
		if m.roots, m.caEnd, err = roots(f.CAName+" "+f.CA, bundle, now); err != nil {
			return nil, err
		}
		sum.Write([]byte{1})
		sum.Write(bundle)
	}
	sum.Sum(m.sum[:0])
	return m, nil
}

// readPEM reads a file that must hold PEM of some kind; what is wanted of it is for the error.
func readPEM(name, path, wanted string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, name)
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxPEMBytes+1))
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, name)
	}
	if len(raw) > maxPEMBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s %s is larger than %d bytes; give a %s in PEM", name, path, maxPEMBytes, wanted)
	}
	if b, _ := pem.Decode(raw); b == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s %s holds no PEM block; give a %s in PEM", name, path, wanted)
	}
	return raw, nil
}

// pair reads a certificate and its key. Nothing of crypto/tls's errors is repeated but for
// what they say about certificates, which are no secret.
func (f Files) pair(cert, key []byte, u Use, now time.Time) (*tls.Certificate, error) {
	at := f.CertName + " " + f.Cert
	chain, err := parseChain(at, cert)
	if err != nil {
		return nil, err
	}
	leaf := chain[0]
	p, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s %s is not the unencrypted private key of the certificate in %s; give the key that was made with it", f.KeyName, f.Key, at)
	}
	p.Leaf = leaf
	switch {
	case !now.Before(leaf.NotAfter):
		return nil, outrigger.Errorf(outrigger.Invalid, "%s expired at %s; renew it", at, leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is not valid before %s; look at this machine's clock", at, leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	need, word := x509.ExtKeyUsageServerAuth, "serverAuth"
	if u == Dial {
		need, word = x509.ExtKeyUsageClientAuth, "clientAuth"
	}
	if n := len(leaf.ExtKeyUsage) + len(leaf.UnknownExtKeyUsage); n > 0 && !slices.Contains(leaf.ExtKeyUsage, need) && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is not for this end of a connection; have it issued with the extended key usage %s", at, word)
	}
	if u == Serve && len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.URIs) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s names no host: its subject alternative names are empty; have it issued for the DNS names and addresses clients dial, or a spiffe:// id", at)
	}
	return &p, nil
}

// parseChain reads the certificates of a PEM file; there is at least one.
func parseChain(at string, raw []byte) (chain []*x509.Certificate, err error) {
	rest := bytes.TrimSpace(raw)
	for len(rest) > 0 {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "%s: certificate %d cannot be parsed: %v", at, len(chain)+1, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s holds no CERTIFICATE block; give certificates in PEM", at)
	}
	return chain, nil
}

// roots reads a bundle of CAs. Those that have expired do no harm while others are added.
func roots(at string, raw []byte, now time.Time) (*x509.CertPool, time.Time, error) {
	chain, err := parseChain(at, raw)
	if err != nil {
		return nil, time.Time{}, err
	}
	pool, last := x509.NewCertPool(), time.Time{}
	for i, c := range chain {
		if c.BasicConstraintsValid && !c.IsCA {
			return nil, time.Time{}, outrigger.Errorf(outrigger.Invalid, "%s: certificate %d is not a CA's; give the certificates of the CAs that sign those of peers", at, i+1)
		}
		pool.AddCert(c)
		if c.NotAfter.After(last) {
			last = c.NotAfter
		}
	}
	if !now.Before(last) {
		return nil, time.Time{}, outrigger.Errorf(outrigger.Invalid, "%s: all %d CAs have expired, the last at %s; give the present ones", at, len(chain), last.UTC().Format(time.RFC3339))
	}
	return pool, last, nil
}
