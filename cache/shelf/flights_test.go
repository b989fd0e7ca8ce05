package shelf_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/shelf"
)

// sky is a store behind a real gRPC server in memory; metadata names the tenant.
type sky struct {
	t      *testing.T
	client pb.NodeAnswersClient
}

func inSky(t *testing.T, do func(w *sky)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		s, err := shelf.New(shelf.Options{Bytes: 16 << 20, Tenants: []string{"acme", "umbra"}, Clock: func() int64 { return int64(time.Since(begun)) + 1 },
			Tenant: func(ctx context.Context) (string, error) {
				if md, _ := metadata.FromIncomingContext(ctx); len(md["tenant"]) == 1 {
					return md["tenant"][0], nil
				}
				return "", outrigger.Errorf(outrigger.Denied, "nobody")
			}})
		if err != nil {
			t.Fatal(err)
		}
		l, g := bufconn.Listen(1<<20), grpc.NewServer()
		pb.RegisterNodeAnswersServer(g, s)
		go func() { _ = g.Serve(l) }() // its end is Stop's
		conn, err := grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		do(&sky{t: t, client: pb.NewNodeAnswersClient(conn)})
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		g.Stop()
	})
}

// pod is one caller's stream.
type pod struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[pb.FlightSend, pb.FlightReceive]
	gone   context.CancelFunc
}

