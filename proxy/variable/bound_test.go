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
)

// slowSessions makes sessions, and says so 900 ms later.
type slowSessions struct {
	pb.VariablesClient
	made func()
}

func (s *slowSessions) CreateSession(ctx context.Context, r *pb.CreateSessionRequest, o ...grpc.CallOption) (*pb.Session, error) {
	out, err := s.VariablesClient.CreateSession(ctx, r, o...)
	s.made()
	time.Sleep(900 * time.Millisecond) // the bubble's
	return out, err
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
		})
	}
}
