package meshtest

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

func mustGetWith(t *testing.T, p *Pod, name string, kv ...string) Read {
	t.Helper()
	r, err := p.GetWith(bg(t), "s", name, kv...)
	if err != nil {
		t.Fatalf("%s reads %s: %v", p.Name, name, err)
	}
	return r
}

// warm makes a pod hold a variable in its own memory. The first answer for a session is
// not held yet by its node, which selects the session's shard meanwhile.
func warm(t *testing.T, p *Pod, name string) {
	t.Helper()
	for range 4 {
		if mustGet(t, p, name).Tier == "process" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not keep %s", p.Name, name)
}

// forged is a token with one character changed.
func forged(token string) string {
	k, c := len(token)-5, "A"
	if token[k] == 'A' {
		c = "B"
	}
	return token[:k] + c + token[k+1:]
}

// A writer hands its token to a pod of another node, whose feed has just become 500 ms
// late. With the token the pod reads the write, however it gets there; without it, it may
// read the old value, but never once a feed lease (300 ms) has passed since the write was
// acknowledged. Over many rounds some reads without a token are stale, so that the test
// is known to be able to tell.
func TestTokenReadsTheWriteOnAnotherNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		writer, reader := w.Pods[0], w.Pods[1]
		if err := writer.Register(bg(t), "s", "x", "0"); err != nil {
			t.Fatal(err)
		}
		stale := 0
		for round := 1; round <= 8; round++ {
			warm(t, reader, "x")
			w.Net.SetDelay("control", reader.Host, 500*time.Millisecond)
			value := fmt.Sprint(round)
			version, token, err := writer.SetToken(bg(t), "s", "x", value)
			if err != nil || token == "" {
				t.Fatalf("set: %v, token %q", err, token)
			}
			acked := time.Now()
			if mustGet(t, reader, "x").Version < version {
				stale++
			}
			start := time.Now()
			r := mustGetWith(t, reader, "x", outrigger.HeaderToken, token, outrigger.HeaderExplain, "true")
			if r.Version < version || r.Value != value {
				t.Fatalf("round %d: with the token: %+v, want version %d", round, r, version)
			}
			if took := time.Since(start); took < 50*time.Millisecond || took > 1200*time.Millisecond {
				t.Errorf("round %d: it took %v; want 50 ms of waiting and one answer", round, took)
			}
			if !strings.Contains(r.Explain, "token=echoed") || !strings.Contains(r.Explain, "consistency=session source=default") {
				t.Errorf("round %d: explained as %s", round, r.Explain)
			}
			// And the answer's own token is worth as much as the writer's.
			if again := mustGetWith(t, reader, "x", outrigger.HeaderToken, r.Token); again.Version < version {
				t.Errorf("round %d: went back to %+v", round, again)
			}
			if since := time.Since(acked); since < 300*time.Millisecond {
				time.Sleep(300*time.Millisecond - since)
			}
			if late := mustGet(t, reader, "x"); late.Version < version && !late.Stale {
				t.Errorf("round %d: %v after the acknowledgement it still reads %+v", round, time.Since(acked), late)
			}
			w.Net.SetDelay("control", reader.Host, 500*time.Microsecond)
			time.Sleep(time.Second)
		}
		if stale == 0 {
			t.Error("no read without a token was stale: the delay did not delay")
		}
		t.Logf("%d of 8 reads without a token were stale", stale)
	})
}

// A session is deleted through one pod; another node's feed is 500 ms late. With the
// token of the deletion, or of a second one that found nothing to delete, the other pod
// does not show what is gone; without one it may, which shows that the test can tell.
func TestTokenOfADeletedSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		writer, reader := w.Pods[0], w.Pods[1]
		stale := 0
		for round := range 4 {
			if err := writer.Register(bg(t), "s", "x", "1"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			warm(t, reader, "x")
			w.Net.SetDelay("control", reader.Host, 500*time.Millisecond)
			var head metadata.MD
			for range 1 + round%2 {
				if _, err := writer.Bridge.CleanupSession(bg(t), &snakepit.CleanupSessionRequest{SessionId: "s"}, grpc.Header(&head)); err != nil {
					t.Fatal(err)
				}
			}
			token := strings.Join(head.Get(outrigger.HeaderToken), "")
			if token == "" {
				t.Fatal("the deletion has no token")
			}
			if _, err := reader.Get(bg(t), "s", "x"); err == nil {
				stale++
			}
			if r, err := reader.GetWith(bg(t), "s", "x", outrigger.HeaderToken, token); gstatus.Code(err) != codes.NotFound {
				t.Errorf("round %d: with the token: %+v, %v; want not found", round, r, err)
			}
			w.Net.SetDelay("control", reader.Host, 500*time.Microsecond)
			time.Sleep(time.Second)
		}
		if stale == 0 {
			t.Error("no read without a token was stale: the delay did not delay")
		}
	})
}

