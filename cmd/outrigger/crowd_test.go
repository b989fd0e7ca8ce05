//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// crowdLimit is the memory the sidecar of the test may have; crowd is how many callers want
// most of a MiB of it at the same time.
const (
	crowdLimit = 128 << 20
	crowd      = 1200
	crowdBytes = 1_000_000
)

// heldModel answers at once, except for the model "held": that gets the better part of a
// large answer, and the rest when the test lets go.
type heldModel struct{ rest chan struct{} }

func (m *heldModel) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if !bytes.Contains(body, []byte(`"user":"held"`)) {
		fmt.Fprintf(w, `{"object":"chat.completion","choices":[],"read":%d}`, len(body))
		return
	}
	_, _ = io.WriteString(w, `{"choices":[],"filler":"`+strings.Repeat("x", crowdBytes))
	_ = http.NewResponseController(w).Flush()
	select {
	case <-m.rest:
		_, _ = io.WriteString(w, `"}`)
	case <-r.Context().Done():
	}
}

// TestCrowdedMemory: a sidecar that may have 128 MiB has 1,200 callers who send a MiB each and
// stop before the end, then as many whose answers do. It says no to whom it has no room for,
// in the protocol's shape, answers variables meanwhile, never has more than it may, and
// serves as before when they are gone.
func TestCrowdedMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	model := &heldModel{rest: make(chan struct{})}
	server := httptest.NewServer(model)
	defer server.Close()
	tools := deafServer(t)
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	conn, err := grpc.NewClient(control, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	eventually(t, "the control plane takes writes", func() bool {
		_, err := pb.NewAdminClient(conn).RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: "m", Version: "v1", Actor: "test",
			Endpoints: []*pb.Endpoint{{Address: strings.TrimPrefix(server.URL, "http://"), Region: "local", Weight: 1}}})
		return err == nil
	})
	m := &tenantMesh{t: t, dir: dir, control: control}
	p := m.run(0, "sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", control, "--memory-bytes", strconv.Itoa(crowdLimit), "--upstream-grpc", tools, "--state-dir", filepath.Join(dir, "state"))
	c := &crowded{t: t, address: p.bound["listen"], page: p.bound["http"], pid: p.cmd.Process.Pid}
	eventually(t, "the sidecar serves the model", func() bool { return c.call(100) == http.StatusOK })

	t.Run("requests", func(t *testing.T) {
		c.come(t, func(i int) string { return c.question("", crowdBytes)[:crowdBytes-i%7] })
	})
	t.Run("answers", func(t *testing.T) {
		c.come(t, func(int) string { return c.question("held", 200) })
	})
	close(model.rest)
	t.Run("messages", c.stream)
}

// deafServer is a gRPC server that takes every call and reads no message.
func deafServer(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, in grpc.ServerStream) error {
		<-in.Context().Done()
		return in.Context().Err()
	}))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); must(t, <-served) })
	return l.Addr().String()
}

// stream sends messages to a server that reads none: flow control reaches from one end to
// the other, so the caller is stopped long before its deadline.
func (c *crowded) stream(t *testing.T) {
	conn, err := grpc.NewClient(c.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/tools.Tools/Pour")
	must(t, err)
	const size, most = 64 << 10, 8 << 20
	sent := 0
	for sent <= most && s.SendMsg(wrapperspb.Bytes(make([]byte, size))) == nil {
		sent += size
	}
	t.Logf("stopped after %d KiB", sent>>10)
	if sent < 4*size || sent > most {
		t.Errorf("%d KiB were taken from the caller, and nobody reads them; want at least %d and at most %d", sent>>10, 4*size>>10, most>>10)
	}
	// Whose clock says so first, the caller's or the sidecar's, is open.
	if err := s.RecvMsg(new(wrapperspb.BytesValue)); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("the call ended with %v, want DeadlineExceeded: the caller is stopped, not refused", err)
	}
	eventually(t, "all is given back", func() bool { return c.held() == 0 })
}

