package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// The hand-over of the table, on a Unix socket: the agent sends one message of
// helloBytes bytes (magic, the table's generation, its size in bytes, the length of the
// feed lease in nanoseconds; little-endian 64-bit words) with the read-only descriptor of the table as SCM_RIGHTS ancillary data
// (unix(7)), and nothing more. The connection stays open for as long as the table is
// the agent's present one; its end tells the reader to attach again. A reader sends
// nothing.
const (
	helloMagic = 0x31524f4842545550 // "PUTBHOR1" in memory order
	helloBytes = 32

	// helloTimeout bounds the hand-over itself; both sides are on one machine.
	helloTimeout = 2 * time.Second
)

// attachments are the open hand-over connections.
type attachments struct {
	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func (t *attachments) add(c net.Conn, limit int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.conns) >= limit {
		return false
	}
	if t.conns == nil {
		t.conns = map[net.Conn]struct{}{}
	}
	t.conns[c] = struct{}{}
	return true
}

func (t *attachments) remove(c net.Conn) {
	t.mu.Lock()
	delete(t.conns, c)
	t.mu.Unlock()
	c.Close()
}

func (t *attachments) closeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.conns {
		c.Close()
	}
}

func (t *attachments) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.conns)
}

// ServeTable hands the table to every process that connects to l, a listener on a Unix
// socket, until ctx ends; it then closes l and every attachment and returns nil. Who may
// connect is decided by the permissions of the socket's path. Beyond
// Options.MaxSidecars, and for a table on the heap, connections are closed at once.
func (a *Agent) ServeTable(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer l.Close() // also when ctx ended just as Accept returned: whoever is told of the end may listen anew
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case err != nil:
			return outrigger.Wrap(outrigger.Unavailable, err, "the table socket does not accept connections")
		}
		if !a.readers.add(c, a.o.MaxSidecars) {
			a.o.Logger.Warn("sidecar refused", "limit", a.o.MaxSidecars, "remedy", "raise MaxSidecars")
			c.Close()
			continue
		}
		conns.Go(func() {
			defer a.readers.remove(c)
			if err := a.handOver(ctx, c); err != nil {
				a.o.Logger.Warn("table not handed over", "error", err)
			}
		})
	}
}

// handOver serves one connection to its end.
func (a *Agent) handOver(ctx context.Context, c net.Conn) error {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	u, ok := c.(*net.UnixConn)
	if !ok {
		return outrigger.Errorf(outrigger.Invalid, "the table can be handed over on a Unix socket only, not on %s", c.LocalAddr().Network())
	}
	w := a.table.Load()
	f, err := w.Descriptor()
	if err != nil {
		return err
	}
	defer f.Close()
	st := w.Stats()
	hello := binary.LittleEndian.AppendUint64(nil, helloMagic)
	hello = binary.LittleEndian.AppendUint64(hello, st.Generation)
	hello = binary.LittleEndian.AppendUint64(hello, uint64(st.TotalBytes))
	hello = binary.LittleEndian.AppendUint64(hello, uint64(a.o.Lease))
	if err := u.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	if _, _, err := u.WriteMsgUnix(hello, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return fmt.Errorf("send the descriptor: %w", err)
	}
	if w != a.table.Load() {
		return nil // rotated meanwhile: the reader comes again
	}
	// Readers send nothing, so this ends when either side closes.
	_, err = c.Read(make([]byte, 1))
	if err == nil {
		return outrigger.Errorf(outrigger.Invalid, "an attached process sent data; the hand-over protocol has none")
	}
	return nil
}

// Attachment is a process's hold of an agent's table.
type Attachment struct {
	Reader *shm.Reader
	// Lease is the length of the agent's feed lease: a table whose lease ends at u was
	// current at u − Lease.
	Lease time.Duration
	// Gone is closed when the agent has retired the table or has died, and by Close.
	Gone <-chan struct{}

	conn *net.UnixConn
}

// Close gives the attachment up. The Reader stays valid.
func (t *Attachment) Close() error { return t.conn.Close() }

// Attach connects to the agent's table socket at path and maps the table. The caller
// must Close the attachment, also after Gone. Errors have kind Unavailable when nobody
// serves there, and Invalid when what is served is not a table.
func Attach(ctx context.Context, path string) (*Attachment, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "no node agent serves a table")
	}
	u := c.(*net.UnixConn)
	r, lease, err := receive(ctx, u)
	if err != nil {
		u.Close()
		return nil, err
	}
	gone := make(chan struct{})
	go func() {
		// Ends with the connection, which Attachment.Close or the agent ends.
		defer close(gone)
		_, _ = u.Read(make([]byte, 1))
	}()
	return &Attachment{Reader: r, Lease: lease, Gone: gone, conn: u}, nil
}

// receive takes the hello message and maps the table in it.
func receive(ctx context.Context, u *net.UnixConn) (*shm.Reader, time.Duration, error) {
	deadline := time.Now().Add(helloTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := u.SetReadDeadline(deadline); err != nil {
		return nil, 0, err
	}
	b, oob := make([]byte, helloBytes+1), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := u.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, 0, outrigger.Wrap(outrigger.Unavailable, err, "the node agent handed no table over")
	}
	files, err := rights(oob[:oobn])
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	switch {
	case err != nil:
		return nil, 0, outrigger.Wrap(outrigger.Invalid, err, "ancillary data of the table socket")
	case n != helloBytes || binary.LittleEndian.Uint64(b) != helloMagic || len(files) != 1:
		return nil, 0, outrigger.Errorf(outrigger.Invalid, "the table socket sent %d bytes and %d descriptors; it is not a node agent's", n, len(files))
	}
	want := int64(binary.LittleEndian.Uint64(b[16:]))
	if st, err := files[0].Stat(); err != nil || st.Size() != want {
		return nil, 0, outrigger.Errorf(outrigger.Invalid, "the table's descriptor is not of %d bytes as announced", want)
	}
	lease := time.Duration(binary.LittleEndian.Uint64(b[24:]))
	if lease <= 0 {
		return nil, 0, outrigger.Errorf(outrigger.Invalid, "the node agent announced a feed lease of %v", lease)
	}
	r, err := shm.Open(files[0])
	if err != nil {
		return nil, 0, err
	}
	return r, lease, u.SetReadDeadline(time.Time{})
}

// rights returns the files passed in ancillary data, also when part of it is bad.
func rights(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		fds, e := unix.ParseUnixRights(&messages[i])
		err = errors.Join(err, e)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "table"))
		}
	}
	return files, err
}
