package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/encoding/protowire"
)

// xdsClients is a fleet of ADS clients in one process, each with a TCP connection of its
// own: delta clients that follow everything, as sidecars and Envoys do, and clients of the
// state of the world that follow one model by name, as gRPC does. They speak gRPC over HTTP/2
// frames by hand, one goroutine each, so that the machine's time goes to the server that is
// measured; what they acknowledge is real.
type xdsClients struct {
	address string
	types   []string // what a delta client follows
	mark    string   // the type whose responses are counted; of a gRPC client it is xds.TypeRoute
	count   int
	state   int // the first so many are clients of the state of the world
	fleetConduct

	mu        sync.Mutex
	changed   *sync.Cond
	streams   []*xdsStream
	reached   map[int]int   // marks since the last connect → streams that have had them
	last      map[int]int64 // when the last stream had so many, ns since 1970
	synced    int           // streams that had an answer to every subscription
	syncedAt  int64
	resources int64 // received
	responses int64
	nack      bool // reject responses of the marked type
	versions  map[string]map[string]string
	failed    error
}

// xdsStream is one client.
type xdsStream struct {
	all      *xdsClients
	i        int
	conn     net.Conn
	frames   *http2.Framer
	answered map[string]bool
	accepted map[string]string // of a client of the state of the world: the version of each type
	marks    int
	turn     int // the last of fleetConduct.turn it answered in
	buf      []byte
	out      []byte
	taken    int  // bytes of flow control not given back
	cut      bool // by us
}

// xdsSeen is what the process says when asked.
type xdsSeen struct {
	Began     int64   `json:"began"`
	Last      int64   `json:"last"` // when the last stream got, and acknowledged, what was waited for
	Resources int64   `json:"resources"`
	Responses int64   `json:"responses"`
	Down      int64   `json:"down"`   // bytes received since the last report, frames included, TCP's own not
	Up        int64   `json:"up"`     // bytes sent
	CPUUS     float64 `json:"cpu_us"` // processor time of the process so far
	Error     string  `json:"error,omitempty"`
}

// xdsPatience bounds every wait for a fleet.
const xdsPatience = 60 * time.Second

// childXDSClients connects, reports, and then obeys one line at a time: "wait N" for the
// Nth marked response on every stream since the last connect, "count" for what was
// received since the last report, "nack" to reject from now on, "ack" to accept again,
// "storm" to cut all connections and come back with the versions held, and what obey of
// fleetConduct knows.
func childXDSClients(_ context.Context, args []string, in io.Reader) (any, error) {
	f := flag.NewFlagSet("xdsclients", flag.ContinueOnError)
	c := &xdsClients{versions: map[string]map[string]string{}}
	f.StringVar(&c.address, "address", "", "of the server")
	types := f.String("types", "", "type URLs to follow, separated by commas")
	f.StringVar(&c.mark, "mark", "", "type URL whose responses are counted")
	f.IntVar(&c.count, "streams", 1, "how many clients")
	f.IntVar(&c.state, "grpc", 0, "how many of them are clients of the state of the world")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	c.types, c.changed = strings.Split(*types, ","), sync.NewCond(&c.mu)
	say := func(s xdsSeen, err error) error {
		if err != nil {
			s.Error = err.Error()
		}
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(s))
	}
	if err := say(c.connect(false)); err != nil {
		return nil, err
	}
	for sc := bufio.NewScanner(in); sc.Scan(); {
		var n int
		if _, err := fmt.Sscanf(sc.Text(), "wait %d", &n); err == nil {
			if err := say(c.wait(n)); err != nil {
				return nil, err
			}
			continue
		}
		var err error
		switch sc.Text() {
		case "count":
			c.mu.Lock()
			err = say(c.take(), nil)
			c.mu.Unlock()
		case "nack", "ack":
			c.mu.Lock()
			c.nack = sc.Text() == "nack"
			c.mu.Unlock()
			err = say(xdsSeen{}, nil)
		case "storm":
			c.cut(func(*xdsStream) bool { return true })
			err = say(c.connect(true))
		default:
			err = say(c.obey(sc.Text()))
		}
		if err != nil {
			return nil, err
		}
	}
	return struct{}{}, nil
}

// take returns what was received since it was last called. Called with mu held.
func (c *xdsClients) take() xdsSeen {
	out := xdsSeen{Resources: c.resources, Responses: c.responses, Down: c.down.Swap(0), Up: c.up.Swap(0), CPUUS: float64(busy().Microseconds())}
	c.resources, c.responses = 0, 0
	return out
}

// connect opens all streams and waits until each had an answer to every subscription.
func (c *xdsClients) connect(again bool) (xdsSeen, error) {
	began := time.Now()
	c.mu.Lock()
	c.take()
	c.synced, c.reached, c.last = 0, map[int]int{}, map[int]int64{}
	held := c.versions
	if !again {
		held = nil
	}
	c.mu.Unlock()
	all := make([]int, c.count)
	for i := range all {
		all[i] = i
	}
	return c.openAll(began, all, held)
}

