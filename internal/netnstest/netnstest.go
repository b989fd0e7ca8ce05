//go:build linux

// Package netnstest gives tests network namespaces of their own: real kernels, real
// rules, nothing shared with the machine. Needs root; without it tests skip and say so,
// and fail when CI=true.
//
//	pod, server := netnstest.New(t), netnstest.New(t)
//	netnstest.Link(t, pod, server, "10.77.0.1/24", "10.77.0.2/24", "fd77::1/64", "fd77::2/64")
//	l := server.Listen("tcp", "10.77.0.2:80")
//	pod.Do(func() { … }) // what f opens or starts belongs to the namespace
//
// A socket belongs to the namespace of the thread that opened it and can be used from
// anywhere afterwards; a process inherits the namespace of the thread that started it.
// Everything ends with the test.
package netnstest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is one namespace. Its methods may be called by several goroutines.
type NS struct {
	t  testing.TB
	fd netns.NsHandle
}

// New makes a namespace whose loopback interface is up.
func New(t testing.TB) *NS {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("skipped: network namespaces need root")
	}
	n := &NS{t: t}
	var err error
	onThread(func() {
		if n.fd, err = netns.New(); err == nil {
			err = up("lo")
		}
	})
	if err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { n.fd.Close() })
	return n
}

// onThread runs f on a thread that ends with it, because its namespace is changed. That is
// never the process's first thread, which does not end: what the kernel says of the process,
// /proc/net for one, would be said of the changed thread from then on.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // unlocked on the first thread only: the runtime discards others
		if unix.Gettid() == os.Getpid() {
			onThread(f) // on another, as this one waits here
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}

// Do runs f on a thread within the namespace. f must not start goroutines that open
// sockets, nor end the test.
func (n *NS) Do(f func()) {
	n.t.Helper()
	var err error
	onThread(func() {
		if err = netns.Set(n.fd); err == nil {
			f()
		}
	})
	if err != nil {
		n.t.Errorf("enter the network namespace: %v", err)
	}
}

// Unprivileged runs f as Do does, on a thread that has no capability.
func (n *NS) Unprivileged(f func()) {
	n.t.Helper()
	n.Do(func() {
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			n.t.Errorf("drop capabilities: %v", err)
			return
		}
		f()
	})
}

// Listen opens a listener in the namespace, closed with the test.
func (n *NS) Listen(network, address string) net.Listener {
	n.t.Helper()
	var l net.Listener
	var err error
	n.Do(func() { l, err = net.Listen(network, address) })
	if err != nil {
		n.t.Fatalf("listen on %s: %v", address, err)
	}
	n.t.Cleanup(func() { l.Close() })
	return l
}

// DialContext connects from within the namespace; d is used as it is.
func (n *NS) DialContext(ctx context.Context, d net.Dialer, network, address string) (c net.Conn, err error) {
	// Racing two families would need another thread.
	d.FallbackDelay = -1
	n.Do(func() { c, err = d.DialContext(ctx, network, address) })
	return c, err
}

// Start starts cmd in the namespace.
func (n *NS) Start(cmd *exec.Cmd) (err error) {
	n.Do(func() { err = cmd.Start() })
	return err
}

// Run runs cmd in the namespace and returns all its output.
func (n *NS) Run(cmd *exec.Cmd) (out []byte, err error) {
	n.Do(func() { out, err = cmd.CombinedOutput() })
	return out, err
}

// Link joins two namespaces by a pair of interfaces called eth0, with these addresses:
// IPv4 of a and b, then IPv6 of a and b, all with their prefix lengths. Each is the
// other's default gateway.
func Link(t testing.TB, a, b *NS, a4, b4, a6, b6 string) {
	t.Helper()
	var err error
	a.Do(func() {
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(b.fd)}
		if err = netlink.LinkAdd(pair); err == nil {
			err = configure(a4, a6)
		}
	})
	if err == nil {
		b.Do(func() { err = configure(b4, b6) })
	}
	if err == nil {
		a.Do(func() { err = gateways(b4, b6) })
	}
	if err == nil {
		b.Do(func() { err = gateways(a4, a6) })
	}
	if err != nil {
		t.Fatalf("link two namespaces: %v", err)
	}
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func configure(addresses ...string) error {
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, s := range addresses {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		a.Flags = 0x02 // IFA_F_NODAD: usable at once
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return up("eth0")
}

func gateways(addresses ...string) error {
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, s := range addresses {
		ip, _, err := net.ParseCIDR(s)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: ip}); err != nil {
			return fmt.Errorf("gateway %s: %w", s, err)
		}
	}
	return nil
}
