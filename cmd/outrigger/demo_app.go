//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/bench/trace"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// record is one line the demonstration's app prints: one model call, variable read or
// variable write, as the app saw it.
type record struct {
	Kind    string  `json:"k"`  // call, read, write
	At      int64   `json:"at"` // start, Unix ns
	Ms      float64 `json:"ms"`
	Err     string  `json:"err,omitempty"`
	Version string  `json:"version,omitempty"`
	Arm     string  `json:"arm,omitempty"`
	Tier    string  `json:"tier,omitempty"`
	Stream  bool    `json:"stream,omitempty"`
	Tokens  int     `json:"tokens,omitempty"`
	Row     int     `json:"row"`
}

// The variables every app of the demonstration reads before each call.
const (
	demoSession = "checkout"
	demoModelID = "demo-chat"
)

var demoVariables = []string{"temperature", "system_prompt"}

// demoAppCommand replays part of the trace as an unmodified OpenAI client that keeps
// its settings in variables. It knows its sidecar's address and nothing else.
func demoAppCommand(g *globals) *cobra.Command {
	a := &demoApp{}
	cmd := &cobra.Command{Use: "demo-app", Short: "Client application of the demonstration", Hidden: true, Args: exactArgs()}
	f := cmd.Flags()
	f.StringVar(&a.sidecar, "sidecar", "", "host:port of this pod's sidecar")
	f.StringVar(&a.protocol, "variables", "bridge", "how variables are read: bridge or rest")
	f.Float64Var(&a.speed, "speed", 10, "how much faster than the trace to replay")
	f.DurationVar(&a.duration, "duration", 45*time.Second, "wall time to replay for")
	f.IntVar(&a.index, "index", 0, "which share of the rows is ours")
	f.IntVar(&a.of, "of", 1, "how many shares there are")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		rows, err := trace.Load()
		if err != nil {
			return err
		}
		a.enc = json.NewEncoder(cmd.OutOrStdout())
		conn, err := grpc.NewClient(a.sidecar, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return configError{err}
		}
		defer conn.Close()
		a.bridge = snakepit.NewBridgeServiceClient(conn)
		a.chat = openai.NewClient(option.WithBaseURL("http://"+a.sidecar+"/v1/"), option.WithAPIKey("demo-key"))
		return a.replay(cmd.Context(), rows)
	}
	return cmd
}

type demoApp struct {
	sidecar, protocol string
	speed             float64
	duration          time.Duration
	index, of         int

	bridge snakepit.BridgeServiceClient
	chat   openai.Client

	mu  sync.Mutex
	enc *json.Encoder // guarded by mu
}

// maxInFlight bounds the calls an app has open; the replay waits above it.
const maxInFlight = 256

// replay issues each of our rows at its time; it returns when the last call ended.
func (a *demoApp) replay(ctx context.Context, rows []trace.Request) error {
	start := time.Now()
	slots := make(chan struct{}, maxInFlight)
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, r := range rows {
		if r.Row%a.of != a.index {
			continue
		}
		due := time.Duration(float64(r.At) / a.speed)
		if due > a.duration {
			return nil
		}
		if !pause.For(ctx, due-time.Since(start)) {
			return nil
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		wg.Go(func() {
			defer func() { <-slots }()
			// A call that has started is finished even when the replay is told to stop.
			a.request(context.WithoutCancel(ctx), r)
		})
	}
	return nil
}

// request is what the application does for one row: read its settings, sometimes
// change one, call the model.
func (a *demoApp) request(ctx context.Context, r trace.Request) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	temperature := 0.7
	for _, name := range demoVariables {
		text := a.read(ctx, r, name)
		if name == "temperature" && text != "" {
			if t, err := strconv.ParseFloat(text, 64); err == nil {
				temperature = t
			}
		}
	}
	if r.Row%25 == 0 {
		a.write(ctx, r, "temperature", strconv.FormatFloat(float64(r.Row%20)/10, 'f', -1, 64))
	}
	a.call(ctx, r, temperature)
}

func (a *demoApp) print(rec record) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.enc.Encode(rec); err != nil {
		return // the parent is gone; the context ends this process soon
	}
}

func since(start time.Time) float64 { return float64(time.Since(start)) / float64(time.Millisecond) }

