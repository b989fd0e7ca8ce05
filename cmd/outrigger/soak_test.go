//go:build !dataplane

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// How long the soak runs by default, and the longest step of its faults.
const (
	soakSlice = 20 * time.Second
	soakStep  = 5 * time.Second
)

// TestSoak runs a sidecar under half of the load this machine can put on it (clients, sidecar,
// node agent, control plane and two models share it), with models that are killed, slow,
// reset connections, answer 500 and break streams off. It asserts, for the sidecar:
//
//   - every request of every client ends with an answer or an error that names its cause,
//     and the sum of what clients saw is what the sidecar counted, by outcome, exactly;
//     every write that was acknowledged, and no other, is in the variable's counter;
//   - over the second half of the run memory does not grow;
//   - when the load is gone, so are its goroutines and descriptors.
//
// OUTRIGGER_SOAK=1h runs it for that long (give go test a -timeout above it), without it
// runs a slice of 20 s. OUTRIGGER_SOAK_SEED chooses the schedule, which is printed.
func TestSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	length, seed := soakSlice, uint64(time.Now().UnixNano())
	var err error
	if v := os.Getenv("OUTRIGGER_SOAK"); v != "" {
		length, err = time.ParseDuration(v)
		must(t, err)
	}
	if v := os.Getenv("OUTRIGGER_SOAK_SEED"); v != "" {
		seed, err = strconv.ParseUint(v, 10, 64)
		must(t, err)
	}
	if end, ok := t.Deadline(); ok && time.Until(end) < length+length/10+5*time.Minute && length > soakSlice {
		t.Fatalf("OUTRIGGER_SOAK=%v needs more time than go test gives: add -timeout %v", length, length+length/10+10*time.Minute)
	}
	t.Logf("%v with OUTRIGGER_SOAK_SEED=%d", length, seed)
	s := newSoaked(t, seed)
	counted, versions := s.counters(), s.versions()

	// What the machine can do, and a run as it will be, so that what is kept for good (idle
	// workers, pools) is there before the first count.
	l := &soakLoad{address: s.address, book: &book{seen: map[string]uint64{}}}
	most := min(max(length/20, 2*time.Second), 30*time.Second)
	l.run(seed, 0, func() { s.wait(most) })
	rate := float64(l.done.Load()) / most.Seconds() / 2
	s.settle(l.book, counted, versions)
	before := s.population()
	t.Logf("half load is %.0f operations/s; at rest: %+v", rate, before)

	// What grows in one slice may be a collection at the wrong moment; a leak grows in every one.
	turns := 1
	if length <= soakSlice {
		turns = 3
	}
	for i := range turns {
		var samples []soakSample
		l.run(seed+1+uint64(i), rate, func() { samples = s.sampled(l, length, seed+uint64(i)) })
		s.settle(l.book, counted, versions)
		grows := s.judgeMemory(samples)
		if grows == "" {
			break
		}
		if i == turns-1 {
			t.Error(grows)
		}
		t.Log(grows)
	}
	s.judgeLeaks(before)
	for _, w := range l.book.wrong {
		t.Error(w)
	}
	if l.book.count > len(l.book.wrong) {
		t.Errorf("and %d more", l.book.count-len(l.book.wrong))
	}
	t.Logf("%d operations: %v", l.done.Load(), l.book.snapshot())
	for _, outcome := range []string{"call ok", "call cancelled", "call timeout", "read process", "write"} {
		if l.book.snapshot()[outcome] == 0 {
			t.Errorf("no %q: the load is not what it should be", outcome)
		}
	}
}

// soaked is the sidecar, and what it needs.
type soaked struct {
	t       *testing.T
	address string
	pid     int
	page    *http.Client // of the admin socket
	vars    pb.VariablesClient
	models  []*upstreamProcess
}

