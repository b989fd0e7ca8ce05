package main

import (
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/outrigger-mesh/outrigger/xds"
)

// fleetConduct is how the clients of a fleet misbehave, and what is counted of them beyond
// what every row needs. All of it but the byte counts
// and the two shares, which are set before anybody misbehaves, is guarded by xdsClients.mu.
type fleetConduct struct {
	down, up atomic.Int64 // bytes since the last report

	refuseOf int           // every so many-th client rejects changed routes; 0 = none
	slowOf   int           // every so many-th client is a slow reader; 0 = none
	slow     chan struct{} // while it is open slow readers read and answer nothing; nil = they do
	turn     int           // the push that is waited for
	got      int           // clients that answered its last response
	gotAt    int64
	churned  int // how often clients were replaced
}

// Where in their stride clients misbehave, so that no client does so in two ways.
const (
	refusePhase = 7
	slowPhase   = 3
)

// obey carries out a line: "conduct R S" has every Rth client reject changed routes and
// every Sth be a slow reader (0 = none), "slow" stops the slow readers and "read" lets them
// go on, "expect" begins a turn, "turn N" waits until N clients answered in it, and
// "churn N" replaces N clients that are no slow readers by new ones that hold nothing.
func (c *xdsClients) obey(line string) (xdsSeen, error) {
	c.mu.Lock()
	var n, m int
	switch {
	case line == "slow" && c.slow == nil:
		c.slow = make(chan struct{})
	case line == "read" && c.slow != nil:
		close(c.slow)
		c.slow = nil
	case line == "expect":
		c.turn++
		c.got = 0
	case scan(line, "conduct %d %d", &n, &m):
		c.refuseOf, c.slowOf = n, m
	case scan(line, "turn %d", &n):
		defer c.mu.Unlock()
		if err := c.until(func() bool { return c.got >= n }); err != nil {
			return xdsSeen{}, fmt.Errorf("%d of %d clients answered the push: %w", c.got, n, err)
		}
		out := c.take()
		out.Last = c.gotAt
		return out, nil
	case scan(line, "churn %d", &n):
		c.mu.Unlock()
		return c.churn(n)
	default:
		defer c.mu.Unlock()
		return xdsSeen{}, fmt.Errorf("no command %q", line)
	}
	c.mu.Unlock()
	return xdsSeen{}, nil
}

func scan(line, format string, into ...any) bool {
	n, err := fmt.Sscanf(line, format, into...)
	return err == nil && n == len(into)
}

// churn replaces n clients, at most half of them, other ones each time.
func (c *xdsClients) churn(n int) (xdsSeen, error) {
	began := time.Now()
	leave, which := map[int]bool{}, []int(nil)
	c.mu.Lock()
	for k := range n { // spread evenly, so that each kind is hit by its share
		i := (c.churned + k*c.count/n) % c.count
		for c.isSlow(i) || leave[i] {
			i = (i + 1) % c.count
		}
		leave[i], which = true, append(which, i)
	}
	c.churned++
	c.mu.Unlock()
	c.cut(func(s *xdsStream) bool { return leave[s.i] })
	return c.openAll(began, which, nil)
}

// cut closes the connections of the streams leaves is true for.
func (c *xdsClients) cut(leaves func(*xdsStream) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stay := c.streams[:0]
	for _, s := range c.streams {
		if !leaves(s) {
			stay = append(stay, s)
			continue
		}
		s.cut = true
		if len(s.answered) == len(s.types()) {
			c.synced--
		}
		_ = s.conn.Close() // its goroutine ends
	}
	clear(c.streams[len(stay):])
	c.streams = stay
}

func (c *xdsClients) isSlow(i int) bool { return c.slowOf > 0 && i%c.slowOf == slowPhase }

// rejects says whether a client rejects this response. Called with mu held.
func (c *xdsClients) rejects(s *xdsStream, typeURL string) bool {
	return c.refuseOf > 0 && s.i%c.refuseOf == refusePhase && typeURL == xds.TypeRoute && s.answered[typeURL]
}

// hold keeps a slow reader from going on: while it waits it reads nothing more.
func (c *xdsClients) hold(s *xdsStream) {
	c.mu.Lock()
	wait := c.slow
	c.mu.Unlock()
	if wait != nil && c.isSlow(s.i) {
		<-wait
	}
}

// note counts a client that has answered the last response of a push. Called with mu held.
func (c *xdsClients) note(s *xdsStream, now int64) {
	if s.turn != c.turn {
		s.turn = c.turn
		c.got, c.gotAt = c.got+1, now
		c.changed.Signal()
	}
}

// isState says whether it is a client of the state of the world.
func (s *xdsStream) isState() bool { return s.i < s.all.state }

func (s *xdsStream) types() []string {
	if s.isState() {
		return xdsStandard()
	}
	return s.all.types
}

// marked is the type of the last response of a push.
func (s *xdsStream) marked() string {
	if s.isState() {
		return xds.TypeRoute
	}
	return s.all.mark
}

// stateNames are what a gRPC client that dialled the first model comes to follow.
func stateNames(typeURL string) []string {
	const model = "model/model-0000"
	switch typeURL {
	case xds.TypeCluster, xds.TypeEndpoint:
		return []string{model + "/v1", model + "/v2"}
	}
	return []string{model}
}

// stateRequest is a DiscoveryRequest.
func (s *xdsStream) stateRequest(typeURL string, first bool, nonce string, why []byte) []byte {
	var req []byte
	if v := s.accepted[typeURL]; v != "" {
		req = protowire.AppendString(protowire.AppendTag(req, 1, protowire.BytesType), v)
	}
	if first {
		node := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), fmt.Sprintf("node-%05d", s.i))
		node = protowire.AppendString(protowire.AppendTag(node, 6, protowire.BytesType), "gRPC Go")
		req = protowire.AppendBytes(protowire.AppendTag(req, 2, protowire.BytesType), node)
	}
	for _, name := range stateNames(typeURL) {
		req = protowire.AppendString(protowire.AppendTag(req, 3, protowire.BytesType), name)
	}
	req = protowire.AppendString(protowire.AppendTag(req, 4, protowire.BytesType), typeURL)
	if nonce != "" {
		req = protowire.AppendString(protowire.AppendTag(req, 5, protowire.BytesType), nonce)
	}
	if why != nil {
		req = protowire.AppendBytes(protowire.AppendTag(req, 6, protowire.BytesType), why)
	}
	return req
}

// reply acknowledges a response, or rejects it when why holds a google.rpc.Status.
func (s *xdsStream) reply(typeURL, version string, nonce, why []byte) []byte {
	if s.isState() {
		if why == nil {
			s.accepted[typeURL] = version
		}
		return s.stateRequest(typeURL, false, string(nonce), why)
	}
	out := protowire.AppendString(protowire.AppendTag(nil, 2, protowire.BytesType), typeURL)
	out = protowire.AppendBytes(protowire.AppendTag(out, 6, protowire.BytesType), nonce)
	if why != nil {
		out = protowire.AppendBytes(protowire.AppendTag(out, 7, protowire.BytesType), why)
	}
	return out
}

// countedConn counts what goes through a connection.
type countedConn struct {
	net.Conn
	down, up *atomic.Int64
}

func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.down.Add(int64(n))
	return n, err
}

func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.up.Add(int64(n))
	return n, err
}
