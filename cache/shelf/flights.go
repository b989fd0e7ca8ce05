package shelf

import (
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/flight"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Limits of flights.
const (
	MaxFlights = 4096      // of a tenant at one time
	pieceBytes = 256 << 10 // sent at once
	maxTold    = 64        // times a leader hears that it is followed no more; then it stays followed
)

// flights are a tenant's questions on their way.
type flights struct {
	room int // followed ones at one time, which hold up to twice MaxAnswer each, and others that hold something, up to MaxAnswer

	mu                sync.Mutex
	listed            map[[KeyBytes]byte]*flying
	followed, landing int
}

func newFlights(bytes int64) *flights {
	return &flights{room: max(2, int(bytes/2/(2*MaxAnswer))), listed: map[[KeyBytes]byte]*flying{}}
}

// flying is one question of a leader.
type flying struct {
	*flight.Flight[*pb.AnswerHead]
	in           *flights
	key, stretch [KeyBytes]byte
	leader       grpc.BidiStreamingServer[pb.FlightSend, pb.FlightReceive]

	mu        sync.Mutex // orders what the leader is told
	followers int
	told      int
	charged   bool // in.followed counts it
	lands     bool // in.landing does: it began with nobody following
	ended     bool // the leader's call is over

	born, expiry int64 // set before the end
}

// join returns the flight of a question, or lists one that stream leads: nil if there are
// too many. The caller of a new flight holds its lock.
func (fs *flights) join(key, stretch [KeyBytes]byte, stream grpc.BidiStreamingServer[pb.FlightSend, pb.FlightReceive]) (f *flying, leads bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f = fs.listed[key]; f != nil {
		if f.stretch != stretch || !fs.enter(f) {
			return nil, false
		}
		return f, false
	}
	if len(fs.listed) >= MaxFlights {
		return nil, false
	}
	f = &flying{in: fs, key: key, stretch: stretch, leader: stream}
	f.Flight = flight.New[*pb.AnswerHead](MaxAnswer, func() { fs.unlist(f) }, nil)
	fs.listed[key] = f
	f.mu.Lock()
	return f, true
}

// enter counts a follower; false if there is no room for what its flight may hold. fs.mu is held.
func (fs *flights) enter(f *flying) bool {
	if !f.charged {
		if fs.followed >= fs.room {
			return false
		}
		f.charged = true
		fs.followed++
	}
	f.Enter()
	return true
}

// hold makes room for what a leader sends; false if there is none.
func (fs *flights) hold(f *flying) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f.charged || f.lands {
		return true
	}
	if fs.landing >= fs.room {
		return false
	}
	f.lands = true
	fs.landing++
	return true
}

func (fs *flights) unlist(f *flying) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.listed[f.key] == f {
		delete(fs.listed, f.key)
	}
}

// end takes the flights of a stretch off the list. Who follows one already asked before.
func (fs *flights) end(stretch [KeyBytes]byte) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for key, f := range fs.listed {
		if f.stretch == stretch {
			delete(fs.listed, key)
		}
	}
}

// follow counts followers for the leader, who is told when the first comes and the last goes.
func (f *flying) follow(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.followers > 0
	f.followers += n
	if is := f.followers > 0; is != was && !f.ended && f.told < maxTold {
		f.told++
		// A few bytes that fit what a stream may hold unsent; a leader that is gone ends its call.
		_ = f.leader.Send(&pb.FlightReceive{What: &pb.FlightReceive_Followed{Followed: is}})
	}
	f.release()
}

// over notes that the leader's call ends.
func (f *flying) over() {
	f.End(false) // unless it has ended well
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.release()
}

// release gives a flight's room back when nobody holds it any more; f.mu is held.
func (f *flying) release() {
	if !f.ended || f.followers > 0 {
		return
	}
	f.in.mu.Lock()
	defer f.in.mu.Unlock()
	// A follower between enter and follow is counted as a reader already.
	if f.Followed() {
		return
	}
	if f.charged {
		f.charged = false
		f.in.followed--
	}
	if f.lands {
		f.lands = false
		f.in.landing--
	}
}