func (a *demoApp) read(ctx context.Context, r trace.Request, name string) string {
	start := time.Now()
	rec := record{Kind: "read", At: start.UnixNano(), Row: r.Row}
	var text string
	var err error
	if a.protocol == "rest" {
		text, rec.Tier, rec.Version, err = a.readREST(ctx, name)
	} else {
		text, rec.Tier, rec.Version, err = a.readBridge(ctx, name)
	}
	rec.Ms = since(start)
	if err != nil {
		rec.Err = err.Error()
	}
	a.print(rec)
	return text
}

func (a *demoApp) readBridge(ctx context.Context, name string) (text, tier, version string, err error) {
	var head metadata.MD
	resp, err := a.bridge.GetVariable(ctx, &snakepit.GetVariableRequest{SessionId: demoSession, VariableIdentifier: name}, grpc.Header(&head))
	if err != nil {
		return "", "", "", err
	}
	if v := head.Get(outrigger.HeaderTier); len(v) == 1 {
		tier = v[0]
	}
	return string(resp.Variable.GetValue().GetValue()), tier, strconv.Itoa(int(resp.Variable.GetVersion())), nil
}

func (a *demoApp) readREST(ctx context.Context, name string) (text, tier, version string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.sidecar+"/v1/variables/"+demoSession+"/"+name, nil)
	if err != nil {
		return "", "", "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", "", "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "", "", "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", "", "", fmt.Errorf("%s: %s", resp.Status, body)
	}
	var v struct {
		Value json.RawMessage `json:"value"`
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return "", "", "", err
	}
	return string(v.Value), resp.Header.Get(outrigger.HeaderTier), resp.Header.Get(outrigger.HeaderVersion), nil
}

func (a *demoApp) write(ctx context.Context, r trace.Request, name, value string) {
	start := time.Now()
	rec := record{Kind: "write", At: start.UnixNano(), Row: r.Row}
	resp, err := a.bridge.SetVariable(ctx, &snakepit.SetVariableRequest{SessionId: demoSession, VariableIdentifier: name,
		Value: &anypb.Any{TypeUrl: "type.googleapis.com/snakepit.float", Value: []byte(value)}})
	rec.Ms = since(start)
	switch {
	case err != nil && gstatus.Code(err) != codes.OK:
		rec.Err = err.Error()
	case !resp.GetSuccess():
		rec.Err = resp.GetErrorMessage()
	}
	a.print(rec)
}

func (a *demoApp) call(ctx context.Context, r trace.Request, temperature float64) {
	params := openai.ChatCompletionNewParams{
		Model:       demoModelID,
		Messages:    []openai.ChatCompletionMessageParamUnion{openai.UserMessage(strings.Repeat("text ", r.Context))},
		MaxTokens:   openai.Int(int64(max(1, r.Generated))),
		Temperature: openai.Float(temperature),
		User:        openai.String(r.User()),
	}
	var head *http.Response
	start := time.Now()
	rec := record{Kind: "call", At: start.UnixNano(), Row: r.Row, Stream: r.Row%2 == 0}
	var err error
	if rec.Stream {
		params.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
		stream := a.chat.Chat.Completions.NewStreaming(ctx, params, option.WithResponseInto(&head))
		for stream.Next() {
			if u := stream.Current().Usage.CompletionTokens; u > 0 {
				rec.Tokens = int(u)
			}
		}
		err = stream.Err()
		stream.Close()
	} else {
		var resp *openai.ChatCompletion
		resp, err = a.chat.Chat.Completions.New(ctx, params, option.WithResponseInto(&head))
		if err == nil {
			rec.Tokens = int(resp.Usage.CompletionTokens)
		}
	}
	rec.Ms = since(start)
	var apiErr *openai.Error
	if errors.As(err, &apiErr) && head == nil {
		head = apiErr.Response
	}
	if head != nil {
		rec.Version, rec.Arm = head.Header.Get(outrigger.HeaderVersion), head.Header.Get(outrigger.HeaderArm)
	}
	switch {
	case err != nil:
		rec.Err = err.Error()
	case rec.Tokens != max(1, r.Generated):
		rec.Err = fmt.Sprintf("asked for %d tokens, got %d", max(1, r.Generated), rec.Tokens)
	}
	a.print(rec)
}
