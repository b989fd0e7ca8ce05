package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/proxy"
)

func upgradeCommand(g *globals) *cobra.Command {
	admin := ""
	limit := 2 * time.Minute
	cmd := &cobra.Command{Use: "upgrade", Short: "Replace a running sidecar by its program's present version", Args: exactArgs(),
		Long: `Upgrade makes the sidecar with that --admin socket start the program it was started
from again, with the same arguments, and hand its listeners to it. Once the new process has
policy and cache it serves, and the old one drains within its --grace and ends. Until then
the old one serves, whatever becomes of the new one; the command fails if it does not take
over. SIGUSR2 does the same without an answer.`}
	cmd.Flags().StringVar(&admin, "admin", "", "the sidecar's admin socket, unix:path")
	cmd.Flags().DurationVar(&limit, "timeout", limit, "how long to wait for the answer")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		path, ok := strings.CutPrefix(admin, "unix:")
		if !ok || path == "" {
			return usageError{fmt.Errorf("--admin is %q; give the sidecar's, unix:path", admin)}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), limit)
		defer cancel()
		pid, err := askUpgrade(ctx, path)
		if err != nil {
			return err
		}
		if g.output == "json" {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]int{"pid": pid})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "process %d serves\n", pid)
		return nil
	}
	return cmd
}

// askUpgrade returns the new process's id.
func askUpgrade(ctx context.Context, path string) (int, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://sidecar/upgrade", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, outrigger.Wrap(outrigger.Unavailable, err, "no sidecar answers at "+path)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return 0, err
	}
	var got struct{ PID int }
	if resp.StatusCode != http.StatusOK {
		return 0, outrigger.Errorf(outrigger.Unavailable, "the sidecar was not replaced: %s", strings.TrimSpace(string(body)))
	}
	return got.PID, json.Unmarshal(body, &got)
}

// upgrader replaces this process by a new one; see handover.go for how.
type upgrader struct {
	p         *process
	sc        *proxy.Sidecar
	program   string // absolute, symbolic links not followed: they may point elsewhere by now
	args      []string
	environ   []string
	limit     time.Duration
	pprof     bool
	listeners []handedListener

	one  sync.Mutex // held during an upgrade
	done bool       // guarded by one: this process has been replaced
}

// handedListener is a listener and what it was asked to be.
type handedListener struct {
	listenerRecord
	l net.Listener
}

func (s *sidecarFlags) upgrader(p *process, sc *proxy.Sidecar) *upgrader {
	u := &upgrader{p: p, sc: sc, args: os.Args[1:], limit: s.upgradeTimeout, pprof: s.pprof}
	program, err := exec.LookPath(os.Args[0])
	if err == nil {
		program, err = filepath.Abs(program)
	}
	if err != nil {
		p.log.Warn("this process cannot be upgraded: its program is not found", "program", os.Args[0], "error", err)
	}
	u.program = program
	u.environ = slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, handOverVariable+"=") })
	return u
}

// handed lists the listeners of a sidecar; nil ones are left out.
func handed(s *sidecarFlags, hl, al, dl net.Listener, taken *proxy.Interception) (out []handedListener) {
	add := func(name, asked string, l net.Listener) {
		out = append(out, handedListener{listenerRecord{name, asked}, l})
	}
	add("listen", s.listen, al)
	add("http", s.http, hl)
	if dl != nil {
		add("admin", s.admin, dl)
	}
	if taken != nil && taken.Outbound != nil {
		add("intercept-outbound", s.intercept.outbound, taken.Outbound)
	}
	if taken != nil && taken.Inbound != nil {
		add("intercept-inbound", s.intercept.inbound, taken.Inbound)
	}
	return out
}

