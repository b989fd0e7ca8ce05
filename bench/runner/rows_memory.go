package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

const (
	memoryKeys = 1_000_000
	// memoryTable is the smallest arena whose table takes that many variables.
	memoryTable = 344 << 20
	// memorySettle is the longest an agent without work takes to give back what filling it
	// needed: ten quiet seconds that begin up to ten and two late.
	memorySettle = 25 * time.Second
)

func runMemory(ctx context.Context, e *env, r row) ([]result, error) {
	cs := []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
		return e.agentMemory(ctx)
	}}}
	for _, p := range []struct {
		name, program string
		args          func(socket string) []string
	}{
		{"redis", "redis-server", func(s string) []string {
			return []string{"--port", "0", "--unixsocket", s, "--save", "", "--appendonly", "no", "--daemonize", "no"}
		}},
		{"memcached", "memcached", func(s string) []string { return []string{"-s", s, "-t", "1", "-m", "2048", "-u", "root"} }},
	} {
		c, stop := e.socketPeer(ctx, p.name, p.program, p.args, 0)
		defer stop()
		c.sample = func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, e.ours("memoryfill", "-server", p.program, "-socket", peerSocket(p.program))...)
		}
		cs = append(cs, c)
	}
	c, err := e.compare(ctx, r.id, 1, cs)
	if err == nil {
		err = e.keep(r.id, c)
	}
	if err != nil {
		return nil, err
	}
	return c.rows(r, "mib", peerNames(cs), func(string) string {
		t, _ := summarise(c.Rounds, us, "", "table_mib")
		h, _ := summarise(c.Rounds, us, "", "heap_mib")
		p, _ := summarise(c.Rounds, us, "", "program_mib")
		l, _ := summarise(c.Rounds, us, "", "loaded_mib")
		return fmt.Sprintf("%s; the table has %v MiB of it, the rest is the agent's own (%v MiB); right after the last variable it was %v MiB; not in it are pages of the program's file (%v MiB)", r.what, figures(t.Ours), figures(h.Ours), figures(l.Ours), figures(p.Ours))
	})
}

// madeUp is an authority that has every variable, and a feed on which nothing happens.
type madeUp struct {
	pb.UnimplementedCoherenceServer
}

// Feed takes every selection and answers every heartbeat: an agent's table holds only
// what its feed would tell it a change of.
func (madeUp) Feed(stream pb.Coherence_FeedServer) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		f := &pb.FeedFrame{Incarnation: 1, Region: "bench", Selective: true}
		selected := func(s *pb.Select) {
			f.Kind = &pb.FeedFrame_Selected{Selected: &pb.Selected{Number: s.GetNumber(), Position: 1}}
		}
		switch k := req.GetKind().(type) {
		case *pb.FeedRequest_Subscribe:
			selected(k.Subscribe.GetSelect())
		case *pb.FeedRequest_Select:
			selected(k.Select)
		case *pb.FeedRequest_Heartbeat:
			f.Kind = &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: k.Heartbeat.GetSent(), Head: 1}}
		}
		if err := stream.Send(f); err != nil {
			return err
		}
	}
}

func (madeUp) Read(_ context.Context, req *pb.ReadRequest) (*pb.ReadResponse, error) {
	out := &pb.ReadResponse{Incarnation: 1, AsOf: 1, Region: "bench"}
	for _, k := range req.GetKeys() {
		out.Results = append(out.Results, &pb.ReadResult{SessionExists: true, Variable: &pb.Variable{Key: k,
			Value: &pb.Value{Type: "string", Json: benchValue()}, Version: &pb.Version{Dot: &pb.Dot{Region: "bench", Incarnation: 1, Position: 1}}}})
	}
	return out, nil
}

func memoryKey(i int) *pb.Key {
	return &pb.Key{Tenant: outrigger.DefaultTenant, Session: fmt.Sprintf("session-%05d", i/100), Name: fmt.Sprintf("name-%02d", i%100)}
}

