package variable_test

import (
	"context"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

// slowSessions makes sessions, and says so 900 ms later.
type slowSessions struct {
	pb.VariablesClient
	made func()
}

func (s *slowSessions) CreateSession(ctx context.Context, r *pb.CreateSessionRequest, o ...grpc.CallOption) (*pb.Session, error) {
	out, err := s.VariablesClient.CreateSession(ctx, r, o...)
	s.made()
	select {
	case <-time.After(900 * time.Millisecond): // the bubble's
		return out, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// A bounded read that makes its session is no older than its bound either, however long
// that took: it sees what somebody registered meanwhile.
func TestBoundedReadOfNewSession(t *testing.T) {
	for name, registered := range map[string]bool{"nothing": false, "a variable": true} {
		slow := &slowSessions{}
		o := worldOptions{autoCreate: true, authority: func(c pb.VariablesClient) pb.VariablesClient { slow.VariablesClient = c; return slow }}
		inWorld(t, o, func(t *testing.T, w *world) {
			slow.made = func() {
				if registered {
					w.register("x", "float", "1")
				}
			}
			g := call(w, w.bridge.GetVariable, getReq("x"), outrigger.HeaderConsistency, "bounded(100ms)")
			age, err := strconv.Atoi(first(g.head, outrigger.HeaderAge))
			if want := map[bool]codes.Code{false: codes.NotFound, true: codes.OK}[registered]; gstatus.Code(g.err) != want || err != nil || age > 100 {
				t.Errorf("%s made meanwhile: %v, age %d ms, %v; want %v and 100 ms at most", name, g.err, age, err, want)
			}
			if n := w.counts.Process.Load() + w.counts.Node.Load() + w.counts.Origin.Load() + w.counts.Errors.Load(); n != 1 {
				t.Errorf("%s made meanwhile: one read counted %d times", name, n)
			}
		})
	}
}

// agesFrom answers the names with delays from afar, and all others at once.
type agesFrom struct {
	variable.Reader
	delays map[string][]time.Duration // of each read of the name in turn
}

func (a *agesFrom) Get(ctx context.Context, r cache.Request) (cache.Answer, error) {
	out := cache.Answer{Tier: outrigger.TierProcess, FeedLive: true, SessionExists: true, Consistency: r.Consistency}
	if rest := a.delays[r.Key.Name]; len(rest) > 0 {
		a.delays[r.Key.Name] = rest[1:]
		out.Tier = outrigger.TierOrigin
		select {
		case <-time.After(rest[0]): // the bubble's
		case <-ctx.Done():
			return cache.Answer{}, ctx.Err()
		}
	}
	return out, nil
}

// A bounded batch is no older than its bound as a whole: what was read first has aged
// while the rest was waited for. It is read once more, and then said to be stale.
func TestBoundedBatch(t *testing.T) {
	for name, c := range map[string]struct {
		bound string
		far   []time.Duration
		code  codes.Code
		age   string
		count map[string]uint64
	}{
		"in time":          {"bounded(500ms)", []time.Duration{400 * time.Millisecond}, codes.OK, "400", map[string]uint64{"process": 1, "origin": 1}},
		"read again":       {"bounded(100ms)", []time.Duration{400 * time.Millisecond}, codes.OK, "0", map[string]uint64{"process": 2}},
		"never in time":    {"bounded(100ms)", []time.Duration{400 * time.Millisecond, 101 * time.Millisecond}, codes.OutOfRange, "", map[string]uint64{"errors": 2}},
		"eventual may age": {"eventual", []time.Duration{400 * time.Millisecond}, codes.OK, "400", map[string]uint64{"process": 1, "origin": 1}},
	} {
		a := &agesFrom{delays: map[string][]time.Duration{"far": c.far}}
		inWorld(t, worldOptions{reader: func(r variable.Reader) variable.Reader { a.Reader = r; return a }}, func(t *testing.T, w *world) {
			g := call(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"near", "far"}}, outrigger.HeaderConsistency, c.bound)
			if age := first(g.head, outrigger.HeaderAge); gstatus.Code(g.err) != c.code || age != c.age {
				t.Errorf("%s: %v, age %q; want %v, %q", name, g.err, age, c.code, c.age)
			}
			got := map[string]uint64{"process": w.counts.Process.Load(), "origin": w.counts.Origin.Load(), "errors": w.counts.Errors.Load()}
			for tier, n := range got {
				if n != c.count[tier] {
					t.Errorf("%s: %d reads of %s counted, want %d", name, n, tier, c.count[tier])
				}
			}
		})
	}
}