type crowded struct {
	t       *testing.T
	address string
	page    string
	pid     int
}

// held is what the sidecar says that calls hold, in bytes.
func (c *crowded) held() int {
	resp, err := http.Get("http://" + c.page + "/stats")
	must(c.t, err)
	defer resp.Body.Close()
	stats := struct {
		Inference struct {
			Held *int `json:"held_bytes"`
		}
	}{}
	must(c.t, json.NewDecoder(resp.Body).Decode(&stats))
	return *stats.Inference.Held
}

// question is a whole request of the user with a body of n bytes.
func (c *crowded) question(user string, n int) string {
	head, tail := `{"model":"m","temperature":0,"user":"`+user+`","messages":[{"role":"user","content":"`, `"}]}`
	body := head + strings.Repeat("y", max(0, n-len(head)-len(tail))) + tail
	return fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// call makes a call with a body of n bytes and returns its status.
func (c *crowded) call(n int) int {
	conn, err := net.Dial("tcp", c.address)
	must(c.t, err)
	defer conn.Close()
	_, _ = io.WriteString(conn, c.question("", n)) // it may be refused before its end
	line := make([]byte, 12)
	if _, err := io.ReadFull(conn, line); err != nil {
		return 0
	}
	status, err := strconv.Atoi(string(line[9:]))
	must(c.t, err)
	return status
}

// come has the crowd send and wait, looks at what the sidecar says and needs, and lets them go.
func (c *crowded) come(t *testing.T, says func(i int) string) {
	most := c.watch()
	var mu sync.Mutex
	var conns []net.Conn
	var group sync.WaitGroup
	refused, shape := 0, ""
	for i := range crowd {
		group.Go(func() {
			conn, err := net.Dial("tcp", c.address)
			must(c.t, err)
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			_, _ = io.WriteString(conn, says(i))
			answer := make([]byte, 4096)
			_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := conn.Read(answer)
			mu.Lock()
			defer mu.Unlock()
			if text := string(answer[:n]); strings.HasPrefix(text, "HTTP/1.1 503 ") {
				refused, shape = refused+1, text
			} else if n > 0 && !strings.HasPrefix(text, "HTTP/1.1 200 ") || n == 0 && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("answered %q, %v", text, err)
			}
		})
	}
	group.Wait()
	peak := most()
	if peak < 1<<20 {
		t.Fatalf("%d bytes resident at most: it was not looked at", peak)
	}
	t.Logf("%d of %d refused; at most %d MiB resident", refused, crowd, peak>>20)
	if peak > crowdLimit {
		t.Errorf("%d MiB resident, the limit is %d", peak>>20, crowdLimit>>20)
	}
	if low := strings.ToLower(shape); refused > 0 && (!strings.Contains(low, "\r\nretry-after: ") || !strings.Contains(shape, `"code":"overloaded"`)) {
		t.Errorf("refused with %q", shape)
	}
	resp, err := http.Get("http://" + c.address + "/v1/sessions/none")
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("a read of a session meanwhile: %s", resp.Status)
	}
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, "it serves as before", func() bool { return c.call(900_000) == http.StatusOK })
	eventually(t, "all is given back", func() bool { return c.held() == 0 })
}

// watch looks at what the sidecar has resident of its own, a hundred times a second until the
// function it returns is called, which returns the most, in bytes. Pages of the program's
// file are the kernel's to take back.
func (c *crowded) watch() (peak func() int) {
	stop, most := make(chan struct{}), make(chan int)
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		kib := 0
		for {
			raw, err := os.ReadFile("/proc/" + strconv.Itoa(c.pid) + "/status")
			if _, rest, ok := strings.Cut(string(raw), "RssAnon:"); err == nil && ok {
				n, _ := strconv.Atoi(strings.Fields(rest)[0])
				kib = max(kib, n)
			}
			select {
			case <-tick.C:
			case <-stop:
				most <- kib << 10
				return
			}
		}
	}()
	return func() int { close(stop); return <-most }
}
