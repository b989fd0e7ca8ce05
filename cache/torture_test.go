//go:build linux

package cache_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

const (
	tortureLease = 300 * time.Millisecond // the agent's default
	// All processes read one CLOCK_MONOTONIC, but for node.Clock's error.
	tortureSlack   = 20 * time.Millisecond
	tortureReaders = 4
)

// Real processes: an authority that writes all the time, the node's agent with its table
// and feed, and readers with a Store each. Any of them is killed (SIGKILL) at random
// moments and started again; the authority comes back with another incarnation. Every
// answer is recorded and judged against the ledger of writes. A reader that ignores the
// lease is judged as well and must be found out.
func TestTorture(t *testing.T) {
	seed := uint64(time.Now().Unix()) / 86400
	if os.Getenv("OUTRIGGER_LONG") != "1" {
		tortureEnough(t, seed, 6*time.Second)
		return
	}
	for i := range uint64(10) {
		t.Run(fmt.Sprintf("minute %d", i+1), func(t *testing.T) { tortureEnough(t, seed+i<<32, time.Minute) })
	}
}

// tortureEnough repeats a run in which too little happened to prove anything, as on a machine
// that hardly gets to run it, for twice as long.
func tortureEnough(t *testing.T, seed uint64, length time.Duration) {
	for try := range uint64(3) {
		few := torture(t, seed+try, length<<try)
		if len(few) == 0 || t.Failed() {
			return
		}
		t.Logf("in %v: %s", length<<try, few)
	}
	t.Error("too little happened in every run")
}

// tortureMesh is the processes of one run.
type tortureMesh struct {
	t     *testing.T
	dir   string
	lives int
	procs map[string]*tortureProc // by role and number
	kills map[string]int          // by role
	files []string                // of readers, one per life
}

type tortureProc struct {
	cmd  *exec.Cmd
	hold io.Closer // our end of its standard input
}

func (m *tortureMesh) start(role string, number int) {
	m.t.Helper()
	exe, err := os.Executable()
	must(m.t, err)
	m.lives++
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), tortureRole+"="+role, tortureDir+"="+m.dir, tortureLife+"="+strconv.Itoa(m.lives))
	cmd.Stderr = os.Stderr
	hold, err := cmd.StdinPipe()
	must(m.t, err)
	must(m.t, cmd.Start())
	m.procs[role+strconv.Itoa(number)] = &tortureProc{cmd, hold}
	if role == "reader" {
		m.files = append(m.files, filepath.Join(m.dir, "answers."+strconv.Itoa(m.lives)))
	}
}

func (m *tortureMesh) kill(role string, number int) {
	p := m.procs[role+strconv.Itoa(number)]
	if err := p.cmd.Process.Kill(); err != nil {
		m.t.Errorf("%s ended by itself: %v", role, err)
	}
	_ = p.cmd.Wait() // always "signal: killed"
	p.hold.Close()
	delete(m.procs, role+strconv.Itoa(number))
	m.kills[role]++
}

func (m *tortureMesh) close() {
	for _, p := range m.procs {
		_ = p.cmd.Process.Kill() // of one that has ended: nothing to do
		_ = p.cmd.Wait()
		p.hold.Close()
	}
}

func (m *tortureMesh) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-m.t.Context().Done():
	}
}

