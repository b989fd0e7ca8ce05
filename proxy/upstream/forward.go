package upstream

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// HeaderHops counts the forwarders a request has passed; it breaks loops that no
// address check can see (two sidecars that name each other).
const HeaderHops = "X-Outrigger-Hops"

// MaxHops is how many forwarders in a row are plausible; client and server sidecar of
// two meshed services with a gateway between them are three.
const MaxHops = 8

type destinationKey struct{}

// WithDestination records the original destination of the connection a request came
// from, for Forwarder.
func WithDestination(ctx context.Context, d netip.AddrPort) context.Context {
	return context.WithValue(ctx, destinationKey{}, d)
}

// Destination returns what WithDestination recorded.
func Destination(ctx context.Context) (netip.AddrPort, bool) {
	d, ok := ctx.Value(destinationKey{}).(netip.AddrPort)
	return d, ok
}

// ForwarderOptions configure NewForwarder.
type ForwarderOptions struct {
	// Transport sends requests; required. NewTransport with a Guard is the usual one.
	Transport http.RoundTripper
	// Base sends every request to one place: scheme, host and an optional path prefix.
	// Nil: the request's context must carry a destination.
	Base *url.URL
	// Guard is asked before a context destination is used; the transport's own guard
	// still applies. Nil allows all.
	Guard *Guard
	// Logger gets failures of single requests at debug level; nil discards.
	Logger *slog.Logger
}

// Forwarder is an http.Handler that passes requests through unchanged, apart from
// hop-by-hop fields. The Host field, path, query, forwarding headers and body stay as
// the client sent them (with Base, Host becomes the base's). Safe for concurrent use.
type Forwarder struct {
	o     ForwarderOptions
	proxy *httputil.ReverseProxy
}

// NewForwarder returns a Forwarder. It panics if Transport is nil, which is a wiring bug.
func NewForwarder(o ForwarderOptions) *Forwarder {
	if o.Transport == nil {
		panic("upstream: ForwarderOptions.Transport is nil")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Forwarder{o: o}
	f.proxy = &httputil.ReverseProxy{
		Rewrite:       f.rewrite,
		Transport:     o.Transport,
		FlushInterval: -1, // every read: a stream must not wait for a buffer to fill
		BufferPool:    &bufferPool{},
		ErrorLog:      slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
		ErrorHandler:  f.fail,
	}
	return f
}

// ServeHTTP forwards one request.
func (f *Forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := CheckConnection(r.Header); err != nil {
		status.WriteHTTP(w, err)
		return
	}
	if Hops(r.Header) >= MaxHops {
		w.Header().Set("content-type", "application/json")
		w.WriteHeader(http.StatusLoopDetected)
		_, _ = io.WriteString(w, `{"error":{"kind":"denied","message":"request passed `+strconv.Itoa(MaxHops)+
			` forwarders; the route is a loop"}}`+"\n")
		return
	}
	if f.o.Base == nil {
		d, ok := Destination(r.Context())
		if !ok {
			status.WriteHTTP(w, outrigger.Errorf(outrigger.Unavailable, "request has no original destination; it did not come through an intercepting listener"))
			return
		}
		if err := f.o.Guard.Check(d); err != nil {
			status.WriteHTTP(w, err)
			return
		}
	}
	if len(r.Header["Upgrade"]) > 0 && !isWebSocket(r) {
		// The proxy below would pass any upgrade on; a backend that then speaks h2c
		// could be sent requests nobody has looked at. Shallow copies: only two keys go.
		r = r.WithContext(r.Context())
		r.Header = r.Header.Clone()
		r.Header.Del("Upgrade")
		r.Header.Del("Http2-Settings")
	}
	f.proxy.ServeHTTP(w, r)
}

// rewrite runs after the proxy has removed hop-by-hop fields.
func (f *Forwarder) rewrite(p *httputil.ProxyRequest) {
	if f.o.Base != nil {
		p.SetURL(f.o.Base) // joins paths; sets Host to the base's
		p.Out.URL.RawQuery = joinQuery(f.o.Base.RawQuery, p.In.URL.RawQuery)
	} else {
		d, _ := Destination(p.In.Context())
		p.Out.URL.Scheme, p.Out.URL.Host = "http", d.String()
		p.Out.Host = p.In.Host
		p.Out.URL.RawQuery = p.In.URL.RawQuery // unparsable queries too
	}
	if p.In.Method == http.MethodOptions && p.In.URL.Path == "*" {
		p.Out.URL.Path, p.Out.URL.RawPath, p.Out.URL.Opaque = "", "", "*" // about the server: no base has a part in it
	}
	// Being transparent: whatever earlier proxies said about the client stays.
	for _, name := range [...]string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := p.In.Header[name]; ok {
			p.Out.Header[name] = v
		}
	}
	// The outgoing request was cloned before the body, and so the trailer, was read:
	// share the map the server fills, or trailers arrive empty.
	p.Out.Trailer = p.In.Trailer
	p.Out.Header.Del("Http2-Settings")
	p.Out.Header.Set(HeaderHops, strconv.Itoa(Hops(p.In.Header)+1))
}

func joinQuery(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "&" + b
}

// Hops reads the counter of HeaderHops; nonsense counts as the limit, so it cannot hide
// a loop.
func Hops(h http.Header) int {
	v := h[HeaderHops]
	if len(v) == 0 {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(v[0]))
	if err != nil || n < 0 || len(v) > 1 {
		return MaxHops
	}
	return n
}

// fail answers when no response head was obtained.
func (f *Forwarder) fail(w http.ResponseWriter, r *http.Request, err error) {
	f.o.Logger.Debug("forward", "method", r.Method, "host", r.URL.Host, "error", err)
	var tooLarge *http.MaxBytesError
	switch {
	case r.Context().Err() != nil:
		status.WriteHTTP(w, outrigger.Wrap(outrigger.KindOf(err), r.Context().Err(), "forward"))
	case outrigger.IsKind(err, outrigger.Denied):
		status.WriteHTTP(w, err)
	case errors.As(err, &tooLarge):
		status.WriteHTTP(w, outrigger.Errorf(outrigger.Invalid, "request body exceeds %d bytes", tooLarge.Limit))
	default:
		w.Header().Set("content-type", "application/json")
		w.WriteHeader(http.StatusBadGateway)
		_, _ = io.WriteString(w, `{"error":{"kind":"unavailable","message":"destination `+r.URL.Host+` cannot be reached"}}`+"\n")
	}
}

// bufferPool keeps 32 KiB copy buffers.
type bufferPool struct{ p sync.Pool }

// Get implements httputil.BufferPool.
func (b *bufferPool) Get() []byte {
	if v, ok := b.p.Get().(*[]byte); ok {
		return *v
	}
	return make([]byte, 32<<10)
}

// Put implements httputil.BufferPool.
func (b *bufferPool) Put(buf []byte) { b.p.Put(&buf) }
