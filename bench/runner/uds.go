package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// blocking is a connection on which one thread sleeps in the kernel for each answer: the
// quickest way to wait that a peer's client could choose without spinning.
type blocking struct {
	fd  int
	buf [4096]byte
}

// ask sends a request and reads until the answer ends as expected.
func (b *blocking) ask(request, end []byte) ([]byte, error) {
	if n, err := unix.Write(b.fd, request); err != nil || n != len(request) {
		return nil, errors.Join(fmt.Errorf("sent %d of %d bytes", n, len(request)), err)
	}
	have := 0
	for {
		n, err := unix.Read(b.fd, b.buf[have:])
		if err != nil || n == 0 {
			return nil, errors.Join(fmt.Errorf("connection ended after %q", b.buf[:have]), err)
		}
		if have += n; bytes.HasSuffix(b.buf[:have], end) {
			return b.buf[:have], nil
		}
		if have == len(b.buf) {
			return nil, fmt.Errorf("unexpected answer %.100q", b.buf[:have])
		}
	}
}

// cacheProtocol is how a cache server is written to and read from.
type cacheProtocol struct {
	set     func(key, value string) string
	stored  string
	get     func(key string) string
	wrapped func(key, value string) string // the whole answer to get
}

// protocolOf knows RESP (redis) and the text protocol of memcached.
func protocolOf(server string) (cacheProtocol, error) {
	switch server {
	case "redis-server":
		return cacheProtocol{
			set: func(k, v string) string {
				return fmt.Sprintf("*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(k), k, len(v), v)
			},
			stored:  "+OK\r\n",
			get:     func(k string) string { return fmt.Sprintf("*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", len(k), k) },
			wrapped: func(_, v string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(v), v) },
		}, nil
	case "memcached":
		return cacheProtocol{
			set:     func(k, v string) string { return fmt.Sprintf("set %s 0 0 %d\r\n%s\r\n", k, len(v), v) },
			stored:  "STORED\r\n",
			get:     func(k string) string { return "get " + k + "\r\n" },
			wrapped: func(k, v string) string { return fmt.Sprintf("VALUE %s 0 %d\r\n%s\r\nEND\r\n", k, len(v), v) },
		}, nil
	}
	return cacheProtocol{}, fmt.Errorf("no protocol known for %q", server)
}

// childUDSRead fills a cache server and times single reads from it.
func childUDSRead(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("udsread", flag.ContinueOnError)
	server := f.String("server", "", "redis-server or memcached")
	socket := f.String("socket", "", "its Unix socket")
	slice := f.Duration("slice", time.Second, "how long to measure")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	proto, err := protocolOf(*server)
	if err != nil {
		return nil, err
	}
	runtime.LockOSThread() // for the life of this process
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: *socket}); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", *socket, err)
	}
	b := &blocking{fd: fd}
	value := strings.Repeat("v", valueBytes)
	var gets, wants [][]byte
	for _, k := range benchKeys() {
		if _, err := b.ask([]byte(proto.set(k, value)), []byte(proto.stored)); err != nil {
			return nil, fmt.Errorf("set %s: %w", k, err)
		}
		gets, wants = append(gets, []byte(proto.get(k))), append(wants, []byte(proto.wrapped(k, value)))
	}
	return timedReads(*slice, func(i uint32) error {
		k := pick(i)
		got, err := b.ask(gets[k], wants[k][len(wants[k])-5:])
		if err == nil && !bytes.Equal(got, wants[k]) {
			err = fmt.Errorf("got %.100q", got)
		}
		return err
	})
}
