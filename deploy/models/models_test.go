package models_test

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy/models"
)

// TestMoves writes the whole relation down a second time: rows are where a version is,
// columns where it may go.
func TestMoves(t *testing.T) {
	order := models.States()
	want := map[models.State]string{ // registered validated shadow candidate production retired quarantined
		models.Registered:  "=++++++",
		models.Validated:   "+=+++++",
		models.Shadow:      "+-=++++",
		models.Candidate:   "+--=+-+",
		models.Production:  "+---=++",
		models.Retired:     "+----=-",
		models.Quarantined: "+----+=",
	}
	if len(want) != len(order) {
		t.Fatalf("%d states, want %d", len(order), len(want))
	}
	for from, row := range want {
		for i, to := range order {
			err := models.CheckMove("chat", "v1", from, to)
			if allowed := row[i] != '-'; allowed != (err == nil) {
				t.Errorf("%s to %s: %v, want allowed %v", from, to, err, allowed)
			}
			if err != nil && (!outrigger.IsKind(err, outrigger.Locked) || !strings.Contains(err.Error(), `"v1" of model "chat" is `+string(from)+" and cannot become "+string(to))) {
				t.Errorf("%s to %s: %v does not name the change", from, to, err)
			}
		}
	}
	if err := models.CheckMove("chat", "v1", models.Registered, "beloved"); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), "validated, shadow") {
		t.Errorf("unknown word: %v", err)
	}
	if models.Moves("beloved") != nil {
		t.Error("an unknown state has moves")
	}
}

// TestDigest hashes the documented bytes independently.
func TestDigest(t *testing.T) {
	c := models.Content{Upstream: "llama<3>", Parameters: map[string]string{"top_p": "1", "temperature": "0.2"}, Pins: map[string]int32{"prod/prompt": 4}}
	sum := sha256.Sum256([]byte(`{"artifact":"","parameters":[["temperature","0.2"],["top_p","1"]],"pins":[["prod/prompt",4]],"upstream":"llama<3>"}`))
	if want := "sha256:" + hex.EncodeToString(sum[:]); c.Digest() != want {
		t.Fatalf("digest %s, want %s", c.Digest(), want)
	}
	other := c
	seen := []string{c.Digest()}
	for name, edit := range map[string]func(){
		"upstream":   func() { other.Upstream = "x" },
		"artifact":   func() { other.Artifact = c.Digest() },
		"parameters": func() { other.Parameters = map[string]string{"temperature": "0.3", "top_p": "1"} },
		"pins":       func() { other.Pins = map[string]int32{"prod/prompt": 5} },
		// The same characters split elsewhere must not give the same bytes.
		"boundaries": func() { other.Parameters = map[string]string{"temperature": "0.2\",\"top_p", "1": ""} },
	} {
		other = c
		edit()
		if d := other.Digest(); slices.Contains(seen, d) {
			t.Errorf("%s does not change the digest", name)
		} else {
			seen = append(seen, d)
		}
	}
	if err := c.CheckExpected(c.Digest()); err != nil {
		t.Error(err)
	}
	if err := c.CheckExpected(seen[1]); !outrigger.IsKind(err, outrigger.Conflict) || !strings.Contains(err.Error(), c.Digest()) || !strings.Contains(err.Error(), seen[1]) {
		t.Errorf("mismatch: %v, want a conflict that names both digests", err)
	}
}

func TestCheck(t *testing.T) {
	many := map[string]string{}
	pins := map[string]int32{}
	for i := range models.MaxParameters + 1 {
		many["p"+strings.Repeat("x", i)] = ""
		pins["s/p"+strings.Repeat("x", i)] = 1
	}
	for _, c := range []struct {
		name, want string
		content    models.Content
	}{
		{"good", "", models.Content{Artifact: "sha256:" + strings.Repeat("0a", 32), Parameters: map[string]string{"t": "1"}, Pins: map[string]int32{"s/p": 0}}},
		{"artifact", `artifact "v1.bin" is not "sha256:"`, models.Content{Artifact: "v1.bin"}},
		{"artifact in capitals", "lower-case", models.Content{Artifact: "sha256:" + strings.Repeat("0A", 32)}},
		{"artifact too short", "64", models.Content{Artifact: "sha256:0a"}},
		{"parameters", "limit is 100", models.Content{Parameters: many}},
		{"parameter name", "parameters", models.Content{Parameters: map[string]string{"": "1"}}},
		{"parameter text", "UTF-8", models.Content{Parameters: map[string]string{"t": "\xff"}}},
		{"parameter size", "limit is 65536", models.Content{Parameters: map[string]string{"t": strings.Repeat("x", models.MaxParameterBytes)}}},
		{"pins", "limit is 100", models.Content{Pins: pins}},
		{"pin without a session", `"prompt" is not SESSION/NAME`, models.Content{Pins: map[string]int32{"prompt": 1}}},
		{"pin without a name", "pins name", models.Content{Pins: map[string]int32{"s/": 1}}},
		{"pin version", "is -1, allowed is 0 or more", models.Content{Pins: map[string]int32{"s/p": -1}}},
	} {
		err := c.content.Check()
		if c.want == "" && err != nil || c.want != "" && (!outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestParent(t *testing.T) {
	for entry, want := range map[string][2]string{"v1": {"chat", "v1"}, "base@v2": {"base", "v2"}} {
		if m, v := models.Parent("chat", entry); m != want[0] || v != want[1] {
			t.Errorf("%q is %s@%s, want %v", entry, m, v, want)
		}
	}
}
