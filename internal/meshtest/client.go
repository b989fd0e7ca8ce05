package meshtest

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

// quick reconnects fast, as processes of a mesh do.
var quick = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}

// Read is what an application learns from one variable read.
type Read struct {
	Value   string
	Version int32
	Tier    string
	Feed    string
	Stale   bool
	Token   string // session token
	Explain string // when asked for
}

// Get reads a variable as the application does, over the bridge.
func (p *Pod) Get(ctx context.Context, session, name string) (Read, error) {
	return p.GetWith(ctx, session, name)
}

// GetWith is Get with request metadata, as keys and values in turn.
func (p *Pod) GetWith(ctx context.Context, session, name string, kv ...string) (Read, error) {
	var head metadata.MD
	ctx = metadata.AppendToOutgoingContext(ctx, kv...)
	r, err := p.Bridge.GetVariable(ctx, &snakepit.GetVariableRequest{SessionId: session, VariableIdentifier: name}, grpc.Header(&head))
	if err != nil {
		return Read{}, err
	}
	first := func(k string) string {
		if v := head.Get(k); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	return Read{Value: string(r.Variable.Value.Value), Version: r.Variable.Version, Tier: first(outrigger.HeaderTier),
		Feed: first(outrigger.HeaderFeed), Stale: first(outrigger.HeaderStale) == "true",
		Token: first(outrigger.HeaderToken), Explain: first(outrigger.HeaderExplain)}, nil
}

// Register declares a float variable.
func (p *Pod) Register(ctx context.Context, session, name, value string) error {
	_, err := p.Bridge.RegisterVariable(ctx, &snakepit.RegisterVariableRequest{SessionId: session, Name: name, Type: "float", InitialValue: float(value)})
	return err
}

// Set writes a float variable and returns its new version.
func (p *Pod) Set(ctx context.Context, session, name, value string) (int32, error) {
	version, _, err := p.SetToken(ctx, session, name, value)
	return version, err
}

// SetToken is Set that returns the session token, too.
func (p *Pod) SetToken(ctx context.Context, session, name, value string) (version int32, token string, err error) {
	var head metadata.MD
	r, err := p.Bridge.SetVariable(ctx, &snakepit.SetVariableRequest{SessionId: session, VariableIdentifier: name, Value: float(value)}, grpc.Header(&head))
	if err != nil {
		return 0, "", err
	}
	if !r.Success {
		return r.NewVersion, "", fmt.Errorf("refused: %s", r.ErrorMessage)
	}
	if v := head.Get(outrigger.HeaderToken); len(v) > 0 {
		token = v[0]
	}
	return r.NewVersion, token, nil
}

func float(v string) *anypb.Any {
	return &anypb.Any{TypeUrl: "type.googleapis.com/snakepit.float", Value: []byte(v)}
}

// Chat makes one model call for a user and returns the answer's status, headers, body.
func (p *Pod) Chat(ctx context.Context, user string, stream bool) (int, http.Header, string, error) {
	body := fmt.Sprintf(`{"model":%q,"max_tokens":3,"stream":%v,"user":%q,"messages":[{"role":"user","content":"hi"}]}`, ModelName, stream, user)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://sidecar/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	req.Header.Set("content-type", "application/json")
	resp, err := p.HTTP.Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(raw), err
}
