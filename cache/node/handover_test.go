package node_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// These tests use real Unix sockets and real shared memory, so they run outside of
// bubbles and wait on events only.

// socketWorld is a running agent that serves its table on a Unix socket.
func socketWorld(t *testing.T, table shm.Options, limit int) (a *node.Agent, o *origintest.Origin, path string) {
	t.Helper()
	n := memnet.New()
	o = origintest.New()
	stopOrigin, err := o.Serve(n, "origin", "origin:1")
	must(t, err)
	cc, err := origintest.Dial(n, "node", "origin:1")
	must(t, err)
	a, err = node.New(node.Options{Node: outrigger.Node{ID: "n", Region: origintest.Region}, Origin: cc, Table: table, MaxSidecars: limit})
	must(t, err)
	path = filepath.Join(t.TempDir(), "table.sock")
	l, err := net.Listen("unix", path)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(stopOrigin)
	ended := make(chan error, 2)
	go func() { ended <- a.Run(ctx) }()
	go func() { ended <- a.ServeTable(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		cc.Close()
	})
	wait(t, "the feed lease", a.Ready())
	return a, o, path
}

func attach(t *testing.T, path string) *node.Attachment {
	t.Helper()
	at, err := node.Attach(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { at.Close() })
	return at
}

func wait(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	select {
	case <-done:
	case <-limit.C:
		t.Fatalf("%s does not happen", what)
	}
}

func TestHandOver(t *testing.T) {
	a, o, path := socketWorld(t, shm.Options{Bytes: 1 << 20}, 8)
	at := attach(t, path)
	o.Put("x", "1")
	_, err := a.Get(t.Context(), get("x"))
	must(t, err)
	if e, _ := at.Reader.Get("default/s/x", nil); e.State != shm.Present {
		t.Fatalf("the attached reader sees x %v", e.State)
	}
	if at.Reader.Generation() != a.Table().Generation() || at.Lease != 300*time.Millisecond {
		t.Errorf("generation %d with lease %v was handed over", at.Reader.Generation(), at.Lease)
	}
	// A larger table: the reader is told, and comes again.
	must(t, a.Rotate(shm.Options{Bytes: 4 << 20}))
	wait(t, "the end of the attachment", at.Gone)
	if !at.Reader.Closed() {
		t.Error("the retired table does not say so")
	}
	again := attach(t, path)
	_, err = a.Get(t.Context(), get("x"))
	must(t, err)
	if e, _ := again.Reader.Get("default/s/x", nil); e.State != shm.Present {
		t.Errorf("the new reader sees x %v", e.State)
	}
	must(t, again.Close())
	wait(t, "the end of a closed attachment", again.Gone)
}

func TestHandOverLimits(t *testing.T) {
	_, _, path := socketWorld(t, shm.Options{Bytes: 1 << 20}, 1)
	first := attach(t, path)
	if _, err := node.Attach(t.Context(), path); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("a second reader got %v, want kind Unavailable", err)
	}
	select {
	case <-first.Gone:
		t.Error("the first reader lost its table")
	default:
	}
	// A heap table cannot be handed over.
	_, _, heap := socketWorld(t, shm.Options{Bytes: 1 << 20, Heap: true}, 1)
	if _, err := node.Attach(t.Context(), heap); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("a reader of a heap table got %v, want kind Unavailable", err)
	}
	if _, err := node.Attach(t.Context(), path+".absent"); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("nobody there: got %v", err)
	}
}

// A process that talks on the socket does not know the protocol and is shown out.
func TestHandOverPeerSendsData(t *testing.T) {
	_, _, path := socketWorld(t, shm.Options{Bytes: 1 << 20}, 8)
	c, err := net.Dial("unix", path)
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte("hello"))
	must(t, err)
	must(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
	b := make([]byte, 64)
	for err == nil {
		_, err = c.Read(b)
	}
	if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Error("the connection stays open")
	}
}

func TestAttachToSomethingElse(t *testing.T) {
	for name, say := range map[string]string{"other protocol": "HTTP/1.1 400 Bad Request\r\n\r\n", "short": "PUTBHOR1", "no descriptor": "PUTBHOR1" + string(make([]byte, 24))} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		must(t, err)
		go func() {
			if c, err := l.Accept(); err == nil {
				_, _ = c.Write([]byte(say))
				c.Close()
			}
		}()
		if _, err := node.Attach(t.Context(), path); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: got %v, want kind Invalid", name, err)
		}
		l.Close()
	}
}

// The clock is the one other processes read, and it only moves forward.
func TestClock(t *testing.T) {
	a, b := node.Clock(), node.Clock()
	for range 1000 {
		x := a()
		y := b()
		if x <= 0 || y < x-int64(time.Millisecond) || y > x+int64(time.Second) {
			t.Fatalf("two clocks of one machine show %d and %d", x, y)
		}
	}
}
