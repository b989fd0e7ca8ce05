package control

import (
	"context"
	"net/http"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// guard stands in front of the admin API, over gRPC and over HTTP: it admits callers,
// refuses while the control plane is catching up with its log, and translates errors.
type guard struct {
	rules authz.Policy
	hosts []string     // names beside localhost that a Host header may give
	ready func() error // why nothing can be answered yet, or nil
}

// readMethod names the methods that change nothing. Default deny: a method that is not named here needs what a
// mutating one needs.
func readMethod(name string) bool {
	switch name {
	case "GetModel", "ListModels", "ServedAt", "ListExperiments", "ExperimentResults", "GetRollout", "ListRollouts",
		"PlanRollout", "GetDeployment", "ListRegions", "ListAlerts", "Audit", "Status",
		"XdsStatus", "XdsConfig", "XdsDiff", "XdsPushLog", "XdsExplain", "XdsLoad",
		"FetchClientStatus", "StreamClientStatus":
		return true
	}
	return false
}

// registrar registers services whose calls all pass the guard first.
type registrar struct {
	grpc.ServiceRegistrar
	guard *guard
}

// RegisterService implements grpc.ServiceRegistrar.
func (g registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	guarded := *desc
	guarded.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		guarded.Methods[i] = grpc.MethodDesc{MethodName: m.MethodName, Handler: g.guard.method(m)}
	}
	guarded.Streams = make([]grpc.StreamDesc, len(desc.Streams))
	for i, d := range desc.Streams {
		handler := d.Handler
		d.Handler = func(srv any, st grpc.ServerStream) error {
			if err := g.guard.admitRPC(st.Context(), !readMethod(d.StreamName)); err != nil {
				return status.ToGRPC(err)
			}
			return handler(srv, st)
		}
		guarded.Streams[i] = d
	}
	g.ServiceRegistrar.RegisterService(&guarded, impl)
}

func (g *guard) method(m grpc.MethodDesc) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		if err := g.admitRPC(ctx, !readMethod(m.MethodName)); err != nil {
			return nil, status.ToGRPC(err)
		}
		out, err := m.Handler(srv, ctx, dec, interceptor)
		if md := status.Trailer(err); md != nil {
			// Fails only without a transport, and then nobody waits for a trailer.
			_ = grpc.SetTrailer(ctx, md)
		}
		return out, status.ToGRPC(err)
	}
}

func (g *guard) admitRPC(ctx context.Context, mutating bool) error {
	md, _ := metadata.FromIncomingContext(ctx)
	r := authz.Request{Mutating: mutating, Authorization: md.Get("authorization"),
		Forwarded: len(md.Get("forwarded"))+len(md.Get("x-forwarded-for")) > 0}
	if p, ok := peer.FromContext(ctx); ok {
		r.Local = authz.LocalPeer(p.Addr)
	}
	if err := g.rules.Decide(r); err != nil {
		return err
	}
	return g.ready()
}

// http admits requests before next sees them. Beside who is asking it refuses host names
// that are not ours (DNS rebinding) and changes that a page of another origin makes a
// browser send.
func (g *guard) http(next http.Handler) http.Handler {
	origins := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("x-content-type-options", "nosniff")
		if err := authz.CheckHost(r.Host, g.hosts); err != nil {
			status.WriteHTTP(w, err)
			return
		}
		if err := origins.Check(r); err != nil {
			status.WriteHTTP(w, denied("a page of another origin may not change anything here: %v", err))
			return
		}
		err := g.rules.Decide(authz.Request{
			Mutating:      r.Method != http.MethodGet && r.Method != http.MethodHead,
			Local:         authz.LocalHostPort(r.RemoteAddr),
			Forwarded:     len(r.Header.Values("Forwarded"))+len(r.Header.Values("X-Forwarded-For")) > 0,
			Authorization: r.Header.Values("Authorization"),
		})
		if err != nil {
			if outrigger.IsKind(err, outrigger.Unauthorised) && !strings.HasPrefix(r.URL.Path, "/v1/") {
				// A browser can be asked for a password, but only for what it shows.
				w.Header().Set("www-authenticate", `Basic realm="outrigger: any name, the admin token as password"`)
			}
			status.WriteHTTP(w, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// whenReady refuses while the control plane is catching up.
func (g *guard) whenReady(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := g.ready(); err != nil {
			status.WriteHTTP(w, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}
