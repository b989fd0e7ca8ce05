package upstream

import (
	"io"
	"net"
	"runtime"
	"testing"
	"time"
)

// An idle connection is looked at before it is used, without taking anything from it: over
// sockets by peeking, over anything else by a read whose time is over.
func TestIdleConnectionIsLookedAt(t *testing.T) {
	socket := func(t *testing.T) (ours, theirs net.Conn) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if ours, err = net.Dial("tcp", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if theirs, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		return ours, theirs
	}
	pipe := func(*testing.T) (ours, theirs net.Conn) { return net.Pipe() }
	for name, dial := range map[string]func(*testing.T) (net.Conn, net.Conn){"socket": socket, "pipe": pipe} {
		for _, tt := range []struct {
			what   string
			do     func(theirs net.Conn)
			usable bool
		}{
			{"quiet", func(net.Conn) {}, true},
			{"said something", func(c net.Conn) { go io.WriteString(c, "x") }, false},
			{"closed", func(c net.Conn) { c.Close() }, false},
		} {
			if name == "pipe" && tt.what == "said something" {
				continue // nothing arrives in a pipe before somebody reads
			}
			t.Run(name+", "+tt.what, func(t *testing.T) {
				ours, theirs := dial(t)
				defer ours.Close()
				defer theirs.Close()
				l := newLink(ours)
				if (l.raw != nil) != (name == "socket") {
					t.Fatalf("a look through the socket: %v", l.raw != nil)
				}
				if !l.usable() {
					t.Fatal("a fresh connection is not usable")
				}
				tt.do(theirs)
				// What the other side did takes a moment to arrive; a quiet one stays usable.
				for end := time.Now().Add(time.Minute); l.usable() != tt.usable; runtime.Gosched() {
					if time.Now().After(end) {
						t.Fatalf("usable stays %v", !tt.usable)
					}
				}
				if tt.usable {
					// Looking took nothing and left no deadline behind.
					go io.WriteString(theirs, "answer")
					got := make([]byte, 6)
					if _, err := io.ReadFull(ours, got); err != nil || string(got) != "answer" {
						t.Errorf("read %q, %v", got, err)
					}
				}
				if tt.what == "said something" && name == "socket" {
					got := make([]byte, 1)
					if _, err := io.ReadFull(ours, got); err != nil || got[0] != 'x' {
						t.Errorf("the look took what was there: %q, %v", got, err)
					}
				}
			})
		}
	}
}
