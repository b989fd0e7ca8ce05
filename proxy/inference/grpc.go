package inference

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/textproto"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	oip "github.com/outrigger-mesh/outrigger/api/inference"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Connections are gRPC connections to the endpoints of policy, by host:port.
type Connections interface {
	// Conn returns the connection to an endpoint, as t says; nil = in the clear.
	Conn(address string, t *policy.TLS) (grpc.ClientConnInterface, error)
}

// GRPC returns the handler (grpc.UnknownServiceHandler) of the Open Inference Protocol
// over gRPC; calls of other services, and those that load and unload models, go to next.
//
// A unary call is a logical request like those over HTTP: same policy, attempts, breakers,
// fallback, limits and outcomes; metadata takes the place of header fields in both
// directions, deadlines are gRPC's own. Of the request message fields 1 and 2, name and
// version, are replaced, and everything else reaches the model byte for byte, as its
// answer, metadata, trailers and status details reach the caller. A model that the policy
// does not name is NOT_FOUND.
//
// ModelStreamInfer goes to one endpoint: another one is tried only while none could be
// connected to. All its requests must name the model of the first; its answers are passed
// on as they come, and what ends the stream ends it for the caller.
//
// ServerLive, ServerReady and ServerMetadata are answered here, from the policy.
func (h *Handler) GRPC(conns Connections, next grpc.StreamHandler) grpc.StreamHandler {
	return func(srv any, in grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(in)
		api, ok := shape.MatchGRPC(method)
		if !ok {
			if answer := h.aboutServer(method); answer != nil {
				var ignored emptypb.Empty
				if err := in.RecvMsg(&ignored); err != nil {
					return err
				}
				return in.SendMsg(answer)
			}
			return next(srv, in)
		}
		return h.serveGRPC(conns, api, method, in)
	}
}

// aboutServer answers for the mesh, nil if the call is another.
func (h *Handler) aboutServer(method string) proto.Message {
	switch method {
	case oip.GRPCInferenceService_ServerLive_FullMethodName:
		return &oip.ServerLiveResponse{Live: true}
	case oip.GRPCInferenceService_ServerReady_FullMethodName:
		ready := false
		if h.o.Policy != nil {
			p, _ := h.o.Policy()
			ready = p != nil
		}
		return &oip.ServerReadyResponse{Ready: ready}
	case oip.GRPCInferenceService_ServerMetadata_FullMethodName:
		return &oip.ServerMetadataResponse{Name: serverName, Version: "2"}
	}
	return nil
}

// raw is a message nobody looks into: a type without fields keeps all of them, as they
// came and in their order, and gives them back so.
func raw(b []byte) *emptypb.Empty {
	m := &emptypb.Empty{}
	m.ProtoReflect().SetUnknown(b)
	return m
}

func receive(s interface{ RecvMsg(any) error }) ([]byte, error) {
	var m emptypb.Empty
	err := s.RecvMsg(&m)
	return m.ProtoReflect().GetUnknown(), err
}

func (h *Handler) serveGRPC(conns Connections, api *shape.API, method string, in grpc.ServerStream) error {
	message, err := receive(in)
	if err == io.EOF {
		return nil // a stream that ended before its first request
	}
	if err != nil {
		return err
	}
	answer := &grpcAnswer{header: http.Header{}}
	r, err := http.NewRequestWithContext(in.Context(), http.MethodPost, "http://sidecar"+method, http.NoBody)
	if err != nil {
		return status.Error(codes.Internal, "bad method name")
	}
	if md, ok := metadata.FromIncomingContext(in.Context()); ok {
		for k, v := range md {
			if !strings.HasPrefix(k, ":") && k != "content-type" && k != "user-agent" && k != "te" {
				r.Header[textproto.CanonicalMIMEHeaderKey(k)] = v
			}
		}
	}
	c := &call{h: h, w: answer, r: r, start: h.now(), api: api, body: message, asked: len(message), again: isClientRetry(r.Header), rpc: &rpc{conns: conns, method: method}}
	if h.o.Policy != nil {
		c.policy, c.status = h.o.Policy()
	}
	if h.inflight.Add(1) > int64(h.o.MaxInFlight) {
		h.inflight.Add(-1)
		return status.Error(codes.Unavailable, "the sidecar has reached its limit of requests in flight; try again")
	}
	defer h.inflight.Add(-1)
	defer c.release()
	if !c.grow(callBytes + len(message)) {
		return status.Error(codes.Unavailable, noRoom.message)
	}
	if c.rpc.names, err = shape.ScanNames(message, !api.Meta); err != nil {
		c.refuse(badRequest(err))
		return answer.end(in)
	}
	if upstream.Hops(r.Header) >= upstream.MaxHops {
		return status.Error(codes.FailedPrecondition, "the request passed too many sidecars; an endpoint of the policy leads back here")
	}
	c.path = shape.Route{API: api, Model: c.rpc.names.Model}
	c.env.SubUser, c.env.Sequence, c.streams = c.rpc.names.SubUser, c.rpc.names.Sequence, api.Streaming == shape.Always
	if !c.route() {
		return answer.end(in)
	}
	if c.streams {
		return c.streamRPC(in)
	}
	if err := abortable(c.forward); err != nil {
		return err
	}
	return answer.end(in)
}

