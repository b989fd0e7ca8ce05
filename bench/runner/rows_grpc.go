package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

// The load of proxy.grpc_hit.
const (
	grpcConnections = 8
	grpcStreams     = 16
)

func grpcRows() []row {
	return []row{{id: "proxy.grpc_hit", unit: "requests/CPU-second", better: "higher", run: runGRPCHit,
		what: fmt.Sprintf("unary gRPC read of a cached %d-byte variable (bridge GetVariable, answered with version, tier, age and token) against a grpc-go server answering BytesValue of %d bytes from a map of %d; h2load, one thread, %d connections of %d streams, closed loop; server CPU, ours summed over sidecar, node agent and control plane; servers and generator share all cores", valueBytes, valueBytes, hitKeys, grpcConnections, grpcStreams),
		bars: []bar{{what: "requests per CPU second / grpc-go", peer: "grpc-go", metric: "per_cpu_s", higher: true, must: 2.5, aim: 4}}}}
}

// grpcServer is one contender: where it is called, with what, and what a right answer is.
type grpcServer struct {
	name, method string
	request      proto.Message
	answer       func() proto.Message
	value        func(proto.Message) []byte
	start        func(ctx context.Context, cpus string) (*running, error)
}

func grpcServers(e *env) []grpcServer {
	key := fmt.Sprintf("name-%04d", hitKeys/2)
	return []grpcServer{
		{us, snakepit.BridgeService_GetVariable_FullMethodName, &snakepit.GetVariableRequest{SessionId: "bench", VariableIdentifier: key},
			func() proto.Message { return new(snakepit.GetVariableResponse) },
			func(m proto.Message) []byte {
				return m.(*snakepit.GetVariableResponse).GetVariable().GetValue().GetValue()
			},
			func(ctx context.Context, cpus string) (*running, error) {
				return e.startMesh(ctx, cpus, registerVariables)
			}},
		{"grpc-go", "/peer.Map/Get", wrapperspb.String(key),
			func() proto.Message { return new(wrapperspb.BytesValue) },
			func(m proto.Message) []byte { return m.(*wrapperspb.BytesValue).GetValue() },
			func(ctx context.Context, cpus string) (*running, error) { return e.goPeer(ctx, "grpchit", cpus) }},
	}
}

// runGRPCHit measures sharing the machine, then pinned, as compareHTTP does.
func runGRPCHit(ctx context.Context, e *env, r row) ([]result, error) {
	places := []placement{{name: "shared"}}
	if _, err := tool("taskset"); err == nil && runtime.NumCPU() > 1 {
		places = append(places, placement{"pinned", "0", "1"})
	}
	servers := grpcServers(e)
	got := map[string]comparison{}
	for _, p := range places {
		rounds := e.rounds
		if p.name == "pinned" {
			rounds = min(rounds, 3)
		}
		slice := max(time.Second, e.slice(2*len(servers)*rounds, time.Second).Round(time.Second)) // h2load knows whole seconds
		var cs []contender
		for _, s := range servers {
			c := contender{name: s.name}
			run, err := s.start(ctx, p.server)
			if err == nil {
				defer run.stop()
				c.sample, err = e.grpcSample(ctx, p.load, run, s, slice)
			}
			c.missing = err
			cs = append(cs, c)
		}
		c, err := e.compare(ctx, r.id+" "+p.name, rounds, cs)
		if err != nil {
			return nil, err
		}
		got[p.name] = c
	}
	if err := e.keep(r.id, got); err != nil {
		return nil, err
	}
	return got["shared"].rows(r, "per_cpu_s", []string{"grpc-go"}, func(peer string) string {
		text := r.what + aside(got["shared"], comparison{}, peer)
		if s, ok := summarise(got["pinned"].Rounds, us, peer, "per_cpu_s"); ok && peer != "" {
			text += fmt.Sprintf("; pinned (server core 0, load core 1): %.4g against %.4g, ratio %.3g", s.Ours, s.Peer, s.Ratio)
		}
		return text
	})
}