// until polls a condition about other processes.
func (m *tortureMesh) until(what string, ok func() bool) {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); m.pause(5 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("%s does not happen", what)
		}
	}
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// torture says what happened too seldom in a run of that length.
func torture(t *testing.T, seed uint64, length time.Duration) (few []string) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 7))
	dir, err := os.MkdirTemp("", "torture") // short: paths of sockets are limited
	must(t, err)
	defer os.RemoveAll(dir)
	m := &tortureMesh{t: t, dir: dir, procs: map[string]*tortureProc{}, kills: map[string]int{}}
	defer m.close()
	m.start("origin", 0)
	m.until("the authority's start", func() bool { return exists(filepath.Join(dir, "origin")) })
	m.start("agent", 0)
	m.until("the agent's start", func() bool { return exists(filepath.Join(dir, "table")) })
	for i := range tortureReaders {
		m.start("reader", i)
	}
	m.until("the readers' start", func() bool {
		return !slices.ContainsFunc(m.files, func(f string) bool { return size(f) < 500*recordBytes })
	})
	m.start("careless", 0)
	careless := filepath.Join(dir, "careless."+strconv.Itoa(m.lives))
	m.until("the careless reader's start", func() bool { return size(careless) > 100*recordBytes })

	for end, order := time.Now().Add(length), []string(nil); time.Now().Before(end); {
		if len(order) == 0 { // all of them, in changing order
			order = []string{"agent", "origin", "reader"}
			r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		m.pause(time.Duration(100+r.IntN(500)) * time.Millisecond)
		role, number := order[0], 0
		order = order[1:]
		if role == "reader" {
			number = r.IntN(tortureReaders)
		}
		m.kill(role, number)
		// Away for less or for more than a lease.
		m.pause(time.Duration(r.IntN(900)) * time.Millisecond)
		m.start(role, number)
	}
	// Long enough away for everybody to notice.
	m.kill("origin", 0)
	m.pause(time.Second)
	m.start("origin", 0)
	m.pause(time.Second)
	m.close()
	m.procs = nil
	return m.judge(careless)
}

func (m *tortureMesh) judge(careless string) (few []string) {
	t := m.t
	t.Helper()
	missing := func(format string, args ...any) { few = append(few, fmt.Sprintf(format, args...)) }
	var writes []tortureRecord
	for life := 1; life <= m.lives; life++ {
		of, err := readAll(ledgerPath(m.dir, life)) // none, if it was not an authority's
		must(t, err)
		writes = append(writes, of...)
	}
	ledger := newTortureLedger(writes)
	var sum tortureTally
	for _, f := range m.files {
		answers, err := readAll(f)
		must(t, err)
		got := ledger.judge(answers)
		if len(got.bad) > 0 {
			t.Errorf("%d wrong answers, for example %s", len(got.bad), got.bad[0])
		}
		sum.add(got)
	}
	answers, err := readAll(careless)
	must(t, err)
	control := ledger.judge(answers)
	t.Logf("%d writes, kills %v, %d answers: by tier %v, %d marked; the careless reader: %d of %d wrong", len(writes), m.kills, sum.answers, sum.tiers, sum.marked, len(control.bad), control.answers)
	if control.stale == 0 {
		missing("the reader that ignores the lease was not found out")
	}
	for _, tier := range []outrigger.Tier{outrigger.TierProcess, outrigger.TierNode, outrigger.TierOrigin} {
		if sum.tiers[tier] < 100 {
			missing("%d answers from tier %s", sum.tiers[tier], tier)
		}
	}
	for _, role := range []string{"agent", "origin", "reader"} {
		if m.kills[role] == 0 {
			missing("no %s was killed", role)
		}
	}
	if sum.marked == 0 || len(writes) < 5000 {
		missing("%d marked answers, %d writes", sum.marked, len(writes))
	}
	return few
}

// tortureLedger is the committed writes of each key, by time.
type tortureLedger [tortureKeys][]tortureRecord

func newTortureLedger(writes []tortureRecord) *tortureLedger {
	l := &tortureLedger{}
	for _, w := range writes {
		l[w.key] = append(l[w.key], w)
	}
	return l
}

// currentAt is the newest version that was certainly committed at a time.
func (l *tortureLedger) currentAt(key, at int64) int64 {
	i, _ := slices.BinarySearchFunc(l[key], at, func(w tortureRecord, at int64) int {
		if w.end <= at {
			return -1
		}
		return 1
	})
	if i == 0 {
		return 0
	}
	return l[key][i-1].version
}

type tortureTally struct {
	answers, marked, stale int
	tiers                  map[outrigger.Tier]int
	bad                    []string
}