func newSoaked(t *testing.T, seed uint64) *soaked {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	dir := t.TempDir()
	s := &soaked{t: t}
	for i := range 2 {
		s.models = append(s.models, newUpstreamProcess(t, dir, fmt.Sprintf("127.0.77.%d", i+1), seed+uint64(i)<<32))
	}
	control := start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"))
	startProcess(t, ctx, dir, "node", "--control", control, "--dir", filepath.Join(dir, "node"), "--node-id", "n")
	conn, err := grpc.NewClient(control, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	s.vars = pb.NewVariablesClient(conn)
	r := &pb.RegisterModelVersionRequest{Model: "soak", Version: "v1", Actor: "test"}
	for _, m := range s.models {
		r.Endpoints = append(r.Endpoints, &pb.Endpoint{Address: m.address, Region: "local", Weight: 1})
	}
	s.until("the control plane takes writes", func() bool {
		_, err = pb.NewAdminClient(conn).RegisterModelVersion(ctx, r)
		return err == nil
	})
	for i := range soakSessions {
		_, err := s.vars.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Session: fmt.Sprintf("s%d", i), Name: "v"}, Value: &pb.Value{Type: "integer", Json: []byte("1")},
			Options: &pb.WriteOptions{Actor: "test", Source: "test", AutoCreateSession: true}})
		must(t, err)
	}
	admin := filepath.Join(dir, "admin.sock")
	a := startProcess(t, ctx, dir, "sidecar", "--listen", "127.0.0.1:0", "--control", control, "--agent-dir", filepath.Join(dir, "node"),
		"--node-id", "n/soak", "--memory-bytes", "1073741824", "--admin", "unix:"+admin, "--pprof", "--state-dir", filepath.Join(dir, "state"))
	s.address, s.pid = a.Listening["listen"], a.PID
	s.page = &http.Client{Transport: &http.Transport{MaxIdleConns: 1, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", admin)
	}}}
	t.Cleanup(s.page.CloseIdleConnections)
	s.until("the sidecar is ready", func() bool {
		resp, err := s.page.Get("http://sidecar/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK && strings.Contains(s.tryGet("/config_dump"), s.models[1].address)
	})
	return s
}

// until polls what has no event of its own.
func (s *soaked) until(what string, f func() bool) {
	s.t.Helper()
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for limit := time.Now().Add(time.Minute); !f(); <-look.C {
		if time.Now().After(limit) {
			s.t.Fatalf("not within a minute: %s", what)
		}
	}
}

// wait is the length of a run.
func (s *soaked) wait(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	<-t.C
}

func (s *soaked) tryGet(path string) string {
	resp, err := s.page.Get("http://sidecar" + path)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return string(b)
}

func (s *soaked) get(path string) string {
	s.t.Helper()
	out := s.tryGet(path)
	if out == "" {
		s.t.Fatalf("%s: no answer of the admin socket", path)
	}
	return out
}

var (
	metricLine = regexp.MustCompile(`(?m)^([a-z0-9_]+)(\{[^}]*\})? ([-+.0-9eE]+)$`)
	errorType  = regexp.MustCompile(`error_type="([^"]*)"`)
)

// metrics returns the sums of the sidecar's metrics by name, and model calls by error.type.
func (s *soaked) metrics() (sums map[string]float64, calls map[string]uint64) {
	s.t.Helper()
	sums, calls = map[string]float64{}, map[string]uint64{}
	for _, m := range metricLine.FindAllStringSubmatch(s.get("/metrics"), -1) {
		v, err := strconv.ParseFloat(m[3], 64)
		must(s.t, err)
		sums[m[1]] += v
		tag := ""
		if e := errorType.FindStringSubmatch(m[2]); e != nil {
			tag = e[1]
		}
		switch m[1] {
		case "gen_ai_server_request_duration_seconds_count":
			calls[soakOutcome(tag)] += uint64(v)
		case "outrigger_inference_refused_total":
			calls[tag] += uint64(v)
		}
	}
	return sums, calls
}

// counters is what the sidecar counted since it started, in the words of the book.
func (s *soaked) counters() map[string]uint64 {
	s.t.Helper()
	sums, calls := s.metrics()
	out := map[string]uint64{"http1": uint64(sums["outrigger_http1_requests_total"]), "http2": uint64(sums["outrigger_http2_requests_total"])}
	for outcome, n := range calls {
		out["call "+outcome] = n
	}
	var stats struct{ Variables map[string]uint64 }
	must(s.t, json.Unmarshal([]byte(s.get("/stats")), &stats))
	v := stats.Variables
	for _, tier := range []string{"process", "node", "origin", "stale"} {
		out["read "+tier] = v[tier]
	}
	out["read none"], out["write"], out["write error"] = v["errors"], v["writes"], v["write_errors"]
	return out
}

// versions are the counters of the variables, by session.
func (s *soaked) versions() (out [soakSessions]uint64) {
	s.t.Helper()
	for i := range out {
		v, err := s.vars.Get(s.t.Context(), &pb.GetRequest{Session: fmt.Sprintf("s%d", i), Identifier: "v"})
		must(s.t, err)
		out[i] = uint64(v.GetVersion().GetCounter())
	}
	return out
}

