package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	rest := " S 17 4000 4000 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 5 0 12345 0 0"
	for _, name := range []string{"nginx", "a b", "x) S 1 (y", "(", ")))"} {
		p, err := parseStat("4242 (" + name + ")" + rest + "\n")
		if err != nil || p != (process{pid: 4242, parent: 17, cpu: 11 + 22 + 33 + 44}) {
			t.Errorf("command %q: %+v, %v", name, p, err)
		}
	}
	for _, bad := range []string{"", "12 nginx S 1", "12 (x) S 1 2 3", "x (x)" + rest, "1 (x) S y" + rest[5:],
		"1 (x)" + strings.Replace(rest, "33", "-3", 1)} {
		if p, err := parseStat(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, p)
		}
	}
}

func TestParseMachine(t *testing.T) {
	m, err := parseMachine("cpu  10 20 30 4000 5 6 7 8 9 0\ncpu0 1 2 3\n")
	if err != nil || m != (machineCPU{work: 60, steal: 8}) {
		t.Errorf("%+v, %v", m, err)
	}
	for _, bad := range []string{"", "cpu0 1 2 3 4 5 6 7 8", "cpu 1 2 3", "cpu a 2 3 4 5 6 7 8"} {
		if _, err := parseMachine(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// The tree: 1 ─ 10 ─ 11, 12 and 1 ─ 20.
func tree(cpu map[int]uint64) activity {
	parents := map[int]int{1: 0, 10: 1, 11: 10, 12: 11, 20: 1}
	a := activity{procs: map[int]process{}}
	for pid, n := range cpu {
		a.procs[pid] = process{pid: pid, parent: parents[pid], cpu: n}
	}
	return a
}

func TestUnder(t *testing.T) {
	a := tree(map[int]uint64{1: 1, 10: 10, 11: 100, 12: 1000, 20: 10000})
	if n := a.under(10); n != 1110 {
		t.Errorf("under 10: %d", n)
	}
	if n := a.under(12, 20); n != 11000 {
		t.Errorf("under 12 and 20: %d", n)
	}
	if n := a.under(99); n != 0 {
		t.Errorf("under a process that is not there: %d", n)
	}
}

func TestForeign(t *testing.T) {
	start := time.Unix(0, 0)
	at := func(a activity, seconds float64, m machineCPU) activity {
		a.at, a.machine = start.Add(time.Duration(seconds*1e9)), m
		return a
	}
	before := at(tree(map[int]uint64{1: 0, 10: 50, 11: 0, 20: 70}), 0, machineCPU{work: 1000, steal: 5})
	for _, c := range []struct {
		name  string
		after activity
		want  float64
	}{
		{"only our own", at(tree(map[int]uint64{1: 0, 10: 60, 11: 90, 20: 70}), 1, machineCPU{work: 1100, steal: 5}), 0},
		{"another process", at(tree(map[int]uint64{1: 0, 10: 60, 11: 90, 20: 110}), 1, machineCPU{work: 1100, steal: 5}), 0.2},
		{"one nobody can see", at(tree(map[int]uint64{1: 0, 10: 60, 11: 90, 20: 70}), 1, machineCPU{work: 1150, steal: 5}), 0.25},
		{"the host", at(tree(map[int]uint64{1: 0, 10: 50, 11: 0, 20: 70}), 2, machineCPU{work: 1000, steal: 205}), 0.5},
		{"one that ended unseen", at(tree(map[int]uint64{1: 0, 10: 50, 11: 0}), 1, machineCPU{work: 1000, steal: 5}), 0},
		{"more than all", at(tree(map[int]uint64{1: 0, 10: 50, 11: 0, 20: 900}), 1, machineCPU{work: 1000, steal: 5}), 1},
		{"no time", at(tree(map[int]uint64{20: 900}), 0, machineCPU{work: 9000}), 0},
	} {
		if got := foreign(before, c.after, 10, 2); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// The live /proc agrees with what this process does: burning CPU shows.
func TestObserveSelf(t *testing.T) {
	before, err := observe()
	if err != nil {
		t.Fatal(err)
	}
	// How long that takes depends on who else wants the processor.
	for limit := time.Now().Add(time.Minute); ; {
		for start := time.Now(); time.Since(start) < 60*time.Millisecond; {
			_ = strings.Repeat("x", 1000)
		}
		after, err := observe()
		if err != nil {
			t.Fatal(err)
		}
		a, b := before.under(os.Getpid()), after.under(os.Getpid())
		if b > a {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("after a minute of burning this process has %d ticks, before %d", b, a)
		}
	}
	if load, err := loadAverage(); err != nil || load < 0 {
		t.Errorf("load average %v, %v", load, err)
	}
	if name := machineName(); !strings.Contains(name, "cores") || strings.Contains(name, "?") {
		t.Errorf("machine %q", name)
	}
}
