package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
)

// result is one row of bench/results/latest.json; the README beside it explains every
// field to readers. Pointers are null where a peer was not there.
type result struct {
	ID        string    `json:"id"`
	What      string    `json:"what"`
	Unit      string    `json:"unit"`
	Better    string    `json:"better"` // lower or higher
	Ours      float64   `json:"ours"`
	Peer      string    `json:"peer"`
	PeerValue *float64  `json:"peer_value"`
	Ratio     *float64  `json:"ratio"`
	Rounds    int       `json:"rounds"`
	Min       *float64  `json:"min"`
	Max       *float64  `json:"max"`
	Commit    string    `json:"commit"`
	Machine   string    `json:"machine,omitempty"`
	Bars      []verdict `json:"bars,omitempty"`
}

// newResult turns a summary into a row.
func newResult(r row, what, peer string, s summary) result {
	out := result{ID: r.id, What: what, Unit: r.unit, Better: r.better, Ours: figures(s.Ours), Peer: peer, Rounds: s.Kept}
	out.PeerValue, out.Ratio, out.Min, out.Max = optional(s.Peer), optional(s.Ratio), optional(s.Min), optional(s.Max)
	if s.Dropped > 0 {
		out.What += fmt.Sprintf("; %d noisy rounds dropped", s.Dropped)
	}
	if s.Foreign > maxForeign {
		out.What += fmt.Sprintf("; busy machine: other processes used up to %.0f %% of it", 100*s.Foreign)
	}
	return out
}

func optional(x float64) *float64 {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return nil
	}
	x = figures(x)
	return &x
}

// figures rounds to four significant digits; more would be noise.
func figures(x float64) float64 {
	if x == 0 || math.IsNaN(x) || math.IsInf(x, 0) {
		return x
	}
	unit := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(x))))
	return math.Round(x*unit) / unit
}

// merge replaces the rows of every id that was measured now and keeps all others. Rows
// come in the order of ids, unknown ids last; rows of one id keep their order.
func merge(old, fresh []result, order []string) []result {
	var out []result
	for _, r := range old {
		if !slices.ContainsFunc(fresh, func(f result) bool { return f.ID == r.ID }) {
			out = append(out, r)
		}
	}
	out = append(out, fresh...)
	rank := func(id string) int {
		if i := slices.Index(order, id); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortStableFunc(out, func(a, b result) int { return cmp.Compare(rank(a.ID), rank(b.ID)) })
	return out
}

// readResults reads a results file; one that does not exist is empty.
func readResults(path string) ([]result, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []result
	if err := json.Unmarshal(raw, &out); err != nil {
		return nil, fmt.Errorf("%s: %w; move it away to start anew", path, err)
	}
	return out, nil
}

// writeJSON replaces a file in one step.
func writeJSON(path string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// printTable shows rows to a person.
func printTable(w io.Writer, rows []result) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tOURS\tPEER\tTHEIRS\tUNIT\tRATIO\tRANGE\tBETTER\tROUNDS")
	for _, r := range rows {
		ratio, spread, theirs := "-", "-", "-"
		if r.PeerValue != nil {
			theirs = fmt.Sprintf("%.4g", *r.PeerValue)
		}
		if r.Ratio != nil && r.Min != nil && r.Max != nil {
			ratio, spread = fmt.Sprintf("%.3g", *r.Ratio), fmt.Sprintf("%.3g..%.3g", *r.Min, *r.Max)
		}
		fmt.Fprintf(t, "%s\t%.4g\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", r.ID, r.Ours, r.Peer, theirs, r.Unit, ratio, spread, r.Better, r.Rounds)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for i, r := range rows {
		if i == 0 || rows[i-1].ID != r.ID || rows[i-1].What != r.What {
			fmt.Fprintf(w, "%s (%s): %s\n", r.ID, r.Peer, r.What)
		}
		for _, v := range r.Bars {
			fmt.Fprintf(w, "%s bar: %s\n", r.ID, v)
		}
	}
	return nil
}
