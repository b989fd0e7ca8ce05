//go:build !dataplane

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// README's list of verbs is that of --help, and every verb has help and JSON.
func TestVerbsOfReadme(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	must(t, err)
	_, text, ok := strings.Cut(string(raw), "## The verbs\n")
	text, _, ok2 := strings.Cut(text, "\n## ")
	if !ok || !ok2 {
		t.Fatal("README has no section The verbs")
	}
	var listed []string
	name := regexp.MustCompile("`([a-z]+)`")
	for line := range strings.Lines(text) {
		if cell, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " |"); ok && strings.HasPrefix(line, "| `") {
			for _, m := range name.FindAllStringSubmatch(cell, -1) {
				listed = append(listed, m[1])
			}
		}
	}
	var helped []string
	for _, c := range (Main{}).command().Commands() {
		if !c.Hidden && c.GroupID != "" {
			helped = append(helped, c.Name())
		}
	}
	slices.Sort(listed)
	slices.Sort(helped)
	if len(helped) < 20 || !slices.Equal(listed, helped) {
		t.Errorf("README lists %v\n--help lists %v", listed, helped)
	}
	for _, verb := range helped {
		var out, errs bytes.Buffer
		code := Main{Stdout: &out, Stderr: &errs}.Run(t.Context(), []string{verb, "--help"})
		if help := out.String(); code != 0 || errs.Len() != 0 || !strings.Contains(help, "Usage:") || !strings.Contains(help, "--output") {
			t.Errorf("%s --help: exit code %d\n%s%s", verb, code, help, &errs)
		}
	}
}
