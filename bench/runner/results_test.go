package main

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMerge(t *testing.T) {
	at := func(id, peer, what string) result { return result{ID: id, Peer: peer, What: what} }
	old := []result{at("b", "x", "old"), at("other", "x", "kept"), at("a", "x", "old"), at("a", "y", "old"), at("c", "x", "kept")}
	fresh := []result{at("b", "x", "new"), at("a", "x", "new"), at("a", "z", "new")}
	var got []string
	for _, r := range merge(old, fresh, []string{"a", "b", "c"}) {
		got = append(got, r.ID+r.Peer+" "+r.What)
	}
	want := []string{"ax new", "az new", "bx new", "cx kept", "otherx kept"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFigures(t *testing.T) {
	for in, want := range map[float64]float64{0: 0, 123456: 123500, 1.23456: 1.235, 0.000123456: 0.0001235, -9876.5: -9877, 9.9999: 10} {
		if got := figures(in); math.Abs(got-want) > math.Abs(want)*1e-12 {
			t.Errorf("%v became %v, want %v", in, got, want)
		}
	}
}

// The fields of a row are a contract with whoever reads the file.
func TestResultFields(t *testing.T) {
	r := row{id: "cache.x", unit: "ns", better: "lower"}
	full := newResult(r, "what", "peer", summary{Ours: 1, Peer: 2, Ratio: 0.5, Min: 0.4, Max: 0.6, Kept: 5})
	full.Commit = "c"
	raw, err := json.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"id":"cache.x","what":"what","unit":"ns","better":"lower","ours":1,"peer":"peer","peer_value":2,"ratio":0.5,"rounds":5,"min":0.4,"max":0.6,"commit":"c"}`
	if string(raw) != want {
		t.Errorf("got  %s\nwant %s", raw, want)
	}
	nan := math.NaN()
	missing := newResult(r, "what", "peer", summary{Ours: 1, Peer: nan, Ratio: nan, Min: nan, Max: nan, Kept: 1, Dropped: 2, Foreign: 0.4})
	if raw, err = json.Marshal(missing); err != nil || !strings.Contains(string(raw), `"peer_value":null,"ratio":null`) {
		t.Errorf("%s, %v", raw, err)
	}
	if missing.What != "what; 2 noisy rounds dropped; busy machine: other processes used up to 40 % of it" {
		t.Errorf("what is %q", missing.What)
	}
}

func TestResultsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "latest.json")
	if rows, err := readResults(path); err != nil || rows != nil {
		t.Errorf("a missing file: %v, %v", rows, err)
	}
	x := 2.5
	want := []result{{ID: "a", Ours: 1.25, Peer: "p", PeerValue: &x}, {ID: "b"}}
	if err := writeJSON(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := readResults(path)
	if err != nil || len(got) != 2 || *got[0].PeerValue != x || got[1].PeerValue != nil {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.WriteFile(path, []byte("[{]"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readResults(path); err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Errorf("a damaged file: %v", err)
	}
}

func TestTable(t *testing.T) {
	x, y := 2.0, 0.5
	var b strings.Builder
	err := printTable(&b, []result{
		{ID: "a", What: "first", Ours: 1, Peer: "p", PeerValue: &x, Ratio: &y, Min: &y, Max: &y, Unit: "ns", Better: "lower", Rounds: 5},
		{ID: "a", What: "first", Ours: 1, Peer: "gone", Unit: "ns", Better: "lower", Rounds: 5}})
	want := `ID  OURS  PEER  THEIRS  UNIT  RATIO  RANGE     BETTER  ROUNDS
a   1     p     2       ns    0.5    0.5..0.5  lower   5
a   1     gone  -       ns    -      -         lower   5

a (p): first
`
	if err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
}
