//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// demoModelCommand is the model server of the demonstration: a real OpenAI-shaped HTTP
// server that produces as many tokens as it is asked for at a set pace. It has no
// language model inside; everything about it that the mesh sees (sizes, timing,
// streaming, errors) is real.
func demoModelCommand(g *globals) *cobra.Command {
	var listen, version string
	var tokensPerSecond, firstToken float64
	cmd := &cobra.Command{Use: "demo-model", Short: "Model server of the demonstration", Hidden: true, Args: exactArgs()}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:0", "address")
	f.StringVar(&version, "version", "v1", "version this server is")
	f.Float64Var(&tokensPerSecond, "tokens-per-second", 60, "pace of generation")
	f.Float64Var(&firstToken, "first-token-ms", 120, "time to the first token")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		p, err := g.start(cmd, "demo-model", version, "")
		if err != nil {
			return err
		}
		l, err := p.listen("listen", listen)
		if err != nil {
			return err
		}
		m := &demoModel{version: version, perToken: time.Duration(float64(time.Second) / tokensPerSecond),
			first: time.Duration(firstToken * float64(time.Millisecond))}
		p.serveHTTP(l, m.handler(), 5*time.Second)
		p.ready.Store(true)
		if err := p.announce(); err != nil {
			return err
		}
		return p.wait()
	}
	return cmd
}

type demoModel struct {
	version         string
	first, perToken time.Duration
	errorRate       atomic.Int64 // per million, set by the script
	seed            atomic.Int64 // 0: calls fail at random; else the call decides
	served          atomic.Int64
}

func (m *demoModel) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/chat/completions", m.chat)
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("POST /demo/fault", m.fault)
	return mux
}

// fault makes the version bad: {"error_rate": 0.5} answers half the calls with 500. With
// a "seed" it is the seed, the version, the user, the sizes of a call and the number of
// the client's attempt that decide, so that replaying a trace fails the same calls again.
func (m *demoModel) fault(w http.ResponseWriter, r *http.Request) {
	var in struct {
		ErrorRate float64 `json:"error_rate"`
		Seed      uint32  `json:"seed"`
	}
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<10)).Decode(&in); err != nil || in.ErrorRate < 0 || in.ErrorRate > 1 {
		http.Error(w, "error_rate must be a share from 0 to 1", http.StatusBadRequest)
		return
	}
	m.seed.Store(int64(in.Seed))
	m.errorRate.Store(int64(in.ErrorRate * 1e6))
	w.WriteHeader(http.StatusNoContent)
}

// fails decides whether a call fails.
func (m *demoModel) fails(attempt string, in chatRequest, prompt, n int) bool {
	draw := rand.Int64N(1e6)
	if seed := m.seed.Load(); seed != 0 {
		h := experiments.UnitHash(fmt.Sprintf("%d %s", seed, m.version), fmt.Sprintf("%s %d %d %s", in.User, prompt, n, attempt))
		draw = int64(uint64(h) * 1e6 >> 32)
	}
	return draw < m.errorRate.Load()
}

type chatRequest struct {
	Model    string `json:"model"`
	User     string `json:"user"`
	Messages []struct {
		Content string `json:"content"`
	} `json:"messages"`
	MaxTokens           int  `json:"max_tokens"`
	MaxCompletionTokens int  `json:"max_completion_tokens"`
	Stream              bool `json:"stream"`
	StreamOptions       struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
}

func (m *demoModel) chat(w http.ResponseWriter, r *http.Request) {
	var in chatRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, 8<<20)).Decode(&in); err != nil {
		openAIError(w, http.StatusBadRequest, "invalid_request_error", err.Error())
		return
	}
	n := max(in.MaxTokens, in.MaxCompletionTokens)
	if n <= 0 {
		n = 16
	}
	id := fmt.Sprintf("chatcmpl-%s-%d", m.version, m.served.Add(1))
	prompt := 0
	for _, msg := range in.Messages {
		prompt += len(strings.Fields(msg.Content))
	}
	if m.fails(r.Header.Get("x-stainless-retry-count"), in, prompt, n) {
		// As late as the answer would have been: failures that overtake successes look like
		// a row of failures to a breaker.
		if m.seed.Load() != 0 && !pause.For(r.Context(), m.first+time.Duration(n)*m.perToken) {
			return
		}
		openAIError(w, http.StatusInternalServerError, "server_error", "this version is broken")
		return
	}
	if in.Stream {
		m.stream(w, r.Context(), in, id, prompt, n)
		return
	}
	if !pause.For(r.Context(), m.first+time.Duration(n)*m.perToken) {
		return
	}
	w.Header().Set("content-type", "application/json")
	// A failed write means the client left; there is nobody to tell.
	_ = json.NewEncoder(w).Encode(map[string]any{
		"id": id, "object": "chat.completion", "created": time.Now().Unix(), "model": in.Model,
		"choices": []any{map[string]any{"index": 0, "finish_reason": "stop",
			"message": map[string]any{"role": "assistant", "content": words(n)}}},
		"usage": usage(prompt, n),
	})
}

// stream sends tokens as they come due; what falls due within one tick shares an event,
// as real servers do under load.
func (m *demoModel) stream(w http.ResponseWriter, ctx context.Context, in chatRequest, id string, prompt, n int) {
	const tick = 10 * time.Millisecond
	w.Header().Set("content-type", "text/event-stream")
	w.Header().Set("cache-control", "no-cache")
	flush := http.NewResponseController(w)
	send := func(choices []any, use any) bool {
		chunk := map[string]any{"id": id, "object": "chat.completion.chunk", "created": time.Now().Unix(), "model": in.Model, "choices": choices}
		if use != nil {
			chunk["usage"] = use
		}
		b, err := json.Marshal(chunk)
		if err != nil {
			return false
		}
		if _, err := fmt.Fprintf(w, "data: %s\n\n", b); err != nil {
			return false
		}
		return flush.Flush() == nil
	}
	if !pause.For(ctx, m.first) {
		return
	}
	for sent := 0; sent < n; {
		k := min(n-sent, max(1, int(tick/m.perToken)))
		if !send([]any{map[string]any{"index": 0, "delta": map[string]any{"role": "assistant", "content": words(k) + " "}}}, nil) {
			return
		}
		if sent += k; sent < n && !pause.For(ctx, time.Duration(k)*m.perToken) {
			return
		}
	}
	if !send([]any{map[string]any{"index": 0, "delta": map[string]any{}, "finish_reason": "stop"}}, nil) {
		return
	}
	if in.StreamOptions.IncludeUsage && !send([]any{}, usage(prompt, n)) {
		return
	}
	fmt.Fprint(w, "data: [DONE]\n\n")
}

func usage(prompt, n int) map[string]int {
	return map[string]int{"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n}
}

func words(n int) string { return strings.TrimSuffix(strings.Repeat("word ", n), " ") }

func openAIError(w http.ResponseWriter, code int, kind, msg string) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	// The status is out; a failed body write has nobody to tell.
	_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{"message": msg, "type": kind, "param": nil, "code": nil}})
}
