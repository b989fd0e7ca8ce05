package rest

import (
	"context"
	"net/http"
	"strings"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// optimizationJSON is the optimisation lock of a variable. It is not part of the ETag,
// which is about the value.
type optimizationJSON struct {
	ID        string    `json:"id"`
	Optimizer string    `json:"optimizer"`
	Priority  int32     `json:"priority,omitempty"`
	StartedAt time.Time `json:"started_at"`
	RenewedAt time.Time `json:"renewed_at"`
}

func lockJSON(o *pb.Optimization) *optimizationJSON {
	if o == nil {
		return nil
	}
	return &optimizationJSON{ID: o.GetId(), Optimizer: o.GetOptimizer(), Priority: o.GetPriority(),
		StartedAt: wire.Time(o.GetStartedAt()), RenewedAt: wire.Time(o.GetRenewedAt())}
}

// optimizationIDs are the optimisations the writer says it holds.
func optimizationIDs(r *http.Request) (ids []string) {
	for _, list := range r.Header.Values(headerOptimizing) {
		for id := range strings.SplitSeq(list, ",") {
			if id = strings.TrimSpace(id); id != "" {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// startOptimization locks a variable; the body is {"optimizer": …, "config": {…}}.
func (v variables) startOptimization(r *http.Request) (Reply, error) {
	t, _, err := target(r)
	if err != nil {
		return Reply{}, err
	}
	var body struct {
		Optimizer string            `json:"optimizer"`
		Config    map[string]string `json:"config"`
		Actor     string            `json:"actor"`
	}
	if err := readJSON(r, &body); err != nil {
		return Reply{}, err
	}
	req := &pb.StartOptimizationRequest{Tenant: t.Tenant, Session: t.Session, Identifier: t.Identifier,
		Optimizer: body.Optimizer, Config: body.Config, Options: writeOptions(r, body.Actor)}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.Variable, error) { return v.vars.StartOptimization(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	return variableReply(out, head), nil
}

// stopOptimization releases the lock that the header names, or any with ?force=true.
func (v variables) stopOptimization(r *http.Request) (Reply, error) {
	t, q, err := target(r, "force")
	if err != nil {
		return Reply{}, err
	}
	if f := q["force"]; f != "" && f != "true" && f != "false" {
		return Reply{}, invalid("query parameter force=%q; give true or false", f)
	}
	req := &pb.StopOptimizationRequest{Tenant: t.Tenant, Session: t.Session, Identifier: t.Identifier,
		Force: q["force"] == "true", Options: writeOptions(r, "")}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.Variable, error) { return v.vars.StopOptimization(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	return variableReply(out, head), nil
}

// byREST records where a dependency came from, and who asked.
func byREST(r *http.Request, req *pb.AddDependencyRequest) error {
	if req.Options == nil {
		req.Options = writeOptions(r, "")
	}
	return nil
}
