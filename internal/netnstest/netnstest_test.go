//go:build linux

package netnstest

import (
	"context"
	"io"
	"net"
	"os"
	"testing"
)

// The process stays in the namespace it was in, whichever thread a new one was made on.
func TestProcessStays(t *testing.T) {
	of := func() string {
		t.Helper()
		link, err := os.Readlink("/proc/self/ns/net") // of the first thread
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	for was, i := of(), 0; i < 100; i++ {
		New(t)
		if is := of(); is != was {
			t.Fatalf("after namespace %d the process is in %s, it was in %s", i+1, is, was)
		}
	}
}

// Two namespaces reach each other over both families, and the machine reaches neither.
func TestLink(t *testing.T) {
	a, b := New(t), New(t)
	Link(t, a, b, "10.77.0.1/24", "10.77.0.2/24", "fd77::1/64", "fd77::2/64")
	for _, address := range []string{"10.77.0.2:80", "[fd77::2]:80"} {
		l := b.Listen("tcp", address)
		c, err := a.DialContext(t.Context(), net.Dialer{}, "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(s, "hello"); err != nil {
			t.Fatal(err)
		}
		s.Close()
		if got, err := io.ReadAll(c); string(got) != "hello" {
			t.Fatalf("%s: got %q, %v", address, got, err)
		}
		c.Close()
	}
	other := New(t)
	if c, err := other.DialContext(context.Background(), net.Dialer{}, "tcp", "10.77.0.2:80"); err == nil {
		c.Close()
		t.Fatal("a namespace that is not linked reached the server")
	}
}
