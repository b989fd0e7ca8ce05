//go:build !dataplane

package main

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/internal/telemetry"
)

// silent has a server answer every call after d.
func silent(d time.Duration) grpc.ServerOption {
	return grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		select {
		case <-time.After(d):
			return s.SendMsg(&emptypb.Empty{})
		case <-s.Context().Done():
			return s.Context().Err()
		}
	})
}

// A call may be silent for as long as its server needs, and a connection idle: nobody is asked
// for a sign of life who would end the connection over it, as gRPC's servers do unless told
// otherwise.
func TestSilentCalls(t *testing.T) {
	type dial func(p *process, target string) (*grpc.ClientConn, error)
	mesh := func(p *process, target string) (*grpc.ClientConn, error) { return p.dialMesh(target) }
	for _, c := range []struct {
		name   string
		dial   dial
		server []grpc.ServerOption
		want   codes.Code
	}{
		{"an application's server", func(p *process, target string) (*grpc.ClientConn, error) { return p.dialGRPC(target) }, nil, codes.OK},
		{"a server of the mesh", mesh, []grpc.ServerOption{takesPings()}, codes.OK},
		// What the two rest on.
		{"pings where they are not welcome", mesh, nil, codes.Unavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tel, err := telemetry.New(t.Context(), telemetry.Options{Service: "test", LogTo: io.Discard})
				must(t, err)
				network := memnet.New()
				l, err := network.Listen("server", "server:1")
				must(t, err)
				const silence = 10 * time.Minute
				gs := grpc.NewServer(append(c.server, silent(silence))...)
				served := make(chan error, 1)
				go func() { served <- gs.Serve(l) }()
				var dials atomic.Int64
				connect := network.Dialer("client")
				p := &process{tel: tel, dialTCP: func(ctx context.Context, address string) (net.Conn, error) {
					dials.Add(1)
					return connect(ctx, address)
				}}
				conn, err := c.dial(p, "passthrough:///server:1")
				must(t, err)
				begin := time.Now()
				err = conn.Invoke(t.Context(), "/tools.Tools/Work", &emptypb.Empty{}, &emptypb.Empty{})
				if took := time.Since(begin); status.Code(err) != c.want || err == nil && took != silence {
					t.Errorf("%v after %v, want %v", err, took, c.want)
				}
				time.Sleep(silence)
				if n := dials.Load(); c.want == codes.OK && n != 1 {
					t.Errorf("%d connections were opened for one call, want 1", n)
				}
				must(t, conn.Close())
				gs.Stop()
				must(t, <-served)
				must(t, tel.Shutdown(context.WithoutCancel(t.Context())))
			})
		})
	}
}

// TestSilentTool: a tool that works for longer than pings would be borne, behind a sidecar, and
// the sidecar's connection to the agent of its node meanwhile.
func TestSilentTool(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	silence := time.Second
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		silence = 50 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel) // after the processes have ended
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	gs := grpc.NewServer(silent(silence))
	served := make(chan error, 1)
	go func() { served <- gs.Serve(l) }()
	t.Cleanup(func() { gs.Stop(); must(t, <-served) })
	dir := t.TempDir()
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	m := &tenantMesh{t: t, dir: dir, control: control}
	agent := m.run(0, "node", "--control", control, "--dir", filepath.Join(dir, "node"), "--node-id", "n")
	p := m.run(0, "sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", control, "--agent-dir", filepath.Join(dir, "node"),
		"--node-id", "n/p", "--upstream-grpc", l.Addr().String(), "--state-dir", filepath.Join(dir, "state"))
	conn, err := grpc.NewClient(p.bound["listen"], grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	if err := conn.Invoke(ctx, "/tools.Tools/Work", &emptypb.Empty{}, &emptypb.Empty{}, grpc.WaitForReady(true)); err != nil {
		t.Error(err)
	}
	for _, r := range []*running{agent, p} {
		if log := r.log.String(); strings.Contains(log, "too_many_pings") {
			t.Errorf("a connection was ended over pings:\n%s", log)
		}
	}
}
