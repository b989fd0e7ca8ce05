//go:build !dataplane

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// cmdJSON checks a value in the last standard output, which must be one JSON document:
//
//	json path.to.0.value want
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: json path want")
	}
	var doc any
	if err := json.Unmarshal([]byte(ts.ReadFile("stdout")), &doc); err != nil {
		ts.Fatalf("standard output is not JSON: %v", err)
	}
	got := fmt.Sprint(walk(ts, doc, args[0]))
	if (got == args[1]) == neg {
		ts.Fatalf("%s is %q, want %q (negated: %v)", args[0], got, args[1], neg)
	}
}

func walk(ts *testscript.TestScript, doc any, path string) any {
	for _, step := range strings.Split(path, ".") {
		switch v := doc.(type) {
		case map[string]any:
			doc = v[step]
		case []any:
			i, err := strconv.Atoi(step)
			if err != nil || i >= len(v) {
				ts.Fatalf("%s: no element %s in %v", path, step, v)
			}
			doc = v[i]
		default:
			return nil
		}
	}
	return doc
}

// cmdExits runs a command and demands its exit code:
//
//	exits 64 outrigger control --consul x --regions-file y
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code command…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	got := 0
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// cmdQuiet finds loopback addresses that nobody listens on, and sets NAME to host:port and
// NAME_IP to the host:
//
//	quiet NAME…
func cmdQuiet(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: quiet NAME…")
	}
	for _, name := range args {
		address, err := quietAddress()
		ts.Check(err)
		host, _, err := net.SplitHostPort(address)
		ts.Check(err)
		ts.Setenv(name, address)
		ts.Setenv(name+"_IP", host)
	}
}
