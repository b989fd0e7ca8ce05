package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
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
// nothing: which table it is given, the kernel's word on who it is decides. One that is
// given none gets refusalMagic and the reason as text instead, and the end.
const (
	helloMagic   = 0x31524f4842545550 // "PUTBHOR1" in memory order
	helloBytes   = 32
	refusalMagic = 0x30524f4842545550 // "PUTBHOR0"
	maxRefusal   = 512                // bytes, the magic included

	// helloTimeout bounds the hand-over itself; both sides are on one machine.
	helloTimeout = 2 * time.Second
)

// attachments are the open hand-over connections.
type attachments struct {
	mu     sync.Mutex
	conns  map[net.Conn]attached
	warned map[user]struct{} // of refusals, so that one who keeps trying fills no log
}

// attached is what a connection is for: a tenant ("" = all) and, once it has been handed
// over, a table.
type attached struct {
	tenant string
	t      *table
}

// add takes a connection in unless its tenant has limit of them.
func (s *attachments) add(c net.Conn, tenant string, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, at := range s.conns {
		if at.tenant == tenant {
			n++
		}
	}
	if n >= limit {
		return false
	}
	if s.conns == nil {
		s.conns = map[net.Conn]attached{}
	}
	s.conns[c] = attached{tenant: tenant}
	return true
}

func (s *attachments) hold(c net.Conn, t *table) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.conns[c]; ok {
		at.t = t
		s.conns[c] = at
	}
}

// holding counts those who have t.
func (s *attachments) holding(t *table) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.conns {
		if at.t == t {
			n++
		}
	}
	return n
}

func (s *attachments) remove(c net.Conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	c.Close()
}

// end closes the connections of those who have t; nil means all.
func (s *attachments) end(t *table) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c, at := range s.conns {
		if t == nil || at.t == t {
			c.Close()
		}
	}
}

func (s *attachments) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// maxWarned bounds the users whose refusal is logged, each once.
const maxWarned = 64

// firstRefusal reports whether a refusal of u is worth a line.
func (s *attachments) firstRefusal(u user) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.warned[u]; known || len(s.warned) >= maxWarned {
		return false
	}
	if s.warned == nil {
		s.warned = map[user]struct{}{}
	}
	s.warned[u] = struct{}{}
	return true
}

// ServeTable hands the table to every process that connects to l, a listener on a Unix
// socket, until ctx ends; it then closes l and every attachment and returns nil. Who may
// connect is decided by the permissions of the socket's path, and with Options.Access each
// process gets the table of its tenant, or the reason why it gets none. Beyond
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
		tenant, ok := a.welcome(c)
		if !ok {
			continue
		}
		conns.Go(func() {
			defer a.readers.remove(c)
			if err := a.handOver(ctx, c, tenant); err != nil {
				a.o.Logger.Warn("table not handed over", "error", err)
			}
		})
	}
}

// welcome decides about a new connection, from nothing it has sent.
func (a *Agent) welcome(c net.Conn) (tenant string, ok bool) {
	if a.o.Access != nil {
		var err error
		if tenant, err = a.o.Access.tableFor(c); err != nil {
			a.refuse(c, err)
			return "", false
		}
	}
	limit := max(1, a.o.MaxSidecars/a.o.Access.count()) // so that no tenant takes another's part
	if !a.readers.add(c, tenant, limit) {
		a.o.Logger.Warn("sidecar refused", "limit", limit, "tenant", tenant, "remedy", "raise MaxSidecars")
		c.Close()
		return "", false
	}
	return tenant, true
}

// refuse says why and closes. The message fits a fresh socket's buffer, so nothing waits
// for a peer that does not read.
func (a *Agent) refuse(c net.Conn, why error) {
	defer c.Close()
	u, _ := peerUser(c) // zeros where that is why
	if a.readers.firstRefusal(u) {
		a.o.Logger.Warn("a process was refused a table", "uid", u.uid, "gid", u.gid, "error", why)
	}
	b := binary.LittleEndian.AppendUint64(nil, refusalMagic)
	b = append(b, why.Error()...)
	if err := c.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
		return
	}
	_, _ = c.Write(b[:min(len(b), maxRefusal)]) // it may have gone
}

// handOver serves one connection to its end.
func (a *Agent) handOver(ctx context.Context, c net.Conn, tenant string) error {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	u, ok := c.(*net.UnixConn)
	if !ok {
		return outrigger.Errorf(outrigger.Invalid, "the table can be handed over on a Unix socket only, not on %s", c.LocalAddr().Network())
	}
	t, err := a.hold(c, tenant)
	if err != nil {
		return err
	}
	if t == nil {
		return outrigger.Errorf(outrigger.Internal, "tenant %s was let in and has no table", tenant)
	}
	if err := a.send(u, t.w); err != nil {
		return err
	}
	if a.tables.Load().of(tenant) != t {
		return nil // replaced meanwhile: the reader comes again
	}
	// Readers send nothing, so this ends when either side closes.
	_, err = c.Read(make([]byte, 1))
	if err == nil {
		return outrigger.Errorf(outrigger.Invalid, "an attached process sent data; the hand-over protocol has none")
	}
	return nil
}

// send hands a table over.
func (a *Agent) send(u *net.UnixConn, w *shm.Writer) error {
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
// serves there, Denied when the agent has no table for this process's user, and Invalid
// when what is served is not a table.
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
	b, oob := make([]byte, maxRefusal), make([]byte, unix.CmsgSpace(4*4))
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
	case n >= 8 && binary.LittleEndian.Uint64(b) == refusalMagic:
		return nil, 0, outrigger.Errorf(outrigger.Denied, "the node agent hands this process no table: %s", strings.ToValidUTF8(string(b[8:n]), "?"))
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
