package rest_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// seen is the last call a server got.
type seen struct {
	method string
	req    proto.Message
	md     metadata.MD
	peer   string
}

func (s *seen) note(ctx context.Context, method string, req proto.Message) {
	*s = seen{method: method, req: req}
	s.md, _ = metadata.FromIncomingContext(ctx)
	if p, ok := peer.FromContext(ctx); ok {
		s.peer = p.Addr.String()
	}
}

// authority is a small variable store: enough to give the conditional calls something to
// be true or false about.
type authority struct {
	pb.UnimplementedVariablesServer
	seen
	vars map[string]*pb.Variable // by "tenant/session/name"
}

func newAuthority() *authority { return &authority{vars: map[string]*pb.Variable{}} }

func at(tenant, session, name string) string { return tenant + "/" + session + "/" + name }

// failed reports a failure as a gRPC server does: the code in the status, what it cannot
// carry in the trailer.
func failed(ctx context.Context, err error) error {
	_ = grpc.SetTrailer(ctx, status.Trailer(err))
	return status.ToGRPC(err)
}

func (a *authority) Get(ctx context.Context, r *pb.GetRequest) (*pb.Variable, error) {
	a.note(ctx, "Get", r)
	_ = grpc.SetHeader(ctx, metadata.Pairs(outrigger.HeaderTier, "origin", outrigger.HeaderToken, "t1", "grpc-internal", "x", "blob-bin", "\x01"))
	v, ok := a.vars[at(r.Tenant, r.Session, r.Identifier)]
	if !ok {
		return nil, failed(ctx, outrigger.ErrVariableNotFound(r.Identifier))
	}
	return v, nil
}

func (a *authority) write(ctx context.Context, id, tenant, session, name string, val *pb.Value, constraints string) *pb.Variable {
	v := &pb.Variable{Id: id, Key: &pb.Key{Tenant: tenant, Session: session, Name: name}, Value: val, Source: "REST",
		ConstraintsJson: constraints, Version: &pb.Version{Dot: &pb.Dot{Region: "eu", Incarnation: 1, Position: 7}},
		CreatedAt: &timestamppb.Timestamp{Seconds: 1700000000}}
	if old := a.vars[at(tenant, session, name)]; old != nil {
		v.Version.Counter = old.Version.Counter + 1
	}
	a.vars[at(tenant, session, name)] = v
	return v
}

func (a *authority) Set(ctx context.Context, r *pb.SetRequest) (*pb.Variable, error) {
	a.note(ctx, "Set", r)
	old, ok := a.vars[at(r.Tenant, r.Session, r.Identifier)]
	switch {
	case !ok:
		return nil, failed(ctx, outrigger.ErrVariableNotFound(r.Identifier))
	case r.ExpectedVersion != nil && *r.ExpectedVersion != old.Version.Counter:
		return nil, failed(ctx, outrigger.ErrVersionMismatch(old.Version.Counter))
	}
	val := proto.CloneOf(r.Value)
	val.Type = old.Value.Type
	return a.write(ctx, old.Id, r.Tenant, r.Session, r.Identifier, val, old.ConstraintsJson), nil
}

func (a *authority) Register(ctx context.Context, r *pb.RegisterRequest) (*pb.Variable, error) {
	a.note(ctx, "Register", r)
	if _, ok := a.vars[at(r.Key.Tenant, r.Key.Session, r.Key.Name)]; ok {
		return nil, failed(ctx, outrigger.Errorf(outrigger.Exists, "Variable already exists: %s", r.Key.Name))
	}
	return a.write(ctx, "var_"+r.Key.Name+"_1", r.Key.Tenant, r.Key.Session, r.Key.Name, r.Value, r.ConstraintsJson), nil
}

func (a *authority) List(ctx context.Context, r *pb.ListRequest) (*pb.ListResponse, error) {
	a.note(ctx, "List", r)
	out := &pb.ListResponse{}
	for _, v := range a.vars {
		out.Variables = append(out.Variables, v)
	}
	return out, nil
}

func (a *authority) Delete(ctx context.Context, r *pb.GetRequest) (*pb.DeleteResponse, error) {
	a.note(ctx, "Delete", r)
	return &pb.DeleteResponse{Version: &pb.Version{Counter: 3, Dot: &pb.Dot{Region: "eu", Incarnation: 1, Position: 9}}}, nil
}

