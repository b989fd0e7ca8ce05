package inference

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func tap(t *testing.T, h *Handler, f TapFilter) *TapStream {
	t.Helper()
	s, err := h.Tap(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func next(t *testing.T, s *TapStream) (c Tapped) {
	t.Helper()
	select {
	case c = <-s.Calls():
	default:
		t.Error("no call was told of")
	}
	return c
}

// Whoever taps is told where calls went, and nothing of what was said or who asked.
func TestTap(t *testing.T) {
	tr := &scripted{steps: map[string][]step{
		"a:1": {{status: 200, body: answerOf("gpt-v1", "secret words")}},
		"b:1": {{status: 400, body: `{}`}, {err: errCut}},
	}}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(5000, []policy.Endpoint{at("a:1", "eu")}, []policy.Endpoint{at("b:1", "us")})).get})
	stable, candidate := unitIn("salt-1", 5000, 10_000), unitIn("salt-1", 0, 5000)
	all, failed, one := tap(t, h, TapFilter{}), tap(t, h, TapFilter{Outcome: OutcomeFailed}), tap(t, h, TapFilter{User: stable, Model: "gpt"})
	none := tap(t, h, TapFilter{Version: "v3"})
	slow := tap(t, h, TapFilter{AtLeast: time.Hour})

	post(h, chatPath, chatBody(stable, false), "Authorization", "Bearer secret")
	c := next(t, all)
	if c.Model != "gpt" || c.Version != "v1" || c.Arm != "stable" || c.Region != "eu" || c.Outcome != OutcomeOK || c.Attempts != 1 || c.Policy != "live" ||
		c.Unit != experiments.UnitHash("salt-1", stable) || c.Bucket < 5000 || c.TokensOut == 0 || c.API != "chat" || c.Stream || c.At.IsZero() {
		t.Errorf("%+v", c)
	}
	raw, err := json.Marshal(c)
	if text := string(raw); err != nil || strings.Contains(text, "secret") || strings.Contains(text, stable) {
		t.Errorf("told too much: %s, %v", text, err)
	}
	if c := next(t, one); c.Version != "v1" {
		t.Errorf("%+v", c)
	}

	post(h, chatPath, chatBody(candidate, false))
	if c := next(t, all); c.Version != "v2" || c.Outcome != OutcomeOK || c.Tag != "400" {
		t.Errorf("the client's own mistake: %+v", c)
	}
	post(h, chatPath, chatBody(candidate, false))
	if c := next(t, all); c.Version != "v2" || c.Outcome != OutcomeOK && c.Outcome != OutcomeFailed {
		t.Errorf("%+v", c)
	}
	if c := next(t, failed); c.Version != "v2" || c.Outcome != OutcomeFailed {
		t.Errorf("%+v", c)
	}
	for len(all.Calls()) > 0 {
		<-all.Calls()
	}
	post(h, chatPath, `{"model":"nope"}`)
	if c := next(t, all); c.Outcome != OutcomeRefused || c.Tag != "model_not_found" || c.Bucket != -1 || c.Model != "" {
		t.Errorf("%+v", c)
	}
	if len(none.Calls())+len(one.Calls())+len(slow.Calls()) != 0 {
		t.Error("a filter let through what it should not")
	}
}

// Taps are bounded, in number and in what one may be behind; closed ones cost nothing.
func TestTapBounds(t *testing.T) {
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: answerOf("gpt-v1", "x")}}}}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	s := tap(t, h, TapFilter{})
	for range tapBuffer + 3 {
		post(h, chatPath, chatBody("u", false))
	}
	if n := s.Dropped(); n != 3 || len(s.Calls()) != tapBuffer || s.Dropped() != 0 {
		t.Errorf("dropped %d, waiting %d", n, len(s.Calls()))
	}
	var more []*TapStream
	for range MaxTaps - 1 {
		more = append(more, tap(t, h, TapFilter{}))
	}
	if _, err := h.Tap(TapFilter{}); !outrigger.IsKind(err, outrigger.Exhausted) {
		t.Errorf("one tap too many: %v", err)
	}
	more[0].Close()
	more[0].Close()
	tap(t, h, TapFilter{}).Close()
	for _, m := range more {
		m.Close()
	}
	if s.Close(); h.taps.open.Load() != nil {
		t.Error("closed taps are still looked at")
	}
	post(h, chatPath, chatBody("u", false))
	if len(s.Calls()) != tapBuffer || s.Dropped() != 0 {
		t.Error("a closed tap was told of a call")
	}
}

// Tapping costs a call no allocation, with or without a reader that keeps up.
func TestTapAllocations(t *testing.T) {
	answer := answerOf("gpt-v1", "one two three")
	tr := roundTripper(func(r *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(answer)), ContentLength: int64(len(answer))}, nil
	})
	h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	body := chatBody("user-1", false)
	r, err := http.NewRequest("POST", chatPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.ContentLength = int64(len(body))
	in := strings.NewReader(body)
	r.Body = io.NopCloser(in)
	w := &sink{header: http.Header{}}
	run := func() float64 {
		return testing.AllocsPerRun(2*tapBuffer, func() {
			in.Reset(body)
			clear(w.header)
			h.ServeHTTP(w, r)
		})
	}
	without := run()
	s := tap(t, h, TapFilter{User: "user-1"})
	if with := run(); with > without {
		t.Errorf("%v allocations with a tap, %v without", with, without)
	}
	if len(s.Calls()) != tapBuffer {
		t.Errorf("%d calls were told of", len(s.Calls()))
	}
}
