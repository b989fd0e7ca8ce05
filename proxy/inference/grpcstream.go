package inference

import (
	"context"
	"encoding/json"
	"io"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func unquote(text []byte) string {
	var s string
	if json.Unmarshal(text, &s) != nil {
		return string(text)
	}
	return s
}

// outMessage is the request message for the assigned version.
func (c *call) outMessage(n *shape.Names) []byte {
	p := n.Rewrite(c.assign.Version.Upstream)
	out := make([]byte, 0, p.Size())
	for _, b := range p {
		out = append(out, b...)
	}
	return out
}

// streamRPC serves one ModelStreamInfer call. The time limit of policy does not apply: a
// stream lasts as long as its ends want it.
func (c *call) streamRPC(in grpc.ServerStream) error {
	v := c.assign.Version
	vp := c.model.versions[v]
	if !vp.gate.enter(orDefault(v.MaxRequests, policy.DefaultMaxRequests)) {
		return status.Errorf(codes.Unavailable, "version %s has reached its limit of requests in flight; try again", v.Name)
	}
	defer vp.gate.leave()
	c.region = c.h.o.Region
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	c.model.budget.deposit()
	limit := int(max(c.assign.Model.MaxAttempts, 1))
	err := status.Errorf(codes.Unavailable, "no endpoint of version %s can be reached", v.Name)
	for _, t := range c.h.order(c.policy, vp, c.env.Sequence) {
		if c.attempts >= limit {
			break
		}
		report, berr := t.breaker.Allow()
		if berr != nil {
			continue
		}
		if c.attempts > 0 && !c.model.budget.withdraw() {
			report(errExcluded)
			break
		}
		c.attempts++
		c.region = t.endpoint.Region
		out, oerr := c.openStream(ctx, t)
		if oerr != nil && in.Context().Err() != nil { // not the endpoint's fault
			report(errExcluded)
			c.account(ending{cancelled: true, tag: "cancelled"})
			return left(in.Context())
		}
		if oerr != nil {
			t.judge(false)
			c.penalise(t)
			report(errEndpoint)
			continue
		}
		t.inflight.Add(1)
		err = c.pump(ctx, cancel, in, out)
		t.inflight.Add(-1)
		return c.endStream(in, t, report, err)
	}
	c.account(ending{failed: true, tag: "no_endpoint"})
	return err
}

// openStream connects to an endpoint and sends the first request.
func (c *call) openStream(ctx context.Context, t *target) (grpc.ClientStream, error) {
	conn, err := c.rpc.conns.Conn(t.endpoint.Address, c.assign.Version.TLS)
	if err != nil {
		return nil, err
	}
	h := c.r.Header.Clone()
	stripOurs(h)
	h[upstream.HeaderHops] = []string{strconv.Itoa(upstream.Hops(h) + 1)}
	ctx = metadata.NewOutgoingContext(ctx, outgoingMetadata(h))
	out, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, c.rpc.method)
	if err != nil {
		return nil, err
	}
	return out, out.SendMsg(raw(c.outMessage(&c.rpc.names)))
}

// pump copies both directions until the model ends the call; nil means status OK.
func (c *call) pump(ctx context.Context, cancel context.CancelFunc, in grpc.ServerStream, out grpc.ClientStream) error {
	c.setHeaders()
	head, _ := (&grpcAnswer{header: c.w.Header()}).metadata()
	if err := in.SetHeader(head); err != nil {
		return err
	}
	up := make(chan error, 1)
	// Receiving from the caller returns when the handler does, so nobody waits for this
	// goroutine: it ends with the call.
	go func() {
		err := c.copyRequests(in, out)
		up <- err
		if err != nil {
			cancel()
		}
	}()
	for first := true; ; first = false {
		m, err := receive(out)
		if first {
			if md, herr := out.Header(); herr == nil {
				delete(md, "content-type")
				if herr = in.SetHeader(md); herr != nil {
					return herr
				}
			}
		}
		if err != nil {
			in.SetTrailer(out.Trailer())
			select {
			case cause := <-up:
				if cause != nil && ctx.Err() != nil {
					return cause // not the echo of our own cancellation
				}
			default:
			}
			if err == io.EOF {
				return nil
			}
			return err
		}
		if c.ttft == 0 {
			c.ttft = max(c.h.now().Sub(c.start), 1)
		}
		c.sent += int64(len(m))
		if err := in.SendMsg(raw(m)); err != nil {
			return err
		}
	}
}

// copyRequests moves the caller's further requests to the model.
func (c *call) copyRequests(in grpc.ServerStream, out grpc.ClientStream) error {
	for {
		m, err := receive(in)
		if err == io.EOF {
			return out.CloseSend()
		}
		if err != nil {
			return err
		}
		names, err := shape.ScanNames(m, false)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		if names.Model != c.rpc.names.Model {
			return status.Errorf(codes.InvalidArgument, "a stream is for one model: this one began with %q", c.rpc.names.Model)
		}
		if err := out.SendMsg(raw(c.outMessage(&names))); err != nil {
			return nil // the model has ended the call; its status comes the other way
		}
	}
}

// endStream accounts for a stream and returns its status.
func (c *call) endStream(in grpc.ServerStream, t *target, report func(error), err error) error {
	end := ending{}
	switch {
	case in.Context().Err() != nil:
		end.cancelled, end.tag = true, "cancelled"
		report(errExcluded)
	case err != nil && httpStatus(status.Code(err)) >= 500:
		end.failed, end.tag = true, status.Code(err).String()
		t.judge(false)
		c.penalise(t)
		report(errEndpoint)
	default:
		t.judge(true)
		report(nil)
	}
	c.account(end)
	return err
}
