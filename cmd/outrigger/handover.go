package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

// A process that is upgraded and the one that replaces it talk over one end each of a
// socket pair, in packets of JSON:
//
//	old → new  {"step":"listeners","listeners":[{"name":"listen","asked":"127.0.0.1:50051"}]} + SCM_RIGHTS
//	new → old  {"step":"ready"}      it has policy and cache, and serves nothing yet
//	old → new  {"step":"go"}         accept now; the old process goes on accepting too
//	new → old  {"step":"serving"}    the old process stops accepting, and drains
//
// Both processes hold the same sockets, so what waits in an accept queue is never lost. If
// the new process ends, says something else or takes too long, the old one kills it and
// serves on. If the old one goes away before it has said "go", the new one ends.

// handOverVariable names the descriptor of the new process's end.
const handOverVariable = "OUTRIGGER_HANDOVER_FD"

// maxListeners bounds what is handed over; the kernel's own limit is 253 descriptors.
const maxListeners = 16

type handOverStep struct {
	Step      string           `json:"step"`
	Listeners []listenerRecord `json:"listeners,omitempty"`
}

// listenerRecord is one listener; the new process takes it if it is configured with the
// same name and address, and binds anew otherwise.
type listenerRecord struct {
	Name  string `json:"name"`
	Asked string `json:"asked"`
}

// handOverConn is one end.
type handOverConn struct{ c *net.UnixConn }

// newHandOverConn owns fd. The other end must be a process of this user.
func newHandOverConn(fd int) (*handOverConn, error) {
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err == nil && int(peer.Uid) != os.Geteuid() {
		err = outrigger.Errorf(outrigger.Denied, "the other process is user %d's, not user %d's", peer.Uid, os.Geteuid())
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "handover")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, outrigger.Errorf(outrigger.Invalid, "descriptor %d is no Unix socket", fd)
	}
	return &handOverConn{u}, nil
}

func (h *handOverConn) send(s handOverStep, fds ...int) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := h.c.SetWriteDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	_, _, err = h.c.WriteMsgUnix(b, rights, nil)
	return err
}

// receive returns one step, which must be want, and the descriptors that came with it, by
// the deadline; a zero one is none.
func (h *handOverConn) receive(want string, by time.Time) (s handOverStep, fds []int, err error) {
	if err := h.c.SetReadDeadline(by); err != nil {
		return s, nil, err
	}
	b, oob := make([]byte, 16<<10), make([]byte, unix.CmsgSpace(4*maxListeners))
	n, oobn, flags, _, err := h.c.ReadMsgUnix(b, oob)
	if err != nil {
		return s, nil, err
	}
	fds, err = descriptors(oob[:oobn])
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = outrigger.Errorf(outrigger.Invalid, "the message is too long")
	case n == 0:
		err = outrigger.Errorf(outrigger.Unavailable, "the other process ended")
	default:
		if err = json.Unmarshal(b[:n], &s); err == nil && s.Step != want {
			err = outrigger.Errorf(outrigger.Invalid, "the other process said %.40q, not %q", s.Step, want)
		}
	}
	if err != nil {
		closeAll(fds)
		return s, nil, err
	}
	return s, fds, nil
}

// descriptors unpacks SCM_RIGHTS; what it returns is close-on-exec.
func descriptors(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		some, err := unix.ParseUnixRights(&m)
		if err != nil {
			closeAll(fds)
			return nil, err
		}
		for _, fd := range some {
			unix.CloseOnExec(fd)
		}
		fds = append(fds, some...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// inherited is what the process before this one handed over. A nil one has nothing.
type inherited struct {
	conn      *handOverConn
	listeners map[listenerRecord]net.Listener
	unix      []*net.UnixListener // taken ones, whose files are ours once we serve
}

// inherit receives the listeners if this process was started by an upgrade.
func inherit(environ []string) (*inherited, error) {
	text := lookupEnv(environ, handOverVariable)
	if text == "" {
		return nil, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 3 {
		return nil, configError{fmt.Errorf("%s is %q; it is set by an upgrade only", handOverVariable, text)}
	}
	conn, err := newHandOverConn(fd)
	if err != nil {
		return nil, fmt.Errorf("sidecar: upgrade: %w", err)
	}
	s, fds, err := conn.receive("listeners", time.Now().Add(10*time.Second))
	if err == nil && len(fds) != len(s.Listeners) {
		err = outrigger.Errorf(outrigger.Invalid, "%d listeners came with %d descriptors", len(s.Listeners), len(fds))
		closeAll(fds)
	}
	if err != nil {
		conn.c.Close()
		return nil, fmt.Errorf("sidecar: upgrade: receive the listeners: %w", err)
	}
	in := &inherited{conn: conn, listeners: map[listenerRecord]net.Listener{}}
	for i, r := range s.Listeners {
		f := os.NewFile(uintptr(fds[i]), r.Name)
		l, lerr := net.FileListener(f)
		err = errors.Join(err, lerr, f.Close())
		if lerr == nil {
			in.listeners[r] = l
		}
	}
	if err != nil {
		in.close()
		return nil, fmt.Errorf("sidecar: upgrade: listeners: %w", err)
	}
	return in, nil
}

// take returns the listener of that name, if it was handed over and is configured as
// before; nil otherwise.
func (in *inherited) take(name, asked string) (net.Listener, error) {
	if in == nil {
		return nil, nil
	}
	key := listenerRecord{name, asked}
	l, ok := in.listeners[key]
	if !ok {
		return nil, nil
	}
	delete(in.listeners, key)
	if u, ok := l.(*net.UnixListener); ok {
		in.unix = append(in.unix, u)
	}
	return l, nil
}

// takeOver waits until this process can serve, and the old one agrees; then it serves, and
// says so to the old one before anybody else. Its errors end this process; the old one goes
// on.
func (in *inherited) takeOver(ctx context.Context, policy <-chan struct{}, attached func() bool, serve, announce func() error) error {
	gone := context.AfterFunc(ctx, func() { in.conn.c.Close() })
	defer gone()
	select {
	case <-policy:
	case <-ctx.Done():
		return nil
	}
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for !attached() {
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil
		}
	}
	if err := in.conn.send(handOverStep{Step: "ready"}); err != nil {
		return fmt.Errorf("sidecar: upgrade: %w", err)
	}
	if _, _, err := in.conn.receive("go", time.Time{}); err != nil {
		return fmt.Errorf("sidecar: upgrade: the old process serves on: %w", err)
	}
	for _, u := range in.unix {
		u.SetUnlinkOnClose(true)
	}
	if err := serve(); err != nil {
		return err
	}
	// If this fails the old one has agreed and is gone: there is nobody else to serve.
	_ = in.conn.send(handOverStep{Step: "serving"})
	return announce()
}

// close drops what was not taken.
func (in *inherited) close() {
	if in == nil {
		return
	}
	in.conn.c.Close()
	for _, l := range in.listeners {
		l.Close()
	}
}
