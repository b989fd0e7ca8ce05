package identity

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func dot(region string, incarnation, position uint64) outrigger.Dot {
	return outrigger.Dot{Region: region, Incarnation: incarnation, Position: position}
}

func TestWith(t *testing.T) {
	base := Token{}.With(dot("eu", 1, 5), dot("us", 2, 7))
	for _, tt := range []struct {
		name string
		add  []outrigger.Dot
		want Token
	}{
		{"nothing", nil, base},
		{"an older position changes nothing", []outrigger.Dot{dot("eu", 1, 4)}, base},
		{"a newer one counts", []outrigger.Dot{dot("us", 2, 8)}, Token{dot("eu", 1, 5), dot("us", 2, 8)}},
		{"regions stay in order", []outrigger.Dot{dot("ap", 3, 1), dot("zz", 4, 1)}, Token{dot("ap", 3, 1), dot("eu", 1, 5), dot("us", 2, 7), dot("zz", 4, 1)}},
		{"another incarnation replaces, even with a lower position", []outrigger.Dot{dot("eu", 9, 1)}, Token{dot("eu", 9, 1), dot("us", 2, 7)}},
		{"what names no write is left out", []outrigger.Dot{dot("", 1, 1), dot("ap", 0, 1), dot("ap", 1, 0)}, base},
	} {
		if got := base.With(tt.add...); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if want := (Token{dot("eu", 1, 5), dot("us", 2, 7)}); !reflect.DeepEqual(base, want) {
		t.Errorf("With changed its receiver to %v", base)
	}
	full := Token{}
	for i := range MaxRegions + 3 {
		full = full.With(dot(fmt.Sprintf("r%02d", i), 1, 1))
	}
	if len(full) != MaxRegions {
		t.Errorf("a token has %d regions, the limit is %d", len(full), MaxRegions)
	}
	if got := full.With(dot("r00", 1, 9)); got[0].Position != 9 {
		t.Errorf("a full token does not move on: %v", got[0])
	}
	if _, err := NewKeys().Verify(NewKeys().Sign(full)); err == nil {
		t.Error("a token of other keys verifies")
	}
	keys := NewKeys()
	if got, err := keys.Verify(keys.Sign(full)); err != nil || !reflect.DeepEqual(got, full) {
		t.Errorf("the longest token does not come back: %v %v", got, err)
	}
}

func TestVerifyRefusesEveryChange(t *testing.T) {
	keys := NewKeys()
	text := keys.Sign(Token{}.With(dot("eu", 0xabcdef, 1234)))
	if strings.ContainsAny(text, "+/= \n") {
		t.Errorf("token %q cannot stand in a header or URL", text)
	}
	raw, _ := base64.RawURLEncoding.DecodeString(text)
	for i := range raw {
		for bit := range 8 {
			bad := bytes.Clone(raw)
			bad[i] ^= 1 << bit
			if _, err := keys.Verify(base64.RawURLEncoding.EncodeToString(bad)); !outrigger.IsKind(err, outrigger.Invalid) {
				t.Fatalf("bit %d of byte %d flipped: %v", bit, i, err)
			}
		}
	}
	for _, bad := range []string{"", "x", text[:len(text)-1], text + "A", text + "==", " " + text, strings.Repeat("A", MaxTokenBytes+1)} {
		if _, err := keys.Verify(bad); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%.20q verifies: %v", bad, err)
		}
	}
	// Signed, but not in the one form.
	for name, body := range map[string][]byte{
		"another version":      {2, 1, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 1},
		"no region":            {1, 0},
		"a number's long form": {1, 0x81, 0, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 1},
		"unordered":            {1, 2, 1, 'b', 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 1},
		"twice":                {1, 2, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 1},
		"more behind it":       {1, 1, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 1, 0},
		"cut":                  {1, 1, 1, 'a', 0, 0, 0},
		"position 0":           {1, 1, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 1, 0},
	} {
		signed := base64.RawURLEncoding.EncodeToString(keys.mac(body, 0, body))
		if got, err := keys.Verify(signed); err == nil {
			t.Errorf("%s: accepted as %v", name, got)
		}
	}
}

