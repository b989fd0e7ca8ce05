package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/outrigger-mesh/outrigger"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func authority(t testing.TB) *Authority {
	t.Helper()
	now := time.Now()
	return must[*Authority](t)(NewAuthority("test", now.Add(-time.Hour), now.Add(24*time.Hour)))
}

func (a *Authority) caText(t testing.TB) []byte {
	t.Helper()
	cert, _, err := a.Text()
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// directory is a directory of files as cert-manager's volume is one: what is in it is replaced
// at once, by swapping a link.
type directory struct {
	t    testing.TB
	root string
	n    int
}

func newDirectory(t testing.TB) *directory { return &directory{t: t, root: t.TempDir()} }

func (d *directory) put(files map[string][]byte) {
	d.t.Helper()
	d.n++
	dir := filepath.Join(d.root, fmt.Sprint("v", d.n))
	next := filepath.Join(d.root, fmt.Sprint("next", d.n))
	err := os.Mkdir(dir, 0o700)
	for name, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	if err = errors.Join(err, os.Symlink(dir, next), os.Rename(next, filepath.Join(d.root, "now"))); err != nil {
		d.t.Fatal(err)
	}
}

func (d *directory) files() Files {
	at := func(name string) string { return filepath.Join(d.root, "now", name) }
	return Files{Cert: at("tls.crt"), Key: at("tls.key"), CA: at("ca.crt"), CertName: "--cert", KeyName: "--key", CAName: "--ca"}
}

// issue puts a leaf and CAs into the directory.
func (d *directory) issue(ca *Authority, l Leaf, roots ...*Authority) {
	d.t.Helper()
	cert, key, err := ca.Issue(l)
	if err != nil {
		d.t.Fatal(err)
	}
	d.put(map[string][]byte{"tls.crt": cert, "tls.key": key, "ca.crt": d.bundle(roots)})
}

func (d *directory) bundle(roots []*Authority) (out []byte) {
	for _, r := range roots {
		out = append(out, r.caText(d.t)...)
	}
	return out
}

func leaf(name string, hosts ...string) Leaf {
	now := time.Now()
	return Leaf{Name: name, Hosts: hosts, URI: "spiffe://test/" + name, Begin: now.Add(-time.Minute), Until: now.Add(time.Hour)}
}

// Files that cannot be used are refused with what they are called, where they are and what to
// do, and never with what is in them.
func TestBadFiles(t *testing.T) {
	ca, now := authority(t), time.Now()
	certOf := func(l Leaf) ([]byte, []byte) {
		cert, key, err := ca.Issue(l)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	cert, key := certOf(leaf("a", "localhost"))
	_, otherKey := certOf(leaf("a", "localhost"))
	expired, expiredKey := certOf(Leaf{Name: "a", Hosts: []string{"a"}, Begin: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)})
	early, earlyKey := certOf(Leaf{Name: "a", Hosts: []string{"a"}, Begin: now.Add(time.Hour), Until: now.Add(2 * time.Hour)})
	client, clientKey := certOf(leaf("a"))
	oldCA := must[*Authority](t)(NewAuthority("old", now.Add(-2*time.Hour), now.Add(-time.Hour)))
	type content = map[string][]byte
	const secret = "not PEM but secret"
	for _, c := range []struct {
		name string
		use  Use
		with content // beside good ones
		kind outrigger.Kind
		says []string
	}{
		{"key of another certificate", Serve, content{"tls.key": otherKey}, outrigger.Invalid, []string{"--key", "tls.key", "is not the unencrypted private key of the certificate in --cert"}},
		{"no key", Serve, content{"tls.key": nil}, outrigger.Unavailable, []string{"--key", "no such file"}},
		{"no certificate", Serve, content{"tls.crt": nil}, outrigger.Unavailable, []string{"--cert", "no such file"}},
		{"no CA", Dial, content{"ca.crt": nil}, outrigger.Unavailable, []string{"--ca", "no such file"}},
		{"certificate without PEM", Serve, content{"tls.crt": []byte(secret)}, outrigger.Invalid, []string{"--cert", "holds no PEM block"}},
		{"key without PEM", Serve, content{"tls.key": []byte(secret)}, outrigger.Invalid, []string{"--key", "holds no PEM block"}},
		{"CA without PEM", Serve, content{"ca.crt": []byte(secret)}, outrigger.Invalid, []string{"--ca", "holds no PEM block"}},
		{"swapped", Serve, content{"tls.crt": key, "tls.key": cert}, outrigger.Invalid, []string{"--cert", "no CERTIFICATE block"}},
		{"half a certificate", Serve, content{"tls.crt": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")}, outrigger.Invalid, []string{"--cert", "certificate 1 cannot be parsed"}},
		{"expired", Serve, content{"tls.crt": expired, "tls.key": expiredKey}, outrigger.Invalid, []string{"--cert", "expired at", "renew it"}},
		{"not valid yet", Serve, content{"tls.crt": early, "tls.key": earlyKey}, outrigger.Invalid, []string{"--cert", "not valid before", "clock"}},
		{"a client's certificate to serve with", Serve, content{"tls.crt": client, "tls.key": clientKey}, outrigger.Invalid, []string{"--cert", "serverAuth"}},
		{"a leaf as CA", Dial, content{"ca.crt": cert}, outrigger.Unknown, nil}, // no constraints: it vouches for itself only
		{"expired CA", Dial, content{"ca.crt": oldCA.caText(t)}, outrigger.Invalid, []string{"--ca", "all 1 CAs have expired"}},
		{"an expired CA beside a good one", Dial, content{"ca.crt": append(oldCA.caText(t), ca.caText(t)...)}, outrigger.Unknown, nil},
		{"too large", Serve, content{"ca.crt": bytes.Repeat(cert, maxPEMBytes/len(cert)+1)}, outrigger.Invalid, []string{"--ca", "larger than"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDirectory(t)
			all := content{"tls.crt": cert, "tls.key": key, "ca.crt": ca.caText(t)}
			for name, text := range c.with {
				if all[name] = text; text == nil {
					delete(all, name)
				}
			}
			d.put(all)
			_, err := OpenCredentials(d.files(), CredentialsOptions{Use: c.use})
			if c.says == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !outrigger.IsKind(err, c.kind) {
				t.Fatalf("%v, want kind %v", err, c.kind)
			}
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			if strings.Contains(err.Error(), secret) {
				t.Errorf("%q shows the content", err)
			}
		})
	}
}

// A setting without its other half is refused.
func TestIncompleteFiles(t *testing.T) {
	for want, c := range map[string]struct {
		f Files
		u Use
	}{
		"key is given without cert":     {Files{Key: "k", CA: "c"}, Dial},
		"cert is given without key":     {Files{Cert: "k", CA: "c"}, Dial},
		"cert is given without ca":      {Files{Cert: "k", Key: "k"}, Dial},
		"ca is given without cert and":  {Files{CA: "c"}, Serve},
		"cert is given without key; gi": {Files{Cert: "k"}, Serve},
	} {
		c.f.CertName, c.f.KeyName, c.f.CAName = "cert", "key", "ca"
		if _, err := OpenCredentials(c.f, CredentialsOptions{Use: c.u}); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestServerNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"": true, "control": true, "10.0.0.1": true, "::1": true, "spiffe://a/b": true, "spiffe://a/ns/*/control-*": true,
		"*.example.org": false, "a b": false, "a/b": false, "spiffe://": false, "spiffe://a": false, "spiffe://a/": false,
		"spiffe://*/b": false, "spiffe:///b": false, "spiffe://a/[b]": false, "spiffe://a/b?": false, `spiffe://a/\b`: false,
		strings.Repeat("a", 4096): false,
	} {
		if err := CheckServerName(name); (err == nil) != ok || err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%.40q: %v", name, err)
		}
	}
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://a/b", "spiffe://a/b", true},
		{"spiffe://a/b", "spiffe://a/b/c", false},
		{"spiffe://a/b", "spiffe://b/b", false},
		{"spiffe://a/b", "https://a/b", false},
		{"spiffe://a/*", "spiffe://a/b", true},
		{"spiffe://a/*", "spiffe://a/b/c", false},
		{"spiffe://a/*", "spiffe://ab/b", false},
		{"spiffe://a/ns/*/sa/control", "spiffe://a/ns/prod/sa/control", true},
		{"spiffe://a/ns/*/sa/control", "spiffe://a/ns/prod/x/sa/control", false},
	} {
		if got := matchesWorkload(c.pattern, c.id); got != c.want {
			t.Errorf("%s, %s: %v", c.pattern, c.id, got)
		}
	}
}

// end is one end of a handshake: what its credentials say of it.
type end struct {
	conn net.Conn
	info credentials.AuthInfo
	err  error
}

// meet makes a connection; afterwards both ends have said and heard a byte, unless one refused
// the other. It is a socket, because refusing somebody must not wait until he listens.
func meet(t *testing.T, server, client credentials.TransportCredentials, address string) (near, far end) {
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	a := must[net.Conn](t)(net.Dial("tcp", l.Addr().String()))
	b := must[net.Conn](t)(l.Accept())
	t.Cleanup(func() { a.Close(); b.Close() })
	done := make(chan struct{})
	go func() {
		defer close(done)
		far.conn, far.info, far.err = server.ServerHandshake(b)
		if far.err == nil {
			far.err = echo(far.conn)
		}
		if far.err != nil {
			b.Close()
		}
	}()
	near.conn, near.info, near.err = client.ClientHandshake(context.Background(), address, a)
	if near.err == nil {
		near.err = ask(near.conn)
	}
	if near.err != nil {
		a.Close()
	}
	<-done
	return near, far
}

func ask(c net.Conn) error {
	if _, err := c.Write([]byte{7}); err != nil {
		return err
	}
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil || b[0] != 7 {
		return fmt.Errorf("answered %d: %w", b[0], err)
	}
	return nil
}

func echo(c net.Conn) error {
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	_, err := c.Write(b[:])
	return err
}

// Who is let in, as whom, and what the other is told.
func TestHandshakes(t *testing.T) {
	ca, other := authority(t), authority(t)
	open := func(d *directory, u Use, name string, without ...string) *Credentials {
		f := d.files()
		for _, w := range without {
			if w == "certificate" {
				f.Cert, f.Key = "", ""
			} else {
				f.CA = ""
			}
		}
		return must[*Credentials](t)(OpenCredentials(f, CredentialsOptions{Use: u, ServerName: name}))
	}
	dir := func(ca *Authority, l Leaf, roots ...*Authority) *directory {
		d := newDirectory(t)
		d.issue(ca, l, roots...)
		return d
	}
	control, foreign := dir(ca, leaf("control", "control.test", "10.0.0.7"), ca), dir(other, leaf("control", "control.test"), other)
	sidecar, stranger := dir(ca, leaf("sidecar"), ca), dir(other, leaf("sidecar"), ca)
	for _, c := range []struct {
		name    string
		server  *Credentials
		client  *Credentials
		address string
		peer    string // as the server knows it; "" = nobody
		refused string // what the client is told; "" = both talk
	}{
		{"both prove themselves", open(control, Serve, ""), open(sidecar, Dial, ""), "control.test:7400", "spiffe://test/sidecar", ""},
		{"by address", open(control, Serve, ""), open(sidecar, Dial, ""), "10.0.0.7:7400", "spiffe://test/sidecar", ""},
		{"another address", open(control, Serve, ""), open(sidecar, Dial, ""), "10.0.0.8:7400", "", "10.0.0.7, not 10.0.0.8"},
		{"another name", open(control, Serve, ""), open(sidecar, Dial, ""), "other.test:7400", "", "valid for control.test, not other.test"},
		{"another address, name given", open(control, Serve, ""), open(sidecar, Dial, "control.test"), "10.0.0.8:7400", "spiffe://test/sidecar", ""},
		{"by workload", open(control, Serve, ""), open(sidecar, Dial, "spiffe://test/contr*"), "10.0.0.8:7400", "spiffe://test/sidecar", ""},
		{"another workload", open(control, Serve, ""), open(sidecar, Dial, "spiffe://test/node"), "control.test:7400", "", "the server is spiffe://test/control, wanted is spiffe://test/node"},
		{"workload of another CA", open(foreign, Serve, ""), open(sidecar, Dial, "spiffe://test/control"), "control.test:7400", "", "signed by none of the CAs in --ca"},
		{"server of another CA", open(foreign, Serve, ""), open(sidecar, Dial, ""), "control.test:7400", "", "signed by none of the CAs in --ca"},
		{"client without certificate", open(control, Serve, ""), open(sidecar, Dial, "", "certificate"), "control.test:7400", "", ""},
		{"client of another CA", open(control, Serve, ""), open(stranger, Dial, ""), "control.test:7400", "", "remote error: tls:"},
		{"nobody's clients are believed", open(control, Serve, "", "ca"), open(stranger, Dial, ""), "control.test:7400", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := meet(t, c.server.Server().Clone(), c.client.Client().Clone(), c.address)
			if c.refused != "" {
				if near.err == nil || !strings.Contains(near.err.Error(), c.refused) {
					t.Fatalf("the client is told %v, want %q", near.err, c.refused)
				}
				return
			}
			if near.err != nil || far.err != nil {
				t.Fatalf("client %v, server %v", near.err, far.err)
			}
			if peer, verified := PeerOf(far.info); peer != c.peer || verified != (c.peer != "") {
				t.Errorf("the server knows %q (%v), want %q", peer, verified, c.peer)
			}
			if v := near.info.(credentials.TLSInfo).State.Version; v != 0x0304 {
				t.Errorf("version %#x, want TLS 1.3", v)
			}
		})
	}
}

