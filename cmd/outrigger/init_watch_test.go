package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/netnstest"
)

// A watchdog with failures 3 and successes 2 over a script of looks: + alive, - not. The
// result has R where the rules were removed, I where they were installed, and ! where that
// failed; the looks go on.
func TestWatchdog(t *testing.T) {
	for _, tt := range []struct {
		in          bool
		looks, want string
		fail        int // changes that fail before the first that works
	}{
		{true, "++++++++", "........", 0},
		{true, "--+--+--+", ".........", 0}, // never three in a row
		{true, "---------", "..R......", 0},
		{true, "+---+-++++", "...R...I..", 0}, // and never two good ones before
		{false, "++---++", ".I..R.I", 0},
		{false, "-+-+-+-", ".......", 0},
		{true, "-----++", "..!!R.I", 2},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			got, n := []byte(strings.Repeat(".", len(tt.looks))), -1
			change := func(mark byte) func() error {
				return func() error {
					if tt.fail > 0 {
						tt.fail--
						got[n] = '!'
						return errors.New("not now")
					}
					got[n] = mark
					return nil
				}
			}
			lines := 0
			w := &watchdog{every: time.Second, failures: 3, successes: 2, install: change('I'), remove: change('R'),
				say: func(string, ...any) { lines++ },
				alive: func(context.Context) error {
					if n++; n == len(tt.looks) {
						cancel()
						return ctx.Err()
					}
					if tt.looks[n] == '-' {
						return errors.New("refused")
					}
					return nil
				}}
			start := time.Now()
			if err := w.run(ctx, tt.in); err != nil {
				t.Error(err)
			}
			if string(got) != tt.want || lines != len(tt.want)-strings.Count(tt.want, ".") || time.Since(start) != time.Duration(len(tt.looks))*time.Second {
				t.Errorf("%s: %s with %d lines after %v, want %s", tt.looks, got, lines, time.Since(start), tt.want)
			}
		})
	}
}

// The same with the kernel's rules and a real listener: there while it listens, gone while
// it does not, and left as they are at the end.
func TestInitWatch(t *testing.T) {
	ns := netnstest.New(t)
	settings := []string{"--own-uids", "1337", "--outbound-port", "15001"}
	inForce := func(want bool) {
		t.Helper()
		look := time.NewTicker(10 * time.Millisecond)
		defer look.Stop()
		for end := time.Now().Add(patience); ; <-look.C {
			code := 0
			ns.Do(func() { code, _, _ = outrigger1(t, append([]string{"init", "verify"}, settings...)...) })
			if (code == 0) == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("in force is %v", !want)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan string, 1)
	var out bytes.Buffer
	go ns.Do(func() {
		code := Main{Stdout: &out, Stderr: &out, Environ: []string{}}.Run(ctx, append([]string{"init", "watch", "--interval", "200ms"}, settings...))
		ended <- fmt.Sprint(code)
	})
	for range 2 {
		l := ns.Listen("tcp", "127.0.0.1:15001")
		inForce(true)
		l.Close()
		inForce(false)
	}
	l := ns.Listen("tcp", "127.0.0.1:15001")
	defer l.Close()
	inForce(true)
	cancel()
	if code := <-ended; code != "0" {
		t.Errorf("exit code %s", code)
	}
	inForce(true)
	// More only where it could not look in time, thrice in a row.
	if s := out.String(); strings.Count(s, "rules installed") < 3 || strings.Count(s, "rules removed") != strings.Count(s, "rules installed")-1 {
		t.Errorf("it said\n%s", s)
	}
}
