package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain lets this test binary stand in for the runner's child processes.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "-child" {
		if err := childMode(context.Background(), os.Args[2], os.Args[3:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func testEnv(t *testing.T) *env {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &env{root: filepath.Join("..", ".."), work: dir, rawDir: filepath.Join(dir, "raw"), self: self, rounds: 1,
		budget: time.Second, generator: "own", progress: t.Output()}
}

// nginx, haproxy and envoy accept the configurations written for them, answer what a row wants
// and are measurable, both by themselves and in front of an upstream.
func TestServersAnswer(t *testing.T) {
	upstream := backend(t, func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Error(err)
		}
		fmt.Fprint(w, strings.Repeat("u", 300))
	})
	e := testEnv(t)
	for program, start := range map[string]func(context.Context, string, string) (*running, error){"nginx": e.nginx, "haproxy": e.haproxy, "envoy": e.envoy} {
		_, err := tool(program)
		if program == "envoy" {
			_, err = e.envoyProgram()
		}
		if err != nil {
			t.Logf("not tested: %v", err)
			continue
		}
		for _, c := range []struct{ name, upstream, body string }{
			{"alone", "", strings.Repeat("v", valueBytes)}, {"proxy", upstream, strings.Repeat("u", 300)},
		} {
			if program == "envoy" && c.upstream == "" {
				continue // it is only ever in front of a model
			}
			run, err := start(t.Context(), "", c.upstream)
			if err != nil {
				t.Errorf("%s %s: %v", program, c.name, err)
				continue
			}
			probe := func(ctx context.Context, run *running) (*http.Request, error) {
				return http.NewRequestWithContext(ctx, http.MethodPost, "http://"+run.address+"/", strings.NewReader("{}"))
			}
			good := func(body []byte) error {
				if string(body) != c.body {
					return fmt.Errorf("body is %q", body)
				}
				return nil
			}
			if err := e.answers(t.Context(), run, workload{probe: probe, good: good}); err != nil {
				t.Errorf("%s %s: %v", program, c.name, err)
			}
			spec := loadOf(run.address, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
			got, err := e.loaded(t.Context(), "", run, spec)
			if err != nil && strings.Contains(err.Error(), "nothing can be said") {
				t.Logf("%s %s: %v", program, c.name, err) // starved of CPU: a refusal to measure is right
			} else if err != nil || got["rps"] <= 0 || got["answer_bytes"] < float64(len(c.body)) {
				t.Errorf("%s %s: %v, %v", program, c.name, got, err)
			}
			run.stop()
			if err := accepts("tcp4", run.address)(); err == nil {
				t.Errorf("%s %s still answers after stop", program, c.name)
			}
		}
	}
}

// One round with samples of both, alternating from round to round; a failing peer is
// left out and named, under CI it is an error, and so are we always.
func TestCompare(t *testing.T) {
	e := testEnv(t)
	var order string
	ok := func(name string, v float64) contender {
		return contender{name: name, sample: func(context.Context) (map[string]float64, error) {
			order += name[:1]
			return map[string]float64{"m": v}, nil
		}}
	}
	gone := contender{name: "gone", missing: errors.New("not installed")}
	bad := contender{name: "bad", sample: func(context.Context) (map[string]float64, error) { return nil, errors.New("broke") }}
	c, err := e.compare(t.Context(), "x", 3, []contender{ok(us, 3), ok("peer", 2), gone, bad})
	if err != nil || order != "oppoop" || len(c.Rounds) != 3 {
		t.Fatalf("order %q, %d rounds, %v", order, len(c.Rounds), err)
	}
	rows, err := c.rows(row{id: "x"}, "m", []string{"peer", "gone", "bad"}, func(string) string { return "w" })
	if err != nil || len(rows) != 3 {
		t.Fatalf("%+v, %v", rows, err)
	}
	if *rows[0].Ratio != 1.5 || rows[0].Ours != 3 {
		t.Errorf("row %+v", rows[0])
	}
	for i, why := range map[int]string{1: "w; gone was not measured: not installed", 2: "w; bad was not measured: broke"} {
		if r := rows[i]; r.PeerValue != nil || !strings.HasPrefix(r.What, why) || r.Ours != 3 {
			t.Errorf("row %+v", r)
		}
	}
	e.ci = true
	for _, peer := range []contender{gone, bad} {
		if _, err := e.compare(t.Context(), "x", 1, []contender{ok(us, 3), peer}); err == nil {
			t.Errorf("under CI %s is no error", peer.name)
		}
	}
	e.ci = false
	bad.name = us
	if _, err := e.compare(t.Context(), "x", 1, []contender{bad, ok("peer", 2)}); err == nil {
		t.Error("our own failure is no error")
	}
}

// Our side of every row that needs no other program yields figures that can be true.
func TestOwnChildren(t *testing.T) {
	e := testEnv(t)
	dir := func() string {
		d, err := e.dir("t")
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	filled, err := e.filled(t.Context(), e.ours("fill", "-events", "2500")...)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		argv []string
		want []string
	}{
		{e.ours("cacheread", "-slice", "5ms"), []string{"ns1", "ns2"}},
		{e.ours("assign", "-slice", "5ms"), []string{"ns"}},
		{e.ours("append", "-slice", "20ms", "-writers", "4", "-dir", dir()), []string{"rate"}},
		{e.ours("open", "-events", "2500", "-dir", filled), []string{"ready_ms", "replay_ms"}},
	} {
		got, err := e.values(t.Context(), c.argv...)
		if err != nil {
			t.Errorf("%v: %v", c.argv[2:], err)
		}
		for _, k := range c.want {
			if v := got[k]; v <= 0 || math.IsInf(v, 0) || math.IsNaN(v) {
				t.Errorf("%v: %s is %v", c.argv[2:], k, v)
			}
		}
	}
	if _, err := e.values(t.Context(), e.ours("open", "-events", "7", "-dir", dir())...); err == nil {
		t.Error("a log with the wrong number of events was accepted")
	}
	if _, err := e.values(t.Context(), e.ours("nothing")...); err == nil || !strings.Contains(err.Error(), "no child mode") {
		t.Errorf("an unknown child mode: %v", err)
	}
}

// The shared table is read from another process, and so are the cache servers that are
// installed.
func TestReadsFromAnotherProcess(t *testing.T) {
	e := testEnv(t)
	r := cacheRows()[1]
	e.budget = 100 * time.Millisecond
	rows, err := runShmRead(t.Context(), e, r)
	if err != nil || len(rows) != 2 {
		t.Fatalf("%+v, %v", rows, err)
	}
	for _, row := range rows {
		if row.PeerValue == nil {
			if !strings.Contains(row.What, "not installed") {
				t.Errorf("%s: %s", row.Peer, row.What)
			}
			continue
		}
		// How the two compare is for the benchmark to say: a test on a busy machine cannot.
		if *row.PeerValue <= 0 || row.Rounds < 1 {
			t.Errorf("%s: measured nothing: %+v", row.Peer, row)
		}
	}
	if _, err := os.Stat(filepath.Join(e.rawDir, r.id+".raw")); err != nil {
		t.Error(err)
	}
}

func TestRunFlags(t *testing.T) {
	var out strings.Builder
	if err := run(t.Context(), []string{"-list", "-run", "^log"}, nil, &out, io.Discard); err != nil || strings.Count(out.String(), "\n") != 2 {
		t.Errorf("%v\n%s", err, out.String())
	}
	for _, bad := range [][]string{{"-run", "("}, {"-run", "nothing matches this"}, {"-rounds", "0"}, {"-generator", "ab"}, {"-x"}} {
		if err := run(t.Context(), bad, nil, &out, io.Discard); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	seen := map[string]bool{}
	for _, r := range allRows() {
		if seen[r.id] || r.what == "" || r.unit == "" || r.better != "lower" && r.better != "higher" {
			t.Errorf("row %+v", r)
		}
		seen[r.id] = true
	}
}
