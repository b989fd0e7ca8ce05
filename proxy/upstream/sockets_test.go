//go:build linux

package upstream

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"
)

func addr(t *testing.T, a net.Addr) netip.AddrPort {
	t.Helper()
	return a.(*net.TCPAddr).AddrPort()
}

// A connection is known as ours from before it is accepted until it is closed, by either
// spelling of its address; others never are.
func TestSockets(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := addr(t, l.Addr())
	s := new(Sockets)
	dial := GuardedDial(nil, NewGuard(GuardOptions{Sockets: s, Allow: []Rule{{Prefix: netip.MustParsePrefix("127.0.0.0/8")}}}), 5*time.Second)
	type made struct {
		c   net.Conn
		err error
	}
	dialled := make(chan made, 1)
	go func() {
		c, err := dial(context.Background(), "tcp", to.String())
		dialled <- made{c, err}
	}()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	from := addr(t, in.RemoteAddr())
	if !s.Has(from, to) { // whether or not dial has returned by now
		t.Fatal("a connection being made is not known")
	}
	out := <-dialled
	if out.err != nil {
		t.Fatal(out.err)
	}
	mapped := netip.AddrPortFrom(netip.AddrFrom16(from.Addr().As16()), from.Port())
	if !s.Has(from, to) || !s.Has(mapped, to) {
		t.Fatal("an open connection is not known")
	}
	other, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if s.Has(addr(t, other.LocalAddr()), to) {
		t.Fatal("somebody else's connection is taken for ours")
	}
	out.c.Close()
	if s.Has(from, to) {
		t.Fatal("a closed connection is still known")
	}
	if s.Has(from, to) || (*Sockets)(nil).Has(from, to) {
		t.Fatal("nobody's connection is known")
	}
}

// What is remembered is bounded by what is open, and failed dials leave nothing.
func TestSocketsAreForgotten(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	s := new(Sockets)
	dial := GuardedDial(nil, NewGuard(GuardOptions{Sockets: s, Allow: []Rule{{Prefix: netip.MustParsePrefix("127.0.0.0/8")}}}), 5*time.Second)
	for range 2*minSweep + 10 {
		c, err := dial(context.Background(), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	l.Close()
	if _, err := dial(context.Background(), "tcp", l.Addr().String()); err == nil {
		t.Fatal("dialled a closed listener")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.made) > minSweep || len(s.dialling) > 0 {
		t.Fatalf("%d open and %d being made are remembered", len(s.made), len(s.dialling))
	}
}
