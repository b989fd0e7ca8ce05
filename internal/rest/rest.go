// Package rest shows gRPC services as JSON over HTTP, for people and scripts: the admin
// API of the control plane, and variables wherever they are served (control plane and
// sidecar use the same routes). Put routes on a mux with Register:
//
//	rest.Register(mux, append(rest.AdminRoutes(admin), rest.VariableRoutes(vars)...))
//
// Bodies are JSON with the field names of the .proto files, at most MaxBodyBytes, and must
// be declared as application/json. What is not understood is refused with status 400
// rather than passed over, because a misspelt filter would match everything: unknown and
// repeated fields, unknown and repeated query parameters, text that is not UTF-8, and a
// name that the path and the body give differently. Errors are written by
// internal/status; equal answers are equal bytes.
//
// Request headers:
//
//	x-outrigger-actor         who asks, for the audit; a field actor in the body counts first
//	idempotency-key           request id: the same write twice writes once
//	x-outrigger-tenant        tenant; same as the query parameter tenant
//	x-outrigger-consistency,
//	x-outrigger-token         reach the method as incoming metadata, as they do over gRPC
//	if-match, if-none-match   on variables: the ETag is the version counter in quotes
//
// What a method sets with grpc.SetHeader becomes response headers, with errors too.
//
// A caller that goes away cancels the method's context; its write may have happened.
// Nothing here starts a goroutine, keeps state between calls or limits concurrency; that
// is for the server around it. Handlers may be called concurrently.
package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

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

// Headers REST callers may use beside the standard ones and those of package outrigger.
const (
	headerActor       = "X-Outrigger-Actor"
	headerIdempotency = "Idempotency-Key"
)

// Reply is what a route answers.
type Reply struct {
	Status int         // 0 = 200; 304 is sent without a body
	ETag   string      // with its quotes; "" = none
	Body   any         // a proto.Message, or what encodes as JSON
	Header metadata.MD // becomes response headers; sent with an error, too
}

// Handler answers one call; the error decides the status. The request's body is bounded,
// and its path, query and headers are known to be UTF-8.
type Handler func(r *http.Request) (Reply, error)

// binder copies what the URL says into the request message.
type binder[T any] func(r *http.Request, req *T) error

// unary adapts a gRPC method. The request message is the query string of a GET and the
// body of other methods, whose only query parameter is tenant; then binds fill in what
// the path and the headers say. A field that the path names may be repeated but not
// contradicted.
func unary[Req, Resp any, PReq interface {
	*Req
	proto.Message
}, PResp interface {
	*Resp
	proto.Message
}](call func(context.Context, PReq) (PResp, error), binds ...binder[Req]) Handler {
	return func(r *http.Request) (Reply, error) {
		req := PReq(new(Req))
		if err := bindMessage(r, req); err != nil {
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
			return invalid("%s is %q in the request and %q in the path; leave it out of the request", field, *dst, v)
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
		out, err := answer(h, r)
		for k, vs := range out.Header {
			if !strings.HasPrefix(k, "grpc-") && !strings.HasSuffix(k, "-bin") { // gRPC's own, and bytes
				w.Header()[http.CanonicalHeaderKey(k)] = vs
			}
		}
		w.Header().Set("cache-control", "no-store")
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
		if out.Status != 0 {
			w.WriteHeader(out.Status)
		}
		_, _ = w.Write(body) // nobody is left to tell
	})
}

// answer refuses what could not be written down as text: names, the actor and the
// request id end up in protobuf strings.
func answer(h Handler, r *http.Request) (Reply, error) {
	if !utf8.ValidString(r.URL.Path) {
		return Reply{}, invalid("path %q is not valid UTF-8", r.URL.Path)
	}
	for _, name := range []string{headerActor, headerIdempotency, outrigger.HeaderTenant, outrigger.HeaderConsistency, outrigger.HeaderToken} {
		if v := r.Header.Get(name); !utf8.ValidString(v) {
			return Reply{}, invalid("header %s %q is not valid UTF-8", strings.ToLower(name), v)
		}
	}
	if _, err := query(r); err != nil {
		return Reply{}, err
	}
	return h(r)
}

