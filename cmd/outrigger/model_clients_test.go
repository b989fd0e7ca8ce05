//go:build !dataplane

package main

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	oip "github.com/outrigger-mesh/outrigger/api/inference"
)

// TestModelClients runs the clients that OpenAI, Anthropic and NVIDIA publish for Python
// against a model server itself and against a sidecar before it, with a control plane, all of
// them processes of their own: what the clients return and raise is the same.
func TestModelClients(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	python := pythonEnvironment(t, "clients")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveModels(t, l)
	dir := t.TempDir()
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	said := startProcess(t, ctx, dir, "sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", control)
	for _, name := range []string{"org/model", "tensors"} {
		register := exec.CommandContext(ctx, filepath.Join(dir, "outrigger"), "model", "register", name, "v1", "--endpoint", l.Addr().String(), "--server", control, "--wait", "60s")
		if out, err := register.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	waitModels(t, http.DefaultClient, "http://"+said.Listening["listen"], "org/model", "tensors")
	passes(t, modelClients(ctx, python, l.Addr().String(), said.Listening["listen"], "openai", "anthropic", "triton").CombinedOutput)
}

// TestModelClientsRedirected runs such clients in a pod whose connections are redirected to
// its sidecar: they are told of the model server only, and of nothing that has changed. One
// is OpenAI's for Go, in this process, and one that of variables, which dials a port of the
// loopback nobody listens on.
func TestModelClientsRedirected(t *testing.T) {
	p := newPod(t, "redirect", "--own-uids", fmt.Sprint(ownUID), "--loopback-ports", "50051")
	python := pythonEnvironment(t, "clients")
	stubs := bridgeStubs(t, t.Context(), pythonEnvironment(t))
	const address, passed = server4 + ":8000", server4 + ":8001" // the latter's bytes pass as they are
	for _, a := range []string{address, passed} {
		serveModels(t, p.server.Listen("tcp", a))
	}
	for _, name := range []string{"org/model", "tensors"} {
		p.verb("model", "register", name, "v1", "--endpoint", address, "--wait", "60s")
	}
	waitModels(t, p.client(), "http://"+address, "org/model", "tensors")
	passes(t, func() ([]byte, error) { return p.ns.Run(modelClients(t.Context(), python, passed, address, "openai")) })

	c := openai.NewClient(option.WithBaseURL("http://"+address+"/v1"), option.WithAPIKey("k"), option.WithHTTPClient(p.client()))
	ask := openai.ChatCompletionNewParams{Model: "org/model", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("one two")}}
	var resp *http.Response
	stream := c.Chat.Completions.NewStreaming(t.Context(), ask, option.WithResponseInto(&resp))
	var text string
	for stream.Next() {
		text += stream.Current().Choices[0].Delta.Content
	}
	if err := stream.Err(); err != nil || text != "one two" || resp.Header.Get(outrigger.HeaderVersion) != "v1" {
		t.Errorf("openai-go: %q, %v, %v", text, err, resp)
	}

	passes(t, func() ([]byte, error) {
		return p.ns.Run(exec.CommandContext(t.Context(), pythonEnvironment(t), filepath.Join("testdata", "session_context.py"), stubs, "127.0.0.1:50051"))
	})
}

// modelClients is the script with these arguments.
func modelClients(ctx context.Context, python string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, python, append([]string{filepath.Join("testdata", "model_clients.py")}, args...)...)
	c.Env = append(os.Environ(), "OPENAI_API_KEY=k", "ANTHROPIC_API_KEY=k", "NO_PROXY=*", "no_proxy=*")
	return c
}

