package feed

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
)

// sockets returns two ends of a connection.
func sockets(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if near, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// opened returns the two ends of a feed over a connection.
func opened(t *testing.T, near, far net.Conn) (*Client, *Server) {
	t.Helper()
	accepted := make(chan *Server, 1)
	go func() {
		s, err := Accept(far, served)
		if err != nil {
			t.Error(err)
		}
		accepted <- s
	}()
	c, err := Connect(t.Context(), near, "")
	if s := <-accepted; err == nil && s != nil {
		return c, s
	}
	t.Fatal(err)
	return nil, nil
}

// 1. A client waits for a frame of which half has come.
// 2. Until ends the waiting.
// 3. The other half comes: the next Recv returns the whole frame. So over a socket and over
// what is none.
func TestUntilInterruptsRecv(t *testing.T) {
	for name, pair := range map[string]func() (near, far net.Conn){
		"socket": func() (net.Conn, net.Conn) { return sockets(t) },
		"pipe":   net.Pipe,
	} {
		near, far := pair()
		c, s := opened(t, near, far)
		if (s.Socket != nil) != (name == "socket") {
			t.Errorf("%s: taken for a socket: %v", name, s.Socket != nil)
		}
		interrupted := make(chan error, 1)
		go func() {
			_, err := c.Recv()
			interrupted <- err
		}()
		want := samples()["changes"]
		raw := message(t, want)
		if _, err := far.Write(raw[:len(raw)/2]); err != nil { // of a pipe, it has been read now
			t.Fatal(err)
		}
		if err := c.Until(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if err := <-interrupted; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: interrupted with %v", name, err)
		}
		if err := c.Until(time.Time{}); err != nil {
			t.Fatal(err)
		}
		rest := make(chan error, 1)
		go func() {
			_, err := far.Write(raw[len(raw)/2:])
			rest <- err
		}()
		if f, err := c.Recv(); err != nil || !proto.Equal(f, want) {
			t.Errorf("%s: %v, %v", name, f, err)
		}
		if err := <-rest; err != nil {
			t.Error(err)
		}
		far.Close()
		if _, err := c.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%s: the end is %v", name, err)
		}
		c.Close()
	}
}

// A socket takes what it has room for; what it took arrives as it was, and a closed one
// says so.
func TestTryWrite(t *testing.T) {
	near, far := sockets(t)
	s := SocketOf(near)
	if s == nil {
		t.Fatal("a TCP connection is no socket")
	}
	sent, full := 0, false
	chunk := make([]byte, 1<<16)
	for !full {
		for i := range chunk {
			chunk[i] = byte((sent + i) % 251)
		}
		n, err := s.TryWrite(chunk)
		if err != nil {
			t.Fatal(err)
		}
		sent, full = sent+n, n < len(chunk)
	}
	got := make([]byte, sent)
	if _, err := io.ReadFull(SocketOf(far), got); err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if b != byte(i%251) {
			t.Fatalf("byte %d of %d is %d", i, sent, b)
		}
	}
	near.Close()
	if n, err := s.TryWrite(chunk); !errors.Is(err, net.ErrClosed) || n != 0 {
		t.Errorf("closed: %d, %v", n, err)
	}
	if n, err := SocketOf(far).Read(chunk); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("its end: %d, %v", n, err)
	}
	if SocketOf(struct{ net.Conn }{far}) != nil {
		t.Error("a connection that wraps a socket is taken for one")
	}
}

// A heartbeat costs neither end memory, and nor do its answer and a change.
func TestConversationAllocatesNothing(t *testing.T) {
	near, far := sockets(t)
	c, s := opened(t, near, far)
	answer := append(message(t, samples()["ack"]), message(t, samples()["changes"])...)
	sent := uint64(0)
	turn := func() {
		sent++
		if err := c.SendHeartbeat(sent); err != nil {
			t.Fatal(err)
		}
		r, err := s.Recv()
		if err != nil || r.GetHeartbeat().GetSent() != sent {
			t.Fatalf("heartbeat %v, %v", r, err)
		}
		if n, err := s.Socket.TryWrite(answer); err != nil || n != len(answer) {
			t.Fatalf("%d of %d written, %v", n, len(answer), err)
		}
		for range 2 {
			if _, err := c.Recv(); err != nil {
				t.Fatal(err)
			}
		}
	}
	turn()
	if n := testing.AllocsPerRun(100, turn); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
