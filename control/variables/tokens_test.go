package variables_test

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// catch collects the headers of a call made in process.
type catch struct {
	grpc.ServerTransportStream
	md metadata.MD
}

func (c *catch) SetHeader(md metadata.MD) error { c.md = metadata.Join(c.md, md); return nil }

func (c *catch) SetTrailer(metadata.MD) error { return nil }

// Direct callers of the control plane get tokens, and those they bring are heeded.
func TestTokensOfDirectCalls(t *testing.T) {
	keys := identity.NewKeys()
	log := memory.New()
	w := startWorld(t, log, variables.Options{SessionKeys: func() *identity.Keys { return keys }})
	defer w.stop()
	svc := w.svc.WithTokens()
	var text string // of the last answer
	ask := func(token, level string, do func(context.Context) error) error {
		t.Helper()
		c := &catch{}
		ctx := metadata.NewIncomingContext(grpc.NewContextWithServerTransportStream(t.Context(), c),
			metadata.Pairs(outrigger.HeaderToken, token, outrigger.HeaderConsistency, level))
		err := do(ctx)
		text = ""
		if v := c.md.Get(outrigger.HeaderToken); len(v) > 0 {
			text = v[0]
		}
		return err
	}
	// holds demands a token of this mesh with a position of this log.
	holds := func(what string, position uint64) identity.Token {
		t.Helper()
		token, err := keys.Verify(text)
		if err != nil {
			t.Fatalf("%s: token %q: %v", what, text, err)
		}
		for _, d := range token {
			if d.Region == "us" && d.Incarnation == log.Incarnation() && d.Position == position {
				return token
			}
		}
		t.Fatalf("%s: the token holds %v, want position %d", what, token, position)
		return nil
	}
	get := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := svc.Get(ctx, &pb.GetRequest{Session: "s", Identifier: name})
			return err
		}
	}
	if err := ask("", "", func(ctx context.Context) error {
		_, err := svc.CreateSession(ctx, &pb.CreateSessionRequest{Id: "s"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	holds("a session", log.Head())
	if err := ask("", "", func(ctx context.Context) error {
		_, err := svc.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("integer", "1")})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	written := log.Head()
	holds("a write", written)
	mine := text
	if err := ask("", "", get("x")); err != nil {
		t.Fatal(err)
	}
	holds("a read", written)
	if err := ask("", "", get("absent")); gstatus.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	holds("nothing found", log.Head())

	// What other regions showed is passed on.
	elsewhere := outrigger.Dot{Region: "eu", Incarnation: 9, Position: 77}
	both, err := keys.Verify(mine)
	if err != nil {
		t.Fatal(err)
	}
	if err := ask(keys.Sign(both.With(elsewhere)), "", get("x")); err != nil {
		t.Fatal(err)
	}
	if got := holds("with another region", written); len(got) != 2 || got[0] != elsewhere {
		t.Errorf("of the other region remains %v", got)
	}
	// A position that is not applied here is waited for, and then an error that says so.
	ahead := keys.Sign(identity.Token{}.With(outrigger.Dot{Region: "us", Incarnation: log.Incarnation(), Position: log.Head() + 100}))
	if err := ask(ahead, "", get("x")); gstatus.Code(err) != codes.Unavailable {
		t.Errorf("a position ahead of the log: %v", err)
	}
	if err := ask(ahead, "eventual", get("x")); err != nil {
		t.Errorf("eventual does not wait: %v", err)
	}
	// Forged, of another mesh, or of a log that is no more: everything there is, and a
	// token that covers it; a write gives back none, so that nothing is lost.
	for what, bad := range map[string]string{
		"forged":       forged(mine),
		"nonsense":     "AAAA",
		"other mesh":   identity.NewKeys().Sign(both),
		"replaced log": keys.Sign(identity.Token{}.With(outrigger.Dot{Region: "us", Incarnation: log.Incarnation() + 1, Position: 1 << 40})),
	} {
		if err := ask(bad, "", get("x")); err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		holds(what, log.Head())
	}
	if err := ask("AAAA", "", func(ctx context.Context) error {
		_, err := svc.Set(ctx, &pb.SetRequest{Session: "s", Identifier: "x", Value: value("integer", "2")})
		return err
	}); err != nil || text != "" {
		t.Errorf("a write with a token nobody can read: %v, token %q", err, text)
	}
}

// forged is a token with one character changed.
func forged(token string) string {
	k, c := len(token)-5, "A"
	if token[k] == 'A' {
		c = "B"
	}
	return token[:k] + c + token[k+1:]
}