func (a *authority) History(ctx context.Context, r *pb.HistoryRequest) (*pb.HistoryResponse, error) {
	a.note(ctx, "History", r)
	return &pb.HistoryResponse{Entries: []*pb.HistoryEntry{
		{Version: &pb.Version{Counter: 1}, Deleted: true},
		{Version: &pb.Version{}, Value: &pb.Value{Type: "float", Json: []byte("0.5")}, Actor: "ann"},
	}}, nil
}

func (a *authority) Rollback(ctx context.Context, r *pb.RollbackRequest) (*pb.Variable, error) {
	a.note(ctx, "Rollback", r)
	return a.vars[at(r.Tenant, r.Session, r.Identifier)], nil
}

func (a *authority) CreateSession(ctx context.Context, r *pb.CreateSessionRequest) (*pb.Session, error) {
	a.note(ctx, "CreateSession", r)
	return &pb.Session{Tenant: r.Tenant, Id: r.Id, Ttl: r.Ttl}, nil
}

func (a *authority) GetSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.Session, error) {
	a.note(ctx, "GetSession", r)
	return &pb.Session{Tenant: r.Tenant, Id: r.Id}, nil
}

func (a *authority) DeleteSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	a.note(ctx, "DeleteSession", r)
	return &pb.DeleteSessionResponse{VariablesRemoved: 2}, nil
}

func (a *authority) ListSessions(ctx context.Context, r *pb.ListSessionsRequest) (*pb.ListSessionsResponse, error) {
	a.note(ctx, "ListSessions", r)
	return &pb.ListSessionsResponse{}, nil
}

// operator is an AdminServer that remembers what it was asked and says something fixed.
type operator struct {
	pb.UnimplementedAdminServer
	seen
}

func saw[Resp any](o *operator, ctx context.Context, method string, r proto.Message, answer Resp) (Resp, error) {
	o.note(ctx, method, r)
	return answer, nil
}

