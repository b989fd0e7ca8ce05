// Command runner measures Outrigger against what a user would pick instead and writes
// one row for each comparison.
//
//	go run ./bench/runner -binary bin/outrigger -run '<regexp>' -out bench/results/latest.json
//
// A row is measured in rounds; in each round every contender is measured once, and the
// row's ratio is the median of the ratios within the rounds. Every server, peer and
// load generator is a process of its own. Progress goes to standard error, a table to
// standard output, single samples to bench/results/raw. Rows of ids that were not
// selected stay in the results file as they are. A row that fails is reported and makes
// the program fail at its end; the others are still measured and written.
//
// It needs Linux: CPU times come from /proc, pinning from taskset. What each field of
// the results means is told in bench/results/README.md.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"
)

// row is one id of the comparison.
type row struct {
	id     string
	what   string
	unit   string
	better string // lower or higher
	bars   []bar  // targets its figures are held against
	run    func(ctx context.Context, e *env, r row) ([]result, error)
}

// allRows lists every id in the order of the results file.
func allRows() []row {
	return slices.Concat(cacheRows(), feedRows(), nodeTierRows(), proxyRows(), sseRows(), tcpRows(), idleRows(), grpcRows(), xdsRows(), fleetRows(), logRows(), experimentRows(), deployRows())
}

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		log.Fatalln("bench:", err)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) >= 2 && args[0] == "-child" {
		return childMode(ctx, args[1], args[2:], stdin, stdout)
	}
	e := &env{ci: os.Getenv("CI") == "true", progress: stderr}
	f := flag.NewFlagSet("runner", flag.ContinueOnError)
	f.SetOutput(stderr)
	pattern := f.String("run", ".", "regular expression; rows whose id it matches are measured")
	out := f.String("out", "bench/results/latest.json", "results file; rows of other ids are kept")
	fleet := f.String("plan", "", "print what a fleet of so many sidecars costs the control plane, or of sidecars and gRPC clients as in 100000,5000, and end")
	list := f.Bool("list", false, "list the rows and end")
	f.StringVar(&e.binary, "binary", "bin/outrigger", "our binary")
	f.StringVar(&e.root, "root", ".", "root of the repository")
	f.IntVar(&e.rounds, "rounds", 5, "rounds of each comparison")
	f.DurationVar(&e.budget, "budget", 40*time.Second, "time for the measuring of one row; starting servers comes on top")
	f.StringVar(&e.generator, "generator", "own", "HTTP load generator: own or wrk")
	f.StringVar(&e.traces, "traces", "", "directory of recorded traces for cache.hit_ratio: numbers of keys, one a line; .gz too")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *fleet != "" {
		return plan(*out, *fleet, stdout)
	}
	re, err := regexp.Compile(*pattern)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	var chosen []row
	for _, r := range allRows() {
		if re.MatchString(r.id) {
			chosen = append(chosen, r)
		}
	}
	switch {
	case *list:
		for _, r := range chosen {
			fmt.Fprintf(stdout, "%-20s %-14s %-7s %s\n", r.id, r.unit, r.better, r.what)
		}
		return nil
	case len(chosen) == 0:
		return fmt.Errorf("-run %q matches no row; -list shows them", *pattern)
	case e.rounds < 1:
		return fmt.Errorf("-rounds is %d; give at least 1", e.rounds)
	case e.generator != "own" && e.generator != "wrk":
		return fmt.Errorf("-generator is %q; give own or wrk", e.generator)
	}
	done, err := e.prepare()
	if err != nil {
		return err
	}
	defer done()
	e.rawDir = filepath.Join(filepath.Dir(*out), "raw")
	return e.measure(ctx, chosen, *out, stdout)
}

// prepare makes paths absolute and the scratch directory; done removes that.
func (e *env) prepare() (done func(), err error) {
	self, err0 := os.Executable()
	root, err1 := filepath.Abs(e.root)
	binary, err2 := filepath.Abs(e.binary)
	if err := errors.Join(err0, err1, err2); err != nil {
		return nil, err
	}
	e.self, e.root, e.binary = self, root, binary
	cache := filepath.Join(root, ".cache", "bench") // on the disk the tree is on, not in memory
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	if e.work, err = os.MkdirTemp(cache, "run-"); err != nil {
		return nil, err
	}
	return func() {
		if err := os.RemoveAll(e.work); err != nil {
			e.log("left behind: %v", err)
		}
	}, nil
}

// measure runs the rows one after the other and writes the results after each.
func (e *env) measure(ctx context.Context, rows []row, out string, stdout io.Writer) error {
	commit, err := commitOf(ctx, e.root)
	if err != nil {
		return err
	}
	var order []string
	for _, r := range allRows() {
		order = append(order, r.id)
	}
	machine := machineName()
	var fresh []result
	var failed []error
	for _, r := range rows {
		start := time.Now()
		got, err := r.run(ctx, e, r)
		if err != nil {
			e.log("%s failed: %v", r.id, err)
			failed = append(failed, fmt.Errorf("%s: %w", r.id, err))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		for i := range got {
			got[i].Commit, got[i].Machine = commit, machine
		}
		fresh = append(fresh, got...)
		e.log("%s took %v", r.id, time.Since(start).Round(time.Second/10))
		old, err := readResults(out)
		if err != nil {
			return err
		}
		if err := writeJSON(out, merge(old, got, order)); err != nil {
			return err
		}
	}
	return errors.Join(append(failed, printTable(stdout, fresh))...)
}

// childMode runs one measurement for a parent runner: JSON in and out.
func childMode(ctx context.Context, mode string, args []string, stdin io.Reader, stdout io.Writer) error {
	modes := map[string]func(context.Context, []string, io.Reader) (any, error){
		"load": childLoad, "cacheread": childCacheRead, "shmread": childShmRead, "udsread": childUDSRead,
		"hitratio": childHitRatio, "invalidation": childInvalidation, "broadcast": childBroadcast, "feednodes": childFeedNodes,
		"stampede": childStampede, "memoryfill": childMemoryFill, "ttfb": childTTFB, "drain": childDrain, "append": childAppend, "fill": childFill, "open": childOpen, "assign": childAssign, "report": childReport,
		"xdsserver": childXDSServer, "xdsclients": childXDSClients,
	}
	f, ok := modes[mode]
	if !ok {
		return fmt.Errorf("no child mode %q; there are %q", mode, sortedKeys(modes))
	}
	out, err := f(ctx, args, stdin)
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(out)
}

func childLoad(ctx context.Context, _ []string, stdin io.Reader) (any, error) {
	var spec loadSpec
	if err := json.NewDecoder(stdin).Decode(&spec); err != nil {
		return nil, err
	}
	return load(ctx, spec)
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
