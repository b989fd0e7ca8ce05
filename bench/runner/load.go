package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// loadSpec is one run of the load generator. It is passed to a process of its own, so
// that the generator can be pinned and its CPU time is not the server's.
type loadSpec struct {
	Address     string        `json:"address"`     // IPv4 host:port
	Requests    [][]byte      `json:"requests"`    // whole HTTP/1.1 requests, sent in turn
	Connections int           `json:"connections"` // each has one request in flight
	Duration    time.Duration `json:"duration"`
}

// loadReport is what came of it. Requests counts complete answers with status 200; any
// other answer ends the run with an error, because its figures would not compare.
type loadReport struct {
	Requests    int     `json:"requests"`
	Seconds     float64 `json:"seconds"`
	P50Micros   float64 `json:"p50_us"`
	P99Micros   float64 `json:"p99_us"`
	AnswerBytes int     `json:"answer_bytes"` // head and body of the last answer
}

// conn is one connection with at most one request in flight.
type conn struct {
	fd   int
	buf  []byte
	have int
	sent time.Time
	open bool // a request is in flight
}

// generator is a closed loop over kept-alive connections: one thread, one epoll. Written
// against the system calls because a goroutine for each connection would cost the shared
// cores more than the servers do.
type generator struct {
	spec  loadSpec
	epoll int
	conns map[int32]*conn
	turn  int
	hist  histogram
	size  int // of the last answer
}

// load runs the generator in this thread.
func load(ctx context.Context, spec loadSpec) (loadReport, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	g := &generator{spec: spec, conns: map[int32]*conn{}}
	if err := g.connect(); err != nil {
		g.close()
		return loadReport{}, err
	}
	defer g.close()
	start := time.Now()
	for _, c := range g.conns {
		if err := g.send(c, start); err != nil {
			return loadReport{}, err
		}
	}
	if err := g.run(ctx, start.Add(spec.Duration)); err != nil {
		return loadReport{}, fmt.Errorf("after %d answers: %w", g.hist.total, err)
	}
	micros := func(q float64) float64 { return float64(g.hist.quantile(q)) / 1e3 }
	return loadReport{Requests: int(g.hist.total), Seconds: time.Since(start).Seconds(),
		P50Micros: micros(0.50), P99Micros: micros(0.99), AnswerBytes: g.size}, nil
}

func (g *generator) connect() error {
	if len(g.spec.Requests) == 0 || g.spec.Connections < 1 {
		return errors.New("a load needs at least one request and one connection")
	}
	ap, err := netip.ParseAddrPort(g.spec.Address)
	if err != nil || !ap.Addr().Is4() {
		return fmt.Errorf("address %q is not IPv4 host:port", g.spec.Address)
	}
	if g.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	for range g.spec.Connections {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		g.conns[int32(fd)] = &conn{fd: fd, buf: make([]byte, 64<<10)}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}); err != nil {
			return fmt.Errorf("connect to %s: %w", g.spec.Address, err)
		}
		if err := errors.Join(unix.SetNonblock(fd, true), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
			unix.EpollCtl(g.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})); err != nil {
			return err
		}
	}
	return nil
}

func (g *generator) close() {
	for _, c := range g.conns {
		unix.Close(c.fd)
	}
	if g.epoll > 0 {
		unix.Close(g.epoll)
	}
}

// send starts the next request on c. Requests are far smaller than a socket buffer and
// the one before was answered, so a short write means that something is wrong.
func (g *generator) send(c *conn, now time.Time) error {
	r := g.spec.Requests[g.turn%len(g.spec.Requests)]
	g.turn++
	n, err := unix.Write(c.fd, r)
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if n != len(r) {
		return fmt.Errorf("sent %d of %d bytes", n, len(r))
	}
	c.sent, c.open, c.have = now, true, 0
	return nil
}

// run answers readiness until the deadline, then collects what is in flight. The loop
// ends with an error when the server falls silent for 5 s.
func (g *generator) run(ctx context.Context, deadline time.Time) error {
	events := make([]unix.EpollEvent, g.spec.Connections)
	inFlight, silent := g.spec.Connections, 0
	for inFlight > 0 {
		n, err := unix.EpollWait(g.epoll, events, 100)
		if err != nil && err != unix.EINTR {
			return err
		}
		if n <= 0 {
			if silent++; silent == 50 || ctx.Err() != nil {
				return fmt.Errorf("no answer for %d ms", silent*100)
			}
			continue
		}
		silent = 0
		for _, ev := range events[:n] {
			c := g.conns[ev.Fd]
			done, err := g.receive(c)
			if err != nil {
				return err
			}
			if !done {
				continue
			}
			now := time.Now()
			g.hist.record(int64(now.Sub(c.sent)))
			c.open = false
			if now.After(deadline) {
				inFlight--
			} else if err := g.send(c, now); err != nil {
				return err
			}
		}
	}
	return nil
}

// receive reads once and reports whether the answer is complete.
func (g *generator) receive(c *conn) (bool, error) {
	if c.have == len(c.buf) {
		return false, fmt.Errorf("an answer exceeds %d bytes", len(c.buf))
	}
	n, err := unix.Read(c.fd, c.buf[c.have:])
	switch {
	case err == unix.EAGAIN:
		return false, nil
	case err != nil:
		return false, fmt.Errorf("receive: %w", err)
	case n == 0 || !c.open:
		return false, errors.New("the server closed a connection, or answered without being asked")
	}
	c.have += n
	status, _, size, err := parseResponse(c.buf[:c.have])
	switch {
	case err != nil:
		return false, fmt.Errorf("%w: %.200q", err, c.buf[:c.have])
	case size == 0:
		return false, nil
	case status != 200 || size != c.have:
		return false, fmt.Errorf("unwanted answer: %.300q", c.buf[:c.have])
	}
	g.size = size
	return true, nil
}