// journal is a log that one goroutine writes while another reads.
type journal struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(b)
}

// take returns what was said since it was last called.
func (j *journal) take() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.b.Reset()
	return j.b.String()
}

// What happens to files while a process runs: good ones are used from the next handshake on,
// bad ones change nothing and are told of once, a certificate that nobody renews is warned of.
func TestFollowing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := authority(t) // of the bubble's time
		d, log := newDirectory(t), &journal{}
		short := leaf("control", "control.test")
		short.Begin = time.Now()
		d.issue(ca, short, ca)
		c := must[*Credentials](t)(OpenCredentials(d.files(), CredentialsOptions{Use: Serve, Logger: slog.New(slog.NewTextHandler(log, nil))}))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		pass := func(life time.Duration) string {
			time.Sleep(life)
			synctest.Wait()
			return log.take()
		}

		if said := pass(30 * time.Minute); said != "" {
			t.Errorf("nothing happened: %s", said)
		}
		before := c.now.Load()
		d.put(map[string][]byte{"tls.crt": []byte("junk"), "tls.key": []byte("junk"), "ca.crt": []byte("junk")})
		said := pass(time.Minute)
		if c.now.Load() != before || strings.Count(said, "cannot be used") != 1 || strings.Contains(said, "junk") {
			t.Errorf("after bad files: %s", said)
		}
		if said := pass(10 * time.Minute); strings.Count(said, "less than a third") != 1 || strings.Contains(said, "cannot be used") {
			t.Errorf("after 41 of 60 minutes: %s", said)
		}
		if said := pass(20 * time.Minute); strings.Count(said, "has expired") != 1 {
			t.Errorf("after 61 of 60 minutes: %s", said)
		}
		if c.now.Load() != before {
			t.Error("bad files replaced good ones")
		}
		fresh := leaf("renewed", "control.test")
		d.issue(ca, fresh, ca)
		if said := pass(3 * time.Second); strings.Count(said, "other certificates are in use") != 1 || !strings.Contains(said, "spiffe://test/renewed") {
			t.Errorf("after a renewal: %s", said)
		}
		d.put(map[string][]byte{"tls.crt": []byte("junk")})
		if said := pass(time.Minute); strings.Count(said, "cannot be used") != 1 {
			t.Errorf("a new failure is not told: %s", said)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Rotations of both leaves, and every tenth of the CA with overlap, under load: no handshake
// fails, and a connection from before lives on. 300 of them in the long slice.
func TestCertificateRotation(t *testing.T) {
	rotations, perCA := 50, 10
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		rotations = 300
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ca := authority(t)
	ds, dc := newDirectory(t), newDirectory(t)
	both := func(ca *Authority, roots ...*Authority) {
		ds.issue(ca, leaf("control", "127.0.0.1"), roots...)
		dc.issue(ca, leaf("sidecar"), roots...)
	}
	both(ca, ca)
	server := must[*Credentials](t)(OpenCredentials(ds.files(), CredentialsOptions{Use: Serve}))
	client := must[*Credentials](t)(OpenCredentials(dc.files(), CredentialsOptions{Use: Dial}))
	var group sync.WaitGroup
	defer group.Wait()
	defer l.Close()
	creds := server.Server()
	group.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer raw.Close()
				conn, info, err := creds.ServerHandshake(raw)
				if _, verified := PeerOf(info); err == nil && !verified {
					err = errors.New("the client is nobody")
				}
				for err == nil {
					err = echo(conn)
				}
				if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("server: %v", err)
				}
			})
		}
	})
	connect := func() (net.Conn, error) {
		raw, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		conn, _, err := client.Client().ClientHandshake(context.Background(), l.Addr().String(), raw)
		return conn, err
	}
	old, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()

	var stop atomic.Bool
	var handshakes, failed atomic.Int64
	var amid sync.RWMutex
	var clients sync.WaitGroup
	end := func() { stop.Store(true); clients.Wait() }
	defer end()
	for range 2 {
		clients.Go(func() {
			for !stop.Load() {
				amid.RLock()
				conn, err := connect()
				if err == nil {
					err = ask(conn)
					conn.Close()
				}
				amid.RUnlock()
				handshakes.Add(1)
				if err != nil {
					failed.Add(1)
					t.Errorf("handshake %d: %v", handshakes.Load(), err)
					return
				}
			}
		})
	}
	reload := func(c *Credentials) {
		before := c.now.Load()
		if c.look(); c.now.Load() == before {
			t.Errorf("new files were not taken over: %s", c.told)
		}
	}
	for i := range rotations {
		if i%perCA != perCA-1 {
			both(ca, ca)
			reload(server)
			reload(client)
			continue
		}
		next := authority(t)
		for _, step := range []func(){
			func() { both(ca, ca, next) },     // believed everywhere,
			func() { both(next, ca, next) },   // then used,
			func() { both(next, next, next) }, // then the only one
		} {
			step()
			// What an operator waits for between the steps, that nobody uses what was before,
			// is here that no handshake is under way that began with it.
			amid.Lock()
			reload(server)
			reload(client)
			amid.Unlock()
		}
		ca = next
	}
	if err := ask(old); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
	end()
	t.Logf("%d handshakes over %d rotations, %d failed", handshakes.Load(), rotations, failed.Load())
	if handshakes.Load() < 20 {
		t.Errorf("only %d handshakes", handshakes.Load())
	}
}

