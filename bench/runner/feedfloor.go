package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"net"
	"os"
	"time"
)

// floorBytes is the size of a message of the floor, about that of a feed frame.
const floorBytes = 300

// floor is the plain TCP broadcast: a connection to each receiver, written to directly.
type floor struct {
	lagFlags
	conns []net.Conn // a Write of one is whole, whoever else writes
}

// childBroadcast is the floor of childInvalidation: the same writers, receivers in a
// process of their own and notes, with nothing between them but a connection each.
func childBroadcast(ctx context.Context, args []string, _ io.Reader) (any, error) {
	l, err := parseLag(flag.NewFlagSet("lag", flag.ContinueOnError), args)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	receivers, err := startFeedNodes(self, listener.Addr().String(), l, true)
	if err != nil {
		return nil, err
	}
	f := &floor{lagFlags: l, conns: make([]net.Conn, l.nodes)}
	out, err := f.measure(ctx, listener, receivers)
	return out, errors.Join(err, f.close(), receivers.close())
}

func (f *floor) measure(ctx context.Context, listener net.Listener, receivers *feedProcess) (map[string]float64, error) {
	for i := range f.conns {
		c, err := listener.Accept()
		if err != nil {
			return nil, err
		}
		f.conns[i] = c
	}
	return f.load(ctx, f.set, receivers)
}

// set sends one write to the receivers that hold the session.
func (f *floor) set(_ context.Context, session, n int) (int64, error) {
	message := make([]byte, floorBytes)
	binary.LittleEndian.PutUint32(message, uint32(session))
	binary.LittleEndian.PutUint32(message[4:], uint32(n))
	before := time.Now().UnixNano()
	for _, h := range f.holdersOf(session) {
		if _, err := f.conns[h].Write(message); err != nil {
			return before, err
		}
	}
	return before, nil
}

func (f *floor) close() error {
	var errs []error
	for _, c := range f.conns {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// startPlain connects every receiver of the floor. They end with their connections.
func (n *feedNodes) startPlain(f *fleet, address string) error {
	for i := range n.nodes {
		n.last[i] = map[int]int{}
		c, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		f.ends = append(f.ends, c.Close)
		go n.receive(i, c)
	}
	return nil
}

// receive is one receiver: it notes when it has read a message.
func (n *feedNodes) receive(h int, c net.Conn) {
	message := make([]byte, floorBytes)
	for {
		if _, err := io.ReadFull(c, message); err != nil {
			return
		}
		at := time.Now().UnixNano()
		session, number := binary.LittleEndian.Uint32(message), binary.LittleEndian.Uint32(message[4:])
		n.mu.Lock()
		n.shows(h, int(session), int(number), at)
		n.mu.Unlock()
	}
}
