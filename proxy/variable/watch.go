package variable

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// watch relays the authority's stream of events until either side or the sidecar ends.
func (c core) watch(r *pb.WatchRequest, stream grpc.ServerStream, send func(*pb.WatchEvent) error) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	if c.o.Draining != nil {
		go func() {
			select {
			case <-c.o.Draining:
				cancel(outrigger.Errorf(outrigger.Unavailable, "the sidecar is shutting down; watch again"))
			case <-ctx.Done():
			}
		}()
	}
	if c.o.AutoCreateSessions {
		if err := c.ensureSession(ctx, r.GetTenant(), r.GetSession()); err != nil {
			return c.watchEnded(ctx, err)
		}
	}
	events, err := c.o.Authority.Watch(ctx, r)
	if err != nil {
		return c.watchEnded(ctx, err)
	}
	if err := stream.SetHeader(authorityHeaders(nil)); err != nil {
		return err
	}
	for {
		ev, err := events.Recv()
		if err != nil {
			return c.watchEnded(ctx, err)
		}
		if err := send(ev); err != nil {
			return err
		}
	}
}

// watchEnded is the error the watcher gets: never none, because its stream has no end.
func (c core) watchEnded(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); outrigger.IsKind(cause, outrigger.Unavailable) {
		return status.ToGRPC(cause)
	}
	if errors.Is(err, io.EOF) {
		err = outrigger.Errorf(outrigger.Unavailable, "the authority has ended the watch; watch again")
	}
	return status.ToGRPC(err)
}

// updateTypes are the bridge's words for watch events.
var updateTypes = map[pb.WatchEvent_Type]string{
	pb.WatchEvent_INITIAL:   "initial_value",
	pb.WatchEvent_CHANGED:   "value_change",
	pb.WatchEvent_DELETED:   "value_change",
	pb.WatchEvent_HEARTBEAT: "heartbeat",
}

// WatchVariables sends the present values (if asked), then every change. A deletion
// arrives as a value_change without a value and with update_metadata deleted=true.
func (b *Bridge) WatchVariables(r *snakepit.WatchVariablesRequest, stream grpc.ServerStreamingServer[snakepit.VariableUpdate]) error {
	c, err := callerOf(stream.Context())
	if err != nil {
		return status.ToGRPC(err)
	}
	req := &pb.WatchRequest{Tenant: c.tenant, Session: r.SessionId, Identifiers: r.VariableIdentifiers, IncludeInitial: r.IncludeInitialValues}
	return b.watch(req, stream, func(ev *pb.WatchEvent) error { return stream.Send(updateOf(ev)) })
}

func updateOf(ev *pb.WatchEvent) *snakepit.VariableUpdate {
	out := &snakepit.VariableUpdate{UpdateType: updateTypes[ev.Type], Timestamp: ev.At, UpdateSource: ev.Actor}
	if ev.Type == pb.WatchEvent_HEARTBEAT {
		return out
	}
	out.VariableId = ev.Variable.GetId()
	if ev.Type == pb.WatchEvent_DELETED {
		out.UpdateMetadata = map[string]string{"deleted": "true"}
		return out
	}
	out.Variable = variableToBridge(ev.Variable)
	return out
}
