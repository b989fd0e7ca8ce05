package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// feedNodes is a process of node agents whose feeds are watched. Each agent is the real
// one, with connections and a feed of its own; what is light is the watching: an agent
// tells of each frame that its table shows, and that is the moment that is noted. So
// nothing polls.
type feedNodes struct {
	lagFlags
	agents []*node.Agent
	clock  func() int64 // of leases

	mu      sync.Mutex
	last    []map[int]int // by node: session → number of the newest write its table shows
	seen    [][]int64     // by session and number: when the last of its nodes showed it
	shown   [][]int       // how many do
	unfresh int           // showings by nodes without a lease
}

// feedReport is what the process says when asked.
type feedReport struct {
	Busy    time.Duration `json:"busy"` // processor time so far
	Seen    [][]int64     `json:"seen,omitempty"`
	Shown   [][]int       `json:"shown,omitempty"`
	Unfresh int           `json:"unfresh"`
}

// childFeedNodes runs until its standard input ends. It prints a report when every node
// holds its sessions, and one for each line it is sent; the line "shown" asks for what
// was noted, too, and the line "profile" starts the profiles if the flag asks for them.
func childFeedNodes(ctx context.Context, args []string, in io.Reader) (any, error) {
	f := flag.NewFlagSet("feednodes", flag.ContinueOnError)
	address := f.String("address", "", "of the authority")
	plain := f.Bool("plain", false, "be the receivers of the floor")
	l, err := parseLag(f, args)
	if err != nil {
		return nil, err
	}
	n := &feedNodes{lagFlags: l, clock: node.Clock(), last: make([]map[int]int, l.nodes),
		seen: make([][]int64, lagSessions), shown: make([][]int, lagSessions)}
	go heap.Keep(ctx, 64<<20) // for all nodes together; each "outrigger node" has half of that
	fl := &fleet{}
	defer fl.close()
	if *plain {
		err = n.startPlain(fl, *address)
	} else {
		err = n.start(ctx, fl, *address)
	}
	if err != nil {
		return nil, err
	}
	say := func(full bool) error {
		r, err := n.report(full)
		if err == nil {
			var raw []byte
			if raw, err = json.Marshal(r); err == nil {
				_, err = fmt.Printf("%s\n", raw)
			}
		}
		return err
	}
	err = say(false)
	profiled := func() error { return nil }
	for sc := bufio.NewScanner(in); err == nil && sc.Scan(); {
		if sc.Text() == "profile" {
			if profiled, err = l.startProfile("nodes"); err != nil {
				break
			}
		}
		err = say(sc.Text() == "shown")
	}
	return struct{}{}, errors.Join(err, profiled())
}

func (n *feedNodes) start(ctx context.Context, f *fleet, address string) error {
	for i := range n.nodes {
		n.last[i] = map[int]int{}
		conn, err := f.dial(address)
		if err != nil {
			return err
		}
		a, err := node.New(node.Options{Node: outrigger.Node{ID: fmt.Sprintf("node-%03d", i), Region: "bench"}, Origin: conn,
			DialFeed: n.dialFeed(address), Applied: func(f *pb.FeedFrame) { n.note(i, f) }, Table: shm.Options{Heap: true, Bytes: 1 << 20}})
		if err != nil {
			return err
		}
		f.run(ctx, a.Run)
		n.agents = append(n.agents, a)
	}
	for _, a := range n.agents {
		if err := live(ctx, a); err != nil {
			return err
		}
	}
	limit, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for s := range lagSessions {
		for _, h := range n.holdersOf(s) {
			for held := false; !held; _, held = n.held(h, s) {
				if _, err := n.agents[h].Read(limit, &pb.ReadRequest{Keys: []*pb.Key{{Session: lagSession(s), Name: "x"}}}); err != nil {
					return err
				}
				pause.For(limit, time.Millisecond)
			}
		}
	}
	return nil
}

func (n *feedNodes) dialFeed(address string) func(context.Context) (net.Conn, error) {
	if n.grpc {
		return nil
	}
	return dialFeed(address)
}

// held is the number of the write a node's table shows for a session.
func (n *feedNodes) held(h, session int) (number int, ok bool) {
	id := outrigger.Key{Tenant: outrigger.DefaultTenant, Session: lagSession(session), Name: "x"}.String()
	e, b := n.agents[h].Table().Get(id, nil)
	v := &pb.Variable{}
	if e.State != shm.Present || proto.Unmarshal(b, v) != nil {
		return 0, false
	}
	return numberOf(v.GetValue().GetJson()), true
}

// report says what was noted. With full, no table may be behind what the notes say it shows.
func (n *feedNodes) report(full bool) (feedReport, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := feedReport{Busy: busy(), Unfresh: n.unfresh}
	if !full {
		return r, nil
	}
	for h, last := range n.last {
		if len(n.agents) == 0 {
			break // the floor has no tables
		}
		for s, number := range last {
			if shows, ok := n.held(h, s); !ok || shows < number {
				return r, fmt.Errorf("node %d was sent write %d of session %d and shows %d (%v)", h, number, s, shows, ok)
			}
		}
	}
	for s := range n.seen { // copies: writes may still be noted while they are printed
		r.Seen, r.Shown = append(r.Seen, slices.Clone(n.seen[s])), append(r.Shown, slices.Clone(n.shown[s]))
	}
	return r, nil
}

// note records that a node's table shows a frame.
func (n *feedNodes) note(h int, f *pb.FeedFrame) {
	at := time.Now().UnixNano()
	fresh := n.clock() < n.agents[h].Table().Lease()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range f.GetChanges().GetChanges() {
		s, err := strconv.Atoi(strings.TrimPrefix(c.GetKey().GetSession(), "session-"))
		number := numberOf(c.GetVariable().GetValue().GetJson())
		if err != nil || number < 0 {
			continue
		}
		if !fresh {
			n.unfresh++
		}
		n.shows(h, s, number, at)
	}
}

// shows notes a write for whoever holds the mutex.
func (n *feedNodes) shows(h, s, number int, at int64) {
	for len(n.seen[s]) <= number {
		n.seen[s], n.shown[s] = append(n.seen[s], 0), append(n.shown[s], 0)
	}
	// A write that a later one stood for became invisible with it.
	for i := n.last[h][s] + 1; i <= number; i++ {
		n.seen[s][i] = max(n.seen[s][i], at)
		n.shown[s][i]++
	}
	n.last[h][s] = max(n.last[h][s], number)
}

// feedProcess is a childFeedNodes process as its parent sees it.
type feedProcess struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startFeedNodes(self, address string, l lagFlags, plain bool) (*feedProcess, error) {
	p := &feedProcess{cmd: exec.Command(self, "-child", "feednodes", "-address", address, "-nodes", strconv.Itoa(l.nodes), "-holders", strconv.Itoa(l.holders), "-grpc="+strconv.FormatBool(l.grpc), "-profile", l.profile, "-plain="+strconv.FormatBool(plain))}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	p.cmd.Stderr = new(strings.Builder)
	return p, p.cmd.Start()
}

// next reads the next report; it waits for the process to send one.
func (p *feedProcess) next() (r feedReport, err error) {
	line, err := p.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		err = fmt.Errorf("node process: %w; %v", err, p.cmd.Stderr)
	}
	return r, err
}

func (p *feedProcess) ask(what string) (feedReport, error) {
	if _, err := fmt.Fprintln(p.in, what); err != nil {
		return feedReport{}, err
	}
	return p.next()
}

func (p *feedProcess) close() error {
	return errors.Join(p.in.Close(), p.cmd.Wait())
}
