//go:build !dataplane

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// drillEnvoys are the Envoys of a drill. All listen at one address, since all get one
// listener, and the kernel deals connections out among them; every call makes a connection of
// its own.
type drillEnvoys struct {
	options translate.EnvoyOptions
	calls   *drillHost
	runs    []*exec.Cmd
	logs    []string
	ended   []chan struct{} // closed when that one has ended
	cancel  context.CancelFunc
	traffic sync.WaitGroup
}

// envoyAddresses are where the Envoys will listen, chosen before the control plane starts.
func envoyAddresses() (o translate.EnvoyOptions, err error) {
	for _, to := range []*string{&o.Egress, &o.Capture} {
		for range 20 {
			var l net.Listener
			// As in firstControl: nothing else is given this port before it is used.
			*to = fmt.Sprintf("127.%d.%d.%d:%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254), 10_000+rand.IntN(10_000))
			if l, err = net.Listen("tcp", *to); err == nil {
				err = l.Close()
				break
			}
		}
		if err != nil {
			return o, err
		}
	}
	return o, nil
}

// startEnvoys starts them and their clients and waits until they answer.
func (m *drillMesh) startEnvoys(ctx context.Context) error {
	e := m.envoys
	for i := range m.d.envoys {
		raw, err := translate.Bootstrap(translate.KindEnvoy, translate.BootstrapOptions{Control: m.port,
			Node: outrigger.Node{ID: fmt.Sprintf("drill/envoy-%d", i), Region: demoRegion}})
		if err != nil {
			return err
		}
		file := filepath.Join(m.dir, fmt.Sprintf("envoy-%d.json", i))
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			return err
		}
		c := exec.Command(m.d.envoy, "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "warning", "--log-path", file+".log")
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			return fmt.Errorf("start Envoy: %w", err)
		}
		ended := make(chan struct{})
		go func() {
			_ = c.Wait() // that it ended is what matters; its log says why
			close(ended)
		}()
		e.runs, e.ended, e.logs = append(e.runs, c), append(e.ended, ended), append(e.logs, file+".log")
	}
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	url := "http://" + e.options.Egress + "/v1/chat/completions"
	// Everyone that listens is dealt some of the connections; that many good answers in a row
	// are not those of one Envoy while another has no policy yet.
	good := 0
	if err := m.until(ctx, "Envoys that answer", func() (bool, error) {
		if err := e.dead(); err != nil {
			return false, err
		}
		before := e.calls.tally()
		e.calls.call(ctx, client, url, m.d.sidecars)
		if after := e.calls.tally(); after.Requests > before.Requests && after.Failed == before.Failed {
			good++
		} else {
			good = 0
		}
		return good >= 10*m.d.envoys, nil
	}); err != nil {
		return err
	}
	e.calls.forget() // what failed before they had a policy is nobody's fault
	ctx, e.cancel = context.WithCancel(ctx)
	e.traffic.Go(func() { e.calls.traffic(ctx, url, m.d.sidecars, &http.Transport{DisableKeepAlives: true}) })
	return nil
}

// dead returns which Envoy has ended.
func (e *drillEnvoys) dead() error {
	for i, ended := range e.ended {
		select {
		case <-ended:
			said, err := os.ReadFile(e.logs[i])
			return fmt.Errorf("envoy-%d ended: %w; it said: %s", i, errors.Join(errors.New(e.runs[i].ProcessState.String()), err), said[max(0, len(said)-2000):])
		default:
		}
	}
	return nil
}

func (e *drillEnvoys) stop() {
	if e == nil {
		return
	}
	if e.cancel != nil {
		e.cancel()
	}
	e.traffic.Wait()
	for i, c := range e.runs {
		_ = c.Process.Kill() // an error means that it has just ended
		<-e.ended[i]
	}
}

// tally is what the clients have seen so far.
func (h *drillHost) tally() drillClients {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls
}

func (h *drillHost) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = drillClients{}
}
