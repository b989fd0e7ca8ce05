package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// idleConnections are open at once in the memory row.
const idleConnections = 10_000

func idleRows() []row {
	return []row{{id: "proxy.idle", unit: "MiB resident", better: "lower", run: runIdle,
		what: fmt.Sprintf("resident memory of the sidecar alone, of a peer all its processes, files it maps included and the kernel's socket buffers not, %v after its start; peers may take as many connections as ours or more", idleSettle),
		bars: []bar{{what: "MiB resident when idle", metric: "idle_mib", of: absolute, must: 60, aim: 35},
			{what: fmt.Sprintf("MiB resident with %d idle connections", idleConnections), metric: "conns_mib", of: absolute, must: 200, aim: math.NaN()}}}}
}

// idleSettle is how long a server is left alone before its memory is read.
const idleSettle = time.Second

// runIdle starts each server anew for every sample.
func runIdle(ctx context.Context, e *env, r row) ([]result, error) {
	if _, err := roomFor(idleConnections + 200); err != nil {
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
			return memoryWith(ctx, run, idleConnections, w.requests(run), []byte("\r\n\r\n"), "conns_mib")
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

// memoryWith reads the memory of the last of run's servers alone (idle_mib) and with n
// connections open (under key), each of which made one of the requests and was answered at
// least up to a mark.
func memoryWith(ctx context.Context, run *running, n int, requests [][]byte, mark []byte, key string) (map[string]float64, error) {
	pid := run.servers[len(run.servers)-1].pid
	if !pause.For(ctx, idleSettle) {
		return nil, ctx.Err()
	}
	idle, own, err := residentUnder(pid)
	if err != nil {
		return nil, err
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range n {
		c, err := askOnce(ctx, run.address, requests[i%len(requests)], mark)
		if err != nil {
			return nil, fmt.Errorf("connection %d: %w", len(open), err)
		}
		open = append(open, c)
	}
	if !pause.For(ctx, idleSettle) {
		return nil, ctx.Err()
	}
	with, ownWith, err := residentUnder(pid)
	return map[string]float64{"idle_mib": idle, "own_idle_mib": own, key: with, "own_" + key: ownWith}, err
}

// dialOne opens a connection.
func dialOne(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp4", address)
}

// askOnce opens a connection, makes one request on it and reads the answer up to mark.
func askOnce(ctx context.Context, address string, request, mark []byte) (net.Conn, error) {
	c, err := dialOne(ctx, address)
	if err != nil {
		return nil, err
	}
	if err = c.SetDeadline(time.Now().Add(startTimeout)); err == nil {
		_, err = c.Write(request)
	}
	var buf [4096]byte
	for have := 0; err == nil; {
		var n int
		n, err = c.Read(buf[have:])
		if have += n; bytes.Contains(buf[:have], mark) {
			return c, nil
		}
		if err != nil || have == len(buf) {
			err = errors.Join(fmt.Errorf("no %q in the answer %.200q", mark, buf[:have]), err)
		}
	}
	c.Close()
	return nil, err
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

// wantOpen is how many descriptors a server of a row should have: with 10,000 clients and
// as many connections to a model, more than the limits of many machines.
const wantOpen = 65_536

// roomFor raises the limit of descriptors to wantOpen where it may (above the hard limit
// that takes privileges), and returns what it is then, at least n. Servers inherit it.
func roomFor(n int) (allowed int, err error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, err
	}
	if l.Cur < wantOpen {
		raised := unix.Rlimit{Cur: wantOpen, Max: max(l.Max, wantOpen)}
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &raised) != nil {
			raised = unix.Rlimit{Cur: l.Max, Max: l.Max}
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err != nil {
				return 0, err
			}
		}
		l = raised
	}
	if l.Cur < uint64(n) {
		return 0, fmt.Errorf("%d descriptors are allowed (ulimit -n); %d are needed", l.Cur, n)
	}
	return int(min(l.Cur, math.MaxInt32)), nil
}
