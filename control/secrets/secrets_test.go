package secrets

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/identity/identitytest"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

func write(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, raw := range files {
		// As tools that care do: whole or not at all.
		tmp := filepath.Join(dir, "."+name+".tmp")
		if err := errors.Join(os.WriteFile(tmp, raw, 0o600), os.Rename(tmp, filepath.Join(dir, name))); err != nil {
			t.Fatal(err)
		}
	}
}

func names(s *Set) string {
	var res translate.Resources
	for name, m := range s.Secrets {
		res.Put("x", name, m)
	}
	return strings.Join(res.Names("x"), " ")
}

// What files are good for, and what is said of those that are not.
func TestWhatFilesSay(t *testing.T) {
	ca := identitytest.NewCA("ca")
	a, b := ca.Issue("a.example"), ca.Issue("b.example")
	now := time.Now()
	ended := ca.IssueFor(now.Add(-2*time.Hour), now.Add(-time.Hour), "a.example")
	soon := ca.IssueFor(now.Add(-2*time.Hour), now.Add(time.Hour), "a.example")
	for _, c := range []struct {
		name    string
		files   map[string][]byte
		secrets string // names
		problem string // severity and the beginning of the text of the first
	}{
		{"a pair and a bundle", map[string][]byte{"a.crt": a.Chain, "a.key": a.Key, "corp.ca": ca.PEM, "README": []byte("x")}, "ca/corp certificate/a", ""},
		{"no pair", map[string][]byte{"a.crt": a.Chain, "a.key": b.Key}, "", "high certificate a: the certificate and the key are not a pair"},
		{"no key", map[string][]byte{"a.crt": a.Chain}, "", "high there is a.crt and no a.key"},
		{"no certificate", map[string][]byte{"a.key": a.Key}, "", "high there is a.key and no a.crt"},
		{"swapped", map[string][]byte{"a.crt": a.Key, "a.key": a.Chain}, "", `high certificate a holds a "PRIVATE KEY"`},
		{"over", map[string][]byte{"a.crt": ended.Chain, "a.key": ended.Key}, "", "high it ended at"},
		{"nearly over", map[string][]byte{"a.crt": soon.Chain, "a.key": soon.Key}, "certificate/a", "medium it ends at"},
		{"garbage", map[string][]byte{"corp.ca": []byte("hello")}, "", "high trust bundle corp: no certificate in PEM"},
		{"a key in a bundle", map[string][]byte{"corp.ca": append(append([]byte{}, ca.PEM...), a.Key...)}, "", `high trust bundle corp holds a "PRIVATE KEY"`},
		{"too large", map[string][]byte{"corp.ca": make([]byte, 1<<20+1)}, "", "high trust bundle corp is 1048577 bytes, the limit is 1048576"},
		{"nothing", nil, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, c.files)
			w, err := Open(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if got := names(w.Set()); got != c.secrets {
				t.Errorf("secrets %q, want %q", got, c.secrets)
			}
			said := ""
			for _, p := range w.Set().Problems {
				said += p.Severity + " " + strings.TrimPrefix(p.Text, "invalid: ") + "\n"
			}
			if !strings.Contains(said, strings.SplitN(c.problem+" ", " ", 2)[0]) || !strings.Contains(said, strings.TrimSpace(strings.SplitN(c.problem+" ", " ", 2)[1])) || c.problem == "" && said != "" {
				t.Errorf("problems %q, want %q", said, c.problem)
			}
			if strings.Contains(said, "BEGIN") || strings.Contains(said, dir) {
				t.Errorf("problems tell what is in the files: %q", said)
			}
		})
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none"), Options{}); err == nil {
		t.Error("a directory that is not there was opened")
	}
}

// A broken file never replaces a good one, and is told of at the second look; files that go
// take the secret with them. Equal files are equal resources in another process.
func TestBrokenNeverReplacesGood(t *testing.T) {
	ca := identitytest.NewCA("ca")
	a, b := ca.Issue("a.example"), ca.Issue("b.example")
	now := time.Now()
	look := func(was *Set, files map[string][]byte) *Set {
		in := map[string]file{}
		for name, raw := range files {
			in[name] = file{name: name, raw: raw, mode: 0o600}
		}
		return next(was, in, now)
	}
	first := look(nil, map[string][]byte{"a.crt": a.Chain, "a.key": a.Key})
	if names(first) != "certificate/a" || !look(first, map[string][]byte{"a.crt": a.Chain, "a.key": a.Key}).Secrets.Same(first.Secrets) {
		t.Fatalf("%+v", first.Problems)
	}
	half := look(first, map[string][]byte{"a.crt": b.Chain, "a.key": a.Key}) // its key comes a moment later
	if len(half.Problems) != 0 || !half.Secrets.Same(first.Secrets) {
		t.Fatalf("half of a rotation: %+v", half.Problems)
	}
	half = look(half, map[string][]byte{"a.crt": b.Chain, "a.key": a.Key})
	if p := half.Problems; len(p) != 1 || !strings.Contains(p[0].Text, "not a pair; the one before stays in use") || !half.Secrets.Same(first.Secrets) {
		t.Fatalf("half of a rotation for good: %+v", p)
	}
	whole := look(half, map[string][]byte{"a.crt": b.Chain, "a.key": b.Key})
	if len(whole.Problems) != 0 || names(whole) != "certificate/a" || whole.Secrets.Same(first.Secrets) {
		t.Fatalf("the rotation was not taken: %+v", whole.Problems)
	}
	if other := look(nil, map[string][]byte{"a.crt": b.Chain, "a.key": b.Key}); !other.Secrets.Same(whole.Secrets) {
		t.Fatal("another replica with the same files has another secret")
	}
	if gone := look(whole, nil); len(gone.Secrets) != 0 {
		t.Fatal("its files are gone, and the secret is not")
	}
}

// A Kubernetes mount is swapped as a whole, by a link, and the watch follows it.
func TestKubernetesMount(t *testing.T) {
	ca := identitytest.NewCA("ca")
	dir := t.TempDir()
	mount := func(version string, c identitytest.Certificate) {
		data := filepath.Join(dir, version)
		if err := os.Mkdir(data, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, data, map[string][]byte{"a.crt": c.Chain, "a.key": c.Key})
		tmp := filepath.Join(dir, "..data_tmp")
		if err := errors.Join(os.Symlink(version, tmp), os.Rename(tmp, filepath.Join(dir, "..data"))); err != nil {
			t.Fatal(err)
		}
	}
	mount("..one", ca.Issue("a.example"))
	for _, f := range []string{"a.crt", "a.key"} {
		if err := os.Symlink(filepath.Join("..data", f), filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		w, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got := names(w.Set()); got != "certificate/a" || len(w.Set().Problems) != 0 {
			t.Fatalf("%q, %+v", got, w.Set().Problems)
		}
		first := w.Set()
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error)
		go func() { ended <- w.Run(ctx) }()
		mount("..two", ca.Issue("a.example"))
		<-w.Changed()
		if w.Set().Secrets.Same(first.Secrets) || len(w.Set().Problems) != 0 {
			t.Errorf("after the swap: %+v", w.Set().Problems)
		}
		cancel()
		<-ended
	})
}
