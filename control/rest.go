package control

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
// generic function unary that turns a method into a handler. Field names are those of
// the .proto files.

// reply is what a route answers; body is a proto.Message or encodes as JSON.
type reply struct {
	status int // 0 = 200
	etag   string
	body   any
}

type handler func(r *http.Request) (reply, error)

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
}](call func(context.Context, PReq) (PResp, error), binds ...binder[Req]) handler {
	return func(r *http.Request) (reply, error) {
		req := PReq(new(Req))
		if r.Method == http.MethodGet {
			if err := bindQuery(r, req); err != nil {
				return reply{}, err
			}
		} else if err := readProto(r, req); err != nil {
			return reply{}, err
		}
		for _, bind := range binds {
			if err := bind(r, (*Req)(req)); err != nil {
				return reply{}, err
			}
		}
		bindActor(r, req)
		resp, err := invoke(r, func(ctx context.Context) (PResp, error) { return call(ctx, req) })
		if err != nil {
			return reply{}, err
		}
		return reply{body: resp}, nil
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

// invoke calls a method in process as a gRPC server would: with the peer in the context
// and a place for trailers, which carry the current version of a conflict.
func invoke[T any](r *http.Request, call func(context.Context) (T, error)) (T, error) {
	trailers := new(trailerCatcher)
	ctx := grpc.NewContextWithServerTransportStream(r.Context(), trailers)
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		ctx = peer.NewContext(ctx, &peer.Peer{Addr: net.TCPAddrFromAddrPort(ap)})
	}
	out, err := call(ctx)
	return out, status.FromGRPC(err, trailers.md)
}

// trailerCatcher implements grpc.ServerTransportStream for calls without a transport.
type trailerCatcher struct{ md metadata.MD }

func (*trailerCatcher) Method() string               { return "" }
func (*trailerCatcher) SetHeader(metadata.MD) error  { return nil }
func (*trailerCatcher) SendHeader(metadata.MD) error { return nil }
func (t *trailerCatcher) SetTrailer(md metadata.MD) error {
	t.md = metadata.Join(t.md, md)
	return nil
}

// serve writes what a handler answers.
func serve(h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, MaxBodyBytes)
		out, err := h(r)
		if err != nil {
			status.WriteHTTP(w, err)
			return
		}
		if out.etag != "" {
			w.Header().Set("etag", out.etag)
		}
		if out.status == http.StatusNotModified {
			w.WriteHeader(out.status)
			return
		}
		body, err := encode(out.body)
		if err != nil {
			status.WriteHTTP(w, outrigger.Wrap(outrigger.Internal, err, "encode the answer"))
			return
		}
		w.Header().Set("content-type", "application/json")
		w.Header().Set("cache-control", "no-store")
		if out.status != 0 {
			w.WriteHeader(out.status)
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