// openAll opens the given streams, of which there must be none, and waits until each of the
// fleet had an answer to every subscription.
func (c *xdsClients) openAll(began time.Time, which []int, held map[string]map[string]string) (xdsSeen, error) {
	work, errs := make(chan int), make(chan error, 32)
	for range cap(errs) { // as many at once as a listener's backlog bears
		go func() {
			var err error
			for i := range work {
				if err == nil {
					err = c.open(i, held)
				}
			}
			errs <- err
		}()
	}
	for _, i := range which {
		work <- i
	}
	close(work)
	var err error
	for range cap(errs) {
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		return xdsSeen{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.until(func() bool { return c.synced == c.count }); err != nil {
		return xdsSeen{}, fmt.Errorf("%d of %d streams have all answers: %w", c.synced, c.count, err)
	}
	out := c.take()
	out.Began, out.Last = began.UnixNano(), c.syncedAt
	return out, nil
}

func (c *xdsClients) wait(n int) (xdsSeen, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.until(func() bool { return c.reached[n] == c.count }); err != nil {
		return xdsSeen{}, fmt.Errorf("%d of %d streams have had %d responses: %w", c.reached[n], c.count, n, err)
	}
	out := c.take()
	out.Last = c.last[n]
	return out, nil
}

// until waits with mu held.
func (c *xdsClients) until(done func() bool) error {
	late := false
	t := time.AfterFunc(xdsPatience, func() { c.mu.Lock(); late = true; c.changed.Broadcast(); c.mu.Unlock() })
	defer t.Stop()
	for !done() && !late && c.failed == nil {
		c.changed.Wait()
	}
	switch {
	case c.failed != nil:
		return c.failed
	case !done():
		return fmt.Errorf("not within %v", xdsPatience)
	}
	return nil
}

// open dials and subscribes to everything; held is what the client has already.
func (c *xdsClients) open(i int, held map[string]map[string]string) error {
	dialled, err := net.Dial("tcp", c.address)
	if err != nil {
		return err
	}
	conn := countedConn{dialled, &c.down, &c.up}
	s := &xdsStream{all: c, i: i, conn: conn, answered: make(map[string]bool, len(c.types))}
	method := "DeltaAggregatedResources"
	if s.isState() {
		method, s.accepted = "StreamAggregatedResources", map[string]string{}
	}
	w := bufio.NewWriter(conn) // the opening goes out in one piece
	s.frames = http2.NewFramer(w, conn)
	s.frames.SetReuseFrames()
	var head strings.Builder
	h := hpack.NewEncoder(&head)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "ads"},
		{":path", "/envoy.service.discovery.v3.AggregatedDiscoveryService/" + method},
		{"content-type", "application/grpc"}, {"te", "trailers"}} {
		if err := h.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			return err
		}
	}
	_, err = w.WriteString(http2.ClientPreface)
	err = errors.Join(err, s.frames.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: xdsWindow}),
		s.frames.WriteWindowUpdate(0, xdsWindow-65535),
		s.frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte(head.String()), EndHeaders: true}))
	for n, t := range s.types() {
		if s.isState() {
			err = errors.Join(err, s.send(s.stateRequest(t, n == 0, "", nil)))
			continue
		}
		var req []byte
		if n == 0 {
			node := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), fmt.Sprintf("node-%05d", i))
			req = protowire.AppendBytes(protowire.AppendTag(req, 1, protowire.BytesType), node)
		}
		req = protowire.AppendString(protowire.AppendTag(req, 2, protowire.BytesType), t)
		req = protowire.AppendString(protowire.AppendTag(req, 3, protowire.BytesType), "*")
		for name, version := range held[t] {
			pair := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), name)
			pair = protowire.AppendString(protowire.AppendTag(pair, 2, protowire.BytesType), version)
			req = protowire.AppendBytes(protowire.AppendTag(req, 5, protowire.BytesType), pair)
		}
		err = errors.Join(err, s.send(req))
	}
	if err = errors.Join(err, w.Flush()); err != nil {
		return err
	}
	s.frames = http2.NewFramer(conn, conn) // from now on every frame goes out at once
	s.frames.SetReuseFrames()
	c.mu.Lock()
	c.streams = append(c.streams, s)
	c.mu.Unlock()
	go s.run()
	return nil
}

// xdsWindow is a client's flow control window; the requests of a client fit into those of
// any server.
const xdsWindow = 1 << 26

// send writes one message. Messages longer than a frame are cut.
func (s *xdsStream) send(message []byte) error {
	s.out = append(binary.BigEndian.AppendUint32(append(s.out[:0], 0), uint32(len(message))), message...)
	const most = 16384
	for rest := s.out; ; rest = rest[most:] {
		if len(rest) <= most {
			return s.frames.WriteData(1, false, rest)
		}
		if err := s.frames.WriteData(1, false, rest[:most]); err != nil {
			return err
		}
	}
}

