//go:build !dataplane

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// slowModel streams words as the test lets it, and tells of every question.
type slowModel struct {
	asked chan *slowAnswer
}

type slowAnswer struct {
	say  chan string // closed: the answer is whole
	left <-chan struct{}
}

func (m *slowModel) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // the question does not matter
	a := &slowAnswer{say: make(chan string), left: r.Context().Done()}
	m.asked <- a
	w.Header().Set("Content-Type", "text/event-stream")
	for {
		select {
		case s, more := <-a.say:
			if !more {
				return
			}
			fmt.Fprintf(w, "data: {\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"content\":%q}}]}\n\n", s)
			if s == "." {
				_, _ = io.WriteString(w, "data: [DONE]\n\n")
			}
			if http.NewResponseController(w).Flush() != nil {
				return
			}
		case <-a.left:
			return
		}
	}
}

// TestPodsAskOnce is two sidecars and the agent of their node as processes: a question both
// are asked at the same time reaches the model once, its stream reaches both, and after
// kill -9 of the one that asks the other asks for itself.
func TestPodsAskOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel) // after the processes have ended
	dir := t.TempDir()
	model := &slowModel{asked: make(chan *slowAnswer, 8)}
	server := httptest.NewServer(model)
	defer func() { server.CloseClientConnections(); server.Close() }()
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	m := &tenantMesh{t: t, dir: dir, control: control}
	m.run(0, "node", "--control", control, "--dir", filepath.Join(dir, "node"), "--node-id", "n", "--answer-cache-bytes", "16000000")
	conn, err := grpc.NewClient(control, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	eventually(t, "the control plane takes writes", func() bool {
		_, err := pb.NewAdminClient(conn).RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: "slow", Version: "v1", Actor: "test",
			Endpoints: []*pb.Endpoint{{Address: strings.TrimPrefix(server.URL, "http://"), Region: "local", Weight: 1}}})
		return err == nil
	})
	pod := func(name string) *running {
		return m.run(0, "sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", control, "--agent-dir", filepath.Join(dir, "node"),
			"--node-id", "n/"+name, "--answer-cache-bytes", "16000000", "--state-dir", filepath.Join(dir, name))
	}
	one, two := pod("one"), pod("two")
	for _, p := range []*running{one, two} {
		eventually(t, "the sidecar knows the model", func() bool {
			resp, err := http.Get("http://" + p.bound["listen"] + "/v1/models")
			if err != nil {
				return false
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			return err == nil && strings.Contains(string(b), "slow")
		})
	}
	ask := func(p *running, question string) *http.Response { // nil: the sidecar has gone
		r, err := http.NewRequestWithContext(ctx, "POST", "http://"+p.bound["listen"]+"/v1/chat/completions",
			strings.NewReader(`{"model":"slow","stream":true,"temperature":0,"messages":[{"role":"user","content":"`+question+`"}]}`))
		must(t, err)
		r.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			return nil
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	asking := func(p *running, question string) <-chan *http.Response {
		c := make(chan *http.Response, 1)
		go func() { c <- ask(p, question) }()
		return c
	}
	// both has one ask and two wait for what it gets. An agent that is busy is not waited for
	// (answers.NodeWait), and two asks for itself: then it is another question's turn.
	both := func(question string) (asked string, a *slowAnswer, c1, c2 <-chan *http.Response) {
		t.Helper()
		tries, look := 0, time.NewTicker(10*time.Millisecond)
		defer look.Stop()
		eventually(t, "the second pod waits for the first", func() bool {
			tries++
			before, asked := two.joined(t), fmt.Sprint(question, tries)
			c1 = asking(one, asked)
			a = <-model.asked
			c2 = asking(two, asked)
			for two.joined(t) == before {
				select {
				case own := <-model.asked:
					for _, s := range []*slowAnswer{a, own} {
						s.say <- "."
						close(s.say)
					}
					for _, c := range []<-chan *http.Response{c1, c2} {
						_, err := io.Copy(io.Discard, (<-c).Body)
						must(t, err)
					}
					return false
				case <-look.C:
				case <-ctx.Done():
					t.Fatal("the second pod neither waits nor asks")
				}
			}
			return true
		})
		return fmt.Sprint(question, tries), a, c1, c2
	}
	said := func(resp *http.Response, want string) {
		t.Helper()
		in := bufio.NewReader(resp.Body)
		line, err := in.ReadString('\n')
		if _, err2 := in.ReadString('\n'); err != nil || err2 != nil || !strings.Contains(line, want) {
			t.Fatalf("read %q, %v, %v; want %s", line, err, err2, want)
		}
		resp.Body = io.NopCloser(in)
	}

	// One asks, two reads along.
	first, a, c1, c2 := both("first")
	a.say <- "hello"
	r1, r2 := <-c1, <-c2
	said(r1, "hello")
	said(r2, "hello")
	if how := r2.Header.Get("x-outrigger-cache") + " " + r2.Header.Get("x-outrigger-tier"); how != "joined node" {
		t.Fatalf("the second pod's answer came as %q", how)
	}
	a.say <- "."
	close(a.say)
	for _, r := range []*http.Response{r1, r2} {
		said(r, `"."`)
		said(r, "[DONE]")
		if rest, err := io.ReadAll(r.Body); err != nil || len(rest) > 0 {
			t.Errorf("after the end: %q, %v", rest, err)
		}
	}
	if r := ask(two, first); r.Header.Get("x-outrigger-cache") != "hit" {
		t.Errorf("then: %v", r.Header)
	}

	// The pod that asks is killed before it has an answer.
	_, a, _, c2 = both("second")
	must(t, one.cmd.Process.Signal(syscall.SIGKILL))
	<-a.left
	a = <-model.asked
	a.say <- "."
	close(a.say)
	r2 = <-c2
	said(r2, `"."`)
	if how := r2.Header.Get("x-outrigger-cache"); how != "miss" {
		t.Errorf("the second pod's own answer came as %q", how)
	}
	select {
	case <-model.asked:
		t.Error("the model was asked once more")
	default:
	}
}

// joined is how often a sidecar read along with another pod.
func (r *running) joined(t *testing.T) int {
	t.Helper()
	resp, err := http.Get("http://" + r.bound["http"] + "/stats")
	must(t, err)
	defer resp.Body.Close()
	var stats struct {
		Inference struct {
			Node struct{ Joined *int } `json:"node_answers"`
		}
	}
	must(t, json.NewDecoder(resp.Body).Decode(&stats))
	return *stats.Inference.Node.Joined
}
