package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// tcpPair returns two ends of a loopback connection.
func tcpPair(tb testing.TB) (near, far *net.TCPConn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

type result struct {
	stats TunnelStats
	err   error
}

func start(ctx context.Context, a, b net.Conn, o TunnelOptions) chan result {
	done := make(chan result, 1)
	go func() {
		s, err := Tunnel(ctx, a, b, o)
		done <- result{s, err}
	}()
	return done
}

// The client finishes sending (EOF), the server still answers, then ends: every byte
// arrives in both directions.
func TestTunnelHalfClose(t *testing.T) {
	client, a := tcpPair(t)
	b, server := tcpPair(t)
	done := start(t.Context(), a, b, TunnelOptions{Prefix: []byte("sniffed ")})

	up, down := bytes.Repeat([]byte("up"), 1<<19), bytes.Repeat([]byte("down"), 1<<18)
	go func() {
		client.Write(up)
		client.CloseWrite()
	}()
	got, err := io.ReadAll(server) // ends only because the half-close is passed on
	if err != nil || string(got) != "sniffed "+string(up) {
		t.Fatalf("server read %d bytes, %v", len(got), err)
	}
	go func() {
		server.Write(down)
		server.Close()
	}()
	if got, err = io.ReadAll(client); err != nil || !bytes.Equal(got, down) {
		t.Fatalf("client read %d bytes, %v", len(got), err)
	}
	r := <-done
	if want := (TunnelStats{int64(len(up) + 8), int64(len(down))}); r.err != nil || r.stats != want {
		t.Errorf("got %+v, want %+v", r, want)
	}
}

func TestTunnelCancel(t *testing.T) {
	client, a := tcpPair(t)
	b, _ := tcpPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := start(ctx, a, b, TunnelOptions{})
	cancel()
	if r := <-done; !outrigger.IsKind(r.err, outrigger.Cancelled) {
		t.Errorf("error %v", r.err)
	}
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("client's connection is still open")
	}
}

func TestTunnelReset(t *testing.T) {
	client, a := tcpPair(t)
	b, server := tcpPair(t)
	done := start(t.Context(), a, b, TunnelOptions{})
	server.SetLinger(0)
	server.Close() // RST
	if r := <-done; !outrigger.IsKind(r.err, outrigger.Unavailable) {
		t.Errorf("error %v", r.err)
	}
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("client's connection is still open")
	}
}

// Over in-memory connections on fake time: traffic in one direction keeps both alive;
// silence ends the tunnel within three idle periods.
func TestTunnelIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, a := net.Pipe()
		b, server := net.Pipe()
		begin := time.Now()
		done := start(t.Context(), a, b, TunnelOptions{Idle: time.Minute})
		go io.Copy(io.Discard, server)
		for range 10 {
			time.Sleep(50 * time.Second)
			if _, err := client.Write([]byte("x")); err != nil {
				t.Fatalf("after %v: %v", time.Since(begin), err)
			}
		}
		last := time.Now()
		r := <-done
		if idle := time.Since(last); !outrigger.IsKind(r.err, outrigger.Timeout) || idle < time.Minute || idle > 3*time.Minute {
			t.Errorf("ended after %v idle with %v", idle, r.err)
		}
		if r.stats.AToB != 10 {
			t.Errorf("stats %+v", r.stats)
		}
	})
}

// A connection that cannot be half-closed is closed wholly; that is an orderly end.
func TestTunnelWithoutHalfClose(t *testing.T) {
	client, a := net.Pipe()
	b, server := net.Pipe()
	done := start(t.Context(), a, b, TunnelOptions{})
	go client.Write([]byte("bye"))
	buf := make([]byte, 3)
	if _, err := io.ReadFull(server, buf); err != nil || string(buf) != "bye" {
		t.Fatal(string(buf), err)
	}
	client.Close()
	if _, err := server.Read(buf); !errors.Is(err, io.EOF) {
		t.Errorf("server sees %v", err)
	}
	if r := <-done; r.err != nil {
		t.Errorf("error %v", r.err)
	}
}
