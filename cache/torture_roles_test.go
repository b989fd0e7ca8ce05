//go:build linux

package cache_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// The test binary runs itself in these roles; each runs until it is killed. The role's
// argument is the number of its life, the directory holds sockets and records.
const (
	tortureRole = "CACHE_TEST_ROLE"
	tortureDir  = "CACHE_TEST_DIR"
	tortureLife = "CACHE_TEST_LIFE"
)

func TestMain(m *testing.M) {
	dir := os.Getenv(tortureDir)
	life, _ := strconv.Atoi(os.Getenv(tortureLife)) // set by us alone
	roles := map[string]func(dir string, life int) error{
		"origin": originRole, "agent": agentRole, "reader": readerRole, "careless": carelessRole,
	}
	run := roles[os.Getenv(tortureRole)]
	if run == nil {
		os.Exit(m.Run())
	}
	// A parent that dies without killing its children closes this pipe.
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}()
	if err := run(dir, life); err != nil {
		fmt.Fprintln(os.Stderr, os.Getenv(tortureRole), err)
		os.Exit(1)
	}
}

const (
	tortureKeys = 32
	tortureKept = 4096 // changes in the authority's log
)

func tortureName(k int) string { return "k" + strconv.Itoa(k) }

// tortureValue is a JSON string with key, version, filling that depends on both, and the
// checksum of all of it. Values of even keys are small enough to ride with their change.
func tortureValue(k int, version int64) string {
	body := strconv.Itoa(k) + "." + strconv.FormatInt(version, 10) + "."
	if k%2 == 1 {
		n := 200 + int(version/1000%8)*150
		body += strings.Repeat(string('a'+byte(version/7%26)), n) + "."
	}
	return `"` + body + strconv.FormatUint(crc64.Checksum([]byte(body), crc64.MakeTable(crc64.ECMA)), 36) + `"`
}

// tortureVersion returns the version inside a value, if the value is whole and of key k.
func tortureVersion(k int, json string) (version int64, whole bool) {
	parts := strings.Split(strings.Trim(json, `"`), ".")
	if len(parts) < 3 {
		return 0, false
	}
	version, err := strconv.ParseInt(parts[1], 10, 64)
	return version, err == nil && json == tortureValue(k, version)
}

// originRole is the authority: an empty log of a new incarnation that writes all keys
// before it serves, and then writes without end, as fast as it can (4,000/s under the race detector). Its log is bounded, so
// an agent that cannot follow is reset. A version is the time of its write; what
// was committed is in the life's ledger, with the time at which that was certain.
func originRole(dir string, life int) error {
	o := origintest.New()
	o.Keep(tortureKept)
	for range life {
		o.Restore() // another incarnation
	}
	o.CreateSession(context.Background(), &pb.CreateSessionRequest{Id: "s"})
	ledger, err := os.Create(ledgerPath(dir, life))
	if err != nil {
		return err
	}
	clock, last := node.Clock(), int64(0)
	put := func(k int) error {
		last = max(last+1, clock())
		o.Put(tortureName(k), tortureValue(k, last))
		_, err := ledger.Write(tortureRecord{key: int64(k), version: last, end: clock()}.encode())
		return err
	}
	for k := range tortureKeys {
		if err := put(k); err != nil {
			return err
		}
	}
	l, err := listen(filepath.Join(dir, "origin"))
	if err != nil {
		return err
	}
	g := grpc.NewServer()
	pb.RegisterVariablesServer(g, o)
	pb.RegisterCoherenceServer(g, o)
	go g.Serve(l)
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for n := 0; ; n++ {
		if raceEnabled && n%4 == 0 {
			<-t.C // under the detector the agent would do nothing but start over
		}
		// Few keys change often, the others seldom: copies of them live long enough to age.
		k := n % 4
		if n%256 == 0 {
			k = n / 256 % tortureKeys
		}
		if err := put(k); err != nil {
			return err
		}
	}
}

// ledgerPath is the ledger of one life: who is killed may leave a part of a record, and what
// follows it would be read as other records.
func ledgerPath(dir string, life int) string {
	return filepath.Join(dir, "ledger."+strconv.Itoa(life))
}

// listen takes a socket's path over from a process that was killed.
func listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

func dialSocket(path string) (*grpc.ClientConn, error) {
	quick := grpc.ConnectParams{MinConnectTimeout: time.Second,
		Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(quick))
}

