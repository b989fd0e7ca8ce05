package loop

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

const streamHead = "HTTP/1.1 200 OK\r\nX-Stream: yes\r\nTransfer-Encoding: chunked\r\n\r\n"

func chunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }

// streamer answers every request with pieces, each sent once the client has what came
// before; after the last one the connection stays, or ends. seen gets what the client read.
func streamer(t *testing.T, r *testRelay, ends bool, pieces ...string) (seen chan struct{}) {
	t.Helper()
	seen = make(chan struct{}, len(pieces))
	r.server = answerer(t, func(_ int, c net.Conn, br *bufio.Reader) {
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, req.Body)
			for i, p := range pieces {
				if i > 0 {
					select {
					case <-seen:
					case <-t.Context().Done(): // the test has failed
						return
					}
				}
				io.WriteString(c, p)
			}
			if ends {
				return
			}
		}
	})
	return seen
}

// A stream comes as it is made, without a worker, on a connection to the server that is
// used again; what of it is not a whole line waits.
func TestStream(t *testing.T) {
	r := &testRelay{}
	seen := streamer(t, r, false, streamHead+chunk("one\n")+"a\r\ntwo\nthr", "\xc3\xa9e\r\n"+chunk("\n"), chunk("four\n")+"0\r\n\r\n")
	s, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	for range 2 {
		io.WriteString(c, relayRequest("x"))
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(resp.Body)
		for _, want := range []string{"one\n", "two\n", "thr\xc3\xa9e\n", "four\n"} {
			got, err := lines.ReadString('\n')
			if got != want {
				t.Fatalf("%q, %v; want %q", got, err, want)
			}
			if want == "two\n" || strings.HasPrefix(want, "thr") {
				seen <- struct{}{}
			}
		}
		if _, err := lines.ReadByte(); err != io.EOF {
			t.Fatal(err)
		}
	}
	if n := s.Counts(); n.Relayed != 2 || n.Slow != 0 || r.takes.Load() != 1 || r.resumed.Load() != 0 {
		t.Errorf("%+v, %d connections, %d calls resumed", n, r.takes.Load(), r.resumed.Load())
	}
}

// A worker goes on where the loop stopped: after what is out, with what was decoded and not
// used, or from the first byte if nothing is out.
func TestStreamResumes(t *testing.T) {
	for _, c := range []struct {
		name   string
		ends   bool
		pieces []string
		want   string
		read   string
	}{
		{"given up in the middle", false, []string{streamHead + chunk("one\n"), chunk("two\ngive up\nthree")}, `one` + "\n" + `two` + "\n" + `resumed 1 after "give up\nthree"`, streamHead},
		{"given up at once", false, []string{streamHead + chunk("give up\n")}, "resumed 1 conn=true", streamHead + chunk("give up\n")},
		{"held, then given up", false, []string{streamHead + chunk("hold\n"), chunk("give up\n")}, "", ""},
		{"the server is lost", true, []string{streamHead + chunk("one\ntw")}, "one\n" + `resumed 1 after "tw"`, streamHead},
		{"a length that is none", false, []string{streamHead + chunk("one\n"), "zz\r\n"}, "one\n" + `resumed 1 after ""`, streamHead + "zz\r\n"},
		{"a line without an end", false, []string{streamHead + chunk("one\n"), chunk("two") + "0\r\n\r\n"}, "one\n" + `resumed 1 after "two"`, streamHead},
		{"empty", false, []string{streamHead + "0\r\n\r\n"}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &testRelay{}
			seen := streamer(t, r, c.ends, c.pieces...)
			_, address, _, _ := relayServer(t, r, time.Second)
			conn, br := dialRelay(t, address)
			for i := range 2 { // the client's connection is good for another one
				io.WriteString(conn, relayRequest("x"))
				if c.name == "held, then given up" {
					seen <- struct{}{} // nothing is out before
				}
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatal(err)
				}
				if c.want == "" {
					body, err := io.ReadAll(resp.Body)
					if want := map[bool]string{true: "resumed 1 conn=true"}[c.name != "empty"]; err != nil || string(body) != want {
						t.Fatalf("%q, %v; want %q", body, err, want)
					}
					continue
				}
				first, rest, _ := strings.Cut(c.want, "\n")
				body := bufio.NewReader(resp.Body)
				if len(c.pieces) > 1 {
					if got, err := body.ReadString('\n'); got != first+"\n" {
						t.Fatalf("%q, %v", got, err)
					}
					seen <- struct{}{}
				} else {
					rest = c.want
				}
				if got, err := io.ReadAll(body); err != nil || string(got) != rest {
					t.Fatalf("%q, %v; want %q", got, err, rest)
				}
				if n := r.resumed.Load(); n != int64(i+1) {
					t.Fatalf("%d calls were resumed", n)
				}
				r.mu.Lock()
				if got := r.resumedReads[i]; got != c.read {
					t.Errorf("the worker was told %q, want %q", got, c.read)
				}
				r.mu.Unlock()
			}
		})
	}
}

// A client that does not read costs no more memory than its sockets and the batch under
// way: a worker waits for it.
func TestStreamSlowReader(t *testing.T) {
	line := strings.Repeat("l", 60<<10) + "\n"
	stopped := make(chan struct{})
	r := &testRelay{server: answerer(t, func(_ int, c net.Conn, br *bufio.Reader) {
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		io.WriteString(c, streamHead)
		for err := error(nil); err == nil; { // until the worker, which does not read on, closes it
			_, err = io.WriteString(c, chunk(line))
		}
		close(stopped)
	})}
	_, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	io.WriteString(c, relayRequest("x"))
	for r.resumed.Load() == 0 {
		<-time.NewTimer(time.Millisecond).C
	}
	body := readBody(t, br)
	<-stopped
	i := strings.Index(body, "resumed 1 after ")
	if i < len(line) || strings.Trim(body[:i], "l\n") != "" || i%len(line) != 0 {
		t.Errorf("%d bytes of the stream before %.100q", i, body[max(i, 0):])
	}
}

// A client that leaves ends its stream; a stream under way when the server is told to end
// goes on for the grace, and its connection closes afterwards.
func TestStreamEnds(t *testing.T) {
	r := &testRelay{}
	streamer(t, r, false, streamHead+chunk("one\n"), "never")
	_, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	io.WriteString(c, relayRequest("x"))
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	c.Close()
	for r.gone.Load() == 0 {
		<-time.NewTimer(time.Millisecond).C
	}

	r = &testRelay{}
	seen := streamer(t, r, false, streamHead+chunk("one\n"), chunk("two\n")+"0\r\n\r\n")
	s, address, cancel, ended := relayServer(t, r, 20*time.Second)
	c, br = dialRelay(t, address)
	io.WriteString(c, relayRequest("x"))
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	body := bufio.NewReader(resp.Body)
	if _, err := body.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	cancel()
	for !s.draining.Load() {
		<-time.NewTimer(time.Millisecond).C
	}
	seen <- struct{}{}
	if got, err := io.ReadAll(body); err != nil || string(got) != "two\n" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("%v, want the end of the connection", err)
	}
	if err := <-ended; err != nil || r.gone.Load() != 0 || r.resumed.Load() != 0 {
		t.Errorf("%v, %d calls ended, %d resumed", err, r.gone.Load(), r.resumed.Load())
	}
}
