package rest

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// variables shows variables as people expect JSON: the value is the value, not its
// bytes in base64, and the ETag is the version counter.
type variables struct{ vars pb.VariablesServer }

// variableJSON is one variable.
type variableJSON struct {
	ID          string            `json:"id"`
	Tenant      string            `json:"tenant"`
	Session     string            `json:"session"`
	Name        string            `json:"name"`
	Type        string            `json:"type"`
	Value       json.RawMessage   `json:"value"`
	Binary      []byte            `json:"binary,omitempty"`
	Version     int32             `json:"version"`
	Dot         string            `json:"dot"`
	Constraints json.RawMessage   `json:"constraints,omitempty"`
	Metadata    map[string]string `json:"metadata,omitempty"`
	Source      string            `json:"source,omitempty"`
	CreatedAt   time.Time         `json:"created_at,omitzero"`
	UpdatedAt   time.Time         `json:"updated_at,omitzero"`
	Lock        *optimizationJSON `json:"optimization,omitempty"`
}

// historyJSON is one earlier version.
type historyJSON struct {
	Version  int32             `json:"version"`
	Dot      string            `json:"dot"`
	Type     string            `json:"type,omitempty"`
	Value    json.RawMessage   `json:"value,omitempty"`
	Binary   []byte            `json:"binary,omitempty"`
	At       time.Time         `json:"at,omitzero"`
	Actor    string            `json:"actor,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Deleted  bool              `json:"deleted,omitempty"`
}

// putJSON is the body of PUT. A variable that does not exist yet is registered when type
// is given; constraints count only then.
type putJSON struct {
	Value           json.RawMessage   `json:"value"`
	Binary          []byte            `json:"binary"`
	Type            string            `json:"type"`
	ExpectedVersion *int32            `json:"expected_version"`
	Constraints     json.RawMessage   `json:"constraints"`
	Metadata        map[string]string `json:"metadata"`
	Actor           string            `json:"actor"`
	CreateSession   bool              `json:"create_session"`
}

// tenantOf returns the tenant of the query or the header, or the default tenant if neither
// is given.
func tenantOf(r *http.Request) (tenant string, given bool, err error) {
	q, err := query(r)
	if err != nil {
		return "", false, err
	}
	inQuery, inHeader := q["tenant"], r.Header.Get(headerTenant)
	if inQuery != "" && inHeader != "" && inQuery != inHeader {
		return "", false, invalid("tenant is %q in the query and %q in the header", inQuery, inHeader)
	}
	t := cmp.Or(inQuery, inHeader)
	return wire.Tenant(t), t != "", nil
}

// target reads what all routes of one variable have in common, and the query parameters
// that the route knows beside tenant.
func target(r *http.Request, known ...string) (*pb.GetRequest, map[string]string, error) {
	q, err := onlyQuery(r, append(known, "tenant")...)
	if err != nil {
		return nil, nil, err
	}
	t, _, err := tenantOf(r)
	return &pb.GetRequest{Tenant: t, Session: r.PathValue("session"), Identifier: r.PathValue("name")}, q, err
}

func writeOptions(r *http.Request, actor string) *pb.WriteOptions {
	if actor == "" {
		actor = r.Header.Get(headerActor)
	}
	return &pb.WriteOptions{Actor: actor, Source: "REST", RequestId: r.Header.Get(headerIdempotency), OptimizationIds: optimizationIDs(r)}
}

func (v variables) get(r *http.Request) (Reply, error) {
	req, _, err := target(r)
	if err != nil {
		return Reply{}, err
	}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.Variable, error) { return v.vars.Get(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	a := variableReply(out, head)
	if holds(r.Header.Values("If-None-Match"), a.ETag) {
		a.Status = http.StatusNotModified
	}
	return a, nil
}

// holds reports whether an If-None-Match header names the tag, by the weak comparison of
// RFC 9110, section 13.1.2. Our tags hold no commas.
func holds(header []string, tag string) bool {
	if len(header) == 0 {
		return false
	}
	for _, one := range strings.Split(strings.Join(header, ","), ",") {
		one = strings.TrimSpace(one)
		if one == "*" || strings.TrimPrefix(one, "W/") == tag {
			return true
		}
	}
	return false
}

// list answers with the variables of a session whose names match ?pattern=.
func (v variables) list(r *http.Request) (Reply, error) {
	t, q, err := target(r, "pattern")
	if err != nil {
		return Reply{}, err
	}
	req := &pb.ListRequest{Tenant: t.Tenant, Session: t.Session, Pattern: q["pattern"]}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.ListResponse, error) { return v.vars.List(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	all := make([]variableJSON, len(out.GetVariables()))
	for i, x := range out.GetVariables() {
		all[i] = toJSON(x)
	}
	return Reply{Body: map[string]any{"variables": all}, Header: head}, nil
}

// put sets a variable, or registers it. If-Match and expected_version make the set
// conditional; If-None-Match: * only registers.
func (v variables) put(r *http.Request) (Reply, error) {
	req, _, err := target(r)
	if err != nil {
		return Reply{}, err
	}
	var body putJSON
	if err := readJSON(r, &body); err != nil {
		return Reply{}, err
	}
	if len(body.Value) == 0 {
		return Reply{}, invalid(`body has no "value"`)
	}
	expected, err := expectedVersion(r, body.ExpectedVersion)
	if err != nil {
		return Reply{}, err
	}
	none := strings.TrimSpace(r.Header.Get("If-None-Match"))
	createOnly := none == "*"
	if none != "" && !createOnly {
		return Reply{}, invalid("if-none-match is %s; a PUT takes only *, and if-match for a version", none)
	}
	if createOnly && (expected != nil || r.Header.Get("If-Match") != "") {
		return Reply{}, invalid("if-none-match excludes if-match and expected_version")
	}
	if !createOnly {
		out, err := v.set(r, req, &body, expected)
		missing := outrigger.IsKind(err, outrigger.NotFound)
		if !missing || body.Type == "" || expected != nil || r.Header.Get("If-Match") != "" {
			return out, err
		}
	}
	if body.Type == "" {
		return Reply{}, invalid(`registering a variable needs "type"`)
	}
	return v.register(r, req, &body)
}

func (v variables) set(r *http.Request, t *pb.GetRequest, body *putJSON, expected *int32) (Reply, error) {
	req := &pb.SetRequest{Tenant: t.Tenant, Session: t.Session, Identifier: t.Identifier,
		Value:           &pb.Value{Type: body.Type, Json: body.Value, Binary: body.Binary},
		ExpectedVersion: expected, Metadata: body.Metadata, Options: writeOptions(r, body.Actor)}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.Variable, error) { return v.vars.Set(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	return variableReply(out, head), nil
}

func (v variables) register(r *http.Request, t *pb.GetRequest, body *putJSON) (Reply, error) {
	o := writeOptions(r, body.Actor)
	o.AutoCreateSession = body.CreateSession
	constraints := string(body.Constraints)
	if constraints == "null" {
		constraints = ""
	}
	req := &pb.RegisterRequest{Key: &pb.Key{Tenant: t.Tenant, Session: t.Session, Name: t.Identifier},
		Value:           &pb.Value{Type: body.Type, Json: body.Value, Binary: body.Binary},
		ConstraintsJson: constraints, Metadata: body.Metadata, Options: o}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.Variable, error) { return v.vars.Register(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	a := variableReply(out, head)
	a.Status = http.StatusCreated
	return a, nil
}

// expectedVersion reads If-Match: "*" asks for existence only, which a set does anyway;
// otherwise one strong tag, with its quotes or without.
func expectedVersion(r *http.Request, inBody *int32) (*int32, error) {
	h := strings.TrimSpace(r.Header.Get("If-Match"))
	if h == "" || h == "*" {
		return inBody, nil
	}
	tag := h
	if len(h) > 1 && strings.HasPrefix(h, `"`) && strings.HasSuffix(h, `"`) {
		tag = h[1 : len(h)-1]
	}
	n, err := strconv.ParseUint(tag, 10, 31)
	if err != nil || len(r.Header.Values("If-Match")) > 1 {
		return nil, invalid("if-match is %s; give the version counter as in the etag, for example \"3\"", h)
	}
	v := int32(n)
	if inBody != nil && *inBody != v {
		return nil, invalid("if-match is %d and expected_version is %d", v, *inBody)
	}
	return &v, nil
}

// delete has no conditional form: the log knows no delete at a version, and checking
// first and deleting afterwards would only look like one.
func (v variables) delete(r *http.Request) (Reply, error) {
	req, _, err := target(r)
	if err != nil {
		return Reply{}, err
	}
	if r.Header.Get("If-Match") != "" {
		return Reply{}, invalid("if-match is not supported for DELETE; leave it out")
	}
	req.Options = writeOptions(r, "")
	out, head, err := invoke(r, func(ctx context.Context) (*pb.DeleteResponse, error) { return v.vars.Delete(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	return Reply{Body: map[string]any{"deleted": true, "version": out.GetVersion().GetCounter(), "dot": wire.Dot(out.GetVersion().GetDot()).String()}, Header: head}, nil
}

func (v variables) history(r *http.Request) (Reply, error) {
	t, q, err := target(r, "limit")
	if err != nil {
		return Reply{}, err
	}
	req := &pb.HistoryRequest{Tenant: t.Tenant, Session: t.Session, Identifier: t.Identifier}
	if s := q["limit"]; s != "" {
		n, err := strconv.ParseInt(s, 10, 32)
		if err != nil {
			return Reply{}, invalid("query parameter limit=%q is not a number", s)
		}
		req.Limit = int32(n)
	}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.HistoryResponse, error) { return v.vars.History(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	all := make([]historyJSON, len(out.GetEntries()))
	for i, e := range out.GetEntries() {
		all[i] = historyJSON{Version: e.GetVersion().GetCounter(), Dot: wire.Dot(e.GetVersion().GetDot()).String(),
			Type: e.GetValue().GetType(), Value: e.GetValue().GetJson(), Binary: e.GetValue().GetBinary(),
			At: wire.Time(e.GetAt()), Actor: e.GetActor(), Metadata: e.GetMetadata(), Deleted: e.GetDeleted()}
	}
	return Reply{Body: map[string]any{"entries": all}, Header: head}, nil
}

// rollback writes the value of an earlier version as a new one.
func (v variables) rollback(r *http.Request) (Reply, error) {
	t, _, err := target(r)
	if err != nil {
		return Reply{}, err
	}
	var body struct {
		TargetVersion *int32 `json:"target_version"`
		Actor         string `json:"actor"`
	}
	if err := readJSON(r, &body); err != nil {
		return Reply{}, err
	}
	if body.TargetVersion == nil {
		return Reply{}, invalid(`body has no "target_version"`)
	}
	req := &pb.RollbackRequest{Tenant: t.Tenant, Session: t.Session, Identifier: t.Identifier,
		TargetVersion: *body.TargetVersion, Options: writeOptions(r, body.Actor)}
	out, head, err := invoke(r, func(ctx context.Context) (*pb.Variable, error) { return v.vars.Rollback(ctx, req) })
	if err != nil {
		return Reply{Header: head}, err
	}
	return variableReply(out, head), nil
}

func variableReply(v *pb.Variable, head metadata.MD) Reply {
	return Reply{Header: head, ETag: strconv.Quote(strconv.Itoa(int(v.GetVersion().GetCounter()))), Body: toJSON(v)}
}

func toJSON(v *pb.Variable) variableJSON {
	return variableJSON{
		ID: v.GetId(), Tenant: v.GetKey().GetTenant(), Session: v.GetKey().GetSession(), Name: v.GetKey().GetName(),
		Type: v.GetValue().GetType(), Value: v.GetValue().GetJson(), Binary: v.GetValue().GetBinary(),
		Version: v.GetVersion().GetCounter(), Dot: wire.Dot(v.GetVersion().GetDot()).String(),
		Constraints: json.RawMessage(v.GetConstraintsJson()), Metadata: v.GetMetadata(), Source: v.GetSource(),
		CreatedAt: wire.Time(v.GetCreatedAt()), UpdatedAt: wire.Time(v.GetUpdatedAt()), Lock: lockJSON(v.GetOptimization()),
	}
}

// VariableJSON is the body of the answer to a GET of one variable.
func VariableJSON(v *pb.Variable) ([]byte, error) { return encode(toJSON(v)) }