// agentRole is the node's agent. The table is small, so that its ring is lapped.
func agentRole(dir string, _ int) error {
	cc, err := dialSocket(filepath.Join(dir, "origin"))
	if err != nil {
		return err
	}
	a, err := node.New(node.Options{Node: outrigger.Node{ID: "n"}, Origin: cc, Table: shm.Options{Bytes: 64 << 10},
		FetchTimeout: 500 * time.Millisecond, RepairEvery: 50 * time.Millisecond})
	if err != nil {
		return err
	}
	table, err := listen(filepath.Join(dir, "table"))
	if err != nil {
		return err
	}
	rpc, err := listen(filepath.Join(dir, "agent"))
	if err != nil {
		return err
	}
	g := grpc.NewServer()
	pb.RegisterVariablesServer(g, a)
	pb.RegisterCoherenceServer(g, a)
	ctx := context.Background()
	ended := make(chan error, 3)
	go func() { ended <- a.Run(ctx) }()
	go func() { ended <- a.ServeTable(ctx, table) }()
	go func() { ended <- g.Serve(rpc) }()
	return <-ended
}

// tortureRecord is one answer, or one committed write.
type tortureRecord struct {
	key, version, begin, end, age, flags int64
}

const recordBytes = 6 * 8

const (
	flagTier   = 7 // outrigger.Tier
	flagStale  = 8
	flagTorn   = 16
	flagAbsent = 32
)

func (r tortureRecord) encode() []byte {
	b := make([]byte, 0, recordBytes)
	for _, v := range []int64{r.key, r.version, r.begin, r.end, r.age, r.flags} {
		b = binary.LittleEndian.AppendUint64(b, uint64(v))
	}
	return b
}

func decodeRecord(b []byte) tortureRecord {
	v := [6]int64{}
	for i := range v {
		v[i] = int64(binary.LittleEndian.Uint64(b[8*i:]))
	}
	return tortureRecord{v[0], v[1], v[2], v[3], v[4], v[5]}
}

// readLoop records one answer after another, in bursts, into the file of this life.
func readLoop(path string, get func(k int) (tortureRecord, bool)) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w, t := bufio.NewWriterSize(f, 1<<16), time.NewTicker(4*time.Millisecond)
	defer t.Stop()
	for n := 0; ; {
		<-t.C
		for range 16 {
			k := n % tortureKeys
			n++
			if r, ok := get(k); ok {
				r.key = int64(k)
				if _, err := w.Write(r.encode()); err != nil {
					return err
				}
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
}

func judgeable(k int, json string, r tortureRecord) tortureRecord {
	version, whole := tortureVersion(k, json)
	r.version = version
	if !whole {
		r.flags |= flagTorn
	}
	return r
}

// readerRole reads through a Store, as a sidecar does.
func readerRole(dir string, life int) error {
	agent, err := dialSocket(filepath.Join(dir, "agent"))
	if err != nil {
		return err
	}
	origin, err := dialSocket(filepath.Join(dir, "origin"))
	if err != nil {
		return err
	}
	s, err := cache.New(cache.Options{TablePath: filepath.Join(dir, "table"), Agent: agent, Origin: origin, Timeout: 300 * time.Millisecond})
	if err != nil {
		return err
	}
	go s.Run(context.Background())
	clock := node.Clock()
	return readLoop(filepath.Join(dir, "answers."+strconv.Itoa(life)), func(k int) (tortureRecord, bool) {
		r := tortureRecord{begin: clock()}
		a, err := s.Get(context.Background(), cache.Request{Key: key(tortureName(k)), Encoding: -1})
		if err != nil {
			return r, false
		}
		r.end, r.age, r.flags = clock(), int64(a.Age), int64(a.Tier)
		if a.Stale {
			r.flags |= flagStale
		}
		if !a.Found {
			r.flags |= flagAbsent
			return r, true
		}
		return judgeable(k, string(a.Variable.GetValue().GetJson()), r), true
	})
}

// carelessRole reads one table for ever without looking at its lease.
func carelessRole(dir string, life int) error {
	at, err := node.Attach(context.Background(), filepath.Join(dir, "table"))
	if err != nil {
		return err
	}
	defer at.Close()
	clock := node.Clock()
	var buf []byte
	return readLoop(filepath.Join(dir, "careless."+strconv.Itoa(life)), func(k int) (tortureRecord, bool) {
		r := tortureRecord{begin: clock(), flags: int64(outrigger.TierNode)}
		e, b := at.Reader.Get(key(tortureName(k)).String(), buf[:0])
		r.end, buf = clock(), b
		v := &pb.Variable{}
		if e.State != shm.Present || proto.Unmarshal(b, v) != nil {
			return r, false
		}
		return judgeable(k, string(v.GetValue().GetJson()), r), true
	})
}

// readAll is the records of a file; none if there is no such file.
func readAll(path string) ([]tortureRecord, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 1<<16)
	var out []tortureRecord
	for b := make([]byte, recordBytes); ; {
		// A killed process may leave a part of a record at the end.
		if _, err := io.ReadFull(in, b); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return out, nil
		} else if err != nil {
			return out, err
		}
		out = append(out, decodeRecord(b))
	}
}