// abortable runs f, which panics with http.ErrAbortHandler where an answer over HTTP
// would be broken off. Nothing of a unary answer is out before it is whole.
func abortable(f func()) (err error) {
	defer func() {
		if p := recover(); p == http.ErrAbortHandler {
			err = status.Error(codes.Unavailable, "the connection to the model was lost in the middle of the answer")
		} else if p != nil {
			panic(p)
		}
	}()
	f()
	return nil
}

// rpc is what a call over gRPC has besides.
type rpc struct {
	conns  Connections
	method string
	names  shape.Names
}

// rpcTo is a call to endpoints of one version.
type rpcTo struct {
	*rpc
	tls *policy.TLS
}

// Keys of what has no place in an http.Response; they never travel as header fields.
const (
	keyStatus  = "Grpc-Status-Details-Bin" // the status, marshalled
	keyTrailer = "Grpc-Trailer-"           // prefix of trailers
)

// RoundTrip implements http.RoundTripper over gRPC: attempts know one transport. A call
// that failed without a word from a server is an error; any status a server sent is an
// answer with the HTTP status that means the same to breakers and retries.
func (p rpcTo) RoundTrip(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	conn, err := p.conns.Conn(req.URL.Host, p.tls)
	if err != nil {
		return nil, err
	}
	ctx := metadata.NewOutgoingContext(req.Context(), outgoingMetadata(req.Header))
	var out emptypb.Empty
	var head, trailer metadata.MD
	err = conn.Invoke(ctx, p.method, raw(body), &out, grpc.Header(&head), grpc.Trailer(&trailer))
	if err != nil && (req.Context().Err() != nil || status.Code(err) == codes.Unavailable && len(head)+len(trailer) == 0) {
		return nil, err
	}
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ProtoMajor: 2, Request: req}
	addMetadata(resp.Header, head, "")
	addMetadata(resp.Header, trailer, keyTrailer)
	answer := out.ProtoReflect().GetUnknown()
	if err != nil {
		s := status.Convert(err)
		b, merr := proto.Marshal(s.Proto())
		if merr != nil {
			return nil, merr
		}
		resp.StatusCode, answer = httpStatus(s.Code()), nil
		resp.Header[keyStatus] = []string{string(b)}
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(answer)), int64(len(answer))
	return resp, nil
}

func outgoingMetadata(h http.Header) metadata.MD {
	md := metadata.MD{}
	for k, v := range h {
		k = strings.ToLower(k)
		if v != nil && !strings.HasPrefix(k, "grpc-") && k != "user-agent" && k != "content-length" {
			md[k] = v
		}
	}
	return md
}

func addMetadata(h http.Header, md metadata.MD, prefix string) {
	for k, v := range md {
		if k != "content-type" {
			h[prefix+textproto.CanonicalMIMEHeaderKey(k)] = v
		}
	}
}

// httpStatus is google.rpc.Code's own mapping, but for codes that say the endpoint is at
// fault, which must not look like the caller's.
func httpStatus(c codes.Code) int {
	switch c {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.NotFound:
		return http.StatusNotFound
	case codes.Aborted, codes.AlreadyExists:
		return http.StatusConflict
	case codes.Canceled:
		return 499
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// grpcCode is the code of a refusal of our own.
func grpcCode(status int) codes.Code {
	switch status {
	case http.StatusNotFound:
		return codes.NotFound
	case http.StatusTooManyRequests:
		return codes.ResourceExhausted
	case http.StatusServiceUnavailable:
		return codes.Unavailable
	case http.StatusGatewayTimeout:
		return codes.DeadlineExceeded
	}
	if status < 500 {
		return codes.InvalidArgument
	}
	return codes.Internal
}

// grpcAnswer collects an answer.
type grpcAnswer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (a *grpcAnswer) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *grpcAnswer) WriteHeader(code int) { a.code = code }

// Write implements http.ResponseWriter.
func (a *grpcAnswer) Write(b []byte) (int, error) { return a.body.Write(b) }

// metadata returns what the caller is told, before and after the answer.
func (a *grpcAnswer) metadata() (head, trailer metadata.MD) {
	head, trailer = metadata.MD{}, metadata.MD{}
	for k, v := range a.header {
		switch {
		case k == keyStatus, k == "Content-Length", k == "Content-Type", k == "Connection":
		case strings.HasPrefix(k, keyTrailer):
			trailer[strings.ToLower(strings.TrimPrefix(k, keyTrailer))] = v
		default:
			head[strings.ToLower(k)] = v
		}
	}
	return head, trailer
}

// left is the status of a call whose caller has left, or whose time is over: the caller may
// be told of that before its own clock says so.
func left(ctx context.Context) error {
	err := ctx.Err()
	if err == nil {
		err = context.Canceled
	}
	return status.FromContextError(err).Err()
}

// end sends the answer.
func (a *grpcAnswer) end(in grpc.ServerStream) error {
	head, trailer := a.metadata()
	in.SetTrailer(trailer)
	if err := in.SetHeader(head); err != nil {
		return status.Error(codes.Internal, "bad metadata in the answer")
	}
	if a.code == http.StatusOK {
		return in.SendMsg(raw(a.body.Bytes()))
	}
	if b := first(a.header, keyStatus); b != "" {
		s := status.New(codes.Unknown, "").Proto()
		if err := proto.Unmarshal([]byte(b), s); err == nil {
			return status.FromProto(s).Err()
		}
	}
	if a.code == 0 {
		return left(in.Context())
	}
	message := a.body.String()
	if text, ok := shape.Value(a.body.Bytes(), "error"); ok {
		message = unquote(text)
	}
	return status.Error(grpcCode(a.code), message)
}
