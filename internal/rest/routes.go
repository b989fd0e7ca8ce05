package rest

import (
	"context"
	"net/http"

	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Route is one line of the REST interface. Pattern is as in http.ServeMux.
type Route struct {
	Pattern string
	Verb    string // the method it is, for whoever decides who may call it
	Handler Handler
	Created bool // success is 201
}

// A Gate is asked before a call is carried out: once with a nil message, before anything
// of the body is read, and again with the request as it will be carried out, which it may
// change. done, if not nil, is told how the call ended. Errors are the answer.
type Gate func(ctx context.Context, verb string) (check func(proto.Message) error, done func(error), err error)

// AdminRoutes are the operators' verbs. Whoever registers them decides who may call them.
func AdminRoutes(admin pb.AdminServer) []Route {
	name := path("name", "name", func(r *pb.NameRequest) *string { return &r.Name })
	action := path("id", "id", func(r *pb.RolloutActionRequest) *string { return &r.Id })
	return []Route{
		{Pattern: "GET /v1/models", Verb: "ListModels", Handler: unary(admin.ListModels)},
		{Pattern: "POST /v1/models", Verb: "RegisterModelVersion", Handler: unary(admin.RegisterModelVersion, requestID), Created: true},
		{Pattern: "GET /v1/models/{name}", Verb: "GetModel", Handler: unary(admin.GetModel, name)},
		{Pattern: "GET /v1/models/{name}/served-at", Verb: "ServedAt", Handler: unary(admin.ServedAt,
			path("name", "model", func(r *pb.ServedAtRequest) *string { return &r.Model }))},
		{Pattern: "GET /v1/models/{name}/metrics", Verb: "ModelMetrics", Handler: unary(admin.ModelMetrics, name)},
		{Pattern: "PUT /v1/models/{name}", Verb: "CreateModel", Handler: unary(admin.CreateModel,
			path("name", "model", func(r *pb.CreateModelRequest) *string { return &r.Model })), Created: true},
		{Pattern: "POST /v1/models/{name}/annotate", Verb: "AnnotateModel", Handler: unary(admin.AnnotateModel,
			path("name", "model", func(r *pb.AnnotateModelRequest) *string { return &r.Model }))},
		{Pattern: "DELETE /v1/models/{name}/aliases/{alias}", Verb: "DeleteAlias", Handler: unary(admin.DeleteAlias,
			path("name", "model", func(r *pb.DeleteAliasRequest) *string { return &r.Model }),
			path("alias", "alias", func(r *pb.DeleteAliasRequest) *string { return &r.Alias }))},
		{Pattern: "POST /v1/models/{name}", Verb: "ConfigureModel", Handler: unary(admin.ConfigureModel,
			path("name", "model", func(r *pb.ConfigureModelRequest) *string { return &r.Model }))},
		{Pattern: "POST /v1/models/{name}/versions", Verb: "RegisterModelVersion", Handler: unary(admin.RegisterModelVersion,
			path("name", "model", func(r *pb.RegisterModelVersionRequest) *string { return &r.Model }), requestID), Created: true},
		{Pattern: "POST /v1/models/{name}/versions/{version}", Verb: "SetModelVersionState", Handler: unary(admin.SetModelVersionState,
			path("name", "model", func(r *pb.SetModelVersionStateRequest) *string { return &r.Model }),
			path("version", "version", func(r *pb.SetModelVersionStateRequest) *string { return &r.Version }))},
		{Pattern: "POST /v1/models/{name}/aliases/{alias}", Verb: "MoveAlias", Handler: unary(admin.MoveAlias,
			path("name", "model", func(r *pb.MoveAliasRequest) *string { return &r.Model }),
			path("alias", "alias", func(r *pb.MoveAliasRequest) *string { return &r.Alias }))},

		{Pattern: "GET /v1/experiments", Verb: "ListExperiments", Handler: unary(admin.ListExperiments)},
		{Pattern: "POST /v1/experiments", Verb: "CreateExperiment", Handler: unary(admin.CreateExperiment), Created: true},
		{Pattern: "POST /v1/experiments/{name}/plan", Verb: "PlanExperiment", Handler: unary(admin.PlanExperiment,
			path("name", "name", func(r *pb.PlanExperimentRequest) *string { return &r.Name }))},
		{Pattern: "GET /v1/experiments/{name}/results", Verb: "ExperimentResults", Handler: unary(admin.ExperimentResults, name)},
		{Pattern: "POST /v1/experiments/{name}", Verb: "SetExperimentState", Handler: unary(admin.SetExperimentState,
			path("name", "name", func(r *pb.SetExperimentStateRequest) *string { return &r.Name }))},

		{Pattern: "GET /v1/rollouts", Verb: "ListRollouts", Handler: unary(admin.ListRollouts)},
		{Pattern: "POST /v1/rollouts", Verb: "StartRollout", Handler: unary(admin.StartRollout), Created: true},
		{Pattern: "GET /v1/rollouts/{name}", Verb: "GetRollout", Handler: unary(admin.GetRollout, name)},
		{Pattern: "POST /v1/rollouts/{id}/advance", Verb: "AdvanceRollout", Handler: unary(admin.AdvanceRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/abort", Verb: "AbortRollout", Handler: unary(admin.AbortRollout, action)},

		{Pattern: "POST /v1/rollouts/plan", Verb: "PlanRollout", Handler: unary(admin.PlanRollout)},
		{Pattern: "POST /v1/rollouts/{id}/hold", Verb: "HoldRollout", Handler: unary(admin.HoldRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/resume", Verb: "ResumeRollout", Handler: unary(admin.ResumeRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/retry", Verb: "RetryRollout", Handler: unary(admin.RetryRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/approve", Verb: "ApproveRollout", Handler: unary(admin.ApproveRollout,
			path("id", "id", func(r *pb.ApproveRolloutRequest) *string { return &r.Id }))},
		{Pattern: "POST /v1/rollouts/{id}/rollback", Verb: "RollbackRollout", Handler: unary(admin.RollbackRollout,
			path("id", "id", func(r *pb.RollbackRolloutRequest) *string { return &r.Id }))},
		{Pattern: "POST /v1/models/{name}/break-glass", Verb: "BreakGlass", Handler: unary(admin.BreakGlass,
			path("name", "model", func(r *pb.BreakGlassRequest) *string { return &r.Model }))},
		{Pattern: "POST /v1/deployment", Verb: "ConfigureDeployment", Handler: unary(admin.ConfigureDeployment)},
		{Pattern: "GET /v1/deployment", Verb: "GetDeployment", Handler: unary(admin.GetDeployment)},

		{Pattern: "GET /v1/regions", Verb: "ListRegions", Handler: unary(admin.ListRegions)},
		{Pattern: "GET /v1/alerts", Verb: "ListAlerts", Handler: unary(admin.ListAlerts)},
		{Pattern: "POST /v1/alerts/{id}/silence", Verb: "SilenceAlert", Handler: unary(admin.SilenceAlert,
			path("id", "id", func(r *pb.SilenceAlertRequest) *string { return &r.Id }))},
		{Pattern: "GET /v1/optimizers", Verb: "ListOptimizers", Handler: unary(admin.ListOptimizers)},
		{Pattern: "POST /v1/optimizers", Verb: "RegisterOptimizer", Handler: unary(admin.RegisterOptimizer), Created: true},
		{Pattern: "DELETE /v1/optimizers/{name}", Verb: "RemoveOptimizer", Handler: unary(admin.RemoveOptimizer,
			path("name", "name", func(r *pb.RemoveOptimizerRequest) *string { return &r.Name }))},
		{Pattern: "POST /v1/optimizers/select", Verb: "SelectOptimizer", Handler: unary(admin.SelectOptimizer)},
		{Pattern: "POST /v1/optimizations", Verb: "RecordOptimization", Handler: unary(admin.RecordOptimization), Created: true},
		{Pattern: "GET /v1/audit", Verb: "Audit", Handler: unary(admin.Audit)},
		{Pattern: "GET /v1/status", Verb: "Status", Handler: unary(admin.Status)},
	}
}

// DeliveryRoutes are where configuration is live. Node ids and resource names may hold '/',
// so they are query parameters.
func DeliveryRoutes(d pb.DeliveryServer) []Route {
	return []Route{
		{Pattern: "GET /v1/xds/status", Verb: "XdsStatus", Handler: unary(d.XdsStatus)},
		{Pattern: "GET /v1/xds/config", Verb: "XdsConfig", Handler: unary(d.XdsConfig)},
		{Pattern: "GET /v1/xds/diff", Verb: "XdsDiff", Handler: unary(d.XdsDiff)},
		{Pattern: "GET /v1/xds/push-log", Verb: "XdsPushLog", Handler: unary(d.XdsPushLog)},
		{Pattern: "GET /v1/xds/explain", Verb: "XdsExplain", Handler: unary(d.XdsExplain)},
		{Pattern: "GET /v1/xds/load", Verb: "XdsLoad", Handler: unary(d.XdsLoad)},
		{Pattern: "GET /v1/xds/canary", Verb: "XdsCanary", Handler: unary(d.XdsCanary)},
		{Pattern: "POST /v1/xds/canary", Verb: "XdsCanaryStart", Handler: unary(d.XdsCanaryStart)},
		{Pattern: "POST /v1/xds/canary/end", Verb: "XdsCanaryEnd", Handler: unary(d.XdsCanaryEnd)},
	}
}

// OutcomeRoutes take late outcomes; the header idempotency-key names the batch.
func OutcomeRoutes(record func(context.Context, *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error)) []Route {
	return []Route{{Pattern: "POST /v1/outcomes", Verb: "RecordOutcomes", Handler: unary(record, func(r *http.Request, req *pb.RecordOutcomesRequest) error {
		if req.RequestId == "" {
			req.RequestId = r.Header.Get(headerIdempotency)
		}
		return nil
	})}}
}

// VariableRoutes are sessions and variables.
func VariableRoutes(vars pb.VariablesServer) []Route {
	v := variables{vars}
	session := path("session", "id", func(r *pb.GetSessionRequest) *string { return &r.Id })
	return []Route{
		{Pattern: "GET /v1/sessions", Verb: "ListSessions", Handler: unary(vars.ListSessions, tenant(func(r *pb.ListSessionsRequest) *string { return &r.Tenant }))},
		{Pattern: "POST /v1/sessions", Verb: "CreateSession", Handler: unary(vars.CreateSession, tenant(func(r *pb.CreateSessionRequest) *string { return &r.Tenant })), Created: true},
		{Pattern: "GET /v1/sessions/{session}", Verb: "GetSession", Handler: unary(vars.GetSession, session, tenant(sessionTenant))},
		{Pattern: "DELETE /v1/sessions/{session}", Verb: "DeleteSession", Handler: unary(vars.DeleteSession, session, tenant(sessionTenant))},

		{Pattern: "GET /v1/variables/{session}", Verb: "ListVariables", Handler: v.list},
		{Pattern: "GET /v1/variables/{session}/{name}", Verb: "GetVariable", Handler: v.get},
		{Pattern: "PUT /v1/variables/{session}/{name}", Verb: "SetVariable", Handler: v.put},
		{Pattern: "DELETE /v1/variables/{session}/{name}", Verb: "DeleteVariable", Handler: v.delete},
		{Pattern: "GET /v1/variables/{session}/{name}/history", Verb: "GetHistory", Handler: v.history},
		{Pattern: "POST /v1/variables/{session}/{name}/rollback", Verb: "RollbackVariable", Handler: v.rollback},
		{Pattern: "POST /v1/variables/{session}/{name}/optimization", Verb: "StartOptimization", Handler: v.startOptimization, Created: true},
		{Pattern: "DELETE /v1/variables/{session}/{name}/optimization", Verb: "StopOptimization", Handler: v.stopOptimization},
		{Pattern: "GET /v1/sessions/{session}/dependencies", Verb: "ListDependencies", Handler: unary(vars.ListDependencies,
			path("session", "session", func(r *pb.ListDependenciesRequest) *string { return &r.Session }), tenant(func(r *pb.ListDependenciesRequest) *string { return &r.Tenant }))},
		{Pattern: "POST /v1/sessions/{session}/dependencies", Verb: "AddDependency", Handler: unary(vars.AddDependency,
			path("session", "session", func(r *pb.AddDependencyRequest) *string { return &r.Session }), tenant(func(r *pb.AddDependencyRequest) *string { return &r.Tenant }), byREST), Created: true},
	}
}

// Register puts the routes on a mux; it panics as http.ServeMux does when a pattern is
// already taken. Calls outside the routes are the mux's to answer. gate is asked about
// every call; nil = all are carried out.
func Register(mux *http.ServeMux, rs []Route, gate Gate) {
	for _, r := range rs {
		h := r.Handler
		if gate != nil {
			h = gated(r.Verb, h, gate)
		}
		if r.Created {
			inner := h
			h = func(r *http.Request) (Reply, error) {
				out, err := inner(r)
				out.Status = http.StatusCreated
				return out, err
			}
		}
		mux.Handle(r.Pattern, serve(h))
	}
}

type checkKey struct{}

// gated asks the gate first and leaves its check where unary finds it.
func gated(verb string, h Handler, gate Gate) Handler {
	return func(r *http.Request) (out Reply, err error) {
		check, done, err := gate(r.Context(), verb)
		if done != nil {
			defer func() { done(err) }()
		}
		if err != nil {
			return Reply{}, err
		}
		if check != nil {
			r = r.WithContext(context.WithValue(r.Context(), checkKey{}, check))
		}
		return h(r)
	}
}

// checked asks the gate about a request that is ready to be carried out.
func checked(r *http.Request, m proto.Message) error {
	if check, ok := r.Context().Value(checkKey{}).(func(proto.Message) error); ok {
		return check(m)
	}
	return nil
}

func sessionTenant(r *pb.GetSessionRequest) *string { return &r.Tenant }

// tenant binds the tenant of the header or the query, which the body may repeat but not
// contradict.
func tenant[T any](at func(*T) *string) binder[T] {
	return func(r *http.Request, req *T) error {
		t, given, err := tenantOf(r)
		if err != nil {
			return err
		}
		dst := at(req)
		if *dst != "" && given && *dst != t {
			return invalid("tenant is %q in the body and %q beside it; leave it out of the body", *dst, t)
		}
		if *dst == "" {
			*dst = t
		}
		return nil
	}
}

// requestID lets a retry of a registration carry the standard header.
func requestID(r *http.Request, req *pb.RegisterModelVersionRequest) error {
	if req.RequestId == "" {
		req.RequestId = r.Header.Get(headerIdempotency)
	}
	return nil
}
