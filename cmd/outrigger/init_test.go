package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/netnstest"
)

// patience is how long tests wait for what will happen. A loaded machine may need it.
const patience = time.Minute

// outrigger1 runs one command line in the calling thread, and so in its namespace.
func outrigger1(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Main{Stdout: &out, Stderr: &errs, Environ: []string{}}.Run(t.Context(), args)
	return code, out.String(), errs.String()
}

// The life of an installation as an operator sees it: install, twice; verify; settings
// that differ; uninstall, twice; with the exit codes and JSON that scripts rely on.
func TestInitVerbs(t *testing.T) {
	ns := netnstest.New(t)
	f := func(want int, field string, value any, args ...string) {
		t.Helper()
		ns.Do(func() {
			t.Helper()
			code, out, errs := outrigger1(t, append([]string{"init", "-o", "json"}, args...)...)
			if code != want {
				t.Errorf("%q: exit code %d, want %d; %s", args, code, want, errs)
			}
			var doc map[string]any
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				t.Errorf("%q: %v in %q", args, err, out)
			}
			if doc[field] != value {
				t.Errorf("%q: %s is %v, want %v", args, field, doc[field], value)
			}
		})
	}
	own := []string{"--own-uids", "1337", "--loopback-ports", "50051"}
	verb := func(name string) []string { return append([]string{name}, own...) }
	f(1, "in_force", false, verb("verify")...)
	f(0, "removed", false, "uninstall")
	f(0, "rules", 6.0, own...)
	f(0, "in_force", true, verb("verify")...)
	f(0, "rules", 6.0, own...)
	f(0, "in_force", true, verb("verify")...)
	f(1, "in_force", false, "verify", "--own-uids", "1338")
	f(0, "mode", "tproxy", append([]string{"--mode", "tproxy"}, own...)...)
	f(0, "in_force", true, append(verb("verify"), "--mode", "tproxy")...)
	f(0, "removed", true, "uninstall")
	f(0, "removed", false, "uninstall")
	f(1, "in_force", false, append(verb("verify"), "--mode", "tproxy")...)
}

// Without privilege the error says CAP_NET_ADMIN, the exit code is 1, and a dry run works.
func TestInitWithoutPrivilege(t *testing.T) {
	netnstest.New(t).Unprivileged(func() {
		code, out, errs := outrigger1(t, "init", "--own-uids", "1337")
		if code != 1 || !strings.Contains(errs, "CAP_NET_ADMIN") {
			t.Errorf("exit code %d, %q, %q", code, out, errs)
		}
		if code, out, errs = outrigger1(t, "init", "--own-uids", "1337", "--dry-run"); code != 0 || out == "" {
			t.Errorf("dry run: exit code %d, %q, %q", code, out, errs)
		}
	})
}
