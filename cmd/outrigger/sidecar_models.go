package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
)

// modelFlags are the sidecar's settings for model calls.
type modelFlags struct {
	defaultModel    string
	tryTimeout      time.Duration
	hedgeAfter      time.Duration
	adaptive        bool
	inFlight        int
	maxBody         int64
	answerBytes     int64
	answerTTL       time.Duration
	answerUndecided bool
	prices          map[string]string
	shadows         int
}

func (m *modelFlags) bind(f *pflag.FlagSet) {
	f.StringVar(&m.defaultModel, "default-model", "", "model of requests that name none (TGI's paths); empty = none")
	f.DurationVar(&m.tryTimeout, "model-try-timeout", 0, "limit of one attempt up to its first content; 0 = the policy's limit of the whole request")
	f.DurationVar(&m.hedgeAfter, "model-hedge-after", 0, "ask a second endpoint when the first has not begun to answer for that long, for calls that change nothing; 0 = never")
	f.BoolVar(&m.adaptive, "model-adaptive-concurrency", false, "give a version no more requests at once than it was seen to take")
	f.IntVar(&m.inFlight, "model-max-in-flight", inference.DefaultMaxInFlight, "model calls at once, open streams included; more are answered 503")
	f.Int64Var(&m.maxBody, "model-max-body", inference.DefaultMaxBody, "largest request body of a model call in bytes; larger ones are answered 413. Bodies over 1 MiB have together 8 times this")
	f.Int64Var(&m.answerBytes, "answer-cache-bytes", 0, "size of the cache of model answers, at least 1 MiB, shared with the other pods of the node if the agent of --agent-dir has --answer-cache-bytes too; 0 = no such cache")
	f.DurationVar(&m.answerTTL, "answer-cache-ttl", answers.DefaultTTL, "limit on the age of a cached answer")
	f.BoolVar(&m.answerUndecided, "answer-cache-all", false, "cache answers to questions that are not deterministic too")
	f.IntVar(&m.shadows, "model-shadows", inference.DefaultShadows, "copies of requests under way to shadow versions; more wait, then are dropped; 0 = none are made")
	f.StringToStringVar(&m.prices, "model-price", nil, "price of a million LLM tokens, model=in/out, for the cost metric")
}

// options checks the settings and makes what they need, within room.
func (m *modelFlags) options(room *heap.Room) (o inference.Options, err error) {
	if m.tryTimeout < 0 || m.hedgeAfter < 0 {
		return o, fmt.Errorf("--model-try-timeout is %v and --model-hedge-after %v; give durations of 0 or more", m.tryTimeout, m.hedgeAfter)
	}
	if m.inFlight < 1 {
		return o, fmt.Errorf("--model-max-in-flight is %d; give at least 1", m.inFlight)
	}
	if m.maxBody < 1<<10 || m.maxBody > 1<<30 {
		return o, fmt.Errorf("--model-max-body is %d; give 1024 to 1073741824", m.maxBody)
	}
	if m.shadows < 0 {
		return o, fmt.Errorf("--model-shadows is %d; give 0 or more", m.shadows)
	}
	o = inference.Options{Room: room, MaxInFlight: m.inFlight, MaxBody: m.maxBody, Shadows: m.shadows, DefaultModel: m.defaultModel, TryTimeout: m.tryTimeout, HedgeAfter: m.hedgeAfter, Adaptive: m.adaptive, AnswerAll: m.answerUndecided}
	if m.answerBytes != 0 {
		if o.Answers, err = answers.New(answers.Options{Bytes: m.answerBytes, TTL: m.answerTTL, Full: room.Full}); err != nil {
			return o, fmt.Errorf("--answer-cache-bytes, --answer-cache-ttl: %w", err)
		}
	}
	for model, text := range m.prices {
		in, out, _ := strings.Cut(text, "/")
		p := inference.Price{}
		p.In, err = strconv.ParseFloat(in, 64)
		if err == nil {
			p.Out, err = strconv.ParseFloat(out, 64)
		}
		if err != nil || !(p.In >= 0 && p.Out >= 0 && p.In+p.Out < 1e12) {
			return o, fmt.Errorf("--model-price %s=%q; give in/out, such as 2.5/10", model, text)
		}
		if o.Prices == nil {
			o.Prices = map[string]inference.Price{}
		}
		o.Prices[model] = p
	}
	return o, nil
}
