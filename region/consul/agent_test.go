package consul

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/outrigger-mesh/outrigger/region"
)

// patience bounds what a real agent may take; nothing is concluded from it.
const patience = time.Minute

// program is the Consul agent that "make ci" builds into .cache/tools.
func program(t *testing.T) string {
	t.Helper()
	p, err := filepath.Abs("../../.cache/tools/consul")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err == nil {
		return p
	}
	if p, err := exec.LookPath("consul"); err == nil {
		return p
	}
	if os.Getenv("OUTRIGGER_LONG") == "1" && os.Getenv("CI") == "true" {
		t.Fatal("there is no Consul agent; build it with: make consul")
	}
	t.Skip("there is no Consul agent here; make consul builds one, make ci runs this with it")
	return ""
}

// realAgent is a Consul server on a loopback address of its own, so that its fixed ports are
// nobody else's, with its state on disk and its API on a Unix socket.
type realAgent struct {
	t         *testing.T
	program   string
	dir, host string
	socket    string
	cmd       *exec.Cmd
	out       bytes.Buffer
	client    *api.Client
	exited    chan struct{}
}

func newRealAgent(t *testing.T) *realAgent {
	a := &realAgent{t: t, program: program(t), dir: t.TempDir()}
	a.host = ownAddress(t)
	// A Unix socket's path has 107 bytes at most, which a test's directory may not leave.
	short, err := os.MkdirTemp("", "consul")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	a.socket = "unix://" + filepath.Join(short, "http")
	a.client, err = api.NewClient(&api.Config{Address: a.socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.kill()
		if t.Failed() {
			t.Log(a.out.String())
		}
	})
	a.start()
	return a
}

// ownAddress is an address in 127/8 where Consul's server port is free.
func ownAddress(t *testing.T) string {
	for i := range 200 {
		host := fmt.Sprintf("127.%d.%d.%d", 64+os.Getpid()%64, os.Getpid()>>6%250+1, i+1)
		if l, err := net.Listen("tcp", host+":8300"); err == nil {
			l.Close()
			return host
		}
	}
	t.Fatal("no loopback address has Consul's ports free")
	return ""
}

func (a *realAgent) start() {
	a.t.Helper()
	a.cmd = exec.Command(a.program, "agent", "-server", "-bootstrap-expect=1", "-node=one", "-data-dir="+a.dir, "-bind="+a.host, "-log-level=warn",
		"-hcl", fmt.Sprintf(`addresses { http = %q }
ports { dns = -1, grpc = -1, serf_wan = -1 }
disable_update_check = true
performance { raft_multiplier = 1 }`, a.socket))
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.out
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	a.exited = make(chan struct{})
	go func() { _ = a.cmd.Wait(); close(a.exited) }() // it is killed; how it ended tells nothing
	a.until("a leader", func() bool {
		leader, err := a.client.Status().Leader()
		return err == nil && leader != ""
	})
}

func (a *realAgent) kill() {
	_ = a.cmd.Process.Kill() // it may have ended
	<-a.exited
}

func (a *realAgent) until(what string, ok func() bool) {
	a.t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			a.t.Fatalf("never happened: %s", what)
		}
		<-tick.C
	}
}

// gateway runs one gateway of a region until stop.
func (a *realAgent) gateway(name, instance string) (d *Directory, stop func()) {
	a.t.Helper()
	d, err := New(Options{Address: a.socket, Instance: instance, Version: "v9", TTL: 2 * time.Second, Wait: 5 * time.Second, MinPeriod: 10 * time.Millisecond,
		Self: region.Info{Name: name, Gateway: a.host + ":7400", Location: region.Location{Latitude: 53, Longitude: -6}}})
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			a.t.Error(err)
		}
	}
	a.t.Cleanup(stop)
	return d, stop
}

// sees reports whether d knows exactly these regions, all healthy, from a Consul that answers.
func sees(d *Directory, names ...string) func() bool {
	return func() bool {
		rs, stale := d.Regions()
		ok := !stale && len(rs) == len(names)
		for i := range names {
			ok = ok && rs[i].Name == names[i] && rs[i].Healthy
		}
		return ok
	}
}

// The whole life with a real agent: two regions find each other, one that dies is unhealthy
// when its check expires, one that leaves is gone, a registration that was taken away is made
// again, and a killed agent costs nothing but a mark.
func TestRealAgent(t *testing.T) {
	a := newRealAgent(t)
	eu, stopEU := a.gateway("eu", "eu-1")
	us, stopUS := a.gateway("us", "us-1")
	a.until("both see both", func() bool { return sees(eu, "eu", "us")() && sees(us, "eu", "us")() })
	rs, _ := us.Regions()
	if rs[0].Gateway != a.host+":7400" || rs[0].Location.Latitude != 53 || rs[0].Location.Longitude != -6 {
		t.Errorf("registered as %+v", rs[0])
	}

	if err := a.client.Agent().ServiceDeregister("eu-1"); err != nil {
		t.Fatal(err)
	}
	a.until("a registration that was taken away is made again", func() bool {
		s, err := a.client.Agent().Services()
		return err == nil && s["eu-1"] != nil
	})
	a.until("and everybody sees it", sees(us, "eu", "us"))

	a.kill()
	a.until("with the agent dead the regions are known, and marked", func() bool {
		rs, stale := us.Regions()
		return stale && len(rs) == 2
	})
	a.start()
	a.until("and fresh when it is back", func() bool { return sees(eu, "eu", "us")() && sees(us, "eu", "us")() })

	// A gateway that dies does not say so: nobody renews its check. Its place is taken here by a
	// registration that nobody renews.
	err := a.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: "ap-1", Name: Service, Address: a.host, Port: 7400,
		Meta:  map[string]string{"region": "ap", "lat": "1", "lon": "103"},
		Check: &api.AgentServiceCheck{CheckID: "service:ap-1", TTL: "1s", Status: api.HealthPassing}})
	if err != nil {
		t.Fatal(err)
	}
	a.until("the third is seen, and unhealthy once its check has expired", func() bool {
		rs, stale := us.Regions()
		return !stale && len(rs) == 3 && rs[0].Name == "ap" && !rs[0].Healthy && rs[1].Healthy && rs[2].Healthy
	})
	stopEU()
	a.until("one that leaves is gone at once", func() bool {
		rs, stale := us.Regions()
		return !stale && len(rs) == 2 && rs[0].Name == "ap" && rs[1].Name == "us"
	})
	stopUS()
}
