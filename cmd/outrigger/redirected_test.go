//go:build !dataplane

package main

import (
	"bufio"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestProgramsRedirected runs more unmodified programs in a pod whose connections are
// redirected to its sidecar, over IPv4 and IPv6, each to a destination that is looked into and
// to one whose bytes pass: gRPC's interoperability suite, OpenAI's client for Node, and
// WebSockets. See TestModelClientsRedirected and TestTransparent for others.
func TestProgramsRedirected(t *testing.T) {
	modules := nodeModules(t)
	python := pythonEnvironment(t, "clients")
	p := newPod(t, "redirect", "--own-uids", "1337")
	t.Run("gRPC", p.interop)
	t.Run("WebSocket", func(t *testing.T) { p.webSockets(t, python) })
	t.Run("Node", func(t *testing.T) {
		const looked, passed = server4 + ":8000", server4 + ":8001"
		for _, a := range []string{looked, passed} {
			serveModels(t, p.server.Listen("tcp", a))
		}
		p.verb("model", "register", "org/model", "v1", "--endpoint", looked, "--wait", "60s")
		waitModels(t, p.client(), "http://"+looked, "org/model")
		for address, version := range map[string][]string{looked: {"v1"}, passed: nil} {
			passes(t, func() ([]byte, error) {
				return p.ns.Run(exec.CommandContext(t.Context(), "node", append([]string{filepath.Join("testdata", "openai_client.mjs"), modules, "http://" + address + "/v1"}, version...)...))
			})
		}
	})
}

// webSockets has both ends of the library's connections talk, the server in the other
// namespace.
func (p *pod) webSockets(t *testing.T, python string) {
	script := filepath.Join("testdata", "websocket_client.py")
	for _, address := range []string{"[" + server6 + "]:8000", server4 + ":8003"} {
		server := exec.Command(python, script, "serve", address)
		stdin, err := server.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := server.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		server.Stderr = newSyncBuffer()
		if err := p.server.Start(server); err != nil {
			t.Fatal(err)
		}
		if said := bufio.NewScanner(stdout); !said.Scan() || said.Text() != "listening" {
			t.Errorf("the server said %q: %s", said.Text(), server.Stderr)
		}
		before := p.counts()
		passes(t, func() ([]byte, error) {
			return p.ns.Run(exec.CommandContext(t.Context(), python, script, "ask", "ws://"+address+"/chat"))
		})
		// Five connections, all by way of the sidecar.
		if after := p.counts(); after.Looked-before.Looked+after.Passed-before.Passed != 5 {
			t.Errorf("%s: %+v, then %+v", address, before, after)
		}
		stdin.Close()
		if err := server.Wait(); err != nil {
			t.Errorf("%v: %s", err, server.Stderr)
		}
	}
}
