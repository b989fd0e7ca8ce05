//go:build !dataplane

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// fault is how a model server of the soak behaves: which share of its requests meets what.
type fault struct {
	Mode  string  // "", slow, reset, fail, error (in the stream), cut (of the stream)
	Share float64 // of requests
}

// soakModel is the program "soak-model ADDRESS SEED": a chat model that answers at once,
// whole or as events. It reads a fault per line from standard input and says on standard
// output that it listens. A prompt "hang" is never answered to its end.
func soakModel() {
	seed, err := strconv.ParseUint(os.Args[2], 10, 64)
	if err != nil {
		panic(err)
	}
	var present atomic.Pointer[fault]
	present.Store(&fault{})
	l, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("listening")
	var requests atomic.Uint64
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f := present.Load()
		rng := rand.New(rand.NewPCG(seed, requests.Add(1)))
		mode := ""
		if rng.Float64() < f.Share {
			mode = f.Mode
		}
		soakAnswer(w, r, mode, rng.IntN(4) == 0)
	})}
	go func() {
		for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
			var f fault
			if err := json.Unmarshal(sc.Bytes(), &f); err != nil {
				panic(err)
			}
			present.Store(&f)
		}
		os.Exit(0) // the test is over
	}()
	fmt.Fprintln(os.Stderr, srv.Serve(l))
	os.Exit(1)
}

func soakAnswer(w http.ResponseWriter, r *http.Request, mode string, chunked bool) {
	var q struct {
		Stream   bool
		Messages []struct{ Content string }
	}
	b, err := io.ReadAll(r.Body)
	if err != nil || json.Unmarshal(b, &q) != nil || len(q.Messages) != 1 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	switch mode {
	case "reset":
		reset(w)
	case "fail":
		w.WriteHeader(http.StatusInternalServerError)
	case "slow":
		select {
		case <-time.NewTimer(50 * time.Millisecond).C:
		case <-r.Context().Done():
		}
	}
	if mode == "reset" || mode == "fail" {
		return
	}
	hang := q.Messages[0].Content == "hang"
	if !q.Stream {
		if hang {
			<-r.Context().Done()
			return
		}
		answer := `{"id":"c","object":"chat.completion","model":"soak","choices":[{"index":0,"message":{"role":"assistant","content":"` + strings.Repeat("word ", 60) + `"},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":60,"total_tokens":65}}`
		w.Header().Set("content-type", "application/json")
		if !chunked {
			w.Header().Set("content-length", strconv.Itoa(len(answer)))
		}
		io.WriteString(w, answer[:100])
		if chunked {
			w.(http.Flusher).Flush()
		}
		io.WriteString(w, answer[100:])
		return
	}
	w.Header().Set("content-type", "text/event-stream")
	for i := range 6 {
		fmt.Fprintf(w, `data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"w%d "}}]}`+"\n\n", i)
		w.(http.Flusher).Flush()
		switch {
		case i < 2:
		case hang:
			<-r.Context().Done()
			return
		case mode == "error":
			fmt.Fprint(w, `data: {"error":{"message":"out of memory","type":"server_error","code":"soak"}}`+"\n\n")
			return
		case mode == "cut":
			reset(w)
			return
		}
	}
	fmt.Fprint(w, "data: [DONE]\n\n")
}

// reset ends the connection as a crash would.
func reset(w http.ResponseWriter) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// upstreamProcess is a soak-model that can be killed and started again.
type upstreamProcess struct {
	t       *testing.T
	program string
	address string
	seed    uint64
	cmd     *exec.Cmd
	stdin   io.WriteCloser
}

// newUpstreamProcess takes an address of its own in 127/8: between a kill and the next
// start no connection of this machine can be given its port.
func newUpstreamProcess(t *testing.T, dir, host string, seed uint64) *upstreamProcess {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	u := &upstreamProcess{t: t, program: filepath.Join(dir, "soak-model"), seed: seed}
	if err := os.Symlink(self, u.program); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", host+":0")
	must(t, err)
	u.address = l.Addr().String()
	l.Close()
	must(t, u.start())
	t.Cleanup(u.kill)
	return u
}

func (u *upstreamProcess) start() error {
	u.seed++
	u.cmd = exec.Command(u.program, u.address, strconv.FormatUint(u.seed, 10))
	u.cmd.Stderr = os.Stderr
	out, err := u.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if u.stdin, err = u.cmd.StdinPipe(); err != nil {
		return err
	}
	if err := u.cmd.Start(); err != nil {
		return err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "listening\n" {
		u.kill()
		return fmt.Errorf("the model at %s said %q: %w", u.address, line, err)
	}
	return nil
}

func (u *upstreamProcess) kill() {
	if u.cmd == nil {
		return
	}
	_ = u.cmd.Process.Kill() // it may have ended
	_ = u.cmd.Wait()         // with an error, since it was killed
	u.cmd = nil
}

// set changes how it behaves; the zero fault is none.
func (u *upstreamProcess) set(f fault) error {
	b, err := json.Marshal(f)
	if err == nil {
		_, err = u.stdin.Write(append(b, '\n'))
	}
	return err
}

// misfortune lets the models fail on a schedule of its own until stop closes, then heals
// them. One thing happens per step, every other step is for getting well, and what comes
// upon both at once comes rarely: else all that was seen would be open breakers.
func misfortune(rng *rand.Rand, models []*upstreamProcess, step time.Duration, stop <-chan struct{}, said func(string)) error {
	tick := time.NewTicker(step)
	defer tick.Stop()
	modes := []fault{{"slow", 0.3}, {"reset", 0.1}, {"fail", 0.2}, {"error", 0.3}, {"cut", 0.3}, {"error", 0.05}, {"cut", 0.05}, {"fail", 1}}
	for turn := 0; ; turn++ {
		select {
		case <-stop:
			return healAll(models)
		case <-tick.C:
		}
		m := models[rng.IntN(len(models))]
		kind := rng.IntN(len(modes) + 2)
		switch {
		case turn%2 == 1 && rng.IntN(4) > 0:
			said("heal")
			if err := healAll(models); err != nil {
				return err
			}
		case m.cmd == nil:
			said("start " + m.address)
			if err := m.start(); err != nil {
				return err
			}
		case kind >= len(modes):
			said("kill " + m.address)
			m.kill()
		default:
			f := modes[kind]
			said(fmt.Sprintf("%s %s %v", m.address, f.Mode, f.Share))
			if err := m.set(f); err != nil {
				return err
			}
		}
	}
}

func healAll(models []*upstreamProcess) error {
	for _, m := range models {
		if err := m.heal(); err != nil {
			return err
		}
	}
	return nil
}

func (u *upstreamProcess) heal() error {
	if u.cmd == nil {
		return u.start()
	}
	return u.set(fault{})
}
