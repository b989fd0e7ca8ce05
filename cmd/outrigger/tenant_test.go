//go:build !dataplane

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Users of two tenants and of nobody; they need no entry in /etc/passwd.
const acmeUser, umbraUser, strangeUser = 41001, 41002, 41003

// as makes a child a process of another user, without groups.
func as(uid uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
}

// tenantMesh is a control plane, a node agent with two tenants and what they run, each a
// process of its own.
type tenantMesh struct {
	t       *testing.T
	dir     string
	control string
	agent   *running
}

type running struct {
	cmd   *exec.Cmd
	bound map[string]string
	log   *syncBuffer
}

// program runs this binary as the user; it may lie where that user cannot look for it.
func (m *tenantMesh) program(user uint32, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "outrigger"
	cmd.Dir = m.dir
	if user != 0 {
		cmd.SysProcAttr = as(user)
	}
	return cmd
}

func (m *tenantMesh) run(user uint32, args ...string) *running {
	t := m.t
	t.Helper()
	r := &running{cmd: m.program(user, args...), log: newSyncBuffer()}
	r.cmd.Stderr = r.log
	stdout, err := r.cmd.StdoutPipe()
	must(t, err)
	must(t, r.cmd.Start())
	t.Cleanup(func() {
		_ = r.cmd.Process.Signal(syscall.SIGTERM) // it may have been ended before
		_ = r.cmd.Wait()
		if t.Failed() {
			t.Logf("%s as %d:\n%s", args[0], user, r.log)
		}
	})
	var said struct{ Listening map[string]string }
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err = errors.Join(err, json.Unmarshal(line, &said)); err != nil {
		t.Fatalf("%s said %q, %v\n%s", args[0], line, err, r.log)
	}
	r.bound = said.Listening
	return r
}

func (m *tenantMesh) node() *running {
	return m.run(0, "node", "--control", m.control, "--dir", filepath.Join(m.dir, "node"), "--node-id", "n", "--feed-lease", "10s",
		"--tenant-users", fmt.Sprintf("%d=acme,%d=umbra", acmeUser, umbraUser))
}

func (m *tenantMesh) sidecar(user uint32) *running {
	return m.run(user, "sidecar", "--control", m.control, "--agent-dir", filepath.Join(m.dir, "node"), "--node-id", fmt.Sprintf("n/%d", user),
		"--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
}

// call is a request for variable shop/x of a tenant.
func call(t *testing.T, method, address, tenant, body string) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+address+"/v1/variables/shop/x", strings.NewReader(body))
	must(t, err)
	req.Header.Set("x-outrigger-tenant", tenant)
	req.Header.Set("content-type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	must(t, err)
	return resp.StatusCode, resp.Header, string(b)
}

// says runs a verb as a user and returns its output and exit code.
func (m *tenantMesh) says(user uint32, args ...string) (string, int) {
	m.t.Helper()
	cmd := m.program(user, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatalf("%q as %d: %v", args, user, err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// shellAs runs a line of shell as a user.
func (m *tenantMesh) shellAs(user uint32, line string) string {
	m.t.Helper()
	cmd := exec.Command("/bin/sh", "-c", line)
	cmd.Dir, cmd.SysProcAttr = "/", as(user)
	out, err := cmd.CombinedOutput()
	if err != nil {
		m.t.Fatalf("%q as %d: %v\n%s", line, user, err, out)
	}
	return string(out)
}

// Two tenants with users of their own share a node agent and see nothing of each other:
// not through the table, not through the agent's calls, not by opening a file. They go on
// when the agent is killed and started anew.
func TestTenantProcesses(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, to start processes of several users")
		}
		t.Skip("needs root, to start processes of several users")
	}
	// Not t.TempDir: other users must get to the sockets.
	dir, err := os.MkdirTemp("", "tenants")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o711))
	m := &tenantMesh{t: t, dir: dir}
	m.control = m.run(0, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data")).bound["listen"]
	m.agent = m.node()
	acme, umbra := m.sidecar(acmeUser), m.sidecar(umbraUser)
	address := map[string]string{"acme": acme.bound["listen"], "umbra": umbra.bound["listen"]}

	for tenant, value := range map[string]string{"acme": "1", "umbra": "2"} {
		eventually(t, tenant+"'s write", func() bool {
			code, _, _ := call(t, http.MethodPut, address[tenant], tenant, `{"value":`+value+`,"type":"integer"}`)
			return code < 300
		})
		m.hits(address[tenant], tenant, value)
	}
	m.separate(address, acme)

	// Killed and started anew: both have a table again, and see what is written now.
	must(t, m.agent.cmd.Process.Kill())
	_ = m.agent.cmd.Wait() // killed
	m.agent = m.node()
	for tenant, value := range map[string]string{"acme": "10", "umbra": "20"} {
		eventually(t, tenant+"'s write after the restart", func() bool {
			code, _, _ := call(t, http.MethodPut, address[tenant], tenant, `{"value":`+value+`}`)
			return code < 300
		})
		m.hits(address[tenant], tenant, value)
	}
	m.separate(address, acme)
}

