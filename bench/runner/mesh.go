package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// startMesh starts control plane, node agent and sidecar of the real binaries on the given
// cores, has fill declare what the row needs, and waits until all are ready. The flags
// are further ones of the sidecar, which is the last of the servers; its address is the
// application's.
func (e *env) startMesh(ctx context.Context, cpus string, fill func(context.Context, *grpc.ClientConn) error, flags ...string) (run *running, err error) {
	bin, err := e.mesh()
	if err != nil {
		return nil, err
	}
	beside, err := e.dataplane()
	if err != nil {
		return nil, err
	}
	dir, err := e.dir("mesh")
	if err != nil {
		return nil, err
	}
	run = &running{}
	defer func(started *running) {
		if err != nil { // run is nil by then
			started.stop()
		}
	}(run)
	launch := func(bin, name string, args ...string) (*server, error) {
		s, err := e.start(ctx, us+"-"+name, cpus, true, append([]string{bin, name, "--log-level", "warn"}, args...)...)
		if err == nil {
			run.servers = append(run.servers, s)
		}
		return s, err
	}
	control, err := launch(bin, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	target := control.addresses["listen"]
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := control.until(ctx, isReady(ctx, control)); err != nil {
		return nil, err
	}
	if err := fill(ctx, conn); err != nil {
		return nil, fmt.Errorf("declare what is measured: %w", err)
	}
	agentDir := filepath.Join(dir, "node")
	node, err := launch(beside, "node", "--control", target, "--dir", agentDir, "--node-id", "bench", "--region", "local")
	if err != nil {
		return nil, err
	}
	sidecar, err := launch(beside, "sidecar", append([]string{"--listen", "127.0.0.1:0", "--control", target, "--agent-dir", agentDir,
		"--node-id", "bench/pod", "--region", "local", "--state-dir", filepath.Join(dir, "sidecar")}, flags...)...)
	if err != nil {
		return nil, err
	}
	for _, s := range []*server{node, sidecar} {
		if err := s.until(ctx, isReady(ctx, s)); err != nil {
			return nil, err
		}
	}
	run.address = sidecar.addresses["listen"]
	return run, nil
}

// isReady asks a process of ours whether it is.
func isReady(ctx context.Context, s *server) func() error {
	return func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.addresses["http"]+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz says %s", resp.Status)
		}
		return nil
	}
}

// registerVariables declares the variables behind hitPath.
func registerVariables(ctx context.Context, conn *grpc.ClientConn) error {
	vars := pb.NewVariablesClient(conn)
	value := &pb.Value{Type: "string", Json: []byte(`"` + strings.Repeat("v", valueBytes-2) + `"`)}
	register := func(ctx context.Context, i int) error {
		_, err := vars.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Session: "bench", Name: fmt.Sprintf("name-%04d", i)}, Value: value,
			Options: &pb.WriteOptions{Actor: "bench", Source: "bench", AutoCreateSession: true}})
		return err
	}
	if err := register(ctx, 0); err != nil { // creates the session
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(64) // one group commit takes many
	for i := 1; i < hitKeys; i++ {
		g.Go(func() error { return register(ctx, i) })
	}
	return g.Wait()
}

// registerModel declares the model the upstream serves.
func registerModel(upstream string) func(context.Context, *grpc.ClientConn) error {
	return registerModels(upstream, chatModel)
}

// registerModels declares models that one upstream, which listens on every address of the
// machine, serves at one loopback address each: a version and an address take 1,024 calls
// at once.
func registerModels(upstream string, names ...string) func(context.Context, *grpc.ClientConn) error {
	return func(ctx context.Context, conn *grpc.ClientConn) error {
		_, port, err := net.SplitHostPort(upstream)
		for i, name := range names {
			if err == nil {
				_, err = pb.NewAdminClient(conn).RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{
					Model: name, Version: "v1", UpstreamModel: "bench-v1", Actor: "bench",
					Endpoints: []*pb.Endpoint{{Address: net.JoinHostPort(fmt.Sprintf("127.0.0.%d", i+1), port), Region: "local", Weight: 1}}})
			}
		}
		return err
	}
}
