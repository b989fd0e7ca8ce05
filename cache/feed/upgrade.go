package feed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// refused is the answer of a server that does not serve the protocol.
type refused struct{ why string }

func (r refused) Error() string { return "the server does not serve " + Protocol + ": " + r.why }

// IsRefused reports whether err of Connect says that the server answered and does not
// serve the protocol to this client, so that gRPC is to be tried.
func IsRefused(err error) bool {
	var r refused
	return errors.As(err, &r)
}

// Client is the client's end.
type Client struct {
	conn   net.Conn
	socket *Socket // of conn, if it is one
	in     reader
	dec    decoder
	out    []byte
}

// Connect asks the server at the other end of conn for a feed; authority is its name. It
// gives up when ctx ends. On an error it has closed conn; see IsRefused.
func Connect(ctx context.Context, conn net.Conn, authority string) (c *Client, err error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			conn.Close()
		}
	}()
	head := "GET " + Path + " HTTP/1.1\r\nHost: " + hostOf(authority) + "\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n\r\n"
	if _, err := io.WriteString(conn, head); err != nil {
		return nil, err
	}
	answer, rest, err := readHead(conn)
	if err != nil {
		return nil, err
	}
	if line, _, _ := strings.Cut(answer, "\r\n"); !strings.HasPrefix(line, "HTTP/1.1 101 ") {
		return nil, refused{fmt.Sprintf("%.80q", line)}
	}
	if !strings.Contains(strings.ToLower(answer), "\r\nupgrade: "+Protocol+"\r\n") {
		return nil, refused{"it switched to another protocol"}
	}
	from, socket := source(conn)
	c = &Client{conn: conn, socket: socket, in: reader{from: from, max: MaxFrame, buf: make([]byte, max(firstBuffer, len(rest)))}}
	c.in.end = copy(c.in.buf, rest)
	return c, nil
}

// hostOf makes an authority fit for a Host header.
func hostOf(authority string) string {
	if authority == "" || strings.ContainsFunc(authority, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }) {
		return "localhost"
	}
	return authority
}

// readHead reads up to the empty line that ends a head; rest came after it. A server that
// closes or says something else instead, as one of HTTP/2 does, has refused.
func readHead(conn io.Reader) (head string, rest []byte, err error) {
	buf := make([]byte, 0, 512)
	for {
		n, err := conn.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if at := strings.Index(string(buf), "\r\n\r\n"); at >= 0 {
			return string(buf[:at+2]), buf[at+4:], nil
		}
		const begin = "HTTP/1."
		if n := min(len(buf), len(begin)); string(buf[:n]) != begin[:n] {
			return "", nil, refused{fmt.Sprintf("it answered %.24q", buf)}
		}
		switch {
		case errors.Is(err, io.EOF):
			return "", nil, refused{"it closed the connection"}
		case err != nil:
			return "", nil, err
		case len(buf) == MaxHead:
			return "", nil, refused{"its answer is too long"}
		case len(buf) == cap(buf):
			buf = append(make([]byte, 0, min(2*cap(buf), MaxHead)), buf...)
		}
	}
}

// Recv returns the next frame. It, and all bytes in it, are valid until the next Recv;
// strings are for ever. An orderly end is io.EOF, an end with a reason an outrigger.Error.
func (c *Client) Recv() (*pb.FeedFrame, error) {
	raw, err := c.in.next()
	if err != nil {
		return nil, err
	}
	return c.dec.frame(raw)
}

// AppendVariable appends v without its key, encoded, to b if that needs no encoding: v is a
// variable of the last frame and its bytes are at hand. Else it appends nothing and returns
// false. Recv and AppendVariable must not be called at the same time.
func (c *Client) AppendVariable(b []byte, v *pb.Variable) ([]byte, bool) {
	return c.dec.appendStored(b, v)
}

// Send sends one request. A message above MaxRequest has kind Invalid.
func (c *Client) Send(r *pb.FeedRequest) (err error) {
	if c.out, err = appendRequest(c.out[:0], r); err != nil {
		return err
	}
	if n := len(c.out) - headerBytes; n > MaxRequest {
		return outrigger.Errorf(outrigger.Invalid, "a feed request has %d bytes, at most %d are allowed; use gRPC", n, MaxRequest)
	}
	return c.send()
}