// JoinFlight implements pb.NodeAnswersServer.
func (s *Store) JoinFlight(stream grpc.BidiStreamingServer[pb.FlightSend, pb.FlightReceive]) error {
	p, err := s.of(stream.Context())
	if err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return closed(err)
	}
	q := first.GetQuestion()
	if q == nil {
		return status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "the first message is no question; send one first"))
	}
	key, stretch, err := asked(q)
	if err != nil {
		return err
	}
	maxAge := int64(-1)
	if q.MaxAgeMs != nil {
		maxAge = max(0, q.GetMaxAgeMs())
	}
	a, r := s.find(p, key, stretch, maxAge)
	if a != nil {
		s.counts[hit].Add(1)
		return stream.Send(&pb.FlightReceive{What: &pb.FlightReceive_Kept{Kept: a}})
	}
	if r == over {
		s.counts[over].Add(1)
		return stream.Send(role(pb.FlightRole_FLIGHT_ROLE_ALONE))
	}
	f, leads := p.flights.join(key, stretch, stream)
	switch {
	case f == nil:
		s.counts[alone].Add(1)
		return stream.Send(role(pb.FlightRole_FLIGHT_ROLE_ALONE))
	case leads:
		s.counts[miss].Add(1)
		return s.lead(p, f)
	}
	s.counts[joined].Add(1)
	return s.readAlong(stream, f)
}

func role(r pb.FlightRole) *pb.FlightReceive {
	return &pb.FlightReceive{What: &pb.FlightReceive_Role{Role: r}}
}

// closed makes of the end of a caller's stream the end of its call.
func closed(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// lead takes the answer of a new flight, whose lock is held, from its leader.
func (s *Store) lead(p *part, f *flying) error {
	defer f.over()
	err := f.leader.Send(role(pb.FlightRole_FLIGHT_ROLE_LEAD)) // before it can be told of followers
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if p.isOver(f.stretch) { // since it was looked at: nobody may join what end did not see
		p.flights.end(f.stretch)
	}
	for {
		m, err := f.leader.Recv()
		if err != nil {
			return closed(err)
		}
		if !p.flights.hold(f) {
			return status.ToGRPC(outrigger.Errorf(outrigger.Exhausted, "%d answers are on their way already; this one is not kept", p.flights.room))
		}
		switch w := m.GetWhat().(type) {
		case *pb.FlightSend_Head:
			if headerBytes(w.Head.GetHeader()) > MaxHeader {
				return status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "the header of an answer has more than %d bytes", MaxHeader))
			}
			f.Begin(w.Head, true)
		case *pb.FlightSend_Body:
			if len(w.Body) > MaxAnswer {
				return status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "a piece of an answer has %d bytes; send at most %d at once", len(w.Body), MaxAnswer))
			}
			f.Write(w.Body)
		case *pb.FlightSend_End:
			return s.land(p, f, w.End)
		default:
			return status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "a leader sends head, body and end; this is none of them"))
		}
	}
}

// land ends a flight well, and keeps its answer if it may be kept.
func (s *Store) land(p *part, f *flying, end *pb.FlightEnd) error {
	head, body, begun, all := f.Got()
	kept := false
	if now, ttl := s.o.Clock(), end.GetTtlMs(); begun && all && ttl > 0 && ttl <= maxTTL {
		f.born, f.expiry = now, now+ttl*ms
		// Before the flight ends, so that nobody falls between.
		kept = s.keep(p, f.key, &entry{stretch: f.stretch, answer: &pb.NodeAnswer{Header: head.GetHeader(), Body: body}, born: f.born, expiry: f.expiry})
	}
	f.End(true)
	f.mu.Lock() // one at a time sends
	defer f.mu.Unlock()
	return f.leader.Send(&pb.FlightReceive{What: &pb.FlightReceive_Stored{Stored: kept}})
}

// readAlong passes a flight on to a follower, who is counted.
func (s *Store) readAlong(stream grpc.BidiStreamingServer[pb.FlightSend, pb.FlightReceive], f *flying) error {
	defer func() {
		f.Leave()
		f.follow(-1)
	}()
	if err := stream.Send(role(pb.FlightRole_FLIGHT_ROLE_FOLLOW)); err != nil {
		f.follow(1) // undone above
		return err
	}
	f.follow(1)
	begun, seen := false, 0
	for {
		p, err := f.Read(stream.Context(), begun, seen)
		if err != nil {
			return status.ToGRPC(outrigger.Wrap(outrigger.KindOf(err), err, "follow"))
		}
		if !begun && p.Begun {
			begun = true
			if err := stream.Send(&pb.FlightReceive{What: &pb.FlightReceive_Head{Head: p.Head}}); err != nil {
				return err
			}
		}
		seen += len(p.New)
		for b := p.New; len(b) > 0; {
			n := min(len(b), pieceBytes)
			if err := stream.Send(&pb.FlightReceive{What: &pb.FlightReceive_Body{Body: b[:n]}}); err != nil {
				return err
			}
			b = b[n:]
		}
		switch {
		case p.Lost:
			return stream.Send(&pb.FlightReceive{What: &pb.FlightReceive_Lost{Lost: true}})
		case p.Whole:
			end := &pb.FlightEnd{TtlMs: max(0, (f.expiry-s.o.Clock())/ms)}
			return stream.Send(&pb.FlightReceive{What: &pb.FlightReceive_End{End: end}})
		}
	}
}
