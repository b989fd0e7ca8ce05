package answers

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Limits of a Seat.
const (
	pieceBytes  = 256 << 10        // sent to the agent at once
	landTimeout = 10 * time.Second // for the rest of an answer, when it is whole
)

// Seat is a place in a flight of the node: the same question, put by several pods at a time.
// One pod leads, asks the model and, while another pod waits for the same, publishes what it
// is answered; the others follow. Whoever got a Seat ends it: a leader with Land or Close, a
// follower with Close, which may be called more than once.
//
// An agent that goes away is a lost flight to its followers, and nothing to its leader.
type Seat struct {
	n      *Node
	stream grpc.BidiStreamingClient[pb.FlightSend, pb.FlightReceive]
	ctx    context.Context
	cancel context.CancelFunc
	leads  bool

	mu         sync.Mutex
	flight     *Flight // that is published
	publishing bool    // its goroutine runs
	counted    bool    // the flight counts the node's followers as a reader
	left       bool    // the stream is over
	ttl        time.Duration
	settled    chan struct{} // closed when ttl is known
	once       sync.Once
}

// Join asks the agent for an answer as Get does and, if there is none, for a place among
// those who ask the same. Both are nil when the caller is on its own.
func (n *Node) Join(ctx context.Context, key Key, stretch Stretch, now time.Time, maxAge time.Duration) (*Answer, *Seat) {
	if !n.usable(now) || n.ending() { // what cannot be published is not led
		return nil, nil
	}
	if now.UnixNano() < n.single.Load() {
		return n.Get(ctx, key, stretch, now, maxAge), nil
	}
	s := &Seat{n: n, settled: make(chan struct{})}
	// The leader's client may leave before the flight ends.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	late := time.AfterFunc(NodeWait, s.cancel)
	left := context.AfterFunc(ctx, s.cancel)
	m, err := s.ask(key, stretch, maxAge)
	left()
	if !late.Stop() && err == nil {
		err = context.DeadlineExceeded
	}
	switch {
	case gstatus.Code(err) == codes.Unimplemented: // an agent of an earlier version
		s.cancel()
		n.single.Store(now.Add(nodeNone).UnixNano())
		return n.Get(ctx, key, stretch, now, maxAge), nil
	case err != nil:
		s.cancel()
		n.rest(ctx, err, now)
		return nil, nil
	}
	a := answerOf(m.GetKept(), now)
	role := m.GetRole()
	switch {
	case !n.usable(now): // a stretch may have ended meanwhile
		a, role = nil, pb.FlightRole_FLIGHT_ROLE_ALONE
	case a != nil:
		n.hits.Add(1)
	case role == pb.FlightRole_FLIGHT_ROLE_LEAD || role == pb.FlightRole_FLIGHT_ROLE_FOLLOW:
		s.leads = role == pb.FlightRole_FLIGHT_ROLE_LEAD
		if !s.leads {
			n.joined.Add(1)
			return nil, s
		}
		n.misses.Add(1)
		return nil, s
	}
	s.cancel()
	if a == nil {
		n.misses.Add(1)
	}
	return a, nil
}

// ask opens the stream and returns what the agent says first.
func (s *Seat) ask(key Key, stretch Stretch, maxAge time.Duration) (*pb.FlightReceive, error) {
	var err error
	if s.stream, err = s.n.agent.JoinFlight(s.ctx); err != nil {
		return nil, err
	}
	q := &pb.GetAnswerRequest{Key: []byte(key), Stretch: stretch[:]}
	if maxAge >= 0 {
		age := maxAge.Milliseconds()
		q.MaxAgeMs = &age
	}
	// What Send fails with, Recv says better.
	_ = s.stream.Send(&pb.FlightSend{What: &pb.FlightSend_Question{Question: q}})
	return s.stream.Recv()
}

// Leads reports whether the caller is to ask the model; false for nil.
func (s *Seat) Leads() bool { return s != nil && s.leads }

// Follows reports whether another pod asks the model; false for nil.
func (s *Seat) Follows() bool { return s != nil && !s.leads }

// Close gives the seat up; followers of a leader lose the flight. It does nothing after Land, and for nil.
func (s *Seat) Close() {
	if s != nil {
		s.once.Do(s.cancel)
	}
}

// Publish has f sent to the node's followers while there are any, who count as its readers.
// It returns at once; Land or Close must follow.
func (s *Seat) Publish(f *Flight) {
	if s == nil || !s.n.begin() {
		return
	}
	s.flight = f
	go func() {
		defer s.n.under.Done()
		s.listen()
	}()
}