// send sends what is in out.
func (c *Client) send() (err error) {
	sent := 0
	if c.socket != nil {
		if sent, err = c.socket.TryWrite(c.out); err != nil || sent == len(c.out) {
			return err
		}
	}
	_, err = c.conn.Write(c.out[sent:])
	return err
}

// SendHeartbeat is Send of a heartbeat; it allocates nothing.
func (c *Client) SendHeartbeat(sent uint64) error {
	c.out = appendHeartbeat(c.out[:0], sent)
	return c.send()
}

// Until lets Recv end with os.ErrDeadlineExceeded at t, also one that waits already; it may
// be called by any goroutine. A later Recv goes on where that one stopped.
func (c *Client) Until(t time.Time) error { return c.conn.SetReadDeadline(t) }

// Close ends the feed and whatever waits for it.
func (c *Client) Close() { c.conn.Close() }

// Server is the server's end. What it sends is up to its owner: frames made with
// AppendMessage, Begin and AppendEnd, written to the connection.
type Server struct {
	Conn   net.Conn
	Socket *Socket // Conn's, nil if it is none; to write to when there is no Write under way
	in     reader
	beat   pb.FeedRequest // the last heartbeat
}

// Accept reads the client's head and answers it. ready says whether a feed can be served
// now; its error is the client's answer (503). On an error Accept has answered and closed
// conn.
func Accept(conn net.Conn, ready func() error) (*Server, error) {
	late := time.AfterFunc(HeadTime, func() { conn.Close() })
	defer late.Stop()
	limit := &io.LimitedReader{R: conn, N: MaxHead}
	br := bufio.NewReader(limit)
	req, err := http.ReadRequest(br)
	if err != nil {
		conn.Close()
		return nil, outrigger.Errorf(outrigger.Invalid, "no request for a feed came: %v", err)
	}
	code, why := judge(req), ""
	if code == 0 {
		if err := ready(); err != nil {
			code, why = http.StatusServiceUnavailable, err.Error()
		}
	}
	if code != 0 {
		if why == "" {
			why = http.StatusText(code)
		}
		// The connection ends either way; a client that has gone need not hear why.
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 %d %s\r\nConnection: close\r\nUpgrade: %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s",
			code, http.StatusText(code), Protocol, len(why), why)
		conn.Close()
		return nil, outrigger.Errorf(outrigger.Denied, "request for a feed answered with %d: %s", code, why)
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+Protocol+"\r\n\r\n"); err != nil {
		conn.Close()
		return nil, err
	}
	s := &Server{Conn: conn, in: reader{max: MaxRequest, buf: make([]byte, requestBuffer)}}
	if n := br.Buffered(); n > 0 {
		s.in.buf = make([]byte, max(requestBuffer, n))
		if s.in.end, err = io.ReadFull(br, s.in.buf[:n]); err != nil {
			conn.Close()
			return nil, err
		}
	}
	s.in.from, s.Socket = source(conn)
	return s, nil
}

// judge returns the status a request is refused with, 0 = it is not.
func judge(r *http.Request) int {
	switch {
	case r.URL.Path != Path || r.URL.RawQuery != "":
		return http.StatusNotFound
	case r.Method != http.MethodGet:
		return http.StatusMethodNotAllowed
	case r.Header.Get("Origin") != "":
		return http.StatusForbidden
	case r.ContentLength != 0 || len(r.TransferEncoding) > 0:
		return http.StatusBadRequest
	case r.ProtoMajor != 1 || r.ProtoMinor != 1 || r.Header.Get("Upgrade") != Protocol || !strings.EqualFold(r.Header.Get("Connection"), "upgrade"):
		return http.StatusUpgradeRequired
	}
	return 0
}

// Recv returns the next request; a heartbeat is valid until the next Recv. An orderly end is
// io.EOF.
func (s *Server) Recv() (*pb.FeedRequest, error) {
	raw, err := s.in.next()
	if err != nil {
		return nil, err
	}
	if sent, ok := heartbeat(raw); ok {
		if s.beat.Kind == nil {
			s.beat.Kind = &pb.FeedRequest_Heartbeat{Heartbeat: &pb.Heartbeat{}}
		}
		s.beat.GetHeartbeat().Sent = sent
		return &s.beat, nil
	}
	r := &pb.FeedRequest{}
	if err := proto.Unmarshal(raw, r); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "a feed frame holds no FeedRequest: %v", err)
	}
	return r, nil
}
