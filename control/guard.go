package control

import (
	"context"
	"net/http"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/mlflow"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// guard stands in front of the admin API, over gRPC and over HTTP: it finds out who is
// calling, admits those whose role suffices, makes every request act in its credential's
// name, refuses while the control plane is catching up with its log, translates errors,
// and has refused changes recorded.
type guard struct {
	rules    func() authz.Policy
	hosts    []string                                     // names beside localhost that a Host header may give
	ready    func() error                                 // why nothing can be answered yet, or nil
	current  func(ctx context.Context, verb string) error // nil = everything is
	refusals *refusals
	sessions *sessions
}

// needs is the role a method asks for. Default deny: a method that is not named here needs
// an administrator.
func needs(name string) authz.Role {
	switch name {
	case "GetModel", "ListModels", "ServedAt", "ListExperiments", "ExperimentResults", "GetRollout", "ListRollouts",
		"PlanRollout", "GetDeployment", "ModelMetrics", "GetArtifact", "ListArtifacts", "ListRegions", "ListAlerts", "Audit", "Status",
		"XdsStatus", "XdsConfig", "XdsDiff", "XdsPushLog", "XdsExplain", "XdsLoad", "XdsCanary",
		"FetchClientStatus", "StreamClientStatus",
		"ListOptimizers", "SelectOptimizer", "ListSessions", "GetSession", "ListVariables", "GetVariable", "GetHistory", "ListDependencies":
		return authz.Viewer
	case "RegisterModelVersion", "SetModelVersionState", "CreateModel", "AnnotateModel", "PutArtifact", "CreateExperiment", "SetExperimentState", "PlanExperiment",
		"StartRollout", "AdvanceRollout", "AbortRollout", "HoldRollout", "ResumeRollout", "ApproveRollout", "RetryRollout", "RollbackRollout",
		"BreakGlass", "SilenceAlert", "RecordOutcomes", "XdsCanaryStart", "XdsCanaryEnd",
		"CreateSession", "DeleteSession", "SetVariable", "DeleteVariable", "RollbackVariable",
		"StartOptimization", "StopOptimization", "AddDependency", "RecordOptimization":
		return authz.Operator
	}
	return authz.Admin
}

func readMethod(name string) bool { return needs(name) == authz.Viewer }

// begin implements rest.Gate, and is what gRPC calls go through, too: the role first, the
// request once it is known.
func (g *guard) begin(ctx context.Context, verb string) (check func(proto.Message) error, done func(error), err error) {
	caller, known := authz.CallerFrom(ctx)
	if !known {
		return nil, nil, outrigger.Errorf(outrigger.Internal, "%s was not admitted by anybody", verb)
	}
	try := &attempt{verb: verb, caller: caller}
	if !readMethod(verb) {
		done = func(err error) { g.refusals.note(ctx, try, err) }
	}
	check = func(m proto.Message) error { return try.see(m) }
	if err := caller.Need(needs(verb), verb); err != nil {
		return check, done, err
	}
	if g.current != nil {
		err = g.current(ctx, verb)
	}
	return check, done, err
}

// attempt is one call of a method, for the audit of what is refused.
type attempt struct {
	verb, target, claimed string
	caller                authz.Caller
}

// see makes a request act in the name of its credential. What passes over gates needs an
// administrator, whatever the method: else two people's approvals are one operator's flag.
func (t *attempt) see(m proto.Message) error {
	r := m.ProtoReflect()
	fields := r.Descriptor().Fields()
	for _, name := range []protoreflect.Name{"id", "name", "model"} {
		if fd := fields.ByName(name); fd != nil && fd.Kind() == protoreflect.StringKind && t.target == "" {
			t.target = r.Get(fd).String()
		}
	}
	if fd := fields.ByName("actor"); fd != nil && !readMethod(t.verb) {
		t.claimed = r.Get(fd).String()
		name, err := t.caller.As(t.claimed)
		if err != nil {
			return err
		}
		r.Set(fd, protoreflect.ValueOfString(name))
	}
	if fd := fields.ByName("force"); fd != nil && r.Get(fd).Bool() {
		return t.caller.Need(authz.Admin, t.verb+" with force")
	}
	return nil
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
			caller, err := g.guard.admitRPC(st.Context(), d.StreamName)
			if err == nil {
				err = caller.Need(needs(d.StreamName), d.StreamName)
			}
			if err != nil {
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
		caller, err := g.admitRPC(ctx, m.MethodName)
		if err != nil {
			return nil, status.ToGRPC(err)
		}
		ctx = authz.WithCaller(ctx, caller)
		check, done, err := g.begin(ctx, m.MethodName)
		var refused error
		var out any
		if err == nil {
			out, err = m.Handler(srv, ctx, func(v any) error {
				if err := dec(v); err != nil {
					return err
				}
				m, ok := v.(proto.Message)
				if !ok {
					return nil
				}
				refused = check(m)
				return refused
			}, interceptor)
		}
		if refused != nil {
			err = refused // as it was, not as the transport wraps it
		}
		if done != nil {
			done(err)
		}
		if md := status.Trailer(err); md != nil {
			// Fails only without a transport, and then nobody waits for a trailer.
			_ = grpc.SetTrailer(ctx, md)
		}
		return out, status.ToGRPC(err)
	}
}

// admitRPC says who calls a method, or why it is not served.
func (g *guard) admitRPC(ctx context.Context, method string) (authz.Caller, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	r := authz.Request{Mutating: !readMethod(method), Authorization: md.Get("authorization"),
		Forwarded: len(md.Get("forwarded"))+len(md.Get("x-forwarded-for")) > 0}
	if p, ok := peer.FromContext(ctx); ok {
		r.Local = authz.LocalPeer(p.Addr)
	}
	caller, err := g.rules().Identify(r)
	if err == nil {
		return caller, g.ready()
	}
	if r.Mutating {
		g.refusals.note(ctx, &attempt{verb: method}, err)
	}
	return caller, err
}

// origin refuses host names that are not ours (DNS rebinding) and changes that a page of
// another origin makes a browser send.
func (g *guard) origin(next http.Handler) http.Handler {
	origins := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("x-content-type-options", "nosniff")
		if err := authz.CheckHost(r.Host, g.hosts); err != nil {
			refuse(w, r, err)
			return
		}
		if err := origins.Check(r); err != nil {
			refuse(w, r, denied("a page of another origin may not change anything here: %v", err))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// http admits requests before next sees them: beside origin, by who is asking. A browser that
// has signed in says so with its session.
func (g *guard) http(next http.Handler) http.Handler {
	return g.origin(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.Header.Values("Authorization")) == 0 {
			if c, ok := g.sessions.caller(r, g.rules()); ok {
				next.ServeHTTP(w, r.WithContext(authz.WithCaller(r.Context(), c)))
				return
			}
		}
		mutating := r.Method != http.MethodGet && r.Method != http.MethodHead
		caller, err := g.rules().Identify(authz.Request{
			Mutating:      mutating,
			Local:         authz.LocalHostPort(r.RemoteAddr),
			Forwarded:     len(r.Header.Values("Forwarded"))+len(r.Header.Values("X-Forwarded-For")) > 0,
			Authorization: r.Header.Values("Authorization"),
		})
		if err != nil {
			if outrigger.IsKind(err, outrigger.Unauthorised) && !strings.HasPrefix(r.URL.Path, "/v1/") && !strings.HasPrefix(r.URL.Path, mlflow.Prefix) {
				// A browser can be asked for a password, but only for what it shows.
				w.Header().Set("www-authenticate", `Basic realm="outrigger: any name, the token as password"`)
			}
			if mutating {
				g.refusals.note(r.Context(), &attempt{verb: r.Method, target: r.URL.Path}, err)
			}
			refuse(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(authz.WithCaller(r.Context(), caller)))
	}))
}

// refuse writes an error in the form of the interface that was asked.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	if strings.HasPrefix(r.URL.Path, mlflow.Prefix) {
		status.WriteMLflow(w, err)
		return
	}
	status.WriteHTTP(w, err)
}

func unauthorised(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Unauthorised, format, args...)
}

// whenReady refuses while the control plane is catching up.
func (g *guard) whenReady(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := g.ready(); err != nil {
			refuse(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}
