// Package secrets follows a directory of certificates, private keys and trust bundles and
// makes of it the Secret resources that clusters name.
//
//	w, err := secrets.Open("/etc/outrigger/secrets", secrets.Options{})
//	go w.Run(ctx)
//	set := w.Set() // immutable; w.Changed() tells of the next one
//
// # Files
//
//	NAME.crt, NAME.key   a client certificate: PEM chain, the owner's first, and its key
//	NAME.ca              a trust bundle: PEM certificates
//
// A mounted Kubernetes Secret is read through its "..data" link, so that a certificate and a
// key always come from one version of it. Other files and directories are ignored.
//
// # Promises
//
//   - A file that is broken, too large, no pair with its other half, or that has expired
//     never replaces a good one: that stays in use, and Set.Problems says which and why. A
//     name without any file left is gone.
//   - A directory that cannot be read changes nothing.
//   - Equal files make equal resources on every replica; nothing of a set depends on time,
//     order or earlier sets, but for the good ones kept.
//   - Errors and problems name files and never hold what is in them.
//   - Files are looked at every 2 s. What is found broken is a problem at the second look
//     that finds the same, because two files are seldom written at once.
//
// At most MaxFiles files are read, identity.MaxPEMBytes of each. Methods may be called
// concurrently; Run once.
package secrets

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// MaxFiles bounds the files of one directory.
const MaxFiles = 2048

// Warning is how long before its end a certificate is a problem.
const Warning = 7 * 24 * time.Hour

const lookEvery = 2 * time.Second

// Options configure a Watch. Zero values mean the defaults.
type Options struct {
	Every  time.Duration    // between two looks [2 s]
	Now    func() time.Time // [time.Now]
	Logger *slog.Logger     // [discarded]
}

// Problem is what an operator should know about one secret.
type Problem struct {
	Name     string // resource name, as in xds.BundleName
	Severity string // "high" if it is broken or over, "medium" if it soon will be, "low" if it is readable by everybody
	Text     string
}

// Set is what a directory held at one look. It is immutable.
type Set struct {
	Secrets  translate.Secrets
	Problems []Problem // by name
	// ends is when certificates end, by resource name.
	ends map[string]time.Time
	// broken is what the last look found wrong, told or not.
	broken map[string]string
	sums   map[string][32]byte // of the content of each secret in use
}

// Watch follows one directory.
type Watch struct {
	dir     string
	o       Options
	set     atomic.Pointer[Set]
	changed chan struct{}
}

// Open looks at the directory once and starts nothing. It fails if it cannot be read;
// broken files are no failure but problems.
func Open(dir string, o Options) (*Watch, error) {
	if o.Every <= 0 {
		o.Every = lookEvery
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Watch{dir: dir, o: o, changed: make(chan struct{}, 1)}
	files, err := read(dir)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "secrets")
	}
	first := next(nil, files, o.Now())
	w.set.Store(next(first, files, o.Now())) // what is broken at the start is told at once
	w.tell(nil, w.Set())
	return w, nil
}

// Set returns what is in use.
func (w *Watch) Set() *Set { return w.set.Load() }

// Changed has an element when Set is another one than when the last was taken; for one
// reader.
func (w *Watch) Changed() <-chan struct{} { return w.changed }

// Run looks at the directory until ctx ends; it returns nil.
func (w *Watch) Run(ctx context.Context) error {
	tick := time.NewTicker(w.o.Every)
	defer tick.Stop()
	unread := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		files, err := read(w.dir)
		if err != nil {
			if err.Error() != unread {
				w.o.Logger.Error("the directory of secrets cannot be read; those read before stay in use", "error", err)
			}
			unread = err.Error()
			continue
		}
		unread = ""
		was := w.Set()
		now := next(was, files, w.o.Now())
		w.set.Store(now)
		w.tell(was, now)
		if !now.Secrets.Same(was.Secrets) {
			select {
			case w.changed <- struct{}{}:
			default:
			}
		}
	}
}

// tell logs what is new.
func (w *Watch) tell(was, now *Set) {
	if was == nil {
		was = &Set{}
	}
	for _, p := range now.Problems {
		if !slices.Contains(was.Problems, p) {
			w.o.Logger.Warn("secret", "name", p.Name, "severity", p.Severity, "problem", p.Text)
		}
	}
	for name, sum := range now.sums {
		if old, had := was.sums[name]; !had || old != sum {
			w.o.Logger.Info("secret in use", "name", name, "until", now.ends[name])
		}
	}
	for name := range was.sums {
		if _, has := now.sums[name]; !has {
			w.o.Logger.Warn("secret is gone", "name", name)
		}
	}
}

// file is one file as it was read.
type file struct {
	name string
	raw  []byte
	mode fs.FileMode
	err  error
}

// read reads all files that may matter, by name.
func read(dir string) (map[string]file, error) {
	base := dir
	if data, err := filepath.EvalSymlinks(filepath.Join(dir, "..data")); err == nil {
		base = data
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil, err
	}
	out := make(map[string]file)
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".crt", ".key", ".ca":
		default:
			continue
		}
		if len(out) == MaxFiles {
			return nil, outrigger.Errorf(outrigger.Exhausted, "%s has more than %d files of secrets", dir, MaxFiles)
		}
		f := readFile(filepath.Join(base, e.Name()))
		f.name = e.Name()
		out[f.name] = f
	}
	return out, nil
}

