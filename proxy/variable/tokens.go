package variable

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// maxKept bounds the sessions whose token is remembered, in each of two generations.
const maxKept = 8192

// Tokens gives out session tokens and takes them back, for all front ends of one sidecar.
//
// Every answer carries a token of what the caller has now seen: what it brought, what
// this sidecar saw in the same session before, and the answer itself. A request with a
// token is answered from nothing older (cache.Request.After). One whose token does not
// verify, of another mesh or a key out of use, is no error: nobody knows what its caller
// has seen, so the origin is asked, and the token of its answer covers everything up to
// then. What is shown by other means (a write, a list) cannot be added to such a token: it
// goes back marked, so that nobody verifies it before a strong read has replaced it. For callers that bring none the sidecar remembers
// what it saw per session and holds reads to it when another table comes into use; within
// one table the cache keeps that promise by itself.
//
// The sessions remembered are bounded: those not used for the longest are forgotten, and
// are then like new ones. Methods may be called concurrently.
type Tokens struct {
	keys   atomic.Pointer[identity.Keys]
	era    func() uint64
	logger *slog.Logger

	mu           sync.Mutex
	recent, past map[string]*kept // by "tenant/session"; recent becomes past when it is full
}

// kept is what is remembered of one session; guarded by Tokens.mu.
type kept struct {
	token identity.Token
	prior identity.Token // of it, what was seen before the present table came into use
	era   uint64
	text  string // token, signed by
	by    *identity.Keys
}

// TokenOptions configure Tokens.
type TokenOptions struct {
	Keys   *identity.Keys // nil = random ones, which only this sidecar can verify, until Follow brings others
	Era    func() uint64  // cache.Store.Era; nil = there is one table for ever
	Logger *slog.Logger   // nil = discard
}

// NewTokens starts nothing.
func NewTokens(o TokenOptions) *Tokens {
	t := &Tokens{era: o.Era, logger: o.Logger, recent: map[string]*kept{}}
	if t.era == nil {
		t.era = func() uint64 { return 0 }
	}
	if t.logger == nil {
		t.logger = slog.New(slog.DiscardHandler)
	}
	if o.Keys == nil {
		o.Keys = identity.NewKeys()
	}
	t.keys.Store(o.Keys)
	return t
}

// Use signs with these keys from now on, and verifies with no others.
func (t *Tokens) Use(keys *identity.Keys) { t.keys.Store(keys) }

// Grant verifies what a tester sends to see an arm, see identity.Grant. With keys of its
// own a sidecar accepts none.
func (t *Tokens) Grant(text string, now time.Time) (identity.Grant, error) {
	return t.keys.Load().VerifyGrant(text, now)
}

const (
	keysRetry   = time.Second // until there are keys
	keysRefresh = time.Minute // afterwards: how long a rotation takes to arrive
	keysTimeout = 2 * time.Second
)

// Follow takes the mesh's keys from the first source that hands them out (the node agent,
// then the control plane) and looks again every minute, until ctx ends; it returns nil.
// While nobody has keys to give, tokens are this sidecar's own: another sidecar that gets
// one asks the origin.
func (t *Tokens) Follow(ctx context.Context, sources ...pb.CoherenceClient) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for wait, told := keysRetry, false; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		keys, err := fetchKeys(ctx, sources)
		switch {
		case err == nil:
			if wait = keysRefresh; !keys.Same(t.keys.Load()) {
				t.keys.Store(keys)
				t.logger.Info("session tokens are signed with the mesh's keys", "keys", keys)
			}
		case !told && ctx.Err() == nil && !outrigger.IsKind(err, outrigger.Unavailable):
			told = true
			t.logger.Warn("no session keys of the mesh; tokens of this sidecar mean an origin read elsewhere", "error", err)
		}
		timer.Reset(wait)
	}
}

func fetchKeys(ctx context.Context, sources []pb.CoherenceClient) (keys *identity.Keys, err error) {
	ctx, cancel := context.WithTimeout(ctx, keysTimeout)
	defer cancel()
	err = outrigger.Errorf(outrigger.Unavailable, "nobody to ask for session keys")
	for _, s := range sources {
		var r *pb.SessionKeysResponse
		if r, err = s.SessionKeys(ctx, &pb.SessionKeysRequest{}); err == nil {
			return identity.ParseKeys(r.GetKeys())
		}
	}
	return nil, fromGRPC(err)
}

// unverified is the state of a token that says nothing to this sidecar.
const unverified = "unverified"

// request returns what a caller's reads in a session are held to.
func (t *Tokens) request(c caller, session string) (r cache.Request, state string) {
	r = cache.Request{Consistency: c.consistency, Declared: !c.explicit, Explain: c.explain}
	if c.token == "" {
		r.After, state = t.remembered(c.tenant, session), "none"
		if len(r.After) > 0 {
			r.Kept, state = true, "kept"
		}
		return r, state
	}
	token, err := t.keys.Load().Verify(c.token)
	if err == nil {
		r.After = token
		return r, "echoed"
	}
	if !c.explicit || c.consistency.Level != outrigger.Eventual {
		r.Consistency, r.Declared, r.SeenAll = outrigger.Consistency{Level: outrigger.Strong}, false, true
	}
	return r, unverified
}

// remembered returns what was seen in a session before the present table.
func (t *Tokens) remembered(tenant, session string) identity.Token {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.find(tenant + "/" + session)
	if k == nil {
		return nil
	}
	t.age(k)
	return k.prior
}

