//go:build !dataplane

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/pebble"
	"github.com/outrigger-mesh/outrigger/control/replicate"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// replicaFlags say whose log a control plane serves.
type replicaFlags struct {
	leader          string
	leaderTokenFile string
	name            string
	promote         bool
}

func (r *replicaFlags) validate(c *controlFlags) error {
	switch {
	case r.promote && r.leader != "":
		return errors.New("--promote and --leader exclude each other: a promoted copy follows nobody")
	case r.leader == "" && r.leaderTokenFile != "":
		return errors.New("--leader-token-file is given without --leader")
	case r.leader != "" && c.deployment != "":
		return errors.New("--deployment is given with --leader; give it to the leader, which applies plans")
	}
	return nil
}

// openLog opens the log in dir: this control plane's own, or a copy of its leader's. close
// closes what was opened.
func (c *controlFlags) openLog(p *process, listen net.Addr) (log eventlog.Log, follow *control.Following, closes func(), err error) {
	dir, o := filepath.Join(c.data, "log"), pebble.Options{Logger: p.log, Meter: p.tel.Meter("control/eventlog/pebble")}
	if c.replica.leader != "" {
		return c.follow(p, dir, o, listen)
	}
	if c.replica.promote {
		if err := pebble.Promote(dir, o); err != nil {
			return nil, nil, nil, configError{fmt.Errorf("--promote: %w", err)}
		}
		p.log.Warn("the copy is a log of its own now; what its leader had not shipped is not in it")
	}
	own, err := pebble.Open(dir, o)
	if err != nil {
		return nil, nil, nil, err
	}
	return own, nil, func() { own.Close() }, nil
}

func (c *controlFlags) follow(p *process, dir string, o pebble.Options, listen net.Addr) (eventlog.Log, *control.Following, func(), error) {
	r := c.replica
	token, err := readSecret("--leader-token-file", r.leaderTokenFile)
	if err != nil {
		return nil, nil, nil, err
	}
	if r.name == "" {
		r.name = replicaName(hostname(), listen)
	}
	conn, err := p.dialControl(r.leader, grpc.WithPerRPCCredentials(bearer(token)))
	if err != nil {
		return nil, nil, nil, err
	}
	f, err := replicate.Open(p.ctx, replicate.FollowerOptions{Conn: conn, Leader: r.leader, Name: r.name, Check: min(time.Second, c.deadMan/4), Logger: p.log,
		Store: func(incarnation uint64) (replicate.Store, error) {
			s, err := pebble.OpenCopy(dir, incarnation, o)
			if err != nil {
				return nil, err // not a Store that holds a nil
			}
			return s, nil
		}})
	if err != nil {
		conn.Close()
		return nil, nil, nil, err
	}
	return f, &control.Following{Log: f, Conn: conn}, func() { f.Close(); conn.Close() }, nil
}

// replicaName is a name that is the same after a restart.
func replicaName(host string, listen net.Addr) string {
	name := host
	if _, port, err := net.SplitHostPort(listen.String()); err == nil {
		name += "-" + port
	}
	return name
}

// leaderKeys stores the leader's session keys beside the copy, for --token-key-file's default;
// those of an earlier life do while the leader is away.
func (c *controlFlags) leaderKeys(p *process, conn grpc.ClientConnInterface, path string) error {
	ctx, cancel := context.WithTimeout(p.ctx, 5*time.Second)
	defer cancel()
	var trailer metadata.MD
	out, err := pb.NewCoherenceClient(conn).SessionKeys(ctx, &pb.SessionKeysRequest{}, grpc.Trailer(&trailer))
	if err != nil {
		if _, have := os.Stat(path); have == nil {
			return nil
		}
		return configError{fmt.Errorf("no keys of session tokens: give this replica the leader's file with --token-key-file: %w", status.FromGRPC(err, trailer))}
	}
	if _, err := identity.ParseKeys(out.GetKeys()); err != nil {
		return outrigger.Wrap(outrigger.Unavailable, err, "the leader's session keys")
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(out.GetKeys()), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// bearer is a token as a credential of every call; connections between replicas are as
// private as the network they are on.
type bearer string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if b == "" {
		return nil, nil
	}
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (b bearer) RequireTransportSecurity() bool { return false }
