package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/outrigger-mesh/outrigger"
)

type settings struct {
	listen   string
	lease    time.Duration
	fallback []string
	labels   map[string]string
}

func flags() (*pflag.FlagSet, *settings) {
	s := &settings{}
	fs := pflag.NewFlagSet("sidecar", pflag.ContinueOnError)
	fs.StringVar(&s.listen, "listen", "127.0.0.1:1", "")
	fs.DurationVar(&s.lease, "feed-lease", time.Second, "")
	fs.StringSliceVar(&s.fallback, "fallback", nil, "")
	fs.StringToStringVar(&s.labels, "labels", nil, "")
	return fs, s
}

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

var sections = []string{"control", "sidecar"}

// Flag beats environment beats file beats default, setting by setting.
func TestPrecedence(t *testing.T) {
	fs, s := flags()
	if err := fs.Parse([]string{"--listen", "flag:1"}); err != nil {
		t.Fatal(err)
	}
	src := Source{
		Path: write(t, "sidecar:\n  listen: file:1\n  feed-lease: 2s\n  fallback: [a:1, b:2]\n  labels: {zone: z1}\ncontrol: {}\n"),
		Environ: []string{"OUTRIGGER_SIDECAR_LISTEN=env:1", "OUTRIGGER_SIDECAR_FEED_LEASE=3s",
			"OUTRIGGER_CONTROL_ANYTHING=not ours", "PATH=/bin"},
		Sections: sections,
	}
	if err := src.Apply(fs, "sidecar"); err != nil {
		t.Fatal(err)
	}
	if s.listen != "flag:1" || s.lease != 3*time.Second || strings.Join(s.fallback, "|") != "a:1|b:2" || s.labels["zone"] != "z1" {
		t.Fatalf("got %+v", s)
	}
}

// Every mistake is refused, naming place and key.
func TestMistakes(t *testing.T) {
	f := func(file string, env []string, want string) {
		t.Helper()
		fs, _ := flags()
		err := Source{Path: write(t, file), Environ: env, Sections: sections}.Apply(fs, "sidecar")
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q %v: got %v, want %q", file, env, err, want)
		}
	}
	f("sidecar:\n  lissen: x\n", nil, `:2: unknown setting sidecar.lissen`)
	f("sidecars:\n  listen: x\n", nil, `:1: unknown section "sidecars"`)
	f("sidecar:\n  feed-lease: soon\n", nil, `sidecar.feed-lease`)
	f("sidecar:\n  listen: a\n  listen: b\n", nil, `listen`)
	f("sidecar: 3\n", nil, `must be a mapping`)
	f("- a\n", nil, `must map sections`)
	f("sidecar:\n  fallback: [[a]]\n", nil, `list items`)
	f("{", nil, `c.yaml`)
	f("", []string{"OUTRIGGER_SIDECAR_LISSEN=x"}, "OUTRIGGER_SIDECAR_LISSEN")
	f("", []string{"OUTRIGGER_SIDECAR_FEED_LEASE=x"}, "OUTRIGGER_SIDECAR_FEED_LEASE")
	fs, _ := flags()
	if err := (Source{Path: "/does/not/exist.yaml"}).Apply(fs, "sidecar"); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("missing file: %v", err)
	}
}

// FuzzParse: any bytes give sections or an error of kind Invalid, never a panic.
func FuzzParse(f *testing.F) {
	f.Add([]byte("sidecar:\n  listen: x\n"))
	f.Add([]byte("sidecar: &a {b: *a}\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := parse("f", raw, sections); err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
			t.Fatalf("unexpected kind: %v", err)
		}
	})
}
