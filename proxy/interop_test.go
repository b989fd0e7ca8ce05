package proxy_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger/internal/interoptest"
	"github.com/outrigger-mesh/outrigger/proxy"
)

// The cases of the gRPC interoperability suite that need neither TLS nor credentials,
// client and server unmodified, through a sidecar that knows nothing of the service. The
// functions of the suite end the process when a case fails.
func TestInterop(t *testing.T) {
	back := grpc.NewServer()
	interoptest.Register(back)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- back.Serve(l) }()
	defer func() {
		back.Stop()
		must(t, <-served)
	}()
	up, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer up.Close()
	address, _, end, ended := onSockets(t, 10*time.Second, func(o *proxy.Options) { o.UpstreamGRPC = up })
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	interoptest.Run(ctx, t, conn)
	conn.Close()
	end()
	within(t, time.Minute, "the end", ended)
}

// conflicts are the cases of h2spec that a port cannot pass which also speaks HTTP/1: what
// is not the preface of HTTP/2 gets an HTTP/1 answer.
var conflicts = []string{"Sends invalid connection preface"}

// h2spec's 145 cases against the sidecar's port. nginx 1.22, which passes that one on a
// port that speaks nothing else, fails 27 others. What answers reads a request to its end
// first: were the answer complete before the client's mistake arrives (RFC 9113, section 8.1,
// allows that), there would be nothing left to answer. A case fails if it does every time,
// because the tool waits for so long only.
func TestH2spec(t *testing.T) {
	tool, err := filepath.Abs(filepath.Join("..", ".cache", "tools", "h2spec"))
	must(t, err)
	if _, err := os.Stat(tool); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%v; make test builds it", err)
		}
		t.Skipf("%v; make test builds it", err)
	}
	patient := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, "read to its end")
	}))
	defer patient.Close()
	address, _, end, ended := onSockets(t, 10*time.Second, func(o *proxy.Options) { o.UpstreamHTTP = mustURL(patient.URL) })
	host, port, err := net.SplitHostPort(address)
	must(t, err)
	var always []string
	for try := range 3 {
		// Its exit status only says whether a case failed, which the text says by name.
		out, _ := exec.Command(tool, "-h", host, "-p", port, "-o", "5").CombinedOutput()
		run, failures, _ := strings.Cut(string(out), "Failures:")
		if !strings.Contains(string(out), "\n145 tests, ") {
			t.Fatalf("not all cases ran:\n%s", run)
		}
		var now []string
		for line := range strings.Lines(failures) {
			_, name, failed := strings.Cut(line, "× ")
			if _, name, _ = strings.Cut(strings.TrimSpace(name), ": "); failed && !slices.Contains(conflicts, name) {
				now = append(now, name)
			}
		}
		if always = slices.DeleteFunc(now, func(name string) bool { return try > 0 && !slices.Contains(always, name) }); len(always) == 0 {
			break
		}
		t.Log(failures)
	}
	for _, name := range always {
		t.Errorf("failed: %s", name)
	}
	end()
	within(t, time.Minute, "the end", ended)
}

// An inference stream over HTTP/2 in the clear, by curl: each event arrives when it is
// sent, and the answer names the protocol.
func TestCurlHTTP2(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	address, word, end, ended := onSockets(t, 10*time.Second, nil)
	cmd := exec.Command(curl, "-sSN", "--http2-prior-knowledge", "-w", "%{http_version} %{http_code}", "-H", "content-type: application/json",
		"-d", `{"model":"chat","stream":true,"user":"u"}`, "http://"+address+"/v1/chat/completions")
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	got, buf := "", make([]byte, 4096)
	for i := range 3 {
		text := fmt.Sprintf("event-%d", i)
		word <- text
		for !strings.Contains(got, text) { // before the next is sent
			n, err := stdout.Read(buf)
			got += string(buf[:n])
			if err != nil {
				t.Fatalf("%v after %q", err, got)
			}
		}
	}
	word <- ""
	rest, err := io.ReadAll(stdout)
	must(t, err)
	must(t, cmd.Wait())
	if got += string(rest); !strings.HasSuffix(got, "data: [DONE]\n\n2 200") {
		t.Errorf("%q", got)
	}
	end()
	within(t, time.Minute, "the end", ended)
}

// Requests that are no calls are served over HTTP/2 as over HTTP/1.
func TestPlainHTTP2(t *testing.T) {
	address, _, end, ended := onSockets(t, 10*time.Second, nil)
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	two := &http.Transport{Protocols: &p}
	for _, path := range []string{"/v1/models", "/nothing/here", "/v1/variables/s/x"} {
		var bodies [2]string
		var types [2]string
		for i, tr := range []*http.Transport{two, {}} {
			resp, err := (&http.Client{Transport: tr}).Get("http://" + address + path)
			must(t, err)
			b, err := io.ReadAll(resp.Body)
			must(t, err)
			resp.Body.Close()
			tr.CloseIdleConnections()
			if want := []int{2, 1}[i]; resp.ProtoMajor != want {
				t.Errorf("%s: HTTP/%d, want %d", path, resp.ProtoMajor, want)
			}
			bodies[i], types[i] = fmt.Sprint(resp.StatusCode, " ", string(b)), resp.Header.Get("Content-Type")
		}
		if bodies[0] != bodies[1] || types[0] != types[1] {
			t.Errorf("%s: HTTP/2 says %q (%s), HTTP/1 %q (%s)", path, bodies[0], types[0], bodies[1], types[1])
		}
	}
	end()
	within(t, time.Minute, "the end", ended)
}
