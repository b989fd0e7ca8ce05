package proxy_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// openaiClient is OpenAI's own client, unmodified; only where it connects is ours.
func (w *world) openaiClient(o ...option.RequestOption) openai.Client {
	return openai.NewClient(append([]option.RequestOption{option.WithBaseURL("http://sidecar/v1"), option.WithAPIKey("k"), option.WithHTTPClient(w.http)}, o...)...)
}

func ask(user string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{Model: "chat", SafetyIdentifier: openai.String(user), Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("hi")}}
}

// named checks that an answer says which version and arm it came from.
func named(t *testing.T, what string, r *http.Response, version, arm string) {
	t.Helper()
	if r == nil {
		t.Fatalf("%s: no answer", what)
	}
	for key, want := range map[string]string{outrigger.HeaderVersion: version, outrigger.HeaderArm: arm, outrigger.HeaderModel: "chat"} {
		if got := r.Header.Get(key); got != want {
			t.Errorf("%s: %s is %q, want %q", what, key, got, want)
		}
	}
	for _, key := range []string{outrigger.HeaderPolicy, outrigger.HeaderAttempts, outrigger.HeaderRegion} {
		if r.Header.Get(key) == "" {
			t.Errorf("%s: no %s", what, key)
		}
	}
}

// OpenAI's client through the whole sidecar, JSON and streaming, on both arms; every
// answer names its version and arm, errors included.
func TestOpenAIClientThroughTheSidecar(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world) {
		c := w.openaiClient()
		for arm, version := range map[string]string{"stable": "v1", "candidate": "v2"} {
			user := userOf(arm)
			var resp *http.Response
			got, err := c.Chat.Completions.New(t.Context(), ask(user), option.WithResponseInto(&resp))
			if err != nil || got.Choices[0].Message.Content != "w1 w2 w3 w4 w5 " || got.Usage.CompletionTokens != 5 {
				t.Errorf("%s: %v, %v", arm, got, err)
			}
			named(t, arm, resp, version, arm)

			resp = nil
			stream := c.Chat.Completions.NewStreaming(t.Context(), ask(user), option.WithResponseInto(&resp))
			var text strings.Builder
			for stream.Next() {
				text.WriteString(stream.Current().Choices[0].Delta.Content)
			}
			if err := stream.Err(); err != nil || text.String() != "w1 w2 w3 w4 w5 " {
				t.Errorf("%s stream: %q, %v", arm, text.String(), err)
			}
			named(t, arm+" stream", resp, version, arm)
		}
		if list, err := c.Models.List(t.Context()); err != nil || len(list.Data) != 1 || list.Data[0].ID != "chat" {
			t.Errorf("models: %v, %v", list, err)
		}

		// The version's own error is passed on, and says whose it is.
		var apiErr *openai.Error
		w.v2.failing.Store(true)
		for _, stream := range []bool{false, true} {
			var err error
			if stream {
				s := c.Chat.Completions.NewStreaming(t.Context(), ask(userOf("candidate")), option.WithMaxRetries(0))
				for s.Next() {
				}
				err = s.Err()
			} else {
				_, err = c.Chat.Completions.New(t.Context(), ask(userOf("candidate")), option.WithMaxRetries(0))
			}
			if !errors.As(err, &apiErr) || apiErr.StatusCode != 500 || apiErr.Message != "broken" {
				t.Fatalf("stream %v: %v", stream, err)
			}
			named(t, "a version's error", apiErr.Response, "v2", "candidate")
		}
		// A version that is down is served by the last good one in the same call.
		w.net.Cut("pod", "v2")
		var resp *http.Response
		if _, err := c.Chat.Completions.New(t.Context(), ask(userOf("candidate")), option.WithResponseInto(&resp)); err != nil {
			t.Errorf("candidate down: %v", err)
		}
		named(t, "candidate down", resp, "v1", "last-good")
		// Without a unit.
		p := ask("")
		p.SafetyIdentifier = openai.ChatCompletionNewParams{}.SafetyIdentifier
		if _, err := c.Chat.Completions.New(t.Context(), p, option.WithResponseInto(&resp)); err != nil {
			t.Errorf("no unit: %v", err)
		}
		named(t, "no unit", resp, "v1", "unassigned")
		// Both down: an error that says for whom, and until when.
		w.net.Cut("pod", "v1")
		for range 8 { // the breakers open
			_, err := c.Chat.Completions.New(t.Context(), ask(userOf("stable")), option.WithMaxRetries(0))
			if !errors.As(err, &apiErr) || apiErr.StatusCode != 503 {
				t.Fatalf("all down: %v", err)
			}
			named(t, "all down", apiErr.Response, "v1", "stable")
		}
		if apiErr.Code != "no_healthy_endpoint" || apiErr.Response.Header.Get("retry-after-ms") == "" {
			t.Errorf("all breakers open: %v %v", apiErr.Code, apiErr.Response.Header)
		}
		w.net.Heal("pod", "v1")
		if _, err := c.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{Model: "gpt-9"}); !errors.As(err, &apiErr) || apiErr.StatusCode != 404 || apiErr.Code != "model_not_found" {
			t.Errorf("unknown model: %v", err)
		}
	})
}

// With the control plane away calls go on and say so; past the dead-man lease the
// candidate's users are back on the last good version.
func TestOpenAIClientWithoutControlPlane(t *testing.T) {
	status := inference.PolicyStatus{}
	inWorld(t, func(w *world, o *proxy.Options) {
		o.Policy = func() (*policy.Policy, inference.PolicyStatus) { return w.policy, status }
	}, func(t *testing.T, w *world) {
		c := w.openaiClient()
		for i, want := range []string{"v2 candidate", "v1 last-good"} {
			status.DeadManExpired = i == 1
			var resp *http.Response
			if _, err := c.Chat.Completions.New(t.Context(), ask(userOf("candidate")), option.WithResponseInto(&resp)); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(resp.Header.Get(outrigger.HeaderVersion), " ", resp.Header.Get(outrigger.HeaderArm)); got != want || resp.Header.Get(outrigger.HeaderPolicy) != "last-good" {
				t.Errorf("%s, policy %s; want %s", got, resp.Header.Get(outrigger.HeaderPolicy), want)
			}
		}
	})
}