// run upgrades at SIGUSR2 until ctx ends.
func (u *upgrader) run(ctx context.Context) error {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR2)
	defer signal.Stop(asked)
	for {
		select {
		case <-asked:
			if _, err := u.upgrade(ctx); err != nil {
				u.p.log.Error("upgrade failed; serving on", "error", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// serveUpgrade is POST /upgrade on the admin socket.
func (u *upgrader) serveUpgrade(w http.ResponseWriter, r *http.Request) {
	pid, err := u.upgrade(r.Context())
	if err != nil {
		u.p.log.Error("upgrade failed; serving on", "error", err)
		status.WriteHTTP(w, err)
		return
	}
	w.Header().Set("content-type", "application/json")
	// The process is on its way out; whoever asked can see the new one.
	_ = json.NewEncoder(w).Encode(map[string]int{"pid": pid})
}

// upgrade starts the new process and, once it serves, begins this one's drain. It returns
// the new process's id. One upgrade at a time: another fails with Unavailable.
func (u *upgrader) upgrade(ctx context.Context) (pid int, err error) {
	if !u.one.TryLock() {
		return 0, outrigger.Errorf(outrigger.Unavailable, "upgrade: another is under way")
	}
	defer u.one.Unlock()
	if u.done || u.p.ctx.Err() != nil || u.p.cmd.Context().Err() != nil {
		return 0, outrigger.Errorf(outrigger.Unavailable, "upgrade: this process is on its way out")
	}
	ctx, cancel := context.WithTimeout(ctx, u.limit)
	defer cancel()
	defer context.AfterFunc(u.p.ctx, cancel)()
	child, conn, err := u.start()
	if err != nil {
		return 0, outrigger.Wrap(outrigger.Unavailable, err, "upgrade: start "+u.program)
	}
	defer conn.c.Close()
	pid = child.Process.Pid
	u.p.log.Info("upgrade: new process started", "pid", pid, "program", u.program)
	if err := u.handOver(ctx, conn); err != nil {
		_ = child.Process.Kill() // an error means that it has ended
		ended := child.Wait()
		return 0, outrigger.Wrap(outrigger.Unavailable, err, fmt.Sprintf("upgrade: process %d did not take over (%v)", pid, ended))
	}
	go func() { _ = child.Wait() }() // if it ends before this process does, how is in its log
	u.done = true
	u.p.log.Info("upgrade: the new process serves; draining", "pid", pid)
	u.release()
	return pid, nil
}

// start runs the new process with its end of the pair.
func (u *upgrader) start() (*exec.Cmd, *handOverConn, error) {
	if u.program == "" {
		return nil, nil, errors.New("the program's file was not found")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "handover")
	defer theirs.Close()
	conn, err := newHandOverConn(pair[0])
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(u.program, u.args...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	cmd.Env = append(slices.Clone(u.environ), handOverVariable+"=3")
	if err := cmd.Start(); err != nil {
		conn.c.Close()
		return nil, nil, err
	}
	return cmd, conn, nil
}

// servingLimit is how long a process that was ready may take to start its servers.
const servingLimit = 10 * time.Second

// handOver is this side of the conversation.
func (u *upgrader) handOver(ctx context.Context, conn *handOverConn) error {
	stop := context.AfterFunc(ctx, func() { conn.c.Close() })
	defer stop()
	by, _ := ctx.Deadline()
	step := handOverStep{Step: "listeners"}
	var fds []int
	defer func() { closeAll(fds) }()
	for _, l := range u.listeners {
		fd, err := duplicate(l.l)
		if err != nil {
			return err
		}
		fds, step.Listeners = append(fds, fd), append(step.Listeners, l.listenerRecord)
	}
	if err := conn.send(step, fds...); err != nil {
		return err
	}
	if _, _, err := conn.receive("ready", by); err != nil {
		return fmt.Errorf("until it was ready: %w", errors.Join(err, ctx.Err()))
	}
	// From here on it accepts: whoever asked for the upgrade may leave, but only a process
	// that does not serve is killed.
	if !stop() {
		return ctx.Err()
	}
	if err := conn.send(handOverStep{Step: "go"}); err != nil {
		return err
	}
	if _, _, err := conn.receive("serving", time.Now().Add(servingLimit)); err != nil {
		return fmt.Errorf("until it served: %w", err)
	}
	return nil
}

// release begins the drain: the listeners are the new process's, their files included. The
// pages about a process stop first: who asks now means the one that serves.
func (u *upgrader) release() {
	for _, l := range u.listeners {
		if l, ok := l.l.(*net.UnixListener); ok {
			l.SetUnlinkOnClose(false)
		}
		if l.Name == "admin" || l.Name == "http" {
			l.l.Close()
		}
	}
	u.sc.HandOver()
	u.p.ready.Store(false)
	u.p.end()
}

// duplicate returns another descriptor of l's socket. Its File method is not used because
// that of an *os.File makes the socket, which both processes share, block.
func duplicate(l net.Listener) (int, error) {
	sc, ok := l.(syscall.Conn)
	if !ok {
		return -1, outrigger.Errorf(outrigger.Invalid, "a %T has no descriptor", l)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	cerr := rc.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, cerr)
}
