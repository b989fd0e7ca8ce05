package identity_test

import (
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// A grant opens what it names until it ends, for whoever has the key, and nothing else does.
func TestGrants(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	keys, others := identity.NewKeys(), identity.NewKeys()
	g := identity.Grant{Experiment: "ab", Arm: "treatment", Until: now.Add(time.Hour)}
	text, err := keys.SignGrant(g, now)
	if err != nil {
		t.Fatal(err)
	}
	got, err := keys.VerifyGrant(text, now)
	if err != nil || got.Experiment != "ab" || got.Arm != "treatment" || !got.Until.Equal(g.Until) {
		t.Fatalf("%+v, %v", got, err)
	}
	rotated, err := identity.ParseKeys(others.Text() + keys.Text())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rotated.VerifyGrant(text, now); err != nil {
		t.Errorf("while keys are rotated: %v", err)
	}
	token := keys.Sign(identity.Token{}.With(outrigger.Dot{Region: "eu", Incarnation: 1, Position: 5}))
	for name, c := range map[string]struct {
		text string
		keys *identity.Keys
		at   time.Time
	}{
		"other keys":      {text, others, now},
		"ended":           {text, keys, now.Add(time.Hour)},
		"changed":         {text[:len(text)-4] + "AAAA", keys, now},
		"cut off":         {text[:10], keys, now},
		"empty":           {"", keys, now},
		"a session token": {token, keys, now},
		"too long":        {strings.Repeat("A", 4096), keys, now},
	} {
		if g, err := c.keys.VerifyGrant(c.text, c.at); !outrigger.IsKind(err, outrigger.Unauthorised) || g != (identity.Grant{}) {
			t.Errorf("%s: %+v, %v", name, g, err)
		}
	}
	for name, bad := range map[string]identity.Grant{
		"no arm":   {Experiment: "ab", Until: now.Add(time.Hour)},
		"ended":    {Experiment: "ab", Arm: "x", Until: now},
		"for ever": {Experiment: "ab", Arm: "x", Until: now.Add(48 * time.Hour)},
	} {
		if _, err := keys.SignGrant(bad, now); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzVerifyGrant(f *testing.F) {
	keys := identity.NewKeys()
	now := time.Unix(1_800_000_000, 0)
	text, err := keys.SignGrant(identity.Grant{Experiment: "ab", Arm: "b", Until: now.Add(time.Minute)}, now)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add("AQJhYgFi")
	f.Fuzz(func(t *testing.T, s string) {
		if g, err := keys.VerifyGrant(s, now); err == nil && (s != text || g.Arm != "b") {
			t.Fatalf("%q was accepted: %+v", s, g)
		}
	})
}