// settle waits until the sidecar has counted what clients saw, since began; the last
// requests are counted after their answers left.
func (s *soaked) settle(b *book, began map[string]uint64, versions [soakSessions]uint64) {
	s.t.Helper()
	want := b.snapshot()
	var off []string
	limit := time.Now().Add(time.Minute)
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for {
		off = off[:0]
		now := s.counters()
		for outcome := range want {
			now[outcome] += 0 // so that what nobody counted is compared as well
		}
		for outcome, n := range now {
			if strings.HasPrefix(outcome, "write to ") || strings.HasPrefix(outcome, "write error to ") {
				continue
			}
			if n -= began[outcome]; n != want[outcome] {
				off = append(off, fmt.Sprintf("%s: clients saw %d, the sidecar counted %d", outcome, want[outcome], n))
			}
		}
		if len(off) == 0 || time.Now().After(limit) {
			break
		}
		<-look.C
	}
	slices.Sort(off)
	for _, line := range off {
		s.t.Error(line)
	}
	for i, n := range s.versions() {
		sure, perhaps := want[fmt.Sprintf("write to %d", i)], want[fmt.Sprintf("write error to %d", i)]
		if n -= versions[i]; n < sure || n > sure+perhaps {
			s.t.Errorf("session %d: %d writes were acknowledged and %d failed, its variable has %d more versions", i, sure, perhaps, n)
		}
	}
}

// soakSample is the sidecar's memory at one moment: its own resident pages, and the heap
// right after a collection. Pages of the program's file and of the node's table are not its
// own: the kernel and the table's size bound them, and both come as they are touched.
type soakSample struct {
	at        time.Duration
	rss, heap float64
}

var residentLine = regexp.MustCompile(`(?m)^Rss(Anon|File|Shmem):\s+(\d+) kB$`)

// resident reads proc_pid_status(5): bytes by kind.
func (s *soaked) resident() map[string]float64 {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.pid))
	must(s.t, err)
	out := map[string]float64{}
	for _, m := range residentLine.FindAllStringSubmatch(string(b), -1) {
		kb, err := strconv.ParseFloat(m[2], 64)
		must(s.t, err)
		out[m[1]] = kb * 1024
	}
	if len(out) != 3 {
		s.t.Fatalf("no resident sizes in %s", b)
	}
	return out
}

var heapLine = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)

// heap has the sidecar collect, and returns the bytes that are allocated right after it: what
// lives, and what was allocated while it was marked.
func (s *soaked) heap() (bytes float64, ok bool) {
	s.t.Helper()
	m := heapLine.FindStringSubmatch(s.tryGet("/debug/pprof/heap?gc=1&debug=1"))
	if m == nil {
		return 0, false
	}
	bytes, err := strconv.ParseFloat(m[1], 64)
	must(s.t, err)
	return bytes, true
}

// sampled lets misfortune happen and takes samples, for the length of the run.
func (s *soaked) sampled(l *soakLoad, length time.Duration, seed uint64) (out []soakSample) {
	step := min(length/20, soakStep)
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- misfortune(rand.New(rand.NewPCG(seed, 7)), s.models, step, stop, func(what string) {
			if length <= time.Minute {
				s.t.Log(what)
			}
		})
	}()
	begin := time.Now()
	look := time.NewTicker(max(length/200, 250*time.Millisecond))
	defer look.Stop()
	for time.Since(begin) < length {
		<-look.C
		heap, ok := s.heap()
		if !ok {
			s.t.Error("no heap profile")
			break
		}
		m, _ := s.metrics()
		r := s.resident()
		out = append(out, soakSample{time.Since(begin), r["Anon"], heap})
		if len(out)%20 == 0 {
			s.t.Logf("%v: %d operations; MiB resident: own %.1f, program %.1f, node's table %.1f; heap %.1f; %v goroutines, %v descriptors",
				time.Since(begin).Round(time.Second), l.done.Load(), r["Anon"]/(1<<20), r["File"]/(1<<20), r["Shmem"]/(1<<20),
				heap/(1<<20), m["go_goroutines"], m["process_open_fds"])
		}
	}
	close(stop)
	if err := <-ended; err != nil {
		s.t.Error(err)
	}
	return out
}

// Growth of the second half of a run that is taken for noise.
const (
	soakHeapNoise = 2 << 20
	soakRSSNoise  = 6 << 20
)

// floors are the smallest heaps of each five samples. A leak raises them like all the others;
// what a collection under load has on top of what lives is chance, and it differs with
// whatever else the machine is doing.
func floors(samples []soakSample) (out []soakSample) {
	for five := range slices.Chunk(samples, 5) {
		out = append(out, slices.MinFunc(five, func(a, b soakSample) int { return cmp.Compare(a.heap, b.heap) }))
	}
	return out
}

