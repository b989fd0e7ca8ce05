package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// env is what every row gets.
type env struct {
	root      string // of the repository
	work      string // scratch directory on the repository's disk
	rawDir    string // where single samples are kept
	binary    string // our binary
	self      string // this program
	rounds    int
	budget    time.Duration // for the measuring of one row
	generator string        // own or wrk
	traces    string        // directory of recorded traces; empty = none
	ci        bool          // a missing peer is an error
	progress  io.Writer

	peersBuilt bool
	peersErr   error
}

func (e *env) log(format string, args ...any) { fmt.Fprintf(e.progress, format+"\n", args...) }

// dir makes an empty scratch directory.
func (e *env) dir(name string) (string, error) { return os.MkdirTemp(e.work, name+"-") }

// slice is how long one sample of one contender may take so that all of them fit the
// budget, at most limit and at least 50 ms.
func (e *env) slice(samples int, limit time.Duration) time.Duration {
	return max(50*time.Millisecond, min(limit, e.budget/time.Duration(max(1, samples))))
}

// ours is the command line of one of this program's own child modes.
func (e *env) ours(mode string, args ...string) []string {
	return append([]string{e.self, "-child", mode}, args...)
}

// peer returns the path of a program of bench/peers, building all of them the first time.
func (e *env) peer(ctx context.Context, name string) (path string, err error) {
	out := filepath.Join(e.work, "peers")
	if !e.peersBuilt {
		e.peersBuilt = true
		e.log("building bench/peers")
		if err := os.MkdirAll(out, 0o755); err != nil {
			return "", err
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-o", out+string(filepath.Separator), "./...")
		cmd.Dir = filepath.Join(e.root, "bench", "peers")
		if text, err := cmd.CombinedOutput(); err != nil {
			e.peersErr = fmt.Errorf("build bench/peers: %w: %s", err, text)
		}
	}
	return filepath.Join(out, name), e.peersErr
}

// tool finds a system program, also where root's programs are kept.
func tool(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed; make deps installs it", name)
}

// mesh returns the path of our binary.
func (e *env) mesh() (string, error) {
	if _, err := os.Stat(e.binary); err != nil {
		return "", fmt.Errorf("%w; make build makes it", err)
	}
	return e.binary, nil
}

// dataplane returns the path of our binary for pods and nodes, which is beside the other.
func (e *env) dataplane() (string, error) {
	path := e.binary + "-dataplane"
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w; make build makes it", err)
	}
	return path, nil
}

// commitOf names the tree that is measured; a changed tree says so.
func commitOf(ctx context.Context, root string) (string, error) {
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = root
		out, err := cmd.Output()
		return strings.TrimSpace(string(out)), err
	}
	head, err := git("rev-parse", "HEAD")
	if err != nil {
		return "", fmt.Errorf("git rev-parse: %w", err)
	}
	changed, err := git("status", "--porcelain", "--untracked-files=no")
	if err != nil {
		return "", fmt.Errorf("git status: %w", err)
	}
	// The results themselves change with every run.
	for line := range strings.Lines(changed) {
		if !strings.Contains(line, "bench/results/") {
			return head + "+changes", nil
		}
	}
	return head, nil
}