// hits waits until a read is proved by the node's table.
func (m *tenantMesh) hits(address, tenant, value string) {
	m.t.Helper()
	socket := "unix:" + filepath.Join(m.dir, "node", agentSocket)
	eventually(m.t, tenant+"'s copy in the table", func() bool {
		_, h, b := call(m.t, http.MethodGet, address, tenant, "")
		out, code := m.says(0, "cache", "get", "shop/x", "--tenant", tenant, "--server", socket)
		return strings.Contains(b, `"value":`+value) && h.Get("x-outrigger-tier") == "process" && code == 0 && strings.Contains(out, tenant+"/shop/x")
	})
}

// separate checks that nobody gets at anything of another's.
func (m *tenantMesh) separate(address map[string]string, acme *running) {
	t := m.t
	t.Helper()
	socket := "unix:" + filepath.Join(m.dir, "node", agentSocket)
	if out, _ := m.says(0, "cache", "stat", "--server", socket); !strings.Contains(out, "sidecars 2") || !strings.Contains(out, "keys 2") {
		t.Errorf("the agent has\n%s", out)
	}
	// A sidecar that is asked for another tenant's variable is refused it.
	if code, _, body := call(t, http.MethodGet, address["acme"], "umbra", ""); code != http.StatusForbidden || strings.Contains(body, "20") {
		t.Errorf("acme's sidecar asked for umbra's variable: %d %s", code, body)
	}
	if code, _, body := call(t, http.MethodPut, address["acme"], "umbra", `{"value":666}`); code != http.StatusForbidden {
		t.Errorf("acme's sidecar told to write umbra's variable: %d %s", code, body)
	}
	// So is any other process of the user, and one of a user of no tenant gets nothing.
	for _, c := range []struct {
		user uint32
		args []string
		code int
		says string
	}{
		{acmeUser, []string{"cache", "dump", "--tenant", "acme"}, 0, "acme/shop/x"},
		{acmeUser, []string{"cache", "dump", "--tenant", "umbra"}, 1, "serves tenant acme only"},
		{acmeUser, []string{"cache", "dump", "--all-tenants"}, 1, "serves tenant acme only"},
		{acmeUser, []string{"cache", "flush", "--all"}, 1, "serves tenant acme only"},
		{acmeUser, []string{"var", "get", "shop/x", "--tenant", "umbra"}, 1, "serves tenant acme only"},
		{umbraUser, []string{"var", "get", "shop/x", "--tenant", "umbra"}, 0, "version"},
		{strangeUser, []string{"cache", "stat"}, 1, "user 41003 with group 41003 has no tenant"},
		{strangeUser, []string{"var", "get", "shop/x", "--tenant", "acme"}, 1, "has no tenant"},
		{0, []string{"cache", "dump", "--all-tenants"}, 0, "umbra/shop/x"},
	} {
		if out, code := m.says(c.user, append(c.args, "--server", socket)...); code != c.code || !strings.Contains(out, c.says) {
			t.Errorf("%q as %d: exit code %d, want %d, and %q in\n%s", c.args, c.user, code, c.code, c.says, out)
		}
	}
	m.files(acme)
}

// files checks that the tables have no name under which others could open them: not
// through the agent's descriptors, not through those or the mappings of the sidecar that
// has one. The agent's own user sees that they are there to be found.
func (m *tenantMesh) files(acme *running) {
	t := m.t
	t.Helper()
	agent := m.agent.cmd.Process.Pid
	line := fmt.Sprintf(`for p in %d %d; do for f in /proc/$p/fd/* /proc/$p/map_files/*; do case "$(readlink "$f")" in *outrigger*) head -c1 "$f" >/dev/null 2>&1 && echo "opened $f";; esac; done; done; true`,
		agent, acme.cmd.Process.Pid)
	if out := m.shellAs(0, line); strings.Count(out, "opened") < 2 {
		t.Errorf("root finds no tables, so nothing is tested:\n%s", out)
	}
	for _, user := range []uint32{acmeUser, umbraUser, strangeUser} {
		if out := m.shellAs(user, line); out != "" {
			t.Errorf("user %d: %s", user, out)
		}
	}
	// Nor can others list what there is, or put a socket of theirs in its place.
	info, err := os.Stat(filepath.Join(m.dir, "node"))
	must(t, err)
	if info.Mode().Perm() != 0o711 {
		t.Errorf("the directory of the sockets has mode %#o", info.Mode().Perm())
	}
}
