package outrigger_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
)

// wantError fails unless err has the kind and contains text.
func wantError(t *testing.T, err error, kind outrigger.Kind, text string) {
	t.Helper()
	if err == nil || !outrigger.IsKind(err, kind) || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v (%s), want %s with %q", err, outrigger.KindOf(err), kind, text)
	}
}

func TestParseKey(t *testing.T) {
	long := strings.Repeat("n", outrigger.MaxNameBytes)
	good := []struct {
		text string
		want outrigger.Key
	}{
		{"s/n", outrigger.Key{Tenant: "default", Session: "s", Name: "n"}},
		{"t/s/n", outrigger.Key{Tenant: "t", Session: "s", Name: "n"}},
		{"t/ s/n ", outrigger.Key{Tenant: "t", Session: " s", Name: "n "}}, // spaces are the caller's business
		{"mandant/größe/日本", outrigger.Key{Tenant: "mandant", Session: "größe", Name: "日本"}},
		{long + "/" + long + "/" + long, outrigger.Key{Tenant: long, Session: long, Name: long}},
	}
	for _, c := range good {
		k, err := outrigger.ParseKey(c.text)
		if err != nil || k != c.want {
			t.Errorf("%.20q: %v, %v", c.text, k, err)
		}
		if again, err := outrigger.ParseKey(k.String()); err != nil || again != k {
			t.Errorf("%.20q: its text form is read as %v, %v", c.text, again, err)
		}
	}
	bad := []struct{ text, want string }{
		{"", `key "" has 1 parts; write tenant/session/name or session/name`},
		{"n", `key "n" has 1 parts`},
		{"a/b/c/d/e", `key "a/b/c/d/e" has 5 parts`},
		{"/n", "session is empty; give 1 to 256 bytes"},
		{"s/", "name is empty"},
		{"/s/n", "tenant is empty"},
		{long + "x/s/n", "tenant is 257 bytes long, the limit is 256; shorten it"},
		{"t/s\n/n", `session "s\n" contains '\n'; control characters and '/' are not allowed`},
		{"t/s/\x7f", `contains '\x7f'`},
		{"t/s/\u0085", `contains '\u0085'`}, // a C1 control, which terminals obey too
		{"t/s/\xff", `name "\xff" is not valid UTF-8`},
		{strings.Repeat("/", 1<<20), "has 1048577 parts"},
	}
	for _, c := range bad {
		k, err := outrigger.ParseKey(c.text)
		wantError(t, err, outrigger.Invalid, c.want)
		if k != (outrigger.Key{}) {
			t.Errorf("%.20q: an error came with the key %v", c.text, k)
		}
		if err != nil && len(err.Error()) > 1500 {
			t.Errorf("%.20q: the error has %d bytes", c.text, len(err.Error()))
		}
	}
}

// FuzzParseKey: an accepted key is valid, printable and its text form reads back.
func FuzzParseKey(f *testing.F) {
	for _, s := range []string{"s/n", "t/s/n", "a/b/c/d", "/", "t/\x00/n", "t/s/\xff", "ß/日/本"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		k, err := outrigger.ParseKey(s)
		if err != nil {
			if !outrigger.IsKind(err, outrigger.Invalid) || !utf8.ValidString(err.Error()) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		if err := k.Validate(); err != nil {
			t.Fatalf("%q was accepted but %v", s, err)
		}
		text := k.String()
		if !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) || strings.Count(text, "/") != 2 {
			t.Fatalf("%q became %q", s, text)
		}
		if again, err := outrigger.ParseKey(text); err != nil || again != k {
			t.Fatalf("%q: %q is read as %v, %v", s, text, again, err)
		}
	})
}

func TestConsistency(t *testing.T) {
	good := []struct {
		text, canonical string
		want            outrigger.Consistency
	}{
		{"", "session", outrigger.Consistency{}},
		{"session", "session", outrigger.Consistency{Level: outrigger.SessionLevel}},
		{"strong", "strong", outrigger.Consistency{Level: outrigger.Strong}},
		{"eventual", "eventual", outrigger.Consistency{Level: outrigger.Eventual}},
		{"bounded(500ms)", "bounded(500ms)", outrigger.Consistency{Level: outrigger.Bounded, MaxAge: 500 * time.Millisecond}},
		{"bounded(1m0.5s)", "bounded(1m0.5s)", outrigger.Consistency{Level: outrigger.Bounded, MaxAge: 60500 * time.Millisecond}},
		{"bounded(0.000001s)", "bounded(1µs)", outrigger.Consistency{Level: outrigger.Bounded, MaxAge: time.Microsecond}},
	}
	for _, c := range good {
		got, err := outrigger.ParseConsistency(c.text)
		if err != nil || got != c.want || got.String() != c.canonical {
			t.Errorf("%q: %v (%+v), %v", c.text, got, got, err)
		}
		if again, err := outrigger.ParseConsistency(got.String()); err != nil || again != got {
			t.Errorf("%q: %q is read as %v, %v", c.text, got, again, err)
		}
	}
	for _, text := range []string{"Strong", " strong", "bounded", "bounded()", "bounded(0s)", "bounded(-1s)", "bounded(5)",
		"bounded(1s", "bounded(1s) ", "bounded(300000000h)", "linearizable", strings.Repeat("x", 1<<20), "\xff"} {
		got, err := outrigger.ParseConsistency(text)
		wantError(t, err, outrigger.Invalid, "is not one of strong, session, bounded(<duration>), eventual")
		if got != (outrigger.Consistency{}) {
			t.Errorf("%.20q: an error came with %v", text, got)
		}
		if err != nil && len(err.Error()) > 400 {
			t.Errorf("%.20q: the error has %d bytes", text, len(err.Error()))
		}
	}
}