// agentMemory fills a real agent the way its sidecars do, in batches through its socket,
// looks for each variable in the table it shares, and reads the process's memory.
func (e *env) agentMemory(ctx context.Context) (values map[string]float64, err error) {
	program, err := e.dataplane()
	if err != nil {
		return nil, err
	}
	dir, err := e.dir("agent")
	if err != nil {
		return nil, err
	}
	f := &fleet{}
	defer func() { err = errors.Join(err, f.close()) }()
	server := grpc.NewServer()
	pb.RegisterCoherenceServer(server, madeUp{})
	if err := f.serve(server); err != nil {
		return nil, err
	}
	s, err := e.start(ctx, us+"-agent", "", true, program, "node", "--control", f.origin.Target(), "--dir", dir, "--region", "bench",
		"--node-id", "node", "--table-bytes", strconv.Itoa(memoryTable), "--http", "127.0.0.1:0", "--log-level", "warn")
	if err != nil {
		return nil, err
	}
	defer s.stop()
	if err := s.until(ctx, isReady(ctx, s)); err != nil {
		return nil, err
	}
	conn, err := f.dial("unix:" + filepath.Join(dir, "agent.sock"))
	if err != nil {
		return nil, err
	}
	table, err := node.Attach(ctx, filepath.Join(dir, "table.sock"))
	if err != nil {
		return nil, err
	}
	defer table.Close()
	var all []int
	for i := range memoryKeys {
		all = append(all, i)
	}
	// The first reads come before the feed carries their sessions, and are read again.
	for missing := all; len(missing) > 0; missing = notHeld(table.Reader, all) {
		if err := readAll(ctx, pb.NewCoherenceClient(conn), missing); err != nil {
			return nil, fmt.Errorf("%d of %d variables are not in the table: %w", len(missing), memoryKeys, err)
		}
	}
	loaded, err := residentOf(s.pid)
	if err != nil {
		return nil, err
	}
	if !pause.For(ctx, memorySettle) {
		return nil, ctx.Err()
	}
	if values, err = residentOf(s.pid); err == nil {
		values["loaded_mib"] = loaded["mib"]
	}
	return values, err
}

// readAll reads variables by their number, in batches.
func readAll(ctx context.Context, agent pb.CoherenceClient, numbers []int) error {
	for batch := range slices.Chunk(numbers, outrigger.MaxBatch) {
		req := &pb.ReadRequest{}
		for _, i := range batch {
			req.Keys = append(req.Keys, memoryKey(i))
		}
		if _, err := agent.Read(ctx, req); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// notHeld says which of them the table does not have as they are.
func notHeld(table *shm.Reader, numbers []int) (missing []int) {
	var buf []byte
	for _, i := range numbers {
		k := memoryKey(i)
		e, b := table.Get(outrigger.Key{Tenant: k.Tenant, Session: k.Session, Name: k.Name}.String(), buf[:0])
		buf = b
		v := &pb.Variable{}
		if e.State != shm.Present || proto.Unmarshal(b, v) != nil || len(v.GetValue().GetJson()) != valueBytes {
			missing = append(missing, i)
		}
	}
	return missing
}

// residentOf reads a process's memory: shared mappings, private pages, and both together.
// Pages of the program's file are left out: the kernel drops them when it needs room, and
// all processes of one program share them.
func residentOf(pid int) (map[string]float64, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string]float64{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		to := map[string]string{"RssFile": "program_mib", "RssShmem": "table_mib", "RssAnon": "heap_mib"}[name]
		if to == "" {
			continue
		}
		kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
		if err != nil {
			return nil, err
		}
		out[to] = kib / 1024
	}
	if len(out) != 3 {
		return nil, fmt.Errorf("/proc/%d/status lacks memory figures: %v", pid, out)
	}
	out["mib"] = out["table_mib"] + out["heap_mib"]
	return out, nil
}

// childMemoryFill fills a cache server and reads the memory of the process behind its
// socket.
func childMemoryFill(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("memoryfill", flag.ContinueOnError)
	server := f.String("server", "", "redis-server or memcached")
	socket := f.String("socket", "", "its Unix socket")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	p, err := protocolOf(*server)
	if err != nil {
		return nil, err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: *socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	const pipeline = 500
	replies := make([]byte, pipeline*len(p.stored))
	for i := 0; i < memoryKeys; {
		var batch strings.Builder
		for range pipeline {
			k := memoryKey(i)
			batch.WriteString(p.set(k.Tenant+"/"+k.Session+"/"+k.Name, string(benchValue())))
			i++
		}
		if _, err := io.WriteString(conn, batch.String()); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(conn, replies); err != nil || string(replies) != strings.Repeat(p.stored, pipeline) {
			return nil, fmt.Errorf("%s answered %.60q: %w", *server, replies, err)
		}
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	if err := errors.Join(raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }), err); err != nil {
		return nil, err
	}
	return residentOf(int(peer.Pid))
}