func readFile(path string) (out file) {
	f, err := os.Open(path)
	if err != nil {
		return file{err: err}
	}
	defer f.Close() // read only: nothing to lose
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = outrigger.Errorf(outrigger.Invalid, "it is no file")
	}
	if err != nil {
		return file{err: err}
	}
	out.mode = info.Mode()
	out.raw, out.err = io.ReadAll(io.LimitReader(f, identity.MaxPEMBytes+1))
	return out
}

// next is the set after was (nil at first) when the directory holds files. It is a pure
// function and modifies none of its arguments.
func next(was *Set, files map[string]file, now time.Time) *Set {
	if was == nil {
		was = &Set{}
	}
	out := &Set{Secrets: translate.Secrets{}, ends: map[string]time.Time{}, broken: map[string]string{}, sums: map[string][32]byte{}}
	for _, name := range named(files) {
		c := examine(name, files, now)
		if c.err == nil {
			out.use(was, c)
		} else {
			out.keep(was, c)
		}
		if end, ok := out.ends[c.resource]; ok {
			out.expiry(c.resource, end, now)
		}
		if key, ok := files[name+".key"]; ok && c.certificate && key.mode.Perm()&0o004 != 0 {
			out.problem(c.resource, "low", name+".key can be read by every user of this machine; give it mode 0600 or 0640")
		}
	}
	slices.SortStableFunc(out.Problems, func(a, b Problem) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// named lists, sorted, the secrets that files belong to: "NAME" for a certificate, with
// whichever of its files, and "NAME.ca" for a bundle.
func named(files map[string]file) (out []string) {
	for f := range files {
		if name, ok := strings.CutSuffix(f, ".crt"); ok {
			out = append(out, name)
		} else if name, ok := strings.CutSuffix(f, ".key"); ok {
			out = append(out, name)
		} else {
			out = append(out, f)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// candidate is what files say a secret is.
type candidate struct {
	resource    string
	certificate bool
	parts       [][]byte
	end         time.Time
	err         error
}

func examine(name string, files map[string]file, now time.Time) (c candidate) {
	if bundle, ok := strings.CutSuffix(name, ".ca"); ok && files[name].name != "" {
		c.resource = xds.BundleName(bundle)
		f := files[name]
		if c.err = errors.Join(outrigger.CheckName("name", bundle), f.err); c.err != nil {
			return c
		}
		b, err := identity.ParseBundle(bundle, f.raw)
		if c.err = err; err != nil {
			return c
		}
		c.parts, c.end = [][]byte{f.raw}, b.NotAfter
	} else {
		c.resource, c.certificate = xds.CertificateName(name), true
		crt, key := files[name+".crt"], files[name+".key"]
		switch {
		case crt.name == "":
			c.err = outrigger.Errorf(outrigger.Invalid, "there is %s.key and no %s.crt", name, name)
			return c
		case key.name == "":
			c.err = outrigger.Errorf(outrigger.Invalid, "there is %s.crt and no %s.key", name, name)
			return c
		}
		if c.err = errors.Join(outrigger.CheckName("name", name), crt.err, key.err); c.err != nil {
			return c
		}
		p, err := identity.ParseKeyPair(name, crt.raw, key.raw)
		if c.err = err; err != nil {
			return c
		}
		c.parts, c.end = [][]byte{crt.raw, key.raw}, p.NotAfter
	}
	if c.end.Before(now) {
		c.err = outrigger.Errorf(outrigger.Invalid, "it ended at %s", c.end.UTC().Format(time.RFC3339))
	}
	return c
}

// use takes a good one, the resource of before if the content is the same.
func (s *Set) use(was *Set, c candidate) {
	sum := sumOf(c.parts)
	s.sums[c.resource], s.ends[c.resource] = sum, c.end
	if old, had := was.sums[c.resource]; had && old == sum {
		s.Secrets[c.resource] = was.Secrets[c.resource]
		return
	}
	if name, ok := strings.CutPrefix(c.resource, xds.BundleName("")); ok {
		s.Secrets[c.resource] = translate.BundleSecret(name, c.parts[0])
		return
	}
	name := strings.TrimPrefix(c.resource, xds.CertificateName(""))
	s.Secrets[c.resource] = translate.CertificateSecret(name, c.parts[0], c.parts[1])
}

// keep goes on with the good one of before, if there is one.
func (s *Set) keep(was *Set, c candidate) {
	why := c.err.Error()
	s.broken[c.resource] = why
	stays := "there is none to use"
	if old := was.Secrets[c.resource]; old != nil {
		s.Secrets[c.resource], s.sums[c.resource], s.ends[c.resource] = old, was.sums[c.resource], was.ends[c.resource]
		stays = "the one before stays in use"
	}
	if was.broken[c.resource] == why {
		s.problem(c.resource, "high", why+"; "+stays)
	}
}

func (s *Set) expiry(name string, end, now time.Time) {
	if left := end.Sub(now); left > 0 && left < Warning { // one that has ended is broken
		s.problem(name, "medium", "it ends at "+end.UTC().Format(time.RFC3339)+"; put its successor in place")
	}
}

func (s *Set) problem(name, severity, text string) {
	s.Problems = append(s.Problems, Problem{Name: name, Severity: severity, Text: text})
}

func sumOf(parts [][]byte) [32]byte {
	h := sha256.New()
	for _, p := range parts {
		sum := sha256.Sum256(p)
		h.Write(sum[:])
	}
	return [32]byte(h.Sum(nil))
}