// Without a token, reads of a pod whose feed is a steady 150 ms late may be stale for
// that long, and are never stale for longer than the lease.
func TestStalenessEndsWithTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		writer, reader := w.Pods[0], w.Pods[1]
		if err := writer.Register(bg(t), "s", "x", "0"); err != nil {
			t.Fatal(err)
		}
		warm(t, reader, "x")
		w.Net.SetDelay("control", reader.Host, 150*time.Millisecond)
		time.Sleep(time.Second)
		stale, worst := 0, time.Duration(0)
		for round := 1; round <= 10; round++ {
			version, err := writer.Set(bg(t), "s", "x", fmt.Sprint(round))
			if err != nil {
				t.Fatal(err)
			}
			acked := time.Now()
			for time.Since(acked) < 400*time.Millisecond {
				began := time.Since(acked)
				if r := mustGet(t, reader, "x"); r.Version < version && !r.Stale {
					stale++
					worst = max(worst, began)
				}
				time.Sleep(7 * time.Millisecond)
			}
		}
		if worst > 300*time.Millisecond {
			t.Errorf("a read begun %v after the acknowledgement was stale; the lease is 300 ms", worst)
		}
		if stale == 0 {
			t.Error("nothing was stale: the delay did not delay")
		}
		t.Logf("%d stale reads, the latest %v after the acknowledgement", stale, worst)
	})
}

// The pods' tokens are signed with one key, which they have from the agent, which has it
// from the control plane. A token of nobody's mesh is no error: it means an origin read.
func TestTokensOfTheMeshAndOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		a, b := w.Pods[0], w.Pods[1]
		if err := a.Register(bg(t), "s", "x", "0"); err != nil {
			t.Fatal(err)
		}
		warm(t, a, "x")
		warm(t, b, "x")
		token := mustGet(t, a, "x").Token
		if _, err := w.Keys.Verify(token); err != nil {
			t.Fatalf("a pod's token %q is not the mesh's: %v", token, err)
		}
		if r := mustGetWith(t, b, "x", outrigger.HeaderToken, token); r.Tier != "process" {
			t.Errorf("a token of what is known here costs a read at %s", r.Tier)
		}
		for _, bad := range []string{"AAAA", strings.Repeat("x", 5000), forged(token)} {
			r := mustGetWith(t, b, "x", outrigger.HeaderToken, bad, outrigger.HeaderExplain, "true")
			if r.Tier != "origin" || !strings.Contains(r.Explain, "consistency=strong source=token token=unverified") {
				t.Errorf("token %.10q: %+v", bad, r)
			}
			if _, err := w.Keys.Verify(r.Token); err != nil {
				t.Errorf("the answer's token is no good: %v", err)
			}
		}
	})
}

// Who writes through the control plane's own REST gets a token, with which a pod whose
// node's feed is late reads that write; without it, the old value, which shows that the
// token made the difference. A forged one at the control plane costs nothing but a read of
// all there is, and is not signed anew.
func TestTokenOfTheControlPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 1, PodsPerNode: 1})
		defer w.Stop()
		pod := w.Pods[0]
		if err := pod.Register(bg(t), "s", "x", "0"); err != nil {
			t.Fatal(err)
		}
		rest := func(method, body, token string) *httptest.ResponseRecorder {
			req := httptest.NewRequest(method, "http://localhost/v1/variables/s/x", strings.NewReader(body))
			req.RemoteAddr = "127.0.0.1:9"
			req.Header.Set("Content-Type", "application/json")
			if token != "" {
				req.Header.Set(outrigger.HeaderToken, token)
			}
			rec := httptest.NewRecorder()
			w.Control.Handler().ServeHTTP(rec, req)
			if rec.Code != 200 {
				t.Fatalf("%s: %d %s", method, rec.Code, rec.Body)
			}
			return rec
		}
		warm(t, pod, "x")
		w.Net.SetDelay("control", pod.Host, 500*time.Millisecond)
		token := rest("PUT", `{"value":7}`, "").Header().Get(outrigger.HeaderToken)
		if _, err := w.Keys.Verify(token); err != nil {
			t.Fatalf("the control plane's token %q: %v", token, err)
		}
		if r := mustGet(t, pod, "x"); r.Value != "0" {
			t.Errorf("without the token the late pod reads %s: the test shows nothing", r.Value)
		}
		if r := mustGetWith(t, pod, "x", outrigger.HeaderToken, token); r.Value != "7" {
			t.Errorf("with the token it reads %s", r.Value)
		}
		fake := forged(token)
		rec := rest("GET", "", fake)
		if got := rec.Header().Get(outrigger.HeaderToken); got == fake || !strings.Contains(rec.Body.String(), `7`) {
			t.Errorf("a forged token: %s, token %q", rec.Body, got)
		} else if _, err := w.Keys.Verify(got); err != nil {
			t.Error(err)
		}
		w.Net.SetDelay("control", pod.Host, 0)
		// And a pod's token is heeded at the control plane.
		_, mine, err := pod.SetToken(bg(t), "s", "x", "8")
		if err != nil {
			t.Fatal(err)
		}
		if rec := rest("GET", "", mine); !strings.Contains(rec.Body.String(), `8`) {
			t.Errorf("after the pod's write: %s", rec.Body)
		}
	})
}