// grpcSample checks that a server answers rightly and returns what measures it.
func (e *env) grpcSample(ctx context.Context, cpus string, run *running, s grpcServer, slice time.Duration) (func(context.Context) (map[string]float64, error), error) {
	answer := s.answer()
	if err := e.grpcAnswers(ctx, run, s, answer); err != nil {
		return nil, err
	}
	message, err := proto.Marshal(s.request)
	if err != nil {
		return nil, err
	}
	dir, err := e.dir("grpc-" + s.name)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "request")
	framed := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	if err := os.WriteFile(file, framed, 0o600); err != nil {
		return nil, err
	}
	load := func(ctx context.Context) (loadReport, error) {
		rep, err := e.h2load(ctx, cpus, "http://"+run.address+s.method, file, slice)
		// A call that fails has status 200 too, but no message.
		if want := 5 + proto.Size(answer); err == nil && rep.AnswerBytes < want-1 {
			err = fmt.Errorf("answers have %d bytes of content, right ones %d", rep.AnswerBytes, want)
		}
		return rep, err
	}
	return func(ctx context.Context) (map[string]float64, error) {
		out, err := e.measured(ctx, run, load)
		if err == nil {
			out["per_cpu_s"] = 1e6 / out["cpu_us"]
		}
		return out, err
	}, nil
}

// grpcAnswers waits for the first right answer, by a client of grpc-go.
func (e *env) grpcAnswers(ctx context.Context, run *running, s grpcServer, answer proto.Message) error {
	conn, err := grpc.NewClient(run.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return run.servers[len(run.servers)-1].until(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if err := conn.Invoke(ctx, s.method, s.request, answer); err != nil {
			return err
		}
		if v := s.value(answer); len(v) != valueBytes || !bytes.Contains(v, bytes.Repeat([]byte("v"), valueBytes-2)) {
			return fmt.Errorf("the value is not in %.300q", v)
		}
		return nil
	})
}

// h2load runs the load.
func (e *env) h2load(ctx context.Context, cpus, url, file string, d time.Duration) (loadReport, error) {
	bin, err := tool("h2load")
	if err != nil {
		return loadReport{}, err
	}
	argv := e.pin(cpus, bin, "-t1", fmt.Sprintf("-c%d", grpcConnections), fmt.Sprintf("-m%d", grpcStreams),
		fmt.Sprintf("--duration=%d", int(d/time.Second)), "-d", file, "-H", "content-type: application/grpc", "-H", "te: trailers", url)
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return loadReport{}, fmt.Errorf("h2load: %w\n%s", err, out)
	}
	return parseH2load(out, d)
}

// parseH2load reads h2load's summary. AnswerBytes is content only. Requests in flight at
// the end of a timed run count as neither done nor failed.
func parseH2load(out []byte, d time.Duration) (loadReport, error) {
	field := func(label, format string, to ...any) error {
		_, line, ok := bytes.Cut(out, []byte(label))
		if !ok {
			return fmt.Errorf("h2load printed no %q:\n%s", label, out)
		}
		if _, err := fmt.Sscanf(string(line), format, to...); err != nil {
			return fmt.Errorf("h2load's %q: %w", label, err)
		}
		return nil
	}
	var total, started, done, succeeded, failed, errored, timeouts, ok2xx int
	if err := field("requests: ", "%d total, %d started, %d done, %d succeeded, %d failed, %d errored, %d timeout",
		&total, &started, &done, &succeeded, &failed, &errored, &timeouts); err != nil {
		return loadReport{}, err
	}
	if err := field("status codes: ", "%d 2xx", &ok2xx); err != nil {
		return loadReport{}, err
	}
	if succeeded == 0 || failed+errored+timeouts > 0 || ok2xx < succeeded {
		return loadReport{}, fmt.Errorf("h2load counted %d successes, %d failures, %d errors, %d time-outs, %d answers of 200", succeeded, failed, errored, timeouts, ok2xx)
	}
	_, traffic, _ := bytes.Cut(out, []byte("traffic: "))
	at := bytes.Index(traffic, []byte(" data"))
	open := bytes.LastIndexByte(traffic[:max(0, at)], '(')
	var content int
	if at < 0 || open < 0 {
		return loadReport{}, fmt.Errorf("h2load printed no traffic:\n%s", out)
	}
	if _, err := fmt.Sscanf(string(traffic[open:at]), "(%d)", &content); err != nil {
		return loadReport{}, fmt.Errorf("h2load's traffic: %w", err)
	}
	return loadReport{Requests: succeeded, Seconds: d.Seconds(), AnswerBytes: content / succeeded}, nil
}