func (o *operator) RegisterModelVersion(ctx context.Context, r *pb.RegisterModelVersionRequest) (*pb.Model, error) {
	return saw(o, ctx, "RegisterModelVersion", r, &pb.Model{Name: r.Model})
}
func (o *operator) ConfigureModel(ctx context.Context, r *pb.ConfigureModelRequest) (*pb.Model, error) {
	return saw(o, ctx, "ConfigureModel", r, &pb.Model{Name: r.Model})
}
func (o *operator) SetModelVersionState(ctx context.Context, r *pb.SetModelVersionStateRequest) (*pb.Model, error) {
	return saw(o, ctx, "SetModelVersionState", r, &pb.Model{})
}
func (o *operator) ServedAt(ctx context.Context, r *pb.ServedAtRequest) (*pb.ServedAtResponse, error) {
	return saw(o, ctx, "ServedAt", r, &pb.ServedAtResponse{})
}
func (o *operator) MoveAlias(ctx context.Context, r *pb.MoveAliasRequest) (*pb.Model, error) {
	return saw(o, ctx, "MoveAlias", r, &pb.Model{})
}
func (o *operator) DeleteAlias(ctx context.Context, r *pb.DeleteAliasRequest) (*pb.Model, error) {
	return saw(o, ctx, "DeleteAlias", r, &pb.Model{})
}
func (o *operator) CreateModel(ctx context.Context, r *pb.CreateModelRequest) (*pb.Model, error) {
	return saw(o, ctx, "CreateModel", r, &pb.Model{})
}
func (o *operator) AnnotateModel(ctx context.Context, r *pb.AnnotateModelRequest) (*pb.Model, error) {
	return saw(o, ctx, "AnnotateModel", r, &pb.Model{})
}
func (o *operator) ModelMetrics(ctx context.Context, r *pb.NameRequest) (*pb.ModelMetricsResponse, error) {
	return saw(o, ctx, "ModelMetrics", r, &pb.ModelMetricsResponse{})
}
func (o *operator) GetModel(ctx context.Context, r *pb.NameRequest) (*pb.Model, error) {
	return saw(o, ctx, "GetModel", r, &pb.Model{Name: r.Name, WeightEpoch: 7, Aliases: map[string]string{"b": "2", "a": "1"}})
}
func (o *operator) ListModels(ctx context.Context, r *pb.ListRequestAll) (*pb.ListModelsResponse, error) {
	return saw(o, ctx, "ListModels", r, &pb.ListModelsResponse{})
}
func (o *operator) CreateExperiment(ctx context.Context, r *pb.CreateExperimentRequest) (*pb.Experiment, error) {
	return saw(o, ctx, "CreateExperiment", r, &pb.Experiment{})
}
func (o *operator) SetExperimentState(ctx context.Context, r *pb.SetExperimentStateRequest) (*pb.Experiment, error) {
	return saw(o, ctx, "SetExperimentState", r, &pb.Experiment{})
}
func (o *operator) PlanExperiment(ctx context.Context, r *pb.PlanExperimentRequest) (*pb.Experiment, error) {
	return saw(o, ctx, "PlanExperiment", r, &pb.Experiment{})
}
func (o *operator) ExperimentResults(ctx context.Context, r *pb.NameRequest) (*pb.ExperimentResultsResponse, error) {
	return saw(o, ctx, "ExperimentResults", r, &pb.ExperimentResultsResponse{})
}
func (o *operator) ListExperiments(ctx context.Context, r *pb.ListRequestAll) (*pb.ListExperimentsResponse, error) {
	return saw(o, ctx, "ListExperiments", r, &pb.ListExperimentsResponse{})
}
func (o *operator) StartRollout(ctx context.Context, r *pb.StartRolloutRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "StartRollout", r, &pb.Rollout{})
}
func (o *operator) AdvanceRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "AdvanceRollout", r, &pb.Rollout{})
}
func (o *operator) AbortRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "AbortRollout", r, &pb.Rollout{})
}
func (o *operator) PlanRollout(ctx context.Context, r *pb.StartRolloutRequest) (*pb.RolloutPlan, error) {
	return saw(o, ctx, "PlanRollout", r, &pb.RolloutPlan{})
}
func (o *operator) HoldRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "HoldRollout", r, &pb.Rollout{})
}
func (o *operator) ResumeRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "ResumeRollout", r, &pb.Rollout{})
}
func (o *operator) RetryRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "RetryRollout", r, &pb.Rollout{})
}
func (o *operator) ApproveRollout(ctx context.Context, r *pb.ApproveRolloutRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "ApproveRollout", r, &pb.Rollout{})
}
func (o *operator) RollbackRollout(ctx context.Context, r *pb.RollbackRolloutRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "RollbackRollout", r, &pb.Rollout{})
}
func (o *operator) BreakGlass(ctx context.Context, r *pb.BreakGlassRequest) (*pb.BreakGlassResponse, error) {
	return saw(o, ctx, "BreakGlass", r, &pb.BreakGlassResponse{})
}
func (o *operator) ConfigureDeployment(ctx context.Context, r *pb.ConfigureDeploymentRequest) (*pb.DeploymentConfiguration, error) {
	return saw(o, ctx, "ConfigureDeployment", r, &pb.DeploymentConfiguration{})
}
func (o *operator) GetDeployment(ctx context.Context, r *pb.NameRequest) (*pb.DeploymentConfiguration, error) {
	return saw(o, ctx, "GetDeployment", r, &pb.DeploymentConfiguration{})
}
func (o *operator) GetRollout(ctx context.Context, r *pb.NameRequest) (*pb.Rollout, error) {
	return saw(o, ctx, "GetRollout", r, &pb.Rollout{})
}
func (o *operator) ListRollouts(ctx context.Context, r *pb.ListRequestAll) (*pb.ListRolloutsResponse, error) {
	return saw(o, ctx, "ListRollouts", r, &pb.ListRolloutsResponse{})
}
func (o *operator) ListRegions(ctx context.Context, r *pb.ListRequestAll) (*pb.ListRegionsResponse, error) {
	return saw(o, ctx, "ListRegions", r, &pb.ListRegionsResponse{})
}
func (o *operator) ListAlerts(ctx context.Context, r *pb.ListRequestAll) (*pb.ListAlertsResponse, error) {
	return saw(o, ctx, "ListAlerts", r, &pb.ListAlertsResponse{})
}
func (o *operator) SilenceAlert(ctx context.Context, r *pb.SilenceAlertRequest) (*pb.Alert, error) {
	return saw(o, ctx, "SilenceAlert", r, &pb.Alert{})
}
func (o *operator) ListOptimizers(ctx context.Context, r *pb.ListRequestAll) (*pb.ListOptimizersResponse, error) {
	return saw(o, ctx, "ListOptimizers", r, &pb.ListOptimizersResponse{})
}
func (o *operator) RegisterOptimizer(ctx context.Context, r *pb.RegisterOptimizerRequest) (*pb.Optimizer, error) {
	return saw(o, ctx, "RegisterOptimizer", r, &pb.Optimizer{})
}
func (o *operator) RemoveOptimizer(ctx context.Context, r *pb.RemoveOptimizerRequest) (*pb.Optimizer, error) {
	return saw(o, ctx, "RemoveOptimizer", r, &pb.Optimizer{})
}
func (o *operator) SelectOptimizer(ctx context.Context, r *pb.SelectOptimizerRequest) (*pb.SelectOptimizerResponse, error) {
	return saw(o, ctx, "SelectOptimizer", r, &pb.SelectOptimizerResponse{})
}
func (o *operator) RecordOptimization(ctx context.Context, r *pb.RecordOptimizationRequest) (*pb.RecordOptimizationResponse, error) {
	return saw(o, ctx, "RecordOptimization", r, &pb.RecordOptimizationResponse{})
}
func (o *operator) Audit(ctx context.Context, r *pb.AuditRequest) (*pb.AuditResponse, error) {
	return saw(o, ctx, "Audit", r, &pb.AuditResponse{})
}
func (o *operator) Status(ctx context.Context, r *pb.ListRequestAll) (*pb.StatusResponse, error) {
	return saw(o, ctx, "Status", r, &pb.StatusResponse{})
}