func (s *xdsStream) run() {
	err := s.read()
	c := s.all
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.cut && c.failed == nil {
		c.failed = fmt.Errorf("a stream ended: %w", err)
		c.changed.Broadcast()
	}
}

func (s *xdsStream) read() error {
	for {
		f, err := s.frames.ReadFrame()
		if err != nil {
			return err
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = s.frames.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = s.frames.WritePing(true, f.Data)
			}
		case *http2.DataFrame:
			err = s.data(f.Data())
		case *http2.RSTStreamFrame:
			err = fmt.Errorf("reset: %v", f.ErrCode)
		case *http2.GoAwayFrame:
			err = fmt.Errorf("go away: %v %q", f.ErrCode, f.DebugData())
		case *http2.HeadersFrame:
			if f.StreamEnded() {
				err = errors.New("the server ended the stream")
			}
		}
		if err != nil {
			return err
		}
	}
}

// data takes a piece of the response stream, which may begin or end within a message.
func (s *xdsStream) data(piece []byte) error {
	if s.taken += len(piece); s.taken > xdsWindow/2 {
		if err := errors.Join(s.frames.WriteWindowUpdate(0, uint32(s.taken)), s.frames.WriteWindowUpdate(1, uint32(s.taken))); err != nil {
			return err
		}
		s.taken = 0
	}
	s.buf = append(s.buf, piece...)
	for len(s.buf) >= 5 {
		n := 5 + int(binary.BigEndian.Uint32(s.buf[1:]))
		if len(s.buf) < n {
			return nil
		}
		if err := s.message(s.buf[5:n]); err != nil {
			return err
		}
		s.buf = append(s.buf[:0], s.buf[n:]...)
	}
	if cap(s.buf) > 4096 && len(s.buf) == 0 {
		s.buf = nil
	}
	return nil
}

// message reads a response and answers it. The fields used have the same numbers in
// DeltaDiscoveryResponse and DiscoveryResponse, but for the nonce and the version.
func (s *xdsStream) message(raw []byte) error {
	s.all.hold(s)
	var typeURL, version string
	var nonce []byte
	var resources [][]byte
	err := fields(raw, func(n protowire.Number, value []byte) {
		switch n {
		case 1:
			version = string(value) // of the state of the world
		case 2:
			resources = append(resources, value)
		case 4:
			typeURL = string(value)
		case 5:
			nonce = value
		}
	})
	if err != nil {
		return err
	}
	c := s.all
	marked := typeURL == s.marked()
	c.mu.Lock()
	refuse := marked && c.nack || c.rejects(s, typeURL)
	c.mu.Unlock()
	var why []byte
	if refuse {
		why = protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 3)
		why = protowire.AppendString(protowire.AppendTag(why, 2, protowire.BytesType), "refused by the benchmark")
	}
	if err := s.send(s.reply(typeURL, version, nonce, why)); err != nil {
		return err
	}
	now := time.Now().UnixNano()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.responses++
	c.resources += int64(len(resources))
	if !s.answered[typeURL] {
		s.answered[typeURL] = true
		if len(s.answered) == len(s.types()) {
			c.synced, c.syncedAt = c.synced+1, now
		}
	} else if marked {
		s.marks++
		c.reached[s.marks]++
		c.last[s.marks] = now
		c.note(s, now)
	}
	if !s.isState() {
		c.learn(typeURL, resources)
	}
	if c.synced == c.count {
		c.changed.Signal()
	}
	return nil
}

// learn keeps the versions of a type, which are the same for all streams. Called with mu held.
func (c *xdsClients) learn(typeURL string, resources [][]byte) {
	for _, r := range resources {
		var name, version string
		_ = fields(r, func(n protowire.Number, value []byte) { // it was read before
			switch n {
			case 1:
				version = string(value)
			case 3:
				name = string(value)
			}
		})
		if c.versions[typeURL] == nil {
			c.versions[typeURL] = map[string]string{}
		}
		if c.versions[typeURL][name] != version {
			c.versions[typeURL][name] = version
		}
	}
}

// fields calls f for each length-delimited field of a message.
func fields(raw []byte, f func(protowire.Number, []byte)) error {
	for len(raw) > 0 {
		n, kind, size := protowire.ConsumeTag(raw)
		if size < 0 {
			return protowire.ParseError(size)
		}
		raw = raw[size:]
		if kind != protowire.BytesType {
			if size = protowire.ConsumeFieldValue(n, kind, raw); size < 0 {
				return protowire.ParseError(size)
			}
			raw = raw[size:]
			continue
		}
		value, size := protowire.ConsumeBytes(raw)
		if size < 0 {
			return protowire.ParseError(size)
		}
		f(n, value)
		raw = raw[size:]
	}
	return nil
}