// query returns the query parameters, each of which may be given once. url.URL.Query
// would drop what it cannot read.
func query(r *http.Request) (map[string]string, error) {
	all, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, invalid("query string: %v", err)
	}
	out := make(map[string]string, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		switch values := all[name]; {
		case len(values) != 1:
			return nil, invalid("query parameter %q is given %d times; give it once", name, len(values))
		case !utf8.ValidString(name) || !utf8.ValidString(values[0]):
			return nil, invalid("query parameter %q is not valid UTF-8", name)
		default:
			out[name] = values[0]
		}
	}
	return out, nil
}

// onlyQuery is query for routes that know a few parameters by name.
func onlyQuery(r *http.Request, known ...string) (map[string]string, error) {
	all, err := query(r)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(known, name) {
			return nil, invalid("query parameter %q is unknown; this call takes: %s", name, strings.Join(append(known, "nothing else"), ", "))
		}
	}
	return all, err
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

// readJSON is readProto for bodies that are no message; into points to a struct. Unlike
// encoding/json by itself it is as strict as readProto.
func readJSON(r *http.Request, into any) error {
	b, err := readBody(r)
	if err != nil || len(b) == 0 {
		return err
	}
	if !utf8.Valid(b) {
		return invalid("body is not valid UTF-8")
	}
	if key, ok := repeatedKey(b); ok {
		return invalid("body has the field %q twice", key)
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

// repeatedKey finds a key that the object b repeats, in whatever case, because decoding
// into a struct ignores it. Errors are left to the decoder proper.
func repeatedKey(b []byte) (string, bool) {
	dec := json.NewDecoder(bytes.NewReader(b))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return "", false
	}
	seen := map[string]bool{}
	for dec.More() {
		tok, err := dec.Token()
		key, ok := tok.(string)
		if err != nil || !ok {
			return "", false
		}
		if folded := strings.ToLower(key); seen[folded] {
			return key, true
		} else {
			seen[folded] = true
		}
		var value json.RawMessage
		if dec.Decode(&value) != nil {
			return "", false
		}
	}
	return "", false
}

// bindMessage fills the request message from the query string or from the body.
func bindMessage(r *http.Request, m proto.Message) error {
	if reads(r) {
		q, err := query(r)
		if err != nil {
			return err
		}
		return bindQuery(q, m)
	}
	var known []string
	if m.ProtoReflect().Descriptor().Fields().ByName("tenant") != nil {
		known = []string{"tenant"} // bound by tenant, which compares it with the header
	}
	if _, err := onlyQuery(r, known...); err != nil {
		return err
	}
	return readProto(r, m)
}

// reads reports whether the call has no body. A HEAD is a GET whose answer is not sent.
func reads(r *http.Request) bool { return r.Method == http.MethodGet || r.Method == http.MethodHead }

// bindActor records who asks, if the message has a place for it and does not say so.
func bindActor(r *http.Request, m proto.Message) {
	actor := r.Header.Get(headerActor)
	fd := m.ProtoReflect().Descriptor().Fields().ByName("actor")
	if actor == "" || fd == nil || reads(r) || m.ProtoReflect().Has(fd) {
		return
	}
	m.ProtoReflect().Set(fd, protoreflect.ValueOfString(actor))
}

// bindQuery sets the scalar and time fields that the query names.
func bindQuery(query map[string]string, m proto.Message) error {
	fields := m.ProtoReflect().Descriptor().Fields()
	for _, name := range slices.Sorted(maps.Keys(query)) {
		fd := fields.ByName(protoreflect.Name(name))
		if fd == nil {
			return invalid("query parameter %q is unknown", name)
		}
		v, err := queryValue(fd, query[name])
		if err != nil {
			return invalid("query parameter %s=%q: %v", name, query[name], err)
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