// listen follows what the agent says until the stream ends.
func (s *Seat) listen() {
	defer s.cancel()
	for {
		m, err := s.stream.Recv()
		s.mu.Lock()
		switch w := m.GetWhat().(type) {
		case *pb.FlightReceive_Followed:
			s.count(w.Followed)
			if w.Followed {
				s.publish()
			}
		case *pb.FlightReceive_Stored:
			if w.Stored {
				s.n.stored.Add(1)
			} else {
				s.n.dropped.Add(1)
			}
		}
		if err != nil {
			s.left = true
			s.count(false)
		}
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// count makes the node's followers a reader of the flight, or no more. s.mu is held.
func (s *Seat) count(followed bool) {
	if followed == s.counted {
		return
	}
	if s.counted = followed; followed {
		s.flight.Enter()
		return
	}
	s.flight.Leave()
}

// publish starts to send the flight, if that is not being done. s.mu is held.
func (s *Seat) publish() {
	if s.publishing || s.left || !s.n.begin() {
		return
	}
	s.publishing = true
	go func() {
		defer s.n.under.Done()
		if !s.send() {
			s.cancel()
		}
	}()
}

// send sends the flight from its first byte to its end; false if the answer, or the agent, is lost.
func (s *Seat) send() bool {
	begun, seen := false, 0
	for {
		p, err := s.flight.Read(s.ctx, begun, seen)
		if err != nil || p.Lost {
			return false
		}
		if !begun && p.Begun {
			begun = true
			if s.stream.Send(&pb.FlightSend{What: &pb.FlightSend_Head{Head: &pb.AnswerHead{Header: fieldsOf(p.Head)}}}) != nil {
				return false
			}
		}
		seen += len(p.New)
		for b := p.New; len(b) > 0; {
			n := min(len(b), pieceBytes)
			if s.stream.Send(&pb.FlightSend{What: &pb.FlightSend_Body{Body: b[:n]}}) != nil {
				return false
			}
			b = b[n:]
		}
		if !p.Whole {
			continue
		}
		select {
		case <-s.settled:
		case <-s.ctx.Done():
			return false
		}
		end := &pb.FlightEnd{TtlMs: s.ttl.Milliseconds()}
		return s.stream.Send(&pb.FlightSend{What: &pb.FlightSend_End{End: end}}) == nil && s.stream.CloseSend() == nil
	}
}

// Land ends a leader's seat after its flight: the node keeps the answer a for those who come
// later, unless a is nil or continues, which is asked now, says that the stretch is over. It returns
// at once; what the agent has not taken after 10 s it does not get.
func (s *Seat) Land(a *Answer, now time.Time, continues func() bool) {
	s.once.Do(func() {
		keep := a != nil && s.n.usable(now) && continues()
		s.mu.Lock()
		defer s.mu.Unlock()
		if a != nil {
			s.ttl = a.Expiry.Sub(now)
		}
		if !keep || s.ttl < time.Millisecond {
			s.ttl = 0
		}
		close(s.settled)
		if s.ttl > 0 && !s.publishing && s.n.landing.Load() < nodeQueue {
			s.n.landing.Add(1)
			context.AfterFunc(s.ctx, func() { s.n.landing.Add(-1) })
			s.publish()
		}
		if !s.publishing {
			if a != nil {
				s.n.dropped.Add(1)
			}
			s.cancel()
			return
		}
		end := time.AfterFunc(landTimeout, s.cancel)
		context.AfterFunc(s.ctx, func() { end.Stop() })
	})
}

// Part is what a follower is told.
type Part struct {
	Header http.Header   // not nil: the answer begins
	Body   []byte        // its next bytes
	Whole  bool          // it has ended well
	TTL    time.Duration // then: for how long it may be given out
}

// Next waits for more of the answer that is followed. An error means that it is lost, or the
// seat closed.
func (s *Seat) Next() (Part, error) {
	m, err := s.stream.Recv()
	if err != nil {
		return Part{}, err
	}
	switch w := m.GetWhat().(type) {
	case *pb.FlightReceive_Head:
		return Part{Header: headerOf(w.Head.GetHeader())}, nil
	case *pb.FlightReceive_Body:
		return Part{Body: w.Body}, nil
	case *pb.FlightReceive_End:
		return Part{Whole: true, TTL: time.Duration(w.End.GetTtlMs()) * time.Millisecond}, nil
	}
	return Part{}, io.ErrUnexpectedEOF
}

func fieldsOf(h http.Header) []*pb.AnswerField {
	out := make([]*pb.AnswerField, 0, len(h))
	for name, values := range h {
		for _, v := range values {
			out = append(out, &pb.AnswerField{Name: name, Value: v})
		}
	}
	return out
}

func headerOf(fields []*pb.AnswerField) http.Header {
	h := make(http.Header, len(fields))
	for _, f := range fields {
		h[f.GetName()] = append(h[f.GetName()], f.GetValue())
	}
	return h
}

// answerOf returns nil for an answer that is absent or whose time is over.
func answerOf(a *pb.NodeAnswer, now time.Time) *Answer {
	if a.GetTtlMs() <= 0 {
		return nil
	}
	age, ttl := time.Duration(a.GetAgeMs())*time.Millisecond, time.Duration(a.GetTtlMs())*time.Millisecond
	return &Answer{Header: headerOf(a.Header), Body: a.Body, Stored: now.Add(-age), Expiry: now.Add(ttl)}
}