// The words are read by clients and stored in metrics: they never change.
func TestWords(t *testing.T) {
	tiers := map[outrigger.Tier]string{outrigger.TierNone: "none", outrigger.TierProcess: "process",
		outrigger.TierNode: "node", outrigger.TierOrigin: "origin", 99: "none"}
	for tier, want := range tiers {
		if tier.String() != want {
			t.Errorf("tier %d is %q, want %q", tier, tier, want)
		}
	}
	if !(outrigger.TierProcess < outrigger.TierNode && outrigger.TierNode < outrigger.TierOrigin) {
		t.Error("tiers are not ordered from nearest to farthest")
	}
	kinds := map[outrigger.Kind]string{
		outrigger.Internal: "internal", outrigger.Invalid: "invalid", outrigger.NotFound: "not_found",
		outrigger.Exists: "exists", outrigger.Conflict: "conflict", outrigger.Locked: "locked",
		outrigger.Denied: "denied", outrigger.Unauthorised: "unauthorised", outrigger.Exhausted: "exhausted",
		outrigger.Unavailable: "unavailable", outrigger.Unknown: "unknown_outcome", outrigger.Stale: "stale",
		outrigger.Cancelled: "cancelled", outrigger.Timeout: "timeout",
	}
	for _, k := range outrigger.Kinds() {
		if k.String() != kinds[k] {
			t.Errorf("kind %d is %q, want %q", k, k, kinds[k])
		}
	}
	if len(outrigger.Kinds()) != len(kinds) {
		t.Errorf("%d kinds, want %d", len(outrigger.Kinds()), len(kinds))
	}
	if got := outrigger.Kind(200).String(); got != "kind(200)" {
		t.Errorf("an unknown kind is %q", got)
	}
	types := fmt.Sprint(outrigger.Types())
	if types != "[float integer string boolean choice module embedding tensor map list]" {
		t.Errorf("types are %s", types)
	}
}

// Clients of the bridge recognise these errors by their texts.
func TestErrorTexts(t *testing.T) {
	mismatch := outrigger.ErrVersionMismatch(7)
	cases := []struct {
		err  *outrigger.Error
		kind outrigger.Kind
		want string
	}{
		{outrigger.ErrSessionNotFound("s"), outrigger.NotFound, "Session not found: s"},
		{outrigger.ErrVariableNotFound("x"), outrigger.NotFound, "Variable not found: x"},
		{mismatch, outrigger.Conflict, "version_mismatch: current=7"},
	}
	for _, c := range cases {
		if c.err.Kind != c.kind || c.err.Error() != c.want {
			t.Errorf("%s: %s", c.err.Kind, c.err)
		}
	}
	if mismatch.Current != 7 {
		t.Errorf("current is %d", mismatch.Current)
	}
}

func TestErrorChain(t *testing.T) {
	cause := errors.New("disk full")
	err := outrigger.Wrap(outrigger.Unavailable, cause, "append")
	outer := fmt.Errorf("set x: %w", err)
	if err.Error() != "append: disk full" || !errors.Is(outer, cause) {
		t.Errorf("%v", err)
	}
	if outrigger.KindOf(outer) != outrigger.Unavailable || !outrigger.IsKind(outer, outrigger.Unavailable) || outrigger.IsKind(outer, outrigger.Internal) {
		t.Errorf("kind of %v is %s", outer, outrigger.KindOf(outer))
	}
	// The outermost kind wins: whoever wraps knows what the failure means to the caller.
	if again := outrigger.Wrap(outrigger.Unknown, outer, "commit"); outrigger.KindOf(again) != outrigger.Unknown {
		t.Errorf("kind of %v is %s", again, outrigger.KindOf(again))
	}
	if outrigger.Wrap(outrigger.Invalid, nil, "x") != nil {
		t.Error("a wrapped nil is not nil")
	}
	// An error that nobody classified is ours, but it is no Error of kind Internal.
	if outrigger.KindOf(cause) != outrigger.Internal || outrigger.IsKind(cause, outrigger.Internal) || outrigger.IsKind(nil, outrigger.Internal) {
		t.Error("a plain error is classified wrongly")
	}
}

func TestDot(t *testing.T) {
	d := outrigger.Dot{Region: "eu", Incarnation: 0xabc, Position: 12}
	if d.String() != "eu@abc:12" || d.IsZero() || !(outrigger.Dot{}).IsZero() {
		t.Errorf("%s, zero %v", d, d.IsZero())
	}
}

func TestSessionExpiry(t *testing.T) {
	used := time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)
	for ttl, want := range map[time.Duration]time.Time{
		0:               used.Add(time.Hour),
		5 * time.Minute: used.Add(5 * time.Minute),
	} {
		if got := (outrigger.Session{TTL: ttl, LastUsedAt: used}).ExpiresAt(); !got.Equal(want) {
			t.Errorf("ttl %s: expires at %s, want %s", ttl, got, want)
		}
	}
}
