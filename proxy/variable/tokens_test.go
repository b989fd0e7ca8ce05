package variable

import (
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

func at(position uint64) outrigger.Dot {
	return outrigger.Dot{Region: "eu", Incarnation: 7, Position: position}
}

// A caller that brings no token is held to what the sidecar saw in its session, but only
// to what it saw before the present table: within one the cache keeps its own promise.
func TestRememberedAcrossTables(t *testing.T) {
	era := uint64(1)
	tokens := NewTokens(TokenOptions{Era: func() uint64 { return era }})
	who := caller{tenant: "default"}
	want := func(session string, positions ...uint64) {
		t.Helper()
		r, state := tokens.request(who, session)
		var after []outrigger.Dot
		for _, p := range positions {
			after = append(after, at(p))
		}
		if len(r.After) != len(after) || len(after) > 0 && !reflect.DeepEqual(r.After, after) || r.Kept != (len(after) > 0) || !r.Declared {
			t.Errorf("session %s: %+v (%s), want after %v", session, r, state, after)
		}
	}
	want("s")
	tokens.saw(who, "s", at(5))
	want("s")
	era++
	want("s", 5)
	want("other")
	tokens.saw(who, "s", at(9)) // through the new table
	want("s", 5)
	era++
	want("s", 9)
	// Another tenant's session of that name is another session.
	if r, _ := tokens.request(caller{tenant: "t2"}, "s"); len(r.After) > 0 {
		t.Errorf("another tenant is held to %v", r.After)
	}
}

// What goes out is what was brought, what is remembered and the answer itself; it is
// signed anew only when that has grown or the keys have changed.
func TestTokenOfAnAnswer(t *testing.T) {
	keys := identity.NewKeys()
	tokens := NewTokens(TokenOptions{Keys: keys})
	who := caller{tenant: "default"}
	if text := tokens.saw(who, "s"); text != "" {
		t.Errorf("a token of nothing: %q", text)
	}
	first := tokens.saw(who, "s", at(5))
	if again := tokens.saw(who, "s", at(3)); again != first {
		t.Error("an older answer changed the token")
	}
	who.token = keys.Sign(identity.Token{}.With(at(8), outrigger.Dot{Region: "us", Incarnation: 3, Position: 1}))
	got, err := keys.Verify(tokens.saw(who, "s", at(6)))
	if want := (identity.Token{at(8), {Region: "us", Incarnation: 3, Position: 1}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	r, state := tokens.request(who, "s")
	if state != "echoed" || r.Kept || len(r.After) != 2 {
		t.Errorf("%s %+v", state, r)
	}
	who.token = ""
	next := identity.NewKeys()
	tokens.Use(next)
	if got, err := next.Verify(tokens.saw(who, "s")); err != nil || got[0] != at(8) {
		t.Errorf("after new keys: %v, %v", got, err)
	}
}

// A token that says nothing to this sidecar means an origin read, unless the caller said
// that it does not care.
func TestUnverifiedTokens(t *testing.T) {
	tokens := NewTokens(TokenOptions{})
	foreign := identity.NewKeys().Sign(identity.Token{}.With(at(1)))
	for _, tt := range []struct {
		consistency outrigger.Consistency
		explicit    bool
		want        outrigger.Level
	}{
		{outrigger.Consistency{}, false, outrigger.Strong},
		{outrigger.Consistency{}, true, outrigger.Strong},
		{outrigger.Consistency{Level: outrigger.Bounded, MaxAge: time.Second}, true, outrigger.Strong},
		{outrigger.Consistency{Level: outrigger.Strong}, true, outrigger.Strong},
		{outrigger.Consistency{Level: outrigger.Eventual}, true, outrigger.Eventual},
	} {
		r, state := tokens.request(caller{tenant: "t", token: foreign, consistency: tt.consistency, explicit: tt.explicit}, "s")
		if state != "unverified" || r.Consistency.Level != tt.want || r.Declared || len(r.After) > 0 {
			t.Errorf("%v: %s %+v", tt.consistency, state, r)
		}
	}
}

// The answer to a caller whose token does not verify carries a new one only when that
// covers what the caller may have seen: after a strong read. A failed read leaves the
// caller its own; what is shown otherwise makes it one that nobody verifies, because one
// who could would not know of it.
func TestAnswersToUnverifiedTokens(t *testing.T) {
	keys := identity.NewKeys()
	c := core{o: Options{Tokens: NewTokens(TokenOptions{Keys: keys})}}
	others := identity.NewKeys()
	who := caller{tenant: "t", token: others.Sign(identity.Token{}.With(at(9)))}
	c.o.Tokens.saw(caller{tenant: "t"}, "s", at(2))
	given := func(md metadata.MD) (identity.Token, bool) {
		t.Helper()
		text := md.Get(outrigger.HeaderToken)
		if len(text) == 0 {
			return nil, false
		}
		token, err := keys.Verify(text[0])
		if err != nil {
			t.Error(err)
		}
		return token, true
	}
	strong := cache.Answer{Consistency: outrigger.Consistency{Level: outrigger.Strong}}
	r, state := c.o.Tokens.request(who, "s")
	if !r.SeenAll {
		t.Error("the read is not asked for everything")
	}
	if got, ok := given(c.shown(metadata.MD{}, who, "s", strong, state, at(12))); !ok || got[0] != at(12) {
		t.Errorf("after a strong read: %v", got)
	}
	if got, ok := given(c.shown(metadata.MD{}, who, "s", cache.Answer{}, state, outrigger.Dot{})); ok {
		t.Errorf("after a failed read: %v", got)
	}
	if got, ok := given(c.shown(metadata.MD{}, who, "s", strong, state, outrigger.Dot{})); ok {
		t.Errorf("after a read of no known position: %v", got)
	}
	v := &pb.Variable{Version: &pb.Version{Dot: &pb.Dot{Region: "eu", Incarnation: 7, Position: 13}}}
	for range 2 {
		who.token = c.wrote(who, "s", v, v.Version).Get(outrigger.HeaderToken)[0]
		if got, err := others.Verify(who.token); err == nil {
			t.Errorf("after a write: %v", got)
		}
	}
	if got, err := others.Verify(strings.TrimSuffix(who.token, mark)); err != nil || got[0] != at(9) {
		t.Errorf("marked twice: %v %v", got, err)
	}
	// What was seen meanwhile is remembered for those who bring nothing.
	if got, _ := keys.Verify(c.o.Tokens.saw(caller{tenant: "t"}, "s")); len(got) != 1 || got[0] != at(13) {
		t.Errorf("remembered: %v", got)
	}
}

// Memory is bounded, the sessions in use stay, and callers may come at the same time.
func TestRememberedSessionsAreBounded(t *testing.T) {
	tokens := NewTokens(TokenOptions{})
	who := caller{tenant: "t"}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range maxKept {
				tokens.saw(who, fmt.Sprintf("s%d-%d", g, i), at(uint64(i+1)))
				if i%100 == 0 {
					tokens.saw(who, "busy", at(uint64(i+1)))
				}
			}
		})
	}
	wg.Wait()
	if n := len(tokens.recent) + len(tokens.past); n > 2*maxKept {
		t.Errorf("%d sessions are remembered, the bound is %d", n, 2*maxKept)
	}
	if tokens.find("t/busy") == nil {
		t.Error("a session in use was forgotten")
	}
}

