package feed

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func served() error { return nil }

// A feed is asked for and granted; requests and frames pass, and either side's goodbye is
// the other's EOF.
func TestUpgrade(t *testing.T) {
	near, far := net.Pipe()
	got := make(chan *pb.FeedRequest, 1)
	ended := make(chan error, 1)
	go func() {
		s, err := Accept(far, served)
		if err != nil {
			ended <- err
			return
		}
		r, err := s.Recv()
		got <- r
		if err == nil {
			_, err = far.Write(message(t, samples()["ack"]))
		}
		if err == nil {
			_, err = s.Recv()
		}
		ended <- err
	}()
	c, err := Connect(t.Context(), near, "origin:7400")
	if err != nil {
		t.Fatal(err)
	}
	sub := &pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{From: 9}}}
	if err := c.Send(sub); err != nil || !proto.Equal(<-got, sub) {
		t.Fatalf("subscribe: %v", err)
	}
	if f, err := c.Recv(); err != nil || !proto.Equal(f, samples()["ack"]) {
		t.Fatalf("frame %v, %v", f, err)
	}
	long := &pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{Node: &pb.Node{Id: strings.Repeat("n", MaxRequest)}}}}
	if err := c.Send(long); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a request of %d bytes: %v", proto.Size(long), err)
	}
	c.Close()
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Errorf("the server's end: %v", err)
	}
}

// What a server refuses, and that the client can tell.
func TestUpgradeRefused(t *testing.T) {
	for head, want := range map[string]string{
		"GET " + Path + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: outrigger-feed/2\r\n\r\n":                                            "HTTP/1.1 426 Upgrade Required",
		"GET " + Path + " HTTP/1.1\r\nHost: x\r\n\r\n":                                                                                                "HTTP/1.1 426 Upgrade Required",
		"GET " + Path + " HTTP/1.0\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n":                                            "HTTP/1.1 426 Upgrade Required",
		"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n":                                                       "HTTP/1.1 404 Not Found",
		"GET " + Path + "?x=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n":                                        "HTTP/1.1 404 Not Found",
		"POST " + Path + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n":                                           "HTTP/1.1 405 Method Not Allowed",
		"GET " + Path + " HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.example\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n":             "HTTP/1.1 403 Forbidden",
		"GET " + Path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n":                       "HTTP/1.1 400 Bad Request",
		"GET " + Path + " HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", MaxHead) + "\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n": "",
		"nonsense\r\n\r\n": "",
	} {
		near, far := net.Pipe()
		answer := make(chan string, 1)
		go func() {
			go func() { _, _ = io.WriteString(near, head) }() // it need not be read to its end
			raw, _ := io.ReadAll(near)
			line, _, _ := strings.Cut(string(raw), "\r\n")
			answer <- line
		}()
		if s, err := Accept(far, served); err == nil {
			t.Errorf("%.80q was accepted: %v", head, s)
		}
		if got := <-answer; got != want {
			t.Errorf("%.80q: %q, want %q", head, got, want)
		}
		near.Close()
	}
}

// What makes a client use gRPC, and what does not.
func TestConnectRefused(t *testing.T) {
	notReady := func(far net.Conn) {
		_, _ = Accept(far, func() error { return outrigger.Errorf(outrigger.Unavailable, "not yet") })
	}
	says := func(text string) func(net.Conn) {
		return func(far net.Conn) {
			go func() { _, _ = io.Copy(io.Discard, far) }()
			_, _ = io.WriteString(far, text)
			far.Close()
		}
	}
	for name, c := range map[string]struct {
		server  func(net.Conn)
		refused bool
	}{
		"a server that is not ready":    {notReady, true},
		"a server of HTTP/2":            {says("\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x40\x00"), true},
		"a server that closes":          {says(""), true},
		"a web server":                  {says("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), true},
		"another protocol":              {says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"), true},
		"an answer without an end":      {says("HTTP/1.1 101 " + strings.Repeat("x", MaxHead)), true},
		"a server that does not answer": {func(far net.Conn) { _, _ = io.Copy(io.Discard, far) }, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			go c.server(far)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := Connect(ctx, near, ""); err == nil || IsRefused(err) != c.refused {
				t.Errorf("%s: %v, refused %v", name, err, IsRefused(err))
			}
			far.Close()
			synctest.Wait()
		})
	}
}

// A client that says nothing is not waited for longer than HeadTime.
func TestAcceptIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, far := net.Pipe()
		start := time.Now()
		if _, err := Accept(far, served); err == nil || time.Since(start) != HeadTime {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// strict refuses a connection that does not begin with a password, as mutual TLS refuses
// one without a certificate.
type strict struct {
	credentials.TransportCredentials
}

func (s strict) Clone() credentials.TransportCredentials { return s }

func (strict) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var b [4]byte
	if _, err := io.ReadFull(raw, b[:]); err != nil || string(b[:]) != "pass" {
		return nil, nil, errors.New("who are you?")
	}
	return raw, nil, nil
}

// Whom the inner credentials refuse never reaches the feed, and HTTP/2 goes where it went.
func TestCredentials(t *testing.T) {
	over := map[string]func(t *testing.T) (near, far net.Conn){
		"pipe": func(*testing.T) (near, far net.Conn) { return net.Pipe() },
		"tcp": func(t *testing.T) (near, far net.Conn) {
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
			return near, far
		},
	}
	for name, pair := range over {
		for _, c := range []struct {
			first, rest string
			want        string
			admit       func(credentials.AuthInfo) error
		}{
			{"pass", "GET x", "feed GET x", nil},
			{"pass", "GET x", "refused", func(credentials.AuthInfo) error { return io.ErrNoProgress }},
			{"pass", "GET x", "feed GET x", func(credentials.AuthInfo) error { return nil }},
			{"pass", "PRI *", "grpc PRI *", func(credentials.AuthInfo) error { return io.ErrNoProgress }},
			{"pass", "PRI *", "grpc PRI *", nil},
			{"fail", "GET x", "refused", nil},
			{"pass", "", "refused", nil}, // it closes
		} {
			near, far := pair(t)
			go func() {
				_, _ = io.WriteString(near, c.first+c.rest) // refused, nobody reads it
				if c.rest == "" {
					near.Close()
				}
			}()
			read := func(conn net.Conn) string {
				b := make([]byte, len(c.rest))
				if _, err := io.ReadFull(conn, b); err != nil {
					t.Errorf("%s, %q: %v", name, c.rest, err)
				}
				return string(b)
			}
			got := "refused"
			creds := Credentials(strict{insecure.NewCredentials()}, c.admit, func(conn net.Conn) { got = "feed " + read(conn) }).Clone()
			conn, _, err := creds.ServerHandshake(far)
			if err == nil {
				got = "grpc " + read(conn)
			} else if (got == "refused") == errors.Is(err, credentials.ErrConnDispatched) {
				t.Errorf("%s, %q: %v for %s", name, c.rest, err, got)
			}
			if got != c.want {
				t.Errorf("%s, %q: %s, want %s", name, c.first+c.rest, got, c.want)
			}
			near.Close()
			far.Close()
		}
	}
}
