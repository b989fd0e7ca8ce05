package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// childTTFB measures the time to the first event of a stream: one kept-alive connection,
// one request after the other, one thread that blocks in the kernel. The quantiles are
// those of that time, Requests counts whole streams.
func childTTFB(ctx context.Context, _ []string, stdin io.Reader) (any, error) {
	var spec loadSpec
	if err := json.NewDecoder(stdin).Decode(&spec); err != nil {
		return nil, err
	}
	runtime.LockOSThread() // for the life of this process
	fd, err := dialRaw(spec.Address)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var hist histogram
	buf := make([]byte, 64<<10)
	start := time.Now()
	for n := 0; time.Since(start) < spec.Duration && ctx.Err() == nil; n++ {
		first, err := oneStream(fd, spec.Requests[n%len(spec.Requests)], buf)
		if err != nil {
			return nil, fmt.Errorf("stream %d: %w", n, err)
		}
		hist.record(int64(first))
	}
	micros := func(q float64) float64 { return float64(hist.quantile(q)) / 1e3 }
	return loadReport{Requests: int(hist.total), Seconds: time.Since(start).Seconds(), P50Micros: micros(0.50), P99Micros: micros(0.99)}, ctx.Err()
}

// dialRaw opens a blocking connection whose reads fail after 5 s.
func dialRaw(address string) (fd int, err error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return -1, err
	}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	limit := unix.Timeval{Sec: 5}
	err = errors.Join(unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// oneStream makes one request and reads its stream to the end; first is when the first
// event was there.
func oneStream(fd int, request, buf []byte) (first time.Duration, err error) {
	start := time.Now()
	if n, err := unix.Write(fd, request); err != nil || n != len(request) {
		return 0, errors.Join(fmt.Errorf("sent %d of %d bytes", n, len(request)), err)
	}
	for have := 0; ; {
		n, err := unix.Read(fd, buf[have:])
		switch {
		case err == unix.EINTR: // the runtime's own signal
			continue
		case err != nil || n == 0:
			return 0, errors.Join(fmt.Errorf("the stream broke off after %.200q", buf[:have]), err)
		}
		have += n
		if first == 0 && bytes.Contains(buf[:have], []byte("data: ")) {
			first = time.Since(start)
		}
		status, _, size, err := parseResponse(buf[:have])
		switch {
		case err != nil || size > 0 && (status != 200 || size != have || first == 0) || have == len(buf):
			return 0, errors.Join(fmt.Errorf("unwanted answer %.300q", buf[:have]), err)
		case size > 0:
			return first, nil
		}
	}
}

// drained is what childDrain saw.
type drained struct {
	Bytes   float64 `json:"bytes"`
	Seconds float64 `json:"seconds"`
}

// childDrain opens connections to a server that floods whoever says something, and reads
// for a while. What it says is neither HTTP nor TLS, so a proxy can only pass it through.
func childDrain(ctx context.Context, _ []string, stdin io.Reader) (any, error) {
	var spec loadSpec
	if err := json.NewDecoder(stdin).Decode(&spec); err != nil {
		return nil, err
	}
	start := time.Now()
	until := start.Add(spec.Duration)
	got := make([]int64, spec.Connections)
	g, ctx := errgroup.WithContext(ctx)
	for i := range got {
		g.Go(func() error {
			c, err := dialOne(ctx, spec.Address)
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.SetDeadline(until.Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := c.Write([]byte("\x00flood\n")); err != nil {
				return err
			}
			buf := make([]byte, 256<<10)
			for time.Now().Before(until) {
				n, err := c.Read(buf)
				if got[i] += int64(n); err != nil {
					return fmt.Errorf("after %d bytes: %w", got[i], err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	out := drained{Seconds: time.Since(start).Seconds()}
	for _, n := range got {
		out.Bytes += float64(n)
	}
	return out, nil
}
