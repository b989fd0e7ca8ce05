package netfilter

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/internal/netnstest"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/redirect"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/rules"
)

const (
	pod4, pod6       = "10.77.0.1", "fd77::1"
	server4, server6 = "10.77.0.2", "fd77::2"

	patience = 30 * time.Second // of a test for the kernel
)

// tproxyPod is a namespace with the rules of mode TProxy, linked with one without. This
// process is the sidecar if own is its user, and a program of the pod if it is not.
func tproxyPod(t *testing.T, own uint32) (pod, server *netnstest.NS) {
	t.Helper()
	pod, server = netnstest.New(t), netnstest.New(t)
	netnstest.Link(t, pod, server, pod4+"/24", server4+"/24", pod6+"/64", server6+"/64")
	r := build(t, rules.Config{Mode: rules.TProxy, OutboundPort: 15001, InboundPort: 15006, UIDs: []uint32{own},
		InboundSkipPorts: []rules.Range{{Lo: 22, Hi: 22}}})
	pod.Do(func() {
		if err := Install(r); err != nil {
			t.Error(err)
		}
	})
	return pod, server
}

const root, other = 0, 1337 // users

func dial(t *testing.T, from *netnstest.NS, address string) *net.TCPConn {
	t.Helper()
	c, err := from.DialContext(t.Context(), net.Dialer{Timeout: patience}, "tcp", address)
	if err == nil {
		t.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(patience))
	}
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func accept(t *testing.T, l net.Listener) *net.TCPConn {
	t.Helper()
	err := l.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
	var c net.Conn
	if err == nil {
		c, err = l.Accept()
	}
	if err == nil {
		t.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(patience))
	}
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// acknowledged waits until the peer's kernel has everything that was written to c.
func acknowledged(t *testing.T, c *net.TCPConn) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	deadline, tick := time.After(patience), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		left := -1
		cerr := rc.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
		if left == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d bytes are not acknowledged", left)
		}
	}
}

// A client may speak before the sidecar has accepted its connection. What the kernel
// answers meanwhile belongs to no user yet.
func TestTProxyBeforeAccept(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			pod, server := tproxyPod(t, root)
			var l net.Listener
			pod.Do(func() {
				var err error
				if l, err = (&net.ListenConfig{Control: redirect.Transparent}).Listen(context.Background(), network, ":15006"); err != nil {
					t.Error(err)
				}
			})
			if t.Failed() {
				return
			}
			defer l.Close()
			host := map[string]string{"tcp4": pod4, "tcp6": pod6}[network]
			c := dial(t, server, net.JoinHostPort(host, "9000"))
			if _, err := io.WriteString(c, "early"); err != nil {
				t.Fatal(err)
			}
			acknowledged(t, c)
			s := accept(t, l)
			got := make([]byte, 5)
			if _, err := io.ReadFull(s, got); err != nil || string(got) != "early" {
				t.Fatalf("the sidecar read %q, %v", got, err)
			}
			if _, err := io.WriteString(s, "late"); err != nil {
				t.Fatal(err)
			}
			s.Close()
			if all, err := io.ReadAll(c); err != nil || string(all) != "late" {
				t.Errorf("the client read %q, %v", all, err)
			}
			if to := s.LocalAddr().(*net.TCPAddr); to.Port != 9000 || to.IP.String() != host {
				t.Errorf("the original destination is %v", to)
			}
		})
	}
}

// A program that is reached past the sidecar answers past it too.
func TestTProxyExcludedInbound(t *testing.T) {
	pod, server := tproxyPod(t, other)
	for _, host := range []string{pod4, pod6} {
		l := pod.Listen("tcp", net.JoinHostPort(host, "22"))
		c := dial(t, server, l.Addr().String())
		s := accept(t, l)
		if _, err := io.WriteString(s, "hello"); err != nil {
			t.Fatal(err)
		}
		s.Close()
		if all, err := io.ReadAll(c); err != nil || string(all) != "hello" {
			t.Errorf("%s: the client read %q, %v", host, all, err)
		}
	}
}

// What the sidecar has written before it closed a connection it opened still arrives,
// although the socket no longer belongs to anybody.
func TestTProxyAfterClose(t *testing.T) {
	pod, server := tproxyPod(t, root)
	for _, host := range []string{server4, server6} {
		l := server.Listen("tcp", net.JoinHostPort(host, "7000"))
		c := dial(t, pod, l.Addr().String())
		s := accept(t, l)
		if err := c.SetWriteBuffer(4 << 20); err != nil {
			t.Fatal(err)
		}
		if err := s.SetReadBuffer(16 << 10); err != nil {
			t.Fatal(err)
		}
		sent := make([]byte, 1<<20)
		if _, err := rand.Read(sent); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(sent); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%s: %d of %d bytes arrived, %v", host, len(got), len(sent), err)
		}
	}
}
