package inference

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// The clients that vendors publish for Node, unmodified, over real sockets: see
// testdata/clients.mjs for what they do.
func TestNodeClients(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a process")
	}
	modules := nodeModules(t)
	chat := &modelServer{name: "gpt-v1"}
	others := speaker{model: "gpt-v1"}
	good := newMesh(t, newPolicy(0, eps(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, chatPath) {
			chat.ServeHTTP(w, r)
			return
		}
		others.ServeHTTP(w, r)
	}))), nil), Options{})
	var mu sync.Mutex
	asked := map[string]int{}
	bad := newMesh(t, newPolicy(0, eps(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		mu.Lock()
		asked[r.Header.Get("X-Stainless-Retry-Count")]++
		mu.Unlock()
		if !bytes.Contains(body, []byte(`"stream":true`)) {
			http.Error(w, "{}", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, chunkOf("gpt-v1", roleDelta), chunkOf("gpt-v1", `{"content":"one "}`))
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Error(err)
		}
		panic(http.ErrAbortHandler) // the model dies
	}))), nil), Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "node", filepath.Join("testdata", "clients.mjs"), modules, good.front.URL, bad.front.URL).CombinedOutput()
	if err != nil || !bytes.HasSuffix(bytes.TrimSpace(out), []byte("PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
	// One stream, never retried once it had begun; one JSON request and the client's retry.
	mu.Lock()
	defer mu.Unlock()
	if asked["0"] != 2 || asked["1"] != 1 {
		t.Errorf("the broken model was asked %v", asked)
	}
	d := outcomes(bad.handler)
	if len(d) != 1 || d[ArmUnassigned] == nil || d[ArmUnassigned].Requests != 2 || d[ArmUnassigned].Failures != 2 {
		t.Errorf("recorded %v: a client's retry is no request of its own", d)
	}
}

// nodeModules returns where the packages of .ci/npm are, which are installed if need be.
// Where they cannot be had the test is skipped, except in CI.
func nodeModules(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("bash", filepath.Join(root, ".ci", "node")).CombinedOutput()
	if err == nil {
		_, err = exec.LookPath("node")
	}
	if err != nil {
		if reason := strings.TrimSpace(string(out)); os.Getenv("CI") == "true" {
			t.Fatalf("%v: %s", err, reason)
		} else {
			t.Skipf("%v: %s", err, reason)
		}
	}
	return filepath.Join(root, ".cache", "npm")
}
