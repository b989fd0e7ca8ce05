// Package rest shows gRPC services as JSON over HTTP, for people and scripts: the admin
// API of the control plane, and variables wherever they are served (control plane and
// sidecar use the same routes).
//
// Field names are those of the .proto files. Bodies are at most MaxBodyBytes and must be
// declared as application/json; unknown fields and query parameters are refused. Errors
// are written by internal/status. Handlers may be called concurrently.
package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// MaxBodyBytes bounds the body of one REST call.
const MaxBodyBytes = 8 << 20

// Headers REST callers may use beside the standard ones.
const (
	headerActor       = "X-Outrigger-Actor"
	headerIdempotency = "Idempotency-Key"
)

// The REST interface is the gRPC services seen as JSON: one table of routes, and the
// generic function unary that turns a method into a Handler. Field names are those of
// the .proto files.

// Reply is what a route answers; Body is a proto.Message or encodes as JSON.
type Reply struct {
	Status int // 0 = 200
	ETag   string
	Body   any
	Header metadata.MD // set by the method with grpc.SetHeader; becomes response headers
}

// Handler answers one call; the error decides the status.
type Handler func(r *http.Request) (Reply, error)

// binder copies what the URL says into the request message.
type binder[T any] func(r *http.Request, req *T) error

// unary adapts a gRPC method. The body, if the HTTP method has one, is the request
// message; then the query string, then binds fill in what the URL says. A field that the
// path names may be repeated in the body but not contradicted.
func unary[Req, Resp any, PReq interface {
	*Req
	proto.Message
}, PResp interface {
	*Resp
	proto.Message
}](call func(context.Context, PReq) (PResp, error), binds ...binder[Req]) Handler {
	return func(r *http.Request) (Reply, error) {
		req := PReq(new(Req))
		if r.Method == http.MethodGet {
			if err := bindQuery(r, req); err != nil {
				return Reply{}, err
			}
		} else if err := readProto(r, req); err != nil {
			return Reply{}, err
		}
		for _, bind := range binds {
			if err := bind(r, (*Req)(req)); err != nil {
				return Reply{}, err
			}
		}
		bindActor(r, req)
		resp, head, err := invoke(r, func(ctx context.Context) (PResp, error) { return call(ctx, req) })
		if err != nil {
			return Reply{Header: head}, err
		}
		return Reply{Body: resp, Header: head}, nil
	}
}

// path binds a path parameter to a field of the request.
func path[T any](param, field string, at func(*T) *string) binder[T] {
	return func(r *http.Request, req *T) error {
		v, dst := r.PathValue(param), at(req)
		if *dst != "" && *dst != v {
			return invalid("%s is %q in the body and %q in the path; leave it out of the body", field, *dst, v)
		}
		*dst = v
		return nil
	}
}

// invoke calls a method in process as a gRPC server would: with the peer and the mesh's
// request headers in the context, and a place for headers and for trailers, which carry
// the current version of a conflict.
func invoke[T any](r *http.Request, call func(context.Context) (T, error)) (T, metadata.MD, error) {
	caught := new(catcher)
	ctx := grpc.NewContextWithServerTransportStream(r.Context(), caught)
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		ctx = peer.NewContext(ctx, &peer.Peer{Addr: net.TCPAddrFromAddrPort(ap)})
	}
	md := metadata.MD{}
	for _, h := range []string{outrigger.HeaderConsistency, outrigger.HeaderToken, outrigger.HeaderTenant} {
		if v := r.Header.Get(h); v != "" {
			md.Set(h, v)
		}
	}
	out, err := call(metadata.NewIncomingContext(ctx, md))
	return out, caught.header, status.FromGRPC(err, caught.trailer)
}

// catcher implements grpc.ServerTransportStream for calls without a transport.
type catcher struct{ header, trailer metadata.MD }

// Method is empty: there is no gRPC path.
func (*catcher) Method() string { return "" }

// SetHeader collects response headers.
func (c *catcher) SetHeader(md metadata.MD) error {
	c.header = metadata.Join(c.header, md)
	return nil
}

// SendHeader is SetHeader: everything goes out with the answer.
func (c *catcher) SendHeader(md metadata.MD) error { return c.SetHeader(md) }

// SetTrailer collects trailers.
func (c *catcher) SetTrailer(md metadata.MD) error {
	c.trailer = metadata.Join(c.trailer, md)
	return nil
}

