package main

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// giveBackEvery is how often: enough to keep what rare work has touched from staying, and
// mapping the rest again costs about a millisecond.
const giveBackEvery = 5 * time.Minute

// giveBackSoon is how long after the first time the second one is: by then also what begins
// when the process is ready (first streams, first reports) has touched what it needs once.
const giveBackSoon = 15 * time.Second

// keepSmall gives back the program's pages when ready closes, and from then on regularly.
func keepSmall(ctx context.Context, ready <-chan struct{}, log *slog.Logger) error {
	select {
	case <-ready:
	case <-ctx.Done():
		return nil
	}
	again := time.NewTimer(giveBackSoon)
	defer again.Stop()
	for {
		giveBackProgram(log)
		select {
		case <-again.C:
			again.Reset(giveBackEvery)
		case <-ctx.Done():
			return nil
		}
	}
}

// giveBackProgram takes the pages of the program's file that only its start needed out of
// this process's memory. Starting touches nearly all of it (the tables of every protocol
// message, and the kernel maps 16 pages around each), which was nine tenths of an idle
// sidecar's resident memory. What is needed again is mapped again from the page cache.
// Only mappings without pages of the process's own are touched: read-only parts of the
// file as it is on the disk. Failure costs memory, nothing else.
func giveBackProgram(log *slog.Logger) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		log.Debug("the program's pages are kept", "error", err)
		return
	}
	defer f.Close()
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		log.Debug("the program's pages are kept", "error", err)
		return
	}
	for _, m := range cleanMappings(f, program) {
		// Where the file's cached pages are huge, one look would map 2 MiB again. A kernel
		// without huge pages refuses this, and does not need it.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_NOHUGEPAGE)
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); e != 0 {
			log.Debug("pages of the program are kept", "error", e)
		}
	}
}

type mapping struct{ start, end uintptr }

// cleanMappings reads smaps (proc_pid_smaps(5)) and returns the private mappings of that
// file that cannot be written and hold no page that differs from the file's.
func cleanMappings(smaps io.Reader, file string) (out []mapping) {
	var m mapping
	candidate := false
	for sc := bufio.NewScanner(smaps); sc.Scan(); {
		line := sc.Text()
		if from, to, flags, path, ok := mappingLine(line); ok {
			candidate = path == file && (flags == "r--p" || flags == "r-xp")
			m = mapping{from, to}
			continue
		}
		if candidate && strings.HasPrefix(line, "Anonymous:") {
			if f := strings.Fields(line); len(f) == 3 && f[1] == "0" {
				out = append(out, m)
			}
			candidate = false
		}
	}
	return out
}

// mappingLine parses "start-end flags offset device inode path".
func mappingLine(line string) (from, to uintptr, flags, path string, ok bool) {
	f := strings.SplitN(line, " ", 6)
	if len(f) != 6 {
		return 0, 0, "", "", false
	}
	a, b, found := strings.Cut(f[0], "-")
	start, err1 := strconv.ParseUint(a, 16, 64)
	end, err2 := strconv.ParseUint(b, 16, 64)
	if !found || err1 != nil || err2 != nil || end <= start {
		return 0, 0, "", "", false
	}
	return uintptr(start), uintptr(end), f[1], strings.TrimLeft(f[5], " "), true
}
