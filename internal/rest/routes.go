package rest

import (
	"context"
	"net/http"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Route is one line of the REST interface. Pattern is as in http.ServeMux.
type Route struct {
	Pattern string
	Handler Handler
	Created bool // success is 201
}

// AdminRoutes are the operators' verbs. Whoever registers them decides who may call them.
func AdminRoutes(admin pb.AdminServer) []Route {
	name := path("name", "name", func(r *pb.NameRequest) *string { return &r.Name })
	action := path("id", "id", func(r *pb.RolloutActionRequest) *string { return &r.Id })
	return []Route{
		{Pattern: "GET /v1/models", Handler: unary(admin.ListModels)},
		{Pattern: "POST /v1/models", Handler: unary(admin.RegisterModelVersion, requestID), Created: true},
		{Pattern: "GET /v1/models/{name}", Handler: unary(admin.GetModel, name)},
		{Pattern: "GET /v1/models/{name}/served-at", Handler: unary(admin.ServedAt,
			path("name", "model", func(r *pb.ServedAtRequest) *string { return &r.Model }))},
		{Pattern: "POST /v1/models/{name}", Handler: unary(admin.ConfigureModel,
			path("name", "model", func(r *pb.ConfigureModelRequest) *string { return &r.Model }))},
		{Pattern: "POST /v1/models/{name}/versions", Handler: unary(admin.RegisterModelVersion,
			path("name", "model", func(r *pb.RegisterModelVersionRequest) *string { return &r.Model }), requestID), Created: true},
		{Pattern: "POST /v1/models/{name}/versions/{version}", Handler: unary(admin.SetModelVersionState,
			path("name", "model", func(r *pb.SetModelVersionStateRequest) *string { return &r.Model }),
			path("version", "version", func(r *pb.SetModelVersionStateRequest) *string { return &r.Version }))},
		{Pattern: "POST /v1/models/{name}/aliases/{alias}", Handler: unary(admin.MoveAlias,
			path("name", "model", func(r *pb.MoveAliasRequest) *string { return &r.Model }),
			path("alias", "alias", func(r *pb.MoveAliasRequest) *string { return &r.Alias }))},

		{Pattern: "GET /v1/experiments", Handler: unary(admin.ListExperiments)},
		{Pattern: "POST /v1/experiments", Handler: unary(admin.CreateExperiment), Created: true},
		{Pattern: "POST /v1/experiments/{name}/plan", Handler: unary(admin.PlanExperiment,
			path("name", "name", func(r *pb.PlanExperimentRequest) *string { return &r.Name }))},
		{Pattern: "GET /v1/experiments/{name}/results", Handler: unary(admin.ExperimentResults, name)},
		{Pattern: "POST /v1/experiments/{name}", Handler: unary(admin.SetExperimentState,
			path("name", "name", func(r *pb.SetExperimentStateRequest) *string { return &r.Name }))},

		{Pattern: "GET /v1/rollouts", Handler: unary(admin.ListRollouts)},
		{Pattern: "POST /v1/rollouts", Handler: unary(admin.StartRollout), Created: true},
		{Pattern: "GET /v1/rollouts/{name}", Handler: unary(admin.GetRollout, name)},
		{Pattern: "POST /v1/rollouts/{id}/advance", Handler: unary(admin.AdvanceRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/abort", Handler: unary(admin.AbortRollout, action)},

		{Pattern: "POST /v1/rollouts/plan", Handler: unary(admin.PlanRollout)},
		{Pattern: "POST /v1/rollouts/{id}/hold", Handler: unary(admin.HoldRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/resume", Handler: unary(admin.ResumeRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/retry", Handler: unary(admin.RetryRollout, action)},
		{Pattern: "POST /v1/rollouts/{id}/approve", Handler: unary(admin.ApproveRollout,
			path("id", "id", func(r *pb.ApproveRolloutRequest) *string { return &r.Id }))},
		{Pattern: "POST /v1/rollouts/{id}/rollback", Handler: unary(admin.RollbackRollout,
			path("id", "id", func(r *pb.RollbackRolloutRequest) *string { return &r.Id }))},
		{Pattern: "POST /v1/models/{name}/break-glass", Handler: unary(admin.BreakGlass,
			path("name", "model", func(r *pb.BreakGlassRequest) *string { return &r.Model }))},
		{Pattern: "POST /v1/deployment", Handler: unary(admin.ConfigureDeployment)},
		{Pattern: "GET /v1/deployment", Handler: unary(admin.GetDeployment)},

		{Pattern: "GET /v1/regions", Handler: unary(admin.ListRegions)},
		{Pattern: "GET /v1/alerts", Handler: unary(admin.ListAlerts)},
		{Pattern: "GET /v1/audit", Handler: unary(admin.Audit)},
		{Pattern: "GET /v1/status", Handler: unary(admin.Status)},
	}
}

// DeliveryRoutes are where configuration is live. Node ids and resource names may hold '/',
// so they are query parameters.
func DeliveryRoutes(d pb.DeliveryServer) []Route {
	return []Route{
		{Pattern: "GET /v1/xds/status", Handler: unary(d.XdsStatus)},
		{Pattern: "GET /v1/xds/config", Handler: unary(d.XdsConfig)},
		{Pattern: "GET /v1/xds/diff", Handler: unary(d.XdsDiff)},
		{Pattern: "GET /v1/xds/push-log", Handler: unary(d.XdsPushLog)},
		{Pattern: "GET /v1/xds/explain", Handler: unary(d.XdsExplain)},
		{Pattern: "GET /v1/xds/load", Handler: unary(d.XdsLoad)},
	}
}

// OutcomeRoutes take late outcomes; the header idempotency-key names the batch.
func OutcomeRoutes(record func(context.Context, *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error)) []Route {
	return []Route{{Pattern: "POST /v1/outcomes", Handler: unary(record, func(r *http.Request, req *pb.RecordOutcomesRequest) error {
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
		{Pattern: "GET /v1/sessions", Handler: unary(vars.ListSessions, tenant(func(r *pb.ListSessionsRequest) *string { return &r.Tenant }))},
		{Pattern: "POST /v1/sessions", Handler: unary(vars.CreateSession, tenant(func(r *pb.CreateSessionRequest) *string { return &r.Tenant })), Created: true},
		{Pattern: "GET /v1/sessions/{session}", Handler: unary(vars.GetSession, session, tenant(sessionTenant))},
		{Pattern: "DELETE /v1/sessions/{session}", Handler: unary(vars.DeleteSession, session, tenant(sessionTenant))},

		{Pattern: "GET /v1/variables/{session}", Handler: v.list},
		{Pattern: "GET /v1/variables/{session}/{name}", Handler: v.get},
		{Pattern: "PUT /v1/variables/{session}/{name}", Handler: v.put},
		{Pattern: "DELETE /v1/variables/{session}/{name}", Handler: v.delete},
		{Pattern: "GET /v1/variables/{session}/{name}/history", Handler: v.history},
		{Pattern: "POST /v1/variables/{session}/{name}/rollback", Handler: v.rollback},
	}
}

// Register puts the routes on a mux; it panics as http.ServeMux does when a pattern is
// already taken. Calls outside the routes are the mux's to answer.
func Register(mux *http.ServeMux, rs []Route) {
	for _, r := range rs {
		h := r.Handler
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