// passes runs a script that says PASS at its end.
func passes(t *testing.T, run func() ([]byte, error)) {
	t.Helper()
	if out, err := run(); err != nil || !bytes.HasSuffix(out, []byte("PASS\n")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// waitModels asks a sidecar until it has all these models.
func waitModels(t *testing.T, c *http.Client, url string, names ...string) {
	t.Helper()
	eventually(t, fmt.Sprint("the sidecar has ", names), func() bool {
		for _, name := range names {
			resp, err := c.Get(url + "/v1/models/" + name)
			if err != nil {
				return false
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return false
			}
		}
		return true
	})
}

// serveModels is a model server of four protocols on one port: HTTP/1.1 and gRPC.
func serveModels(t *testing.T, l net.Listener) {
	g := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	oip.RegisterGRPCInferenceServiceServer(g, tensorRPC{})
	s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 {
			g.ServeHTTP(w, r)
			return
		}
		answerClients(w, r)
	})}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	over := make(chan error, 1)
	go func() { over <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-over; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}

// answerClients serves the HTTP protocols; it knows only the name a model is registered by.
func answerClients(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	switch {
	case err != nil:
		panic(http.ErrAbortHandler)
	case strings.HasPrefix(r.URL.Path, "/v2/"):
		answerTensors(w, r, body)
		return
	}
	var q struct {
		Model    string
		Stream   bool
		Messages []struct{ Content string }
	}
	if err := json.Unmarshal(body, &q); err != nil || q.Model != "org/model" || len(q.Messages) != 1 {
		w.WriteHeader(http.StatusNotFound)
		_, _ = fmt.Fprintf(w, `{"error":{"message":"%s for %s: %v"}}`, r.URL.Path, q.Model, err)
		return
	}
	h, text := w.Header(), q.Messages[0].Content
	h.Set("X-Request-Id", "req-1")
	h.Set("Content-Type", "application/json")
	switch {
	case text == "429":
		h.Set("Retry-After", "3")
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = io.WriteString(w, `{"error":{"message":"slow down","type":"rate","param":null,"code":"busy"}}`)
	case text == "503 at first" && r.Header.Get("X-Stainless-Retry-Count") == "0":
		h.Set("Retry-After-Ms", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"error":{"message":"not yet"}}`)
	case r.URL.Path == "/v1/messages":
		answerMessage(w, q.Stream)
	case q.Stream:
		streamChat(w, text)
	default:
		answerChat(w, r, text)
	}
}

func answerChat(w http.ResponseWriter, r *http.Request, text string) {
	quoted, _ := json.Marshal(text)
	out := fmt.Sprintf(`{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":%s}}]}`, quoted)
	if text != "gzip" || !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		_, _ = io.WriteString(w, out)
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	z := gzip.NewWriter(w)
	_, _ = io.WriteString(z, out)
	_ = z.Close()
}

// streamChat answers with three events; "odd framing" is written as the specification of
// server-sent events allows but few servers do.
func streamChat(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/event-stream")
	event := func(text string) string {
		quoted, _ := json.Marshal(text)
		return fmt.Sprintf(`{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}`, quoted)
	}
	flush := func() { _ = http.NewResponseController(w).Flush() } // whoever is gone gets nothing
	switch text {
	case "odd framing":
		head, tail, _ := strings.Cut(event("x"), `,"created"`)
		_, _ = io.WriteString(w, ": a comment\n\nretry: 5\nid: 7\r\ndata:"+event("a")+"\r\n\r\n")
		flush()
		_, _ = io.WriteString(w, "data: "+head+"\ndata: ,\"created\""+tail+"\n\n")
		flush()
	case "cut", "error event":
		_, _ = io.WriteString(w, "data: "+event("begun")+"\n\n")
		flush()
		if text == "cut" {
			panic(http.ErrAbortHandler)
		}
		_, _ = io.WriteString(w, `data: {"error":{"message":"the engine died","type":"server_error","code":"dead"}}`+"\n\n")
		return
	default:
		for _, part := range strings.SplitAfter(text, " ") {
			_, _ = io.WriteString(w, "data: "+event(part)+"\n\n")
			flush()
		}
	}
	_, _ = io.WriteString(w, "data: [DONE]\n\n")
}

func answerMessage(w http.ResponseWriter, stream bool) {
	if !stream {
		_, _ = io.WriteString(w, `{"id":"m","type":"message","role":"assistant","model":"m","content":[{"type":"text","text":"a b"}],"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":2}}`)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	for _, e := range []string{
		`{"type":"message_start","message":{"id":"m","type":"message","role":"assistant","model":"m","content":[],"usage":{"input_tokens":1,"output_tokens":1}}}`,
		`{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}`, `{"type":"ping"}`,
		`{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}`, `{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" b"}}`,
		`{"type":"content_block_stop","index":0}`, `{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}`, `{"type":"message_stop"}`,
	} {
		name := strings.Split(e, `"`)[3]
		_, _ = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", name, e)
		_ = http.NewResponseController(w).Flush() // whoever is gone gets nothing
	}
}

// answerTensors gives binary tensors back as they came.
func answerTensors(w http.ResponseWriter, r *http.Request, body []byte) {
	if r.Method == http.MethodGet {
		return // live, ready
	}
	var in io.Reader = bytes.NewReader(body)
	var err error
	switch r.Header.Get("Content-Encoding") {
	case "gzip":
		in, err = gzip.NewReader(in)
	case "deflate":
		in, err = zlib.NewReader(in)
	}
	if err == nil {
		body, err = io.ReadAll(in)
	}
	n, nerr := strconv.Atoi(r.Header.Get("Inference-Header-Content-Length"))
	if err := errors.Join(err, nerr); err != nil || n > len(body) || r.URL.Path != "/v2/models/tensors/infer" {
		http.Error(w, fmt.Sprintf(`{"error":"%s: %v"}`, r.URL.Path, err), http.StatusBadRequest)
		return
	}
	head := fmt.Sprintf(`{"model_name":"tensors","model_version":"1","id":"7","outputs":[{"name":"in","datatype":"FP32","shape":[6],"parameters":{"binary_data_size":%d}}]}`, len(body)-n)
	w.Header().Set("Inference-Header-Content-Length", strconv.Itoa(len(head)))
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write(append([]byte(head), body[n:]...))
}

// tensorRPC is the same over gRPC.
type tensorRPC struct {
	oip.UnimplementedGRPCInferenceServiceServer
}

func (tensorRPC) ServerLive(context.Context, *oip.ServerLiveRequest) (*oip.ServerLiveResponse, error) {
	return &oip.ServerLiveResponse{Live: true}, nil
}

func (tensorRPC) ServerReady(context.Context, *oip.ServerReadyRequest) (*oip.ServerReadyResponse, error) {
	return &oip.ServerReadyResponse{Ready: true}, nil
}

func (tensorRPC) ModelReady(_ context.Context, r *oip.ModelReadyRequest) (*oip.ModelReadyResponse, error) {
	return &oip.ModelReadyResponse{Ready: r.Name == "tensors"}, nil
}

func (tensorRPC) ModelInfer(ctx context.Context, r *oip.ModelInferRequest) (*oip.ModelInferResponse, error) {
	switch {
	case r.ModelName != "tensors" || len(r.Inputs) != 1:
		return nil, status.Errorf(codes.NotFound, "asked for %q", r.ModelName)
	case r.Id == "bad":
		return nil, status.Error(codes.InvalidArgument, "no such input äöü")
	case r.Id == "slow":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &oip.ModelInferResponse{ModelName: "tensors", ModelVersion: "1", Id: r.Id, RawOutputContents: r.RawInputContents,
		Outputs: []*oip.ModelInferResponse_InferOutputTensor{{Name: "in", Datatype: "FP32", Shape: r.Inputs[0].Shape}}}, nil
}

func (s tensorRPC) ModelStreamInfer(stream grpc.BidiStreamingServer[oip.ModelInferRequest, oip.ModelStreamInferResponse]) error {
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		answer, err := s.ModelInfer(stream.Context(), r)
		out := &oip.ModelStreamInferResponse{InferResponse: answer}
		if err != nil {
			out = &oip.ModelStreamInferResponse{ErrorMessage: status.Convert(err).Message()}
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}
