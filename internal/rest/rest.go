// Package rest shows gRPC services as JSON over HTTP, for people and scripts: the admin
// API of the control plane, and variables wherever they are served (control plane and
// sidecar use the same routes). Put routes on a mux with Register:
//
//	rest.Register(mux, append(rest.AdminRoutes(admin), rest.VariableRoutes(vars)...), nil)
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
//	x-outrigger-token,
//	x-outrigger-explain       reach the method as incoming metadata, as they do over gRPC
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
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// MaxBodyBytes bounds the body of one REST call.
const MaxBodyBytes = 8 << 20

// Request headers, in canonical form: net/http would otherwise make it anew for every
// look-up of every call. The lower-case ones of package outrigger are metadata keys.
const (
	headerActor       = "X-Outrigger-Actor"
	headerIdempotency = "Idempotency-Key"
	headerConsistency = "X-Outrigger-Consistency"
	headerToken       = "X-Outrigger-Token"
	headerTenant      = "X-Outrigger-Tenant"
	headerExplain     = "X-Outrigger-Explain"
	headerOptimizing  = "X-Outrigger-Optimization"
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
		if err := checked(r, req); err != nil {
			return Reply{}, err
		}
		resp, head, err := invoke(r, func(ctx context.Context) (PResp, error) { return call(ctx, req) })
		if err != nil {
			return Reply{Header: head}, err
		}
		return Reply{Body: resp, Header: head}, nil
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
	for _, h := range [...]struct{ name, key string }{{headerConsistency, outrigger.HeaderConsistency},
		{headerToken, outrigger.HeaderToken}, {headerTenant, outrigger.HeaderTenant},
		{headerExplain, outrigger.HeaderExplain}} {
		if v := r.Header.Get(h.name); v != "" {
			md[h.key] = []string{v}
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
	c.header = join(c.header, md)
	return nil
}

// SendHeader is SetHeader: everything goes out with the answer.
func (c *catcher) SendHeader(md metadata.MD) error { return c.SetHeader(md) }

// SetTrailer collects trailers.
func (c *catcher) SetTrailer(md metadata.MD) error {
	c.trailer = join(c.trailer, md)
	return nil
}

// join is metadata.Join without its copy in the usual case: methods set headers once.
func join(have, more metadata.MD) metadata.MD {
	if len(have) == 0 {
		return more
	}
	return metadata.Join(have, more)
}

// serve writes what a Handler answers.
func serve(h Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, MaxBodyBytes)
		out, err := answer(h, r)
		for k, vs := range out.Header {
			if !strings.HasPrefix(k, "grpc-") && !strings.HasSuffix(k, "-bin") { // gRPC's own, and bytes
				w.Header()[http.CanonicalHeaderKey(k)] = slices.Clip(vs) // the method may keep its map
			}
		}
		w.Header().Set("Cache-Control", "no-store")
		if err != nil {
			status.WriteHTTP(w, err)
			return
		}
		if out.ETag != "" {
			w.Header().Set("Etag", out.ETag)
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
		w.Header().Set("Content-Type", "application/json")
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
	for _, name := range [...]string{headerActor, headerIdempotency, headerTenant, headerConsistency, headerToken, headerExplain} {
		if v := r.Header.Get(name); !utf8.ValidString(v) {
			return Reply{}, invalid("header %s %q is not valid UTF-8", strings.ToLower(name), v)
		}
	}
	if _, err := query(r); err != nil {
		return Reply{}, err
	}
	return h(r)
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