func (w *sky) open(tenant string, first *pb.FlightSend) *pod {
	w.t.Helper()
	ctx, gone := context.WithCancel(metadata.AppendToOutgoingContext(w.t.Context(), "tenant", tenant))
	stream, err := w.client.JoinFlight(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	p := &pod{t: w.t, stream: stream, gone: gone}
	p.send(first)
	return p
}

func question(key, stretch int) *pb.FlightSend {
	return &pb.FlightSend{What: &pb.FlightSend_Question{Question: &pb.GetAnswerRequest{Key: id(key), Stretch: id(stretch)}}}
}

// ask joins a question, and is told what is wanted.
func (w *sky) ask(tenant string, key, stretch int, want string) *pod {
	w.t.Helper()
	p := w.open(tenant, question(key, stretch))
	p.hears(want)
	return p
}

func (p *pod) send(m *pb.FlightSend) {
	p.t.Helper()
	if err := p.stream.Send(m); err != nil {
		p.t.Fatal(err)
	}
}

func head(value string) *pb.FlightSend {
	return &pb.FlightSend{What: &pb.FlightSend_Head{Head: &pb.AnswerHead{Header: []*pb.AnswerField{{Name: "A", Value: value}}}}}
}

func piece(b string) *pb.FlightSend {
	return &pb.FlightSend{What: &pb.FlightSend_Body{Body: []byte(b)}}
}

func end(ttl time.Duration) *pb.FlightSend {
	return &pb.FlightSend{What: &pb.FlightSend_End{End: &pb.FlightEnd{TtlMs: ttl.Milliseconds()}}}
}

// next is what the agent says, in a word or two.
func (p *pod) next() string {
	m, err := p.stream.Recv()
	if err == io.EOF {
		return "over"
	} else if err != nil {
		return gstatus.Code(err).String()
	}
	switch w := m.GetWhat().(type) {
	case *pb.FlightReceive_Kept:
		return "kept " + string(w.Kept.Body)
	case *pb.FlightReceive_Role:
		return strings.ToLower(strings.TrimPrefix(w.Role.String(), "FLIGHT_ROLE_"))
	case *pb.FlightReceive_Followed:
		return map[bool]string{true: "followed", false: "deserted"}[w.Followed]
	case *pb.FlightReceive_Stored:
		return map[bool]string{true: "stored", false: "refused"}[w.Stored]
	case *pb.FlightReceive_Head:
		return "head " + w.Head.Header[0].GetValue()
	case *pb.FlightReceive_Body:
		return "body " + string(w.Body)
	case *pb.FlightReceive_End:
		return "end " + (time.Duration(w.End.TtlMs) * time.Millisecond).String()
	case *pb.FlightReceive_Lost:
		return "lost"
	}
	return m.String()
}

func (p *pod) hears(want ...string) {
	p.t.Helper()
	for _, s := range want {
		if got := p.next(); got != s {
			p.t.Fatalf("heard %.200q, want %.200q", got, s)
		}
	}
}

// One leads and the others read along, whenever they come; then it is kept.
func TestFlight(t *testing.T) {
	inSky(t, func(w *sky) {
		one := w.ask("acme", 1, 7, "lead")
		w.ask("umbra", 1, 7, "lead") // another tenant is nobody's company
		w.ask("acme", 2, 7, "lead")  // nor is another question
		two := w.ask("acme", 1, 7, "follow")
		one.hears("followed")
		one.send(head("x"))
		one.send(piece("a"))
		two.hears("head x", "body a")
		three := w.ask("acme", 1, 7, "follow")
		three.hears("head x", "body a")
		one.send(piece("b"))
		two.hears("body b")
		two.gone()
		three.hears("body b")
		one.send(end(time.Minute))
		one.hears("stored", "over")
		three.hears("end 1m0s", "over")
		time.Sleep(20 * time.Second)
		w.ask("acme", 1, 7, "kept ab").hears("over")
		stale := question(1, 7)
		age := int64(19_999)
		stale.GetQuestion().MaxAgeMs = &age
		w.open("acme", stale).hears("lead")
	})
}

// What nobody follows is sent once, whole; what may not be kept is for those who are there.
func TestFlightThatIsNotFollowed(t *testing.T) {
	inSky(t, func(w *sky) {
		one := w.ask("acme", 1, 7, "lead")
		one.send(head("x"))
		one.send(piece("ab"))
		one.send(end(time.Minute))
		one.hears("stored", "over")
		w.ask("acme", 1, 7, "kept ab")

		one = w.ask("acme", 2, 7, "lead")
		two := w.ask("acme", 2, 7, "follow")
		one.hears("followed")
		one.send(head("x"))
		one.send(piece("c"))
		one.send(end(0))
		one.hears("refused", "over")
		two.hears("head x", "body c", "end 0s", "over")
		w.ask("acme", 2, 7, "lead")
	})
}

// A leader that is gone, or breaks the rules, is lost to its followers, and the next to ask
// leads. It is told when nobody follows it any more.
func TestLeaderLost(t *testing.T) {
	for name, lose := range map[string]func(p *pod){
		"gone":           func(p *pod) { p.gone() },
		"closed":         func(p *pod) { _ = p.stream.CloseSend() },
		"asks again":     func(p *pod) { p.send(question(1, 7)) },
		"says nothing":   func(p *pod) { p.send(&pb.FlightSend{}) },
		"a piece of 2M":  func(p *pod) { p.send(piece(strings.Repeat("x", 2<<20))) },
		"a head of 100K": func(p *pod) { p.send(head(strings.Repeat("x", 100<<10))) },
		"never began":    func(p *pod) { p.send(end(time.Minute)) },
	} {
		inSky(t, func(w *sky) {
			one := w.ask("acme", 1, 7, "lead")
			w.ask("acme", 1, 7, "follow").gone()
			one.hears("followed", "deserted")
			two := w.ask("acme", 1, 7, "follow")
			one.hears("followed")
			lose(one)
			if got := two.next(); got != "lost" {
				t.Errorf("%s: the follower heard %.100q", name, got)
			}
			two.hears("over")
			w.ask("acme", 1, 7, "lead")
		})
	}
	// In the middle of it.
	inSky(t, func(w *sky) {
		one := w.ask("acme", 1, 7, "lead")
		two := w.ask("acme", 1, 7, "follow")
		one.send(head("x"))
		one.send(piece("a"))
		two.hears("head x", "body a")
		one.gone()
		two.hears("lost", "over")
	})
}

// A stretch that has ended has no flights: those under way take nobody more and are not kept.
func TestFlightOfEndedStretch(t *testing.T) {
	inSky(t, func(w *sky) {
		one := w.ask("acme", 1, 7, "lead")
		two := w.ask("acme", 1, 7, "follow")
		other := w.ask("acme", 2, 8, "lead")
		ctx := metadata.AppendToOutgoingContext(w.t.Context(), "tenant", "acme")
		if _, err := w.client.EndStretch(ctx, &pb.EndStretchRequest{Stretches: [][]byte{id(7)}}); err != nil {
			t.Fatal(err)
		}
		w.ask("acme", 1, 7, "alone").hears("over")
		one.hears("followed")
		one.send(head("x"))
		one.send(piece("a"))
		one.send(end(time.Minute))
		one.hears("refused", "over")
		two.hears("head x", "body a", "end 1m0s", "over") // it asked before
		w.ask("acme", 1, 7, "alone")
		w.ask("acme", 2, 8, "follow")
		other.hears("followed")
	})
}

// Of acme's 8 MiB half is room for two followed flights. A stream of any length reaches who
// keeps up and is not kept; who comes after the limit leads; room is given back.
func TestFlightBounds(t *testing.T) {
	inSky(t, func(w *sky) {
		one, two, three := w.ask("acme", 1, 7, "lead"), w.ask("acme", 2, 7, "lead"), w.ask("acme", 3, 7, "lead")
		along := w.ask("acme", 1, 7, "follow")
		w.ask("acme", 2, 7, "follow").gone()
		two.hears("followed", "deserted")
		w.ask("acme", 3, 7, "alone").hears("over")
		two.gone()
		synctest.Wait()
		w.ask("acme", 3, 7, "follow")
		three.hears("followed")

		one.hears("followed")
		one.send(head("x"))
		along.hears("head x")
		for range 40 {
			s := strings.Repeat("y", 100<<10)
			one.send(piece(s))
			along.hears("body " + s)
		}
		w.ask("acme", 1, 7, "lead") // one is longer than what is held
		// Two more may be on their way with nobody following.
		four, five, six := w.ask("acme", 4, 7, "lead"), w.ask("acme", 5, 7, "lead"), w.ask("acme", 6, 7, "lead")
		for _, p := range []*pod{four, five, six} {
			p.send(head("x"))
			synctest.Wait()
		}
		six.hears("ResourceExhausted")
		four.send(piece("d"))
		four.send(end(time.Minute))
		four.hears("stored", "over")
		six = w.ask("acme", 6, 7, "lead")
		six.send(head("x"))
		six.send(end(time.Minute))
		six.hears("stored", "over")
		w.ask("acme", 6, 7, "kept ").hears("over")
		one.send(end(time.Minute))
		one.hears("refused", "over")
		along.hears("end 0s", "over")
	})
	inSky(t, func(w *sky) {
		one := w.ask("acme", 1, 7, "lead")
		two := w.ask("acme", 1, 7, "follow")
		one.send(head("x"))
		s := strings.Repeat("z", 1<<20)
		for range 8 { // and two reads nothing
			one.send(piece(s))
			synctest.Wait()
		}
		one.send(end(time.Minute))
		one.hears("followed", "refused", "over")
		two.hears("head x")
		var got bytes.Buffer
		for s := two.next(); s != "lost"; s = two.next() {
			if !strings.HasPrefix(s, "body z") {
				t.Fatalf("heard %.100q", s)
			}
			got.WriteString(s[len("body "):])
		}
		if n := got.Len(); n == 0 || n > 7<<20 {
			t.Errorf("a follower that stood still got %d bytes before it was lost", n)
		}
	})
}

func TestFlightRefusals(t *testing.T) {
	inSky(t, func(w *sky) {
		for name, c := range map[string]struct {
			tenant string
			first  *pb.FlightSend
			want   string
		}{
			"unknown tenant": {"other", question(1, 7), "PermissionDenied"},
			"no question":    {"acme", head("x"), "InvalidArgument"},
			"short key":      {"acme", &pb.FlightSend{What: &pb.FlightSend_Question{Question: &pb.GetAnswerRequest{Key: []byte("k"), Stretch: id(1)}}}, "InvalidArgument"},
			"no stretch":     {"acme", &pb.FlightSend{What: &pb.FlightSend_Question{Question: &pb.GetAnswerRequest{Key: id(1)}}}, "InvalidArgument"},
		} {
			if got := w.open(c.tenant, c.first).next(); got != c.want {
				t.Errorf("%s: %s, want %s", name, got, c.want)
			}
		}
		for n := range shelf.MaxFlights {
			w.ask("acme", n, 7, "lead")
		}
		w.ask("acme", shelf.MaxFlights, 7, "alone")
		w.ask("umbra", shelf.MaxFlights, 7, "lead")
	})
}
