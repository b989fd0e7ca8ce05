package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// idleConnections are open at once in the memory row.
const idleConnections = 10_000

func idleRows() []row {
	return []row{{id: "proxy.idle", unit: "MiB resident", better: "lower", run: runIdle,
		what: fmt.Sprintf("resident memory of the sidecar alone, of a peer all its processes, files it maps included and the kernel's socket buffers not, %v after its start; peers may take 16384 connections, as ours may", idleSettle)}}
}

// idleSettle is how long a server is left alone before its memory is read.
const idleSettle = time.Second

// runIdle starts each server anew for every sample.
func runIdle(ctx context.Context, e *env, r row) ([]result, error) {
	if err := roomFor(idleConnections + 200); err != nil {
		return nil, err
	}
	w := hitWork()
	var cs []contender
	for _, s := range hitServers(e)[:3] { // ours, nginx, haproxy
		cs = append(cs, contender{name: s.name, sample: func(ctx context.Context) (map[string]float64, error) {
			run, err := s.start(ctx, "", "")
			if err != nil {
				return nil, err
			}
			defer run.stop()
			if err := e.answers(ctx, run, w); err != nil {
				return nil, err
			}
			return idleMemory(ctx, run, w.requests(run.address)[0])
		}})
	}
	c, err := e.compare(ctx, r.id, min(e.rounds, 3), cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "idle_mib", peerNames(cs), func(peer string) string {
		text := r.what
		for _, m := range []struct{ key, label string }{{"conns_mib", fmt.Sprintf("with %d kept-alive connections that carried one request each", idleConnections)}, {"own_idle_mib", "idle without mapped files"}} {
			if s, ok := summarise(c.Rounds, us, peer, m.key); ok && peer != "" {
				text += fmt.Sprintf("; %s %.3g against %.3g", m.label, s.Ours, s.Peer)
			} else if ok {
				text += fmt.Sprintf("; %s %.3g", m.label, s.Ours)
			}
		}
		return text
	})
}

// idleMemory reads the memory of the last of run's servers alone, and with connections.
func idleMemory(ctx context.Context, run *running, request []byte) (map[string]float64, error) {
	pid := run.servers[len(run.servers)-1].pid
	if !pause(ctx, idleSettle) {
		return nil, ctx.Err()
	}
	idle, own, err := residentUnder(pid)
	if err != nil {
		return nil, err
	}
	var open []int
	defer func() {
		for _, fd := range open {
			unix.Close(fd)
		}
	}()
	for range idleConnections {
		fd, err := askOnce(run.address, request)
		if err != nil {
			return nil, fmt.Errorf("connection %d: %w", len(open), err)
		}
		open = append(open, fd)
	}
	if !pause(ctx, idleSettle) {
		return nil, ctx.Err()
	}
	conns, _, err := residentUnder(pid)
	return map[string]float64{"idle_mib": idle, "own_idle_mib": own, "conns_mib": conns}, err
}

// askOnce opens a connection, makes one request on it and reads the beginning of the answer.
func askOnce(address string, request []byte) (fd int, err error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return -1, err
	}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	limit := unix.Timeval{Sec: 5}
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}))
	if err == nil {
		_, err = unix.Write(fd, request)
	}
	if err == nil {
		var buf [4096]byte
		n, rerr := unix.Read(fd, buf[:])
		if err = rerr; err == nil && n == 0 {
			err = errors.New("closed instead of answered")
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// residentUnder sums VmRSS, and RssAnon alone, of a process and those below it, in MiB.
// Pages that such processes share are counted by each.
func residentUnder(root int) (all, own float64, err error) {
	a, err := observe()
	if err != nil {
		return 0, 0, err
	}
	for pid := range a.procs {
		at := pid
		for at != root && at > 1 {
			at = a.procs[at].parent
		}
		if at != root {
			continue
		}
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			return 0, 0, err
		}
		for line := range strings.Lines(string(text)) {
			name, rest, _ := strings.Cut(line, ":")
			if name != "VmRSS" && name != "RssAnon" {
				continue
			}
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			if err != nil {
				return 0, 0, err
			}
			if name == "VmRSS" {
				all += kib / 1024
			} else {
				own += kib / 1024
			}
		}
	}
	if all == 0 {
		return 0, 0, fmt.Errorf("process %d has no memory: it has ended", root)
	}
	return all, own, nil
}

// roomFor fails unless this process may open n descriptors; servers inherit the limit.
func roomFor(n uint64) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if l.Cur < n {
		return fmt.Errorf("%d descriptors are allowed (ulimit -n); %d are needed", l.Cur, n)
	}
	return nil
}