// The token of a fixed key is a golden text: other processes hold tokens across upgrades.
func TestFormIsFixed(t *testing.T) {
	keys, err := ParseKeys(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)))
	if err != nil {
		t.Fatal(err)
	}
	const want = "AQECZXUAAAAAAAAACtIJXCHQjn-law145WlL0FV2ug"
	if got := keys.Sign(Token{}.With(dot("eu", 10, 1234))); got != want {
		t.Errorf("signed as %s, want %s", got, want)
	}
}

func TestRotation(t *testing.T) {
	older, newer := NewKeys(), NewKeys()
	parse := func(text string) *Keys {
		t.Helper()
		k, err := ParseKeys(text)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	both, swapped := parse(older.Text()+newer.Text()), parse("# new first\n\n"+newer.Text()+older.Text())
	tok := Token{}.With(dot("eu", 1, 1))
	steps := []*Keys{older, both, swapped, newer}
	for i, at := range steps {
		// Neighbouring steps coexist while a change is rolled out.
		for _, peer := range steps[max(0, i-1):min(len(steps), i+2)] {
			if _, err := peer.Verify(at.Sign(tok)); err != nil {
				t.Errorf("step %d: a neighbour refuses its token: %v", i, err)
			}
		}
	}
	if _, err := newer.Verify(older.Sign(tok)); err == nil {
		t.Error("a removed key still verifies")
	}
	if both.Same(swapped) || !both.Same(parse(both.Text())) {
		t.Error("Same compares keys wrongly")
	}
	for _, bad := range []string{"", "# none", "not base64!", base64.StdEncoding.EncodeToString(make([]byte, 31)),
		base64.StdEncoding.EncodeToString(make([]byte, 65)), older.Text() + newer.Text() + NewKeys().Text()} {
		if _, err := ParseKeys(bad); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("keys %.12q: %v", bad, err)
		}
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data", "token.key")
	var wg sync.WaitGroup
	got := make([]*Keys, 8)
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = LoadOrCreateKeys(path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, k := range got {
		if !k.Same(got[0]) {
			t.Error("two processes that created the file hold different keys")
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", st.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".token-key-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateKeys(path); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a damaged file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "damaged" {
		t.Error("a damaged file was replaced")
	}
}

func TestKeysAreNotLogged(t *testing.T) {
	var out bytes.Buffer
	k := NewKeys()
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "keys", k)
	fmt.Fprint(&out, k)
	if secret := strings.TrimSpace(k.Text()); strings.Contains(out.String(), secret) || !strings.Contains(out.String(), "1 token keys") {
		t.Errorf("logged as %s", out.String())
	}
}

func FuzzVerify(f *testing.F) {
	keys, _ := ParseKeys(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)))
	f.Add([]byte{1, 1, 2, 'e', 'u', 0, 0, 0, 0, 0, 0, 0, 10, 4}, keys.Sign(Token{}.With(dot("eu", 10, 4), dot("us", 11, 1<<40))))
	f.Add([]byte{1, 0x80}, "")
	f.Fuzz(func(t *testing.T, body []byte, text string) {
		if tok, err := keys.Verify(text); err == nil && keys.Sign(tok) != text {
			t.Errorf("%q verifies and signs again as %q", text, keys.Sign(tok))
		}
		// What is signed and decodes must be the one form of a valid token.
		if tok, err := keys.Verify(base64.RawURLEncoding.EncodeToString(keys.mac(body, 0, body))); err == nil {
			if !bytes.Equal(encode(nil, tok), body) || !reflect.DeepEqual(Token{}.With(tok...), tok) {
				t.Errorf("%x decodes as %v", body, tok)
			}
		}
	})
}
