package meshtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// ModelServer is an OpenAI-shaped server of one model version: it streams or answers
// the number of tokens asked for, and fails when told to.
type ModelServer struct {
	part
	Version string
	Address string
	Failing atomic.Bool  // answer 500
	Served  atomic.Int64 // requests received
	// Token is the time per token; set before the first request.
	Token time.Duration

	mu     sync.Mutex
	models map[string]int // requests by the model name received
}

// Models returns the upstream model names the server was asked for.
func (m *ModelServer) Models() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[string]int{}
	for k, v := range m.models {
		out[k] = v
	}
	return out
}

// ModelName is the logical model StartModel registers versions of.
const ModelName = "chat"

// StartModel starts a server of a version and registers it.
func (w *World) StartModel(version string) *ModelServer {
	w.t.Helper()
	host := "model-" + version
	m := &ModelServer{Version: version, Address: host + ":8000", Token: time.Millisecond, models: map[string]int{}}
	l := w.listen(host, m.Address)
	s := &http.Server{Handler: m}
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	m.run(w.t, host, ctx, func(context.Context) error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	m.stops = append(m.stops, func() { s.Close() })
	w.Models[version] = m
	_, err := w.Control.Admin.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: ModelName, Version: version,
		UpstreamModel: ModelName + "-" + version, Actor: "test", Endpoints: []*pb.Endpoint{{Address: m.Address, Region: Region, Weight: 1}}})
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

// ServeHTTP answers one chat completion.
func (m *ModelServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.Served.Add(1)
	var in struct {
		Model     string `json:"model"`
		MaxTokens int    `json:"max_tokens"`
		Stream    bool   `json:"stream"`
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err == nil {
		err = json.Unmarshal(body, &in)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	m.mu.Lock()
	m.models[in.Model]++
	m.mu.Unlock()
	if m.Failing.Load() {
		w.Header().Set("content-type", "application/json")
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprint(w, `{"error":{"message":"broken version","type":"server_error","param":null,"code":null}}`)
		return
	}
	if !in.Stream {
		pause.For(r.Context(), time.Duration(in.MaxTokens)*m.Token)
		w.Header().Set("content-type", "application/json")
		fmt.Fprintf(w, `{"id":"c1","object":"chat.completion","created":1,"model":%q,"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":%q}}],"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}}`,
			in.Model, m.Version, in.MaxTokens, in.MaxTokens+1)
		return
	}
	w.Header().Set("content-type", "text/event-stream")
	for i := range in.MaxTokens {
		pause.For(r.Context(), m.Token)
		if _, err := fmt.Fprintf(w, "data: {\"id\":\"c1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":%q,\"choices\":[{\"index\":0,\"delta\":{\"content\":\"%d \"}}]}\n\n", in.Model, i); err != nil {
			return
		}
		w.(http.Flusher).Flush()
	}
	fmt.Fprint(w, "data: [DONE]\n\n")
}
