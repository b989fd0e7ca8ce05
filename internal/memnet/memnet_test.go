package memnet

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// pair dials a listener and returns both ends.
func pair(t *testing.T, n *Network) (near, far net.Conn) {
	t.Helper()
	l, err := n.Listen("b", "b:1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	near, err = n.Dialer("a")(context.Background(), "b:1")
	if err != nil {
		t.Fatal(err)
	}
	far, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

// A write arrives exactly one link delay later, and order is kept.
func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		n.SetDelay("a", "b", 40*time.Millisecond)
		near, far := pair(t, n)
		defer near.Close()
		defer far.Close()
		start := time.Now()
		for _, s := range []string{"one", "two"} {
			if _, err := near.Write([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		buf := make([]byte, 6)
		if _, err := io.ReadFull(far, buf); err != nil {
			t.Fatal(err)
		}
		if string(buf) != "onetwo" || time.Since(start) != 40*time.Millisecond {
			t.Fatalf("got %q after %v", buf, time.Since(start))
		}
	})
}

// Bytes written before Close arrive, then EOF.
func TestCloseDelivers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := pair(t, New())
		if _, err := near.Write([]byte("last words")); err != nil {
			t.Fatal(err)
		}
		near.Close()
		got, err := io.ReadAll(far)
		if err != nil || string(got) != "last words" {
			t.Fatalf("got %q, %v", got, err)
		}
		far.Close()
	})
}

// A cut breaks both ends, refuses dials, and heals.
func TestCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		near, far := pair(t, n)
		n.Cut("a", "b")
		if _, err := near.Read(make([]byte, 1)); err == nil {
			t.Fatal("read on a cut link succeeded")
		}
		if _, err := far.Write([]byte("x")); err == nil {
			t.Fatal("write on a cut link succeeded")
		}
		if _, err := n.Dialer("a")(context.Background(), "b:1"); !errors.Is(err, ErrRefused) {
			t.Fatalf("dial over a cut link: %v", err)
		}
		n.Heal("b", "a")
		c, err := n.Dialer("a")(context.Background(), "b:1")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

// Dialling an address nobody listens on is refused, and an address is taken once.
func TestRefused(t *testing.T) {
	n := New()
	if _, err := n.Dialer("a")(context.Background(), "nowhere:1"); !errors.Is(err, ErrRefused) {
		t.Fatalf("got %v", err)
	}
	l, err := n.Listen("b", "b:1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Listen("b", "b:1"); err == nil {
		t.Fatal("address was given out twice")
	}
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("accept after close: %v", err)
	}
}

// The end of a connection arrives even when it is closed while a write is on its way.
func TestCloseDuringDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		n.SetDelay("a", "b", time.Second)
		near, far := pair(t, n)
		if _, err := near.Write([]byte("late")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		near.Close()
		got, err := io.ReadAll(far)
		if err != nil || string(got) != "late" {
			t.Fatalf("got %q, %v", got, err)
		}
		if _, err := far.Write([]byte("lost")); err != nil {
			t.Fatalf("a write to a closed peer: %v", err)
		}
		far.Close()
	})
}