// serve writes what a Handler answers.
func serve(h Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, MaxBodyBytes)
		out, err := h(r)
		for k, vs := range out.Header {
			w.Header()[http.CanonicalHeaderKey(k)] = vs
		}
		if err != nil {
			status.WriteHTTP(w, err)
			return
		}
		if out.ETag != "" {
			w.Header().Set("etag", out.ETag)
		}
		if out.Status == http.StatusNotModified {
			w.WriteHeader(out.Status)
			return
		}
		body, err := encode(out.Body)
		if err != nil {
			status.WriteHTTP(w, outrigger.Wrap(outrigger.Internal, err, "encode the answer"))
			return
		}
		w.Header().Set("content-type", "application/json")
		w.Header().Set("cache-control", "no-store")
		if out.Status != 0 {
			w.WriteHeader(out.Status)
		}
		_, _ = w.Write(body) // nobody is left to tell
	})
}

// encode writes one line of JSON. protojson varies its spacing on purpose; Compact makes
// equal answers equal bytes.
func encode(body any) ([]byte, error) {
	m, ok := body.(proto.Message)
	if !ok {
		b, err := json.Marshal(body)
		return append(b, '\n'), err
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// readBody returns the body; a body that is not declared as JSON is refused, because a
// web page may send any other type to this server without asking first.
func readBody(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, outrigger.Errorf(outrigger.Exhausted, "body is larger than the limit of %d bytes", tooLarge.Limit)
	case err != nil:
		return nil, invalid("body cannot be read: %v", err)
	case len(b) == 0:
		return nil, nil
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("content-type")); err != nil || t != "application/json" {
		return nil, invalid("content-type is %q; send application/json", r.Header.Get("content-type"))
	}
	return b, nil
}

func readProto(r *http.Request, m proto.Message) error {
	b, err := readBody(r)
	if err != nil || len(b) == 0 {
		return err
	}
	if err := protojson.Unmarshal(b, m); err != nil {
		return invalid("body: %v", err)
	}
	return nil
}

// readJSON is readProto for bodies that are no message.
func readJSON(r *http.Request, into any) error {
	b, err := readBody(r)
	if err != nil || len(b) == 0 {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return invalid("body: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return invalid("body holds more than one JSON document")
	}
	return nil
}

// bindActor records who asks, if the message has a place for it and does not say so.
func bindActor(r *http.Request, m proto.Message) {
	actor := r.Header.Get(headerActor)
	fd := m.ProtoReflect().Descriptor().Fields().ByName("actor")
	if actor == "" || fd == nil || r.Method == http.MethodGet || m.ProtoReflect().Has(fd) {
		return
	}
	m.ProtoReflect().Set(fd, protoreflect.ValueOfString(actor))
}

// bindQuery sets the scalar and time fields the query string names. Unknown names are
// refused: a misspelt filter would silently match everything.
func bindQuery(r *http.Request, m proto.Message) error {
	fields := m.ProtoReflect().Descriptor().Fields()
	for name, values := range r.URL.Query() {
		fd := fields.ByName(protoreflect.Name(name))
		if fd == nil || len(values) != 1 {
			return invalid("query parameter %q is unknown or given %d times", name, len(values))
		}
		v, err := queryValue(fd, values[0])
		if err != nil {
			return invalid("query parameter %s=%q: %v", name, values[0], err)
		}
		m.ProtoReflect().Set(fd, v)
	}
	return nil
}

func queryValue(fd protoreflect.FieldDescriptor, s string) (protoreflect.Value, error) {
	switch {
	case fd.IsList() || fd.IsMap():
	case fd.Kind() == protoreflect.StringKind:
		return protoreflect.ValueOfString(s), nil
	case fd.Kind() == protoreflect.BoolKind:
		b, err := strconv.ParseBool(s)
		return protoreflect.ValueOfBool(b), err
	case fd.Kind() == protoreflect.Int32Kind:
		n, err := strconv.ParseInt(s, 10, 32)
		return protoreflect.ValueOfInt32(int32(n)), err
	case fd.Kind() == protoreflect.Uint64Kind:
		n, err := strconv.ParseUint(s, 10, 64)
		return protoreflect.ValueOfUint64(n), err
	case fd.Message() != nil && fd.Message().FullName() == "google.protobuf.Timestamp":
		t, err := time.Parse(time.RFC3339Nano, s)
		return protoreflect.ValueOfMessage(timestamppb.New(t).ProtoReflect()), err
	}
	return protoreflect.Value{}, errors.New("this field cannot be given in a query")
}

func invalid(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Invalid, format, args...)
}
