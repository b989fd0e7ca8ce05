package variables_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/feed"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

// overTCP makes the world's feeds come over real sockets, which tell when they are full.
func (w *world) overTCP() (address string) {
	w.t.Helper()
	return w.overTCPWith(insecure.NewCredentials())
}

func (w *world) overTCPWith(creds credentials.TransportCredentials) (address string) {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(w.svc.Credentials(creds)))
	pb.RegisterCoherenceServer(server, w.svc)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	w.t.Cleanup(func() { server.Stop(); <-served })
	w.dial = func(ctx context.Context) (net.Conn, error) {
		raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		conn, _, err := creds.ClientHandshake(ctx, "", raw)
		return conn, err
	}
	return l.Addr().String()
}

// masked encrypts, for a test. Like the connections of gRPC's TLS credentials it has a
// SyscallConn, which is that of the socket below.
type masked struct{ *net.TCPConn }

func (m masked) Read(b []byte) (int, error) {
	n, err := m.TCPConn.Read(b)
	for i := range b[:n] {
		b[i] ^= 0x5a
	}
	return n, err
}

func (m masked) Write(b []byte) (int, error) {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i] ^ 0x5a
	}
	return m.TCPConn.Write(out)
}

type maskedCredentials struct {
	credentials.TransportCredentials
}

func (c maskedCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return masked{conn.(*net.TCPConn)}, info, nil
}

func (c maskedCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return masked{conn.(*net.TCPConn)}, info, nil
}

func (c maskedCredentials) Clone() credentials.TransportCredentials { return c }

// What the credentials make of a connection is never gone round: neither kind of client
// would understand what is not masked.
func TestFeedsBehindCredentials(t *testing.T) { t.Run("lean", testFeedsBehindCredentials) }

func testFeedsBehindCredentials(t *testing.T) {
	creds := maskedCredentials{insecure.NewCredentials()}
	w := newWorld(t)
	cc, err := grpc.NewClient(w.overTCPWith(creds), grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	w.session("s")
	if _, err := pb.NewCoherenceClient(cc).Read(w.ctx, &pb.ReadRequest{Keys: []*pb.Key{{Session: "s", Name: "x"}}}); err != nil {
		t.Fatal(err)
	}
	n := w.selecting(0, 0, "s")
	n.expect("reset to 1: first subscription", "selected 1 at 1")
	w.register("s", "x", value("integer", "1"))
	n.expect("(1,2] s/x@2<1=1")
	n.beat(7)
	n.expect("ack 7 head 2")
}

// 1. Both kinds of feed and calls share a port.
// 2. A lean node stops reading while far more is written than its socket takes; heartbeats
// and a select come in meanwhile. Writers do not wait for it, and other nodes do not.
// 3. It reads on: frames without a gap, but for resets, up to the head, with the newest
// value last, the select answered, and of the heartbeats the newest.
func TestSocketFeeds(t *testing.T) { t.Run("lean", testSocketFeeds) }

func testSocketFeeds(t *testing.T) {
	w := startWorld(t, memory.New(), variables.Options{FeedRing: 64})
	cc, err := grpc.NewClient(w.overTCP(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	w.session("s")
	if _, err := pb.NewCoherenceClient(cc).Read(w.ctx, &pb.ReadRequest{Keys: []*pb.Key{{Session: "s", Name: "x"}}}); err != nil {
		t.Fatal(err)
	}
	slow, quick := w.selecting(0, 0, "s"), w.selecting(0, 0, "s")
	for _, n := range []*node{slow, quick} {
		n.expect("reset to 1: first subscription", "selected 1 at 1")
	}
	big := `"` + strings.Repeat("v", 3500) + `"`
	w.register("s", "x", value("string", big))
	const writes = 4000 // 14 MB: more than both ends' socket buffers take
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		for at := uint64(0); at < writes+2; {
			f := quick.recv()
			at = max(at, f.GetChanges().GetThrough(), f.GetReset_().GetFrom())
		}
	}()
	for i := range writes {
		w.set("s", "x", big)
		if i%100 == 0 { // or they would be let go of, should the writes take half a minute
			slow.beat(uint64(i + 1))
			quick.beat(uint64(i + 1))
		}
	}
	slow.selects(2, shards("u"), nil)
	slow.beat(writes)
	within(t, 2*time.Minute, "the quick node", heard)

	head := w.log.Head()
	at, frames, answered, beat, acked := uint64(1), 0, false, uint64(0), uint64(0)
	for at < head || !answered || beat < writes {
		f := slow.recv()
		if r := f.GetReset_(); r != nil {
			at = r.GetFrom()
		} else if s := f.GetSelected(); s != nil {
			answered = s.GetNumber() == 2 && s.GetPosition() <= at
		} else if a := f.GetAck(); a != nil {
			// A head may be behind frames that came up while it was answered.
			if a.GetSent() <= beat || a.GetHead() < acked {
				t.Fatalf("answer %v after beat %d of head %d, at %d", a, beat, acked, at)
			}
			beat, acked = a.GetSent(), a.GetHead()
		} else if c := f.GetChanges(); c.GetPrevious() != at {
			t.Fatalf("frame continues at %d, applied is %d", c.GetPrevious(), at)
		} else {
			at = c.GetThrough()
			frames++
		}
	}
	if frames == 0 || frames > writes*3/4 {
		t.Errorf("%d frames for %d writes; what waits is to be coalesced", frames, writes)
	}
}

// A node that vanishes without a word is let go of, and so is one whose service ends; what
// comes later is refused.
func TestLeanFeedsEnd(t *testing.T) { t.Run("lean", testLeanFeedsEnd) }

func testLeanFeedsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		silent, talking := w.subscribe(0, 0), w.subscribe(0, 0)
		silent.next()
		talking.next()
		time.Sleep(feed.MaxSilence - time.Second)
		talking.beat(1)
		talking.expect("ack 1 head 0")
		time.Sleep(2 * time.Second)
		if f := w.svc.Stats().Feeds; len(f) != 1 {
			t.Errorf("feeds after %v of silence: %+v", feed.MaxSilence, f)
		}
		dial := w.dial
		conn, err := dial(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		w.stop()
		if _, err := talking.stream.Recv(); err == nil {
			t.Error("a feed outlives its service")
		}
		if _, err := feed.Connect(context.Background(), conn, ""); err == nil {
			t.Error("a feed was opened after the end")
		}
	})
}

// Bytes that are no frames, and messages in the wrong place, end the feed with a reason.
func TestLeanFeedRefusesNonsense(t *testing.T) {
	for what, bytes := range map[string]string{
		"frame": "GET / HTTP/1.1\r\n", "length": "m\xff\xff\xff", "message": "m\x00\x00\x02\xff\xff", "nothing": "m\x00\x00\x00",
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			conn, err := w.dial(w.ctx)
			if err != nil {
				t.Fatal(err)
			}
			c, err := feed.Connect(w.ctx, conn, "")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, bytes); err != nil {
				t.Fatal(err)
			}
			if f, err := c.Recv(); !outrigger.IsKind(err, outrigger.Invalid) {
				t.Errorf("%s: %v, %v", what, f, err)
			}
			if _, err := c.Recv(); !errors.Is(err, io.EOF) {
				t.Errorf("%s: then %v", what, err)
			}
		})
	}
}