func (a *tortureTally) add(b tortureTally) {
	a.answers += b.answers
	a.marked += b.marked
	if a.tiers == nil {
		a.tiers = map[outrigger.Tier]int{}
	}
	for tier, n := range b.tiers {
		a.tiers[tier] += n
	}
}

// judge checks the answers one process recorded: values are whole; what is not marked was
// current at most a lease before it was asked for, and at most its own age before it was
// given; and versions of a key do not go back, but for marked answers.
func (l *tortureLedger) judge(answers []tortureRecord) tortureTally {
	out := tortureTally{tiers: map[outrigger.Tier]int{}}
	var last [tortureKeys]int64
	for _, a := range answers {
		out.answers++
		out.tiers[outrigger.Tier(a.flags&flagTier)]++
		say := func(what string) {
			out.bad = append(out.bad, fmt.Sprintf("%s: key %d, version %d after %d, asked at %d for %v, age %v, tier %s", what, a.key, a.version, last[a.key],
				a.begin, time.Duration(a.end-a.begin), time.Duration(a.age), outrigger.Tier(a.flags&flagTier)))
		}
		switch {
		case a.flags&flagTorn != 0:
			say("torn or mixed")
			continue
		case a.flags&flagStale != 0:
			out.marked++
			continue
		case a.flags&flagAbsent != 0:
			say("lost")
			continue
		}
		if a.version < l.currentAt(a.key, a.begin-int64(tortureLease+tortureSlack)) {
			out.stale++
			say("older than the lease")
		}
		if a.age > 0 && a.version < l.currentAt(a.key, a.end-a.age-int64(tortureSlack)) {
			say("older than it says")
		}
		if a.version < last[a.key] {
			say("back in time")
		}
		last[a.key] = max(last[a.key], a.version)
	}
	return out
}

// The judge finds each kind of wrong answer in records made by hand.
func TestTortureJudge(t *testing.T) {
	const ms = int64(time.Millisecond)
	l := newTortureLedger([]tortureRecord{{version: 10 * ms, end: 11 * ms}, {version: 500 * ms, end: 501 * ms}, {version: 900 * ms, end: 901 * ms}})
	ok := tortureRecord{version: 10 * ms, begin: 800 * ms, end: 801 * ms}
	for _, c := range []struct {
		name    string
		answers []tortureRecord
		bad     int
	}{
		{"within the lease", []tortureRecord{ok}, 0},
		{"beyond the lease", []tortureRecord{{version: 10 * ms, begin: 822 * ms, end: 823 * ms}}, 1},
		{"the same, marked", []tortureRecord{{version: 10 * ms, begin: 822 * ms, end: 823 * ms, flags: flagStale}}, 0},
		{"beyond its own age", []tortureRecord{{version: 10 * ms, begin: 800 * ms, end: 801 * ms, age: 100 * ms}}, 1},
		{"torn", []tortureRecord{{flags: flagTorn | flagStale}}, 1},
		{"lost", []tortureRecord{{flags: flagAbsent}}, 1},
		{"back in time", []tortureRecord{{version: 500 * ms, begin: 799 * ms, end: 800 * ms}, ok}, 1},
	} {
		if got := l.judge(c.answers); len(got.bad) != c.bad {
			t.Errorf("%s: %d wrong, want %d: %v", c.name, len(got.bad), c.bad, got.bad)
		}
	}
	whole := tortureValue(3, 12345)
	if v, ok := tortureVersion(3, whole); !ok || v != 12345 {
		t.Errorf("a whole value reads as %d, %v", v, ok)
	}
	other := tortureValue(3, 12346)
	for _, mixed := range []string{whole[:100] + other[100:], whole[:len(whole)-1], tortureValue(5, 12345), "", `"3.12345."`} {
		if _, ok := tortureVersion(3, mixed); ok {
			t.Errorf("%.40s… passes for whole", mixed)
		}
	}
}