// A port scanner is no refused client, and many refused ones are one line.
func TestRefusedClients(t *testing.T) {
	d, log := newDirectory(t), &bytes.Buffer{}
	ca := authority(t)
	d.issue(ca, leaf("control", "a"), ca)
	now := time.Now()
	c := must[*Credentials](t)(OpenCredentials(d.files(), CredentialsOptions{Use: Serve, Now: func() time.Time { return now }, Logger: slog.New(slog.NewTextHandler(log, nil))}))
	send := func(b string) {
		near, far := net.Pipe()
		go func() {
			_, _ = near.Write([]byte(b)) // it may be refused amid
			go func() { _, _ = io.Copy(io.Discard, near) }()
			if b == "" {
				near.Close()
			}
		}()
		if _, _, err := c.Server().ServerHandshake(far); err == nil {
			t.Errorf("%q was let in", b)
		}
		far.Close()
	}
	send("")
	if log.Len() > 0 {
		t.Errorf("a connection that says nothing: %s", log)
	}
	for range 3 {
		send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	}
	if n := strings.Count(log.String(), "a connection was refused"); n != 1 {
		t.Errorf("%d lines: %s", n, log)
	}
	now = now.Add(logEvery)
	send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	if n := strings.Count(log.String(), "a connection was refused"); n != 2 {
		t.Errorf("%d lines after 10 s: %s", n, log)
	}
}

func FuzzCertificates(f *testing.F) {
	ca := authority(f)
	cert, key, err := ca.Issue(leaf("a", "b"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert, key)
	f.Add(append(cert, cert...), []byte("x"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"), key)
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		chain, err := parseChain("x", cert)
		if (err == nil) != (len(chain) > 0) || err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
			t.Fatalf("%d certificates, %v", len(chain), err)
		}
		if p, err := (Files{}).pair(cert, key, Serve, time.Now()); err == nil && p.Leaf == nil {
			t.Fatal("a pair without its certificate")
		}
		for _, c := range chain {
			if n := PeerName(c); len(n) > maxPeerName || strings.ContainsAny(n, "\n\r\x1b") {
				t.Fatalf("%q", n)
			}
		}
	})
}
