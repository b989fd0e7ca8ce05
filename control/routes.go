package control

import (
	"net/http"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// route is one line of the REST interface. pattern is as in http.ServeMux.
type route struct {
	pattern string
	handler handler
	created bool // success is 201
}

// routes is the whole REST interface: operators' verbs and variables.
func routes(admin pb.AdminServer, vars pb.VariablesServer) []route {
	name := func(r *http.Request, req *pb.NameRequest) error {
		req.Name = r.PathValue("name")
		return nil
	}
	action := path("id", "id", func(r *pb.RolloutActionRequest) *string { return &r.Id })
	v := restVariables{vars}
	return []route{
		{pattern: "GET /v1/models", handler: unary(admin.ListModels)},
		{pattern: "POST /v1/models", handler: unary(admin.RegisterModelVersion), created: true},
		{pattern: "GET /v1/models/{name}", handler: unary(admin.GetModel, name)},
		{pattern: "POST /v1/models/{name}", handler: unary(admin.ConfigureModel,
			path("name", "model", func(r *pb.ConfigureModelRequest) *string { return &r.Model }))},
		{pattern: "POST /v1/models/{name}/versions", handler: unary(admin.RegisterModelVersion,
			path("name", "model", func(r *pb.RegisterModelVersionRequest) *string { return &r.Model }), requestID), created: true},
		{pattern: "POST /v1/models/{name}/versions/{version}", handler: unary(admin.SetModelVersionState,
			path("name", "model", func(r *pb.SetModelVersionStateRequest) *string { return &r.Model }),
			path("version", "version", func(r *pb.SetModelVersionStateRequest) *string { return &r.Version }))},
		{pattern: "POST /v1/models/{name}/aliases/{alias}", handler: unary(admin.MoveAlias,
			path("name", "model", func(r *pb.MoveAliasRequest) *string { return &r.Model }),
			path("alias", "alias", func(r *pb.MoveAliasRequest) *string { return &r.Alias }))},

		{pattern: "GET /v1/experiments", handler: unary(admin.ListExperiments)},
		{pattern: "POST /v1/experiments", handler: unary(admin.CreateExperiment), created: true},
		{pattern: "POST /v1/experiments/{name}", handler: unary(admin.SetExperimentState,
			path("name", "name", func(r *pb.SetExperimentStateRequest) *string { return &r.Name }))},

		{pattern: "GET /v1/rollouts", handler: unary(admin.ListRollouts)},
		{pattern: "POST /v1/rollouts", handler: unary(admin.StartRollout), created: true},
		{pattern: "GET /v1/rollouts/{name}", handler: unary(admin.GetRollout, name)},
		{pattern: "POST /v1/rollouts/{id}/advance", handler: unary(admin.AdvanceRollout, action)},
		{pattern: "POST /v1/rollouts/{id}/abort", handler: unary(admin.AbortRollout, action)},

		{pattern: "GET /v1/regions", handler: unary(admin.ListRegions)},
		{pattern: "GET /v1/alerts", handler: unary(admin.ListAlerts)},
		{pattern: "GET /v1/audit", handler: unary(admin.Audit)},
		{pattern: "GET /v1/status", handler: unary(admin.Status)},

		{pattern: "GET /v1/sessions", handler: unary(vars.ListSessions, tenant(func(r *pb.ListSessionsRequest) *string { return &r.Tenant }))},
		{pattern: "POST /v1/sessions", handler: unary(vars.CreateSession, tenant(func(r *pb.CreateSessionRequest) *string { return &r.Tenant })), created: true},
		{pattern: "GET /v1/sessions/{session}", handler: unary(vars.GetSession, session, tenant(sessionTenant))},
		{pattern: "DELETE /v1/sessions/{session}", handler: unary(vars.DeleteSession, session, tenant(sessionTenant))},

		{pattern: "GET /v1/variables/{session}", handler: v.list},
		{pattern: "GET /v1/variables/{session}/{name}", handler: v.get},
		{pattern: "PUT /v1/variables/{session}/{name}", handler: v.put},
		{pattern: "DELETE /v1/variables/{session}/{name}", handler: v.delete},
		{pattern: "GET /v1/variables/{session}/{name}/history", handler: v.history},
		{pattern: "POST /v1/variables/{session}/{name}/rollback", handler: v.rollback},
	}
}

// register puts the routes on a mux.
func register(mux *http.ServeMux, rs []route) {
	for _, r := range rs {
		h := r.handler
		if r.created {
			plain := h
			h = func(r *http.Request) (reply, error) {
				out, err := plain(r)
				out.status = http.StatusCreated
				return out, err
			}
		}
		mux.Handle(r.pattern, serve(h))
	}
}

func session(r *http.Request, req *pb.GetSessionRequest) error {
	req.Id = r.PathValue("session")
	return nil
}

func sessionTenant(r *pb.GetSessionRequest) *string { return &r.Tenant }

// tenant binds the tenant header, or for calls without a body the query parameter.
func tenant[T any](at func(*T) *string) binder[T] {
	return func(r *http.Request, req *T) error {
		t, err := tenantOf(r)
		if dst := at(req); err == nil && *dst == "" {
			*dst = t
		}
		return err
	}
}

// requestID lets a retry of a registration carry the standard header.
func requestID(r *http.Request, req *pb.RegisterModelVersionRequest) error {
	if req.RequestId == "" {
		req.RequestId = r.Header.Get(headerIdempotency)
	}
	return nil
}