func TestExplanation(t *testing.T) {
	v := &pb.Variable{Version: &pb.Version{Counter: 3, Dot: &pb.Dot{Region: "eu", Incarnation: 0x1f, Position: 12}}}
	full := cache.Answer{Found: true, Variable: v, Tier: outrigger.TierProcess, Age: 100500 * time.Microsecond, FeedLive: true, Why: `process "copy"`,
		Explain: &cache.Explain{Table: true, Lease: 199 * time.Millisecond, Incarnation: 0x1f, Applied: 12, Agent: true, Head: 13, Floor: 11}}
	for _, tt := range []struct {
		a     cache.Answer
		who   caller
		token string
		want  string
	}{
		{full, caller{}, "none", `tier=process version=3 dot=eu@1f:12 age_ms=101 stale=false lease_ms=199 incarnation=1f applied=12 head=13 floor=11 consistency=session source=default token=none why="process \"copy\""`},
		{cache.Answer{Tier: outrigger.TierOrigin, ByVariable: true, Stale: true, Why: "x\r\ny", Consistency: outrigger.Consistency{Level: outrigger.Bounded, MaxAge: time.Second}},
			caller{}, "kept", `tier=origin age_ms=0 stale=true consistency=bounded(1s) source=variable token=kept why="x\r\ny"`},
		{cache.Answer{}, caller{explicit: true}, "none", `tier=none age_ms=0 stale=false consistency=session source=request token=none why=""`},
	} {
		got := explanation(tt.a, tt.who, tt.token)
		if got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
		if strings.ContainsAny(got, "\r\n") {
			t.Errorf("%q cannot be a header", got)
		}
	}
}

// A hit of the event loop carries the token of what it shows.
func TestEncodeHTTPWithToken(t *testing.T) {
	keys := identity.NewKeys()
	tokens := NewTokens(TokenOptions{Keys: keys})
	v := &pb.Variable{Key: &pb.Key{Session: "s", Name: "x"}, Value: &pb.Value{Type: "float", Json: []byte("1")},
		Version: &pb.Version{Dot: &pb.Dot{Region: "eu", Incarnation: 7, Position: 4}}}
	want := "X-Outrigger-Token: " + keys.Sign(identity.Token{}.With(at(4))) + "\r\n"
	if got := string(tokens.EncodeHTTP(v)); !strings.Contains(got, want) {
		t.Errorf("%q lacks %q", got, want)
	}
	if got := string(EncodeHTTP(v)); strings.Contains(got, "Token") {
		t.Errorf("without tokens: %q", got)
	}
}