// world is both services behind one mux.
type world struct {
	vars  *authority
	admin *operator
	mux   *http.ServeMux
}

func newWorld() *world {
	w := &world{vars: newAuthority(), admin: new(operator), mux: http.NewServeMux()}
	rest.Register(w.mux, append(rest.AdminRoutes(w.admin), rest.VariableRoutes(w.vars)...), nil)
	return w
}

// request builds a call; header lines are "name: value", and a body is JSON unless they
// say otherwise.
func request(method, target, body string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.RemoteAddr = "192.0.2.7:4000"
	if body != "" {
		r.Header.Set("content-type", "application/json")
	}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Add(name, value)
		if name == "content-type" {
			r.Header.Set(name, value)
		}
	}
	return r
}

func (w *world) call(method, target, body string, headers ...string) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	w.mux.ServeHTTP(rec, request(method, target, body, headers...))
	return rec
}

// put sets variable x of session s, registering it the first time.
func (w *world) put(t *testing.T, value, typ string) {
	t.Helper()
	if rec := w.call("PUT", "/v1/variables/s/x", `{"value":`+value+`,"type":"`+typ+`"}`); rec.Code != 201 && rec.Code != 200 {
		t.Fatalf("%d %s", rec.Code, rec.Body)
	}
}

func (a *authority) StartOptimization(ctx context.Context, r *pb.StartOptimizationRequest) (*pb.Variable, error) {
	a.note(ctx, "StartOptimization", r)
	then := &timestamppb.Timestamp{Seconds: 1700000000}
	v := a.vars[at(r.Tenant, r.Session, r.Identifier)]
	v.Optimization = &pb.Optimization{Id: "opt_1_1", Optimizer: r.Optimizer, StartedAt: then, RenewedAt: then}
	return v, nil
}

func (a *authority) StopOptimization(ctx context.Context, r *pb.StopOptimizationRequest) (*pb.Variable, error) {
	a.note(ctx, "StopOptimization", r)
	return a.vars[at(r.Tenant, r.Session, r.Identifier)], nil
}

func (a *authority) AddDependency(ctx context.Context, r *pb.AddDependencyRequest) (*pb.Dependencies, error) {
	a.note(ctx, "AddDependency", r)
	return &pb.Dependencies{Order: []string{"b"}}, nil
}

func (a *authority) ListDependencies(ctx context.Context, r *pb.ListDependenciesRequest) (*pb.Dependencies, error) {
	a.note(ctx, "ListDependencies", r)
	return &pb.Dependencies{Order: []string{"b"}}, nil
}
