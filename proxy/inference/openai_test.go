package inference

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/ssestream"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// These tests use OpenAI's own Go client, unmodified; only its base URL is ours.

func client(m *mesh, o ...option.RequestOption) openai.Client {
	return openai.NewClient(append([]option.RequestOption{option.WithBaseURL(m.front.URL + "/v1"), option.WithAPIKey("k")}, o...)...)
}

func ask(text, user string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{Model: "gpt", SafetyIdentifier: openai.String(user), Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(text)}}
}

func TestOpenAIClient(t *testing.T) {
	v1, v2 := &modelServer{name: "gpt-v1"}, &modelServer{name: "gpt-v2"}
	m := newMesh(t, newPolicy(1000, []policy.Endpoint{at(serve(t, v1), "eu")}, []policy.Endpoint{at(serve(t, v2), "eu")}), Options{})
	c := client(m)
	for name, tt := range map[string]struct {
		user, arm, upstream string
	}{
		"stable": {unitIn("salt-1", 1000, 10_000), "stable", "gpt-v1"}, "candidate": {unitIn("salt-1", 0, 1000), "candidate", "gpt-v2"},
	} {
		t.Run(name, func(t *testing.T) {
			var resp *http.Response
			got, err := c.Chat.Completions.New(t.Context(), ask("hello brave world", tt.user), option.WithResponseInto(&resp))
			if err != nil {
				t.Fatal(err)
			}
			if got.Choices[0].Message.Content != "hello brave world" || got.Model != tt.upstream || resp.Header.Get("x-outrigger-arm") != tt.arm {
				t.Errorf("answer %q by %s, arm %s", got.Choices[0].Message.Content, got.Model, resp.Header.Get("x-outrigger-arm"))
			}

			stream := c.Chat.Completions.NewStreaming(t.Context(), ask("one two three", tt.user))
			var acc openai.ChatCompletionAccumulator
			chunks := 0
			for stream.Next() {
				acc.AddChunk(stream.Current())
				chunks++
			}
			if err := stream.Err(); err != nil || chunks != 5 || acc.Choices[0].Message.Content != "one two three " {
				t.Errorf("%d chunks, %v: %+v", chunks, err, acc.Choices)
			}
		})
	}
	var notFound *openai.Error
	if _, err := c.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "gpt-9"}); !errors.As(err, &notFound) || notFound.StatusCode != 404 || notFound.Code != "model_not_found" {
		t.Errorf("unknown model: %v", err)
	}
	list, err := c.Models.List(t.Context())
	if err != nil || len(list.Data) != 1 || list.Data[0].ID != "gpt" {
		t.Errorf("models %+v, %v", list, err)
	}
	if one, err := c.Models.Get(t.Context(), "gpt"); err != nil || one.ID != "gpt" {
		t.Errorf("model %+v, %v", one, err)
	}
	for _, base := range []string{"/openai/v1", "/api/v1", "/inference/v1", "/compatible-mode/v1", "/v1beta/openai"} {
		if one, err := c.Models.Get(t.Context(), "gpt", option.WithBaseURL(m.front.URL+base)); err != nil || one.ID != "gpt" {
			t.Errorf("%s: model %+v, %v", base, one, err)
		}
	}
	for _, d := range m.handler.Recorder().Drain(m.handler.now()) {
		if d.Requests != 2 || d.Failures != 0 || d.TokensOut != 6 || d.TokensIn != 6 || len(d.TtftSketch) == 0 || len(d.LatencySketch) == 0 {
			t.Errorf("outcome %v", d)
		}
	}
}

// The client retries what the sidecar says may be retried, and stops where it says so.
func TestOpenAIClientRetries(t *testing.T) {
	var calls atomic.Int64
	tr := roundTripper(func(*http.Request) (*http.Response, error) {
		if calls.Add(1) < 3 {
			return nil, errCut
		}
		return (&scripted{steps: map[string][]step{"a:1": {{status: 200, body: answerOf("gpt-v1", "at last")}}}}).answer("a:1")
	})
	m := newMesh(t, newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil), Options{Transport: tr})
	c := client(m)
	got, err := c.Chat.Completions.New(t.Context(), ask("x", "u"))
	if err != nil || got.Choices[0].Message.Content != "at last" || calls.Load() != 3 {
		t.Errorf("after %d calls: %+v, %v", calls.Load(), got, err)
	}
	// One logical request: the first try failed, its retries are not samples.
	if d := only(t, m.handler); d.Requests != 1 || d.Failures != 1 || d.Attempts != 3 {
		t.Errorf("outcome %v", d)
	}

	m.source.p.Store(newPolicy(0, nil, nil)) // no endpoint: retrying is pointless
	calls.Store(0)
	var seen atomic.Int64
	counting := func(r *http.Request, next option.MiddlewareNext) (*http.Response, error) {
		seen.Add(1)
		return next(r)
	}
	var apiErr *openai.Error
	_, err = c.Chat.Completions.New(t.Context(), ask("x", "u"), option.WithMiddleware(counting))
	if !errors.As(err, &apiErr) || apiErr.Code != "no_endpoint" || apiErr.StatusCode != 503 || seen.Load() != 1 || calls.Load() != 0 {
		t.Errorf("no endpoint: %v after %d requests", err, seen.Load())
	}
}

func (s *scripted) answer(address string) (*http.Response, error) {
	r, err := http.NewRequest("POST", "http://"+address, strings.NewReader(""))
	if err != nil {
		return nil, err
	}
	return s.RoundTrip(r)
}

// A model lost in the middle of a stream reaches the application as a typed error, and
// so does it on the responses API, whose errors are named events.
func TestOpenAIClientMidStreamLoss(t *testing.T) {
	for _, path := range []string{"chat", "responses"} {
		backend := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			if path == "chat" {
				fmt.Fprint(w, chunkOf("gpt-v1", roleDelta), chunkOf("gpt-v1", `{"content":"half "}`))
			} else {
				fmt.Fprint(w, "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"r\"}}\n\n",
					"event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"half \"}\n\n")
			}
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler) // the process dies
		})
		m := newMesh(t, newPolicy(0, []policy.Endpoint{at(serve(t, backend), "eu")}, nil), Options{})
		c := client(m)
		var text string
		var err error
		if path == "chat" {
			s := c.Chat.Completions.NewStreaming(t.Context(), ask("x", "u"))
			for s.Next() {
				text += s.Current().Choices[0].Delta.Content
			}
			err = s.Err()
		} else {
			text, err = readResponses(t, c)
		}
		var typed *ssestream.StreamError
		if !errors.As(err, &typed) || !strings.Contains(typed.Message, "upstream_lost") || text != "half " {
			t.Errorf("%s: text %q, error %v", path, text, err)
		}
		m.front.Close()
		if d := only(t, m.handler); d.Failures != 1 || d.Requests != 1 {
			t.Errorf("%s: outcome %v", path, d)
		}
	}
}