// age notices another table; the mutex is held.
func (t *Tokens) age(k *kept) {
	if now := t.era(); k.era != now {
		k.prior, k.era = k.token, now
	}
}

// find returns what is remembered under a name, as recently used; the mutex is held.
func (t *Tokens) find(name string) *kept {
	if k := t.recent[name]; k != nil {
		return k
	}
	k := t.past[name]
	if k != nil {
		t.put(name, k)
	}
	return k
}

func (t *Tokens) put(name string, k *kept) {
	if len(t.recent) >= maxKept {
		t.past, t.recent = t.recent, map[string]*kept{}
	}
	t.recent[name] = k
}

// mark at the end of a token makes it one that nobody can verify.
const mark = "~"

// saw remembers what a session was shown and returns the token to give out; "" for a
// session that has seen nothing.
func (t *Tokens) saw(c caller, session string, dots ...outrigger.Dot) string {
	var brought identity.Token
	if c.token != "" {
		var err error
		if brought, err = t.keys.Load().Verify(c.token); err != nil {
			t.note(c, session, nil, dots)
			if len(identity.Token{}.With(dots...)) == 0 {
				return ""
			}
			return strings.TrimSuffix(c.token, mark) + mark
		}
	}
	return t.note(c, session, brought, dots)
}

// sawAll is saw for dots that cover whatever the caller may have seen before.
func (t *Tokens) sawAll(c caller, session string, dots ...outrigger.Dot) string {
	if len(identity.Token{}.With(dots...)) == 0 {
		return ""
	}
	return t.note(c, session, nil, dots)
}

func (t *Tokens) note(c caller, session string, brought identity.Token, dots []outrigger.Dot) string {
	name := c.tenant + "/" + session
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.find(name)
	if k == nil {
		k = &kept{era: t.era()}
		defer func() {
			if len(k.token) > 0 {
				t.put(name, k)
			}
		}()
	}
	t.age(k)
	next := k.token.With(brought...).With(dots...)
	keys := t.keys.Load()
	if len(next) > 0 && (k.by != keys || len(k.token) == 0 || &next[0] != &k.token[0]) {
		k.token, k.by, k.text = next, keys, keys.Sign(next)
	}
	return k.text
}

// EncodeHTTP is the function EncodeHTTP with the token of having seen the variable, which
// is all there is to tell a caller that brings no token and wants no goroutine.
func (t *Tokens) EncodeHTTP(v *pb.Variable) []byte {
	return encodeHTTP(v, t.sign(v))
}

// shown adds the token, and the explanation when one was asked for, to an answer's
// headers.
func (c core) shown(md metadata.MD, who caller, session string, a cache.Answer, state string, seen ...outrigger.Dot) metadata.MD {
	saw := c.o.Tokens.saw
	if state == unverified && a.Consistency.Level == outrigger.Strong {
		saw = c.o.Tokens.sawAll
	}
	if text := saw(who, session, seen...); text != "" {
		md.Set(outrigger.HeaderToken, text)
	}
	if who.explain {
		md.Set(outrigger.HeaderExplain, explanation(a, who, state))
	}
	return md
}

// wrote is authorityHeaders with the token of having seen what the authority answered.
func (c core) wrote(who caller, session string, answer any, version *pb.Version) metadata.MD {
	md := authorityHeaders(version)
	if dots := wire.Seen(answer); session != "" && len(dots) > 0 {
		if text := c.o.Tokens.saw(who, session, dots...); text != "" {
			md.Set(outrigger.HeaderToken, text)
		}
	}
	return md
}

// explanation is one line of key=value pairs; why comes last, in double quotes.
func explanation(a cache.Answer, who caller, token string) string {
	var b strings.Builder
	add := func(key string, value any) { fmt.Fprintf(&b, "%s=%v ", key, value) }
	add("tier", a.Tier)
	if a.Found {
		add("version", a.Variable.GetVersion().GetCounter())
		add("dot", wire.Dot(a.Variable.GetVersion().GetDot()))
	}
	add("age_ms", milliseconds(a.Age))
	add("stale", a.Stale)
	if e := a.Explain; e != nil && e.Table {
		add("lease_ms", e.Lease.Milliseconds())
		add("incarnation", strconv.FormatUint(e.Incarnation, 16))
		add("applied", e.Applied)
		if e.Agent {
			add("head", e.Head)
			add("floor", e.Floor)
		}
	}
	source := "default"
	switch {
	case who.explicit:
		source = "request"
	case token == unverified:
		source = "token"
	case a.ByVariable:
		source = "variable"
	}
	add("consistency", a.Consistency)
	add("source", source)
	add("token", token)
	b.WriteString("why=" + strconv.QuoteToASCII(a.Why))
	return b.String()
}

// milliseconds rounds a bound up.
func milliseconds(d time.Duration) int64 {
	return int64((d + time.Millisecond - 1) / time.Millisecond)
}

// sessionOf names the session of a request to the authority.
func sessionOf(request any) (tenant, session string) {
	switch r := request.(type) {
	case *pb.GetSessionRequest:
		return wire.Tenant(r.GetTenant()), r.GetId()
	case *pb.RegisterRequest:
		return wire.Tenant(r.GetKey().GetTenant()), r.GetKey().GetSession()
	case interface{ GetSession() string }:
		t, _ := request.(interface{ GetTenant() string })
		return wire.Tenant(t.GetTenant()), r.GetSession()
	}
	return "", ""
}
