package hello

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

// capture returns what a real TLS client sends first.
func capture(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	near, far := net.Pipe()
	go func() {
		_ = tls.Client(near, c).Handshake() // ends with the pipe
		near.Close()
	}()
	defer far.Close()
	head := make([]byte, 5)
	if _, err := io.ReadFull(far, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

// split cuts the one record of b into records of n bytes.
func split(b []byte, n int) (out []byte) {
	for body := b[5:]; len(body) > 0; {
		m := min(n, len(body))
		out = append(out, 0x16, 3, 1)
		out = binary.BigEndian.AppendUint16(out, uint16(m))
		out = append(out, body[:m]...)
		body = body[m:]
	}
	return out
}

// Client hellos of a real client give their name, in any number of pieces and records;
// every prefix asks for more.
func TestServerName(t *testing.T) {
	f := func(want string, c *tls.Config) {
		t.Helper()
		whole := capture(t, c)
		for _, b := range [][]byte{whole, split(whole, 100), split(whole, 3), append(bytes.Clone(whole), "more"...)} {
			if got, err := ServerName(b); got != want || err != nil {
				t.Errorf("got %q, %v; want %q", got, err, want)
			}
		}
		for _, b := range [][]byte{whole, split(whole, 50)} {
			for i := range b {
				if got, err := ServerName(b[:i]); !errors.Is(err, ErrShort) {
					t.Fatalf("prefix of %d bytes: %q, %v", i, got, err)
				}
			}
		}
	}
	f("api.example.com", &tls.Config{ServerName: "API.example.com"})
	f("a.test", &tls.Config{ServerName: "a.test", MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}})
	f("", &tls.Config{InsecureSkipVerify: true}) // no name
}

func TestMalformed(t *testing.T) {
	good := capture(t, &tls.Config{ServerName: "api.example.com"})
	f := func(name string, change func(b []byte) []byte) {
		t.Helper()
		if got, err := ServerName(change(bytes.Clone(good))); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	at := func(i int, v byte) func([]byte) []byte { return func(b []byte) []byte { b[i] = v; return b } }
	f("HTTP", func([]byte) []byte { return []byte("GET / HTTP/1.1\r\n") })
	f("another record", at(0, 0x17))
	f("another major version", at(1, 2))
	f("a server hello", at(5, 2))
	f("an empty record", func(b []byte) []byte { b[3], b[4] = 0, 0; return b })
	f("a record beyond the limit", at(3, 0xff))
	f("a message beyond the limit", at(6, 1))
	f("a session longer than the message", at(5+4+34, 0xff))
	f("a name with a space", func(b []byte) []byte { return bytes.Replace(b, []byte("api.ex"), []byte("api ex"), 1) })
	f("a name with two dots", func(b []byte) []byte { return bytes.Replace(b, []byte("api.ex"), []byte("api..x"), 1) })
	f("never an end", func([]byte) []byte {
		return split(append([]byte{0x16, 3, 1, 0, 0, 1, 0, 0x3f, 0xff}, make([]byte, MaxBytes)...), 64)
	})
}

func TestMatches(t *testing.T) {
	f := func(pattern, name string, want bool) {
		t.Helper()
		if Matches(pattern, name) != want {
			t.Errorf("%q against %q: %v", pattern, name, !want)
		}
	}
	f("a.test", "a.test", true)
	f("a.test", "b.a.test", false)
	f("*.a.test", "b.a.test", true)
	f("*.a.test", "c.b.a.test", false)
	f("*.a.test", "a.test", false)
	f("*.a.test", ".a.test", false)
	f("", "", false)
}

// The usual hello costs the name alone.
func TestAllocations(t *testing.T) {
	b := capture(t, &tls.Config{ServerName: "api.example.com"})
	if n := testing.AllocsPerRun(100, func() {
		if name, err := ServerName(b); err != nil || !strings.HasPrefix(name, "api") {
			t.Fatal(name, err)
		}
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzServerName: no input panics; a decision is not changed by bytes that follow; within
// MaxBytes there is one; and a name is one that can be matched.
func FuzzServerName(f *testing.F) {
	good := capture(f, &tls.Config{ServerName: "api.example.com"})
	f.Add(good, []byte("x"))
	f.Add(split(good, 7), []byte{0x16})
	f.Add([]byte{0x16, 3, 1, 0, 4, 1, 0, 0, 0}, []byte{})
	f.Fuzz(func(t *testing.T, b, more []byte) {
		name, err := ServerName(b)
		if errors.Is(err, ErrShort) {
			if len(b) >= MaxBytes {
				t.Fatalf("undecided after %d bytes", len(b))
			}
			return
		}
		if err == nil && name != "" && !plausible([]byte(name)) {
			t.Fatalf("name %q", name)
		}
		if again, err2 := ServerName(append(bytes.Clone(b), more...)); len(b)+len(more) < MaxBytes && (again != name || !errors.Is(err2, err)) {
			t.Fatalf("%q, %v; with more bytes %q, %v", name, err, again, err2)
		}
	})
}