// judgeMemory fits a line to the second half, and says by how much it grows if it does.
func (s *soaked) judgeMemory(all []soakSample) string {
	half := all[len(all)/2:]
	heap := growth(floors(half), func(x soakSample) float64 { return x.heap })
	rss := growth(half, func(x soakSample) float64 { return x.rss })
	s.t.Logf("growth over the second half, by the fitted line: heap %+.2f MiB, RSS %+.2f MiB; at its end heap %.1f MiB, RSS %.1f MiB",
		heap/(1<<20), rss/(1<<20), half[len(half)-1].heap/(1<<20), half[len(half)-1].rss/(1<<20))
	if heap > soakHeapNoise || rss > soakRSSNoise {
		return fmt.Sprintf("memory grows: heap by %.0f bytes, RSS by %.0f bytes over the second half", heap, rss)
	}
	return ""
}

// growth is the slope of the least-squares line times the time it covers.
func growth(samples []soakSample, of func(soakSample) float64) float64 {
	var n, sx, sy, sxx, sxy float64
	for _, s := range samples {
		x, y := s.at.Seconds(), of(s)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	slope := (n*sxy - sx*sy) / (n*sxx - sx*sx)
	return slope * (samples[len(samples)-1].at - samples[0].at).Seconds()
}

// population is what a leak would add to.
type population struct {
	goroutines  int // but for idle workers of the event loops, which are kept
	descriptors int // but for idle connections to models, which are kept for up to 120 s
	toModels    int
	clients     int
	held        int // bytes of memory that calls have taken
}

var goroutineGroup = regexp.MustCompile(`^(\d+) @ `)

func (s *soaked) population() (p population) {
	s.t.Helper()
	sc := bufio.NewScanner(strings.NewReader(s.get("/debug/pprof/goroutine?debug=1")))
	sc.Buffer(nil, 1<<20)
	n, worker := 0, false
	flush := func() {
		if !worker {
			p.goroutines += n
		}
		n, worker = 0, false
	}
	for sc.Scan() {
		if m := goroutineGroup.FindStringSubmatch(sc.Text()); m != nil {
			flush()
			n, _ = strconv.Atoi(m[1])
		}
		worker = worker || strings.Contains(sc.Text(), "loop.(*workers).work")
	}
	flush()
	m, _ := s.metrics()
	p.toModels = s.connectionsToModels()
	p.descriptors = int(m["process_open_fds"]) - p.toModels
	var stats struct {
		Inference struct {
			Held int `json:"held_bytes"`
		}
	}
	must(s.t, json.Unmarshal([]byte(s.get("/stats")), &stats))
	p.held = stats.Inference.Held
	p.clients = int(m["outrigger_http1_connections"] + m["outrigger_http2_connections"])
	return p
}

// connectionsToModels counts this machine's sockets whose peer is a model and that a
// process still holds (proc_net_tcp(5): inode 0 is nobody's), in the namespace of this thread.
func (s *soaked) connectionsToModels() (n int) {
	s.t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/tcp")
	must(s.t, err)
	peers := map[string]bool{}
	for _, m := range s.models {
		var ip [4]byte
		var port int
		if _, err := fmt.Sscanf(m.address, "%d.%d.%d.%d:%d", &ip[0], &ip[1], &ip[2], &ip[3], &port); err != nil {
			s.t.Fatal(err)
		}
		peers[fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], port)] = true
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 9 && peers[f[2]] && f[9] != "0" {
			n++
		}
	}
	return n
}

// judgeLeaks waits for the sidecar to be as it was.
func (s *soaked) judgeLeaks(before population) {
	s.t.Helper()
	var now population
	limit := time.Now().Add(time.Minute)
	look := time.NewTicker(200 * time.Millisecond)
	defer look.Stop()
	for {
		now = s.population()
		if now.goroutines <= before.goroutines && now.descriptors <= before.descriptors && now.clients == 0 && now.held == 0 {
			break
		}
		if time.Now().After(limit) {
			s.t.Errorf("a minute after the load: %+v, before it: %+v\n%s", now, before, s.get("/debug/pprof/goroutine?debug=1"))
			return
		}
		<-look.C
	}
	s.t.Logf("at rest again: %+v", now)
	if now.toModels > soakSessions {
		s.t.Errorf("%d connections to models are kept, by %d clients at once", now.toModels, soakSessions)
	}
}
