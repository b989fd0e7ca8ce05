package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is the unit of CPU times in /proc: USER_HZ, 100 on every Linux
// architecture Go supports. The kernel keeps a process' total in nanoseconds and only
// rounds it, so the error of a difference is at most one tick.
const ticksPerSecond = 100

// process is what /proc/<pid>/stat says about one process.
type process struct {
	pid, parent int
	// cpu is user and system time of all threads, and of the children that ended and
	// were waited for, in ticks. See proc_pid_stat(5).
	cpu uint64
}

// parseStat reads one /proc/<pid>/stat. The command name may contain anything, blanks
// and parentheses included, so fields are counted from the last parenthesis.
func parseStat(text string) (process, error) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return process{}, fmt.Errorf("no command name in %q", text)
	}
	f := strings.Fields(text[end+1:])
	if len(f) < 15 {
		return process{}, fmt.Errorf("%d fields after the command name in %q, want 15 or more", len(f), text)
	}
	var p process
	var errs [6]error
	p.pid, errs[0] = strconv.Atoi(strings.TrimSpace(text[:open]))
	p.parent, errs[1] = strconv.Atoi(f[1])
	for i, field := range f[11:15] { // utime, stime, cutime, cstime
		var n uint64
		n, errs[2+i] = strconv.ParseUint(field, 10, 64)
		p.cpu += n
	}
	return p, errors.Join(errs[:]...)
}

// machineCPU is the first line of /proc/stat in ticks since boot, over all cores.
type machineCPU struct {
	work  uint64 // user, nice and system time; what guests use is part of user
	steal uint64 // taken by other guests of the host
}

func parseMachine(text string) (machineCPU, error) {
	line, _, _ := strings.Cut(text, "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return machineCPU{}, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var n [8]uint64
	for i := range n {
		var err error
		if n[i], err = strconv.ParseUint(f[1+i], 10, 64); err != nil {
			return machineCPU{}, err
		}
	}
	return machineCPU{work: n[0] + n[1] + n[2], steal: n[7]}, nil
}

// activity is the CPU time used on the machine up to an instant.
type activity struct {
	at      time.Time
	machine machineCPU
	procs   map[int]process
}

// observe reads /proc. Processes that end meanwhile are left out.
func observe() (activity, error) {
	a := activity{at: time.Now(), procs: map[int]process{}}
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return a, err
	}
	if a.machine, err = parseMachine(string(text)); err != nil {
		return a, err
	}
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return a, err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it ended
		}
		p, err := parseStat(string(text))
		if err != nil {
			return a, fmt.Errorf("%s: %w", f, err)
		}
		a.procs[p.pid] = p
	}
	return a, nil
}

// under returns the CPU ticks of the processes with the given ids and of everything
// below them.
func (a activity) under(roots ...int) uint64 {
	children := map[int][]int{}
	for _, p := range a.procs {
		children[p.parent] = append(children[p.parent], p.pid)
	}
	var sum uint64
	for todo := roots; len(todo) > 0; {
		pid := todo[len(todo)-1]
		todo = append(todo[:len(todo)-1:len(todo)-1], children[pid]...)
		sum += a.procs[pid].cpu
	}
	return sum
}

func (a activity) all() (sum uint64) {
	for _, p := range a.procs {
		sum += p.cpu
	}
	return sum
}

// foreign returns which share of cores·wall time was used by processes outside the tree
// of root between two observations. Each of three counts is a lower bound: what other
// visible processes used; what the machine worked beyond the tree (which also knows
// other containers, but may miss the soft interrupts our own loopback traffic causes);
// and what the host took away. The highest is returned.
func foreign(before, after activity, root, cores int) float64 {
	wall := after.at.Sub(before.at).Seconds()
	if wall <= 0 {
		return 0
	}
	ticks := func(now, then uint64) float64 { return max(0, float64(now)-float64(then)) }
	ownBefore, ownAfter := before.under(root), after.under(root)
	own := ticks(ownAfter, ownBefore)
	others := ticks(after.all()-ownAfter, before.all()-ownBefore)
	beyond := ticks(after.machine.work, before.machine.work) - own
	steal := ticks(after.machine.steal, before.machine.steal)
	return min(1, max(others, beyond, steal, 0)/(wall*ticksPerSecond*float64(cores)))
}

// loadAverage returns the one-minute load average.
func loadAverage() (float64, error) {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), " ")
	return strconv.ParseFloat(first, 64)
}

// machineName describes the machine for readers of the results.
func machineName() string {
	model := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	kernel := "?"
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = strings.TrimSpace(string(text))
	}
	return fmt.Sprintf("%d cores %s, Linux %s, %s", runtime.NumCPU(), model, kernel, runtime.Version())
}
