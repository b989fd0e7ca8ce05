//go:build !dataplane

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// What README and ARCHITECTURE tell a stranger to type is there: verbs, their flags, the targets
// of make, tests that are named, and files of this tree.
func TestCommandsOfDocs(t *testing.T) {
	d := newDocs(t)
	checked := 0
	for _, name := range []string{"README.md", "ARCHITECTURE.md", filepath.Join("bench", "results", "README.md")} {
		raw, err := os.ReadFile(filepath.Join("..", "..", name))
		must(t, err)
		for _, code := range codeOf(string(raw)) {
			for _, wrong := range d.check(code) {
				t.Errorf("%s: %q: %s", name, code, wrong)
			}
			checked++
		}
	}
	if checked < 300 {
		t.Errorf("only %d pieces of code were found; is the reading of them broken?", checked)
	}
}

// Each kind of offence is found, and what is right is not.
func TestDocsCanBeWrong(t *testing.T) {
	d := newDocs(t)
	for code, wrong := range map[string]string{
		"bin/outrigger cotrol --data ./data":                             "no verb cotrol",
		"outrigger var gett shop/temperature":                            "no verb gett",
		"bin/outrigger control --data ./data --adopt":                    "control has no flag --adopt",
		"setpriv --reuid 1337 outrigger sidecar --reuid 1":               "sidecar has no flag --reuid",
		"sidecar --model-max-bodies 1":                                   "sidecar has no flag --model-max-bodies",
		"--no-such-flag":                                                 "no verb has a flag --no-such-flag",
		"D=$(bin/outrigger model artefact push weights.bin)":             "no verb artefact",
		"outrigger optimizer register a:9 && bin/outrigger optimizer l":  "no verb l",
		"outrigger top -z":                                               "top has no flag -z",
		"make flat":                                                      "make has no target flat",
		"go test ./cmd/outrigger -run NoSuchTest":                        "no test of ./cmd/outrigger is called NoSuchTest",
		"control/canaries.go":                                            "is not in this tree",
		"make bench BENCH=proxy":                                         "",
		"outrigger VERB --help":                                          "",
		"control --artifacts":                                            "",
		"control/canary.go":                                              "",
		"bin/outrigger model register chat v1 --endpoint a # --comment":  "",
		"outrigger cache dump --session shop --server unix:./agent.sock": "",
	} {
		got := d.check(code)
		if wrong == "" && len(got) > 0 || wrong != "" && !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, wrong) }) {
			t.Errorf("%q: found %q, want %q", code, got, wrong)
		}
	}
}

// docs is what documentation may name.
type docs struct {
	root    *cobra.Command
	targets []string // of make
}

func newDocs(t *testing.T) *docs {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("..", "..", "Makefile"))
	must(t, err)
	d := &docs{root: Main{}.command()}
	for _, m := range regexp.MustCompile(`(?m)^([a-z-]+):`).FindAllStringSubmatch(string(raw), -1) {
		d.targets = append(d.targets, m[1])
	}
	d.root.InitDefaultCompletionCmd()
	return d
}

// codeOf returns the lines of code blocks, those that go on as one, and code spans.
func codeOf(text string) (out []string) {
	fenced := false
	var prose strings.Builder
	text = strings.ReplaceAll(text, "\\\n", " ")
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "```"):
			fenced = !fenced
		case fenced:
			out = append(out, strings.TrimSpace(line))
		default:
			prose.WriteString(line)
		}
	}
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(prose.String(), -1) {
		out = append(out, m[1])
	}
	return out
}

var (
	commandEnds = regexp.MustCompile(`\s#.*|&&|[;|)]`)
	longFlag    = regexp.MustCompile(`^\[?--([a-z][a-z0-9-]*)`)
	shortFlag   = regexp.MustCompile(`^-([a-z])$`)
	treePath    = regexp.MustCompile(`^(proxy|xds|control|cache|region|experiments|deploy|bench|api|cmd|internal)/[a-z0-9_./-]*[a-z0-9]$`)
)

// check says what is wrong with one line or span of code.
func (d *docs) check(code string) (wrong []string) {
	for _, part := range commandEnds.Split(code, -1) {
		words := strings.Fields(part)
		if len(words) == 0 {
			continue
		}
		if i := slices.IndexFunc(words, func(w string) bool { return w == "outrigger" || strings.HasSuffix(w, "bin/outrigger") }); i >= 0 {
			wrong = append(wrong, d.command(words[i+1:], true)...)
			continue
		}
		switch first := words[0]; {
		case first == "make":
			for _, w := range words[1:] {
				if strings.Contains(w, `="`) {
					break // one setting to the end
				}
				if !strings.Contains(w, "=") && !slices.Contains(d.targets, w) {
					wrong = append(wrong, "make has no target "+w)
				}
			}
		case first == "go" && len(words) > 4 && words[1] == "test" && words[3] == "-run":
			wrong = append(wrong, testNamed(words[2], words[4])...)
		case longFlag.MatchString(first):
			for _, w := range words {
				if m := longFlag.FindStringSubmatch(w); m != nil && !anyFlag(d.root, m[1]) {
					wrong = append(wrong, "no verb has a flag --"+m[1])
				}
			}
		case d.verb(first) != nil:
			wrong = append(wrong, d.command(words, false)...)
		case len(words) == 1 && treePath.MatchString(first):
			if !slices.ContainsFunc([]string{".", "cache", "xds"}, func(dir string) bool { // what stands in a row of the map about dir
				_, err := os.Stat(filepath.Join("..", "..", dir, filepath.FromSlash(first)))
				return err == nil
			}) {
				wrong = append(wrong, "is not in this tree")
			}
		}
	}
	return wrong
}

func (d *docs) verb(name string) *cobra.Command { return subverb(d.root, name) }

func subverb(c *cobra.Command, name string) *cobra.Command {
	for _, sub := range c.Commands() {
		if sub.Name() == name || sub.HasAlias(name) {
			return sub
		}
	}
	return nil
}

// command checks the words behind the program's name. Words in a sentence may go on with
// something else than a command, so there only flags are looked at.
func (d *docs) command(words []string, whole bool) (wrong []string) {
	c := d.root
	for len(words) > 0 {
		sub := subverb(c, words[0])
		if sub == nil {
			break
		}
		c, words = sub, words[1:]
	}
	takesNoWords := c.HasSubCommands() && !strings.Contains(c.Use, " ")
	if whole && len(words) > 0 && takesNoWords && regexp.MustCompile(`^[a-z][a-z-]*$`).MatchString(words[0]) {
		return []string{"no verb " + words[0]}
	}
	if c == d.root {
		return nil // VERB, or the program's own words
	}
	for _, w := range words {
		if m := longFlag.FindStringSubmatch(w); m != nil && flagOf(c, m[1]) == nil && m[1] != "help" && !(!whole && anyFlag(c, m[1])) {
			wrong = append(wrong, c.Name()+" has no flag --"+m[1])
		}
		if m := shortFlag.FindStringSubmatch(w); m != nil && c.Flags().ShorthandLookup(m[1]) == nil && c.InheritedFlags().ShorthandLookup(m[1]) == nil && m[1] != "h" {
			wrong = append(wrong, c.Name()+" has no flag -"+m[1])
		}
	}
	return wrong
}

func flagOf(c *cobra.Command, name string) *pflag.Flag {
	if f := c.Flags().Lookup(name); f != nil {
		return f
	}
	if f := c.PersistentFlags().Lookup(name); f != nil {
		return f
	}
	return c.InheritedFlags().Lookup(name)
}

// anyFlag reports whether c or a verb below it has the flag.
func anyFlag(c *cobra.Command, name string) bool {
	return flagOf(c, name) != nil || name == "help" || slices.ContainsFunc(c.Commands(), func(sub *cobra.Command) bool { return anyFlag(sub, name) })
}

// testNamed looks for a test whose name matches, in the files of a package.
func testNamed(pkg, name string) []string {
	files, _ := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(strings.TrimPrefix(pkg, "./")), "*_test.go")) // the pattern is well-formed
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return []string{err.Error()}
		}
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)`).FindAllStringSubmatch(string(raw), -1) {
			if strings.Contains(m[1], name) {
				return nil
			}
		}
	}
	return []string{"no test of " + pkg + " is called " + name}
}
