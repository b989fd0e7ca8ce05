// Package mlflow answers the model registry part of MLflow's REST interface from the
// models of the mesh, so that programs and people with an MLflow client register versions,
// move aliases and look things up without another registry beside this one.
//
//	MLFLOW_REGISTRY_URI=http://127.0.0.1:7401 python -c 'from mlflow import MlflowClient …'
//
// # What is served
//
// Under /api/2.0/mlflow/, with the shapes of model_registry.proto:
//
//	registered-models/  create get update search get-latest-versions set-tag delete-tag alias
//	model-versions/     create get update search get-download-uri transition-stage set-tag delete-tag
//
// rename and delete answer NOT_IMPLEMENTED: what served when must stay answerable, and
// nothing is ever taken out of the log. Versions are archived instead.
//
// # How words correspond
//
//	version            the number of a version; our name is the tag outrigger.version
//	alias              champion, challenger, last_good; others are refused. Setting
//	                   champion promotes. The champion cannot be deleted
//	stage None         registered
//	stage Staging      validated, shadow, candidate; setting it makes a version validated
//	stage Production   production; setting it makes the version the champion
//	stage Archived     retired, quarantined; setting it retires
//	source             metadata mlflow.source. A digest "sha256:…", or the address of an
//	                   artifact of this control plane, is the version's artifact, too
//	run_id, run_link   metadata mlflow.run_id, mlflow.run_link
//	description, tags  ours; they may change and decide nothing
//
// A version created here answers no requests, unless its tag outrigger.endpoints says at its
// creation where it runs ("10.0.0.1:8000@eu, 10.0.0.2:8000"; outrigger.upstream_model is
// the name it has there). It is then a version like any other, and the first one of a model
// goes into production.
//
// # Promises
//
// Calls are those of the admin API: the same roles, refusals and events. Error codes are
// MLflow's (internal/status). A state change that is not allowed is INVALID_STATE with
// status 409, because MLflow's clients repeat a 500. Unknown members of a request are
// passed over, as MLflow does. Bodies are bounded by rest.MaxBodyBytes. Searches look at
// the models as they are at each call: a page follows from its token's offset.
//
// A Handler may be used by any number of goroutines and starts none.
package mlflow

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Prefix is where MLflow's interface is.
const Prefix = "/api/2.0/mlflow/"

// Registry is what answers: the admin API.
type Registry interface {
	GetModel(context.Context, *pb.NameRequest) (*pb.Model, error)
	CreateModel(context.Context, *pb.CreateModelRequest) (*pb.Model, error)
	AnnotateModel(context.Context, *pb.AnnotateModelRequest) (*pb.Model, error)
	RegisterModelVersion(context.Context, *pb.RegisterModelVersionRequest) (*pb.Model, error)
	SetModelVersionState(context.Context, *pb.SetModelVersionStateRequest) (*pb.Model, error)
	MoveAlias(context.Context, *pb.MoveAliasRequest) (*pb.Model, error)
	DeleteAlias(context.Context, *pb.DeleteAliasRequest) (*pb.Model, error)
}

// Options of a Handler. Registry and All are required.
type Options struct {
	Registry Registry
	// All returns every model, by name.
	All func() []*pb.Model
	// Gate is asked before every call, by the names of the admin API; nil lets all pass.
	Gate rest.Gate
}

// Handler serves the interface.
type Handler struct {
	o   Options
	mux *http.ServeMux
}

// answerFunc answers one call; the result is written as JSON.
type answerFunc func(c *call) (any, error)

// New starts nothing.
func New(o Options) *Handler {
	h := &Handler{o: o, mux: http.NewServeMux()}
	for pattern, f := range map[string]answerFunc{
		"POST registered-models/create":              createModel,
		"GET registered-models/get":                  getModel,
		"PATCH registered-models/update":             updateModel,
		"GET registered-models/search":               searchModels,
		"GET registered-models/get-latest-versions":  latestVersions,
		"POST registered-models/get-latest-versions": latestVersions,
		"POST registered-models/set-tag":             setModelTag,
		"DELETE registered-models/delete-tag":        deleteModelTag,
		"POST registered-models/alias":               setAlias,
		"GET registered-models/alias":                getAlias,
		"DELETE registered-models/alias":             deleteAlias,
		"POST registered-models/rename":              never("a model's name is what applications call it by and its events are kept under; register its versions under the other name"),
		"DELETE registered-models/delete":            never("which version answered when must stay answerable; archive its versions"),
		"POST model-versions/create":                 createVersion,
		"GET model-versions/get":                     getVersion,
		"PATCH model-versions/update":                updateVersion,
		"GET model-versions/search":                  searchVersions,
		"GET model-versions/get-download-uri":        downloadURI,
		"POST model-versions/transition-stage":       transition,
		"POST model-versions/set-tag":                setVersionTag,
		"DELETE model-versions/delete-tag":           deleteVersionTag,
		"DELETE model-versions/delete":               never("which version answered when must stay answerable; move it to stage Archived"),
	} {
		method, path, _ := strings.Cut(pattern, " ")
		h.mux.HandleFunc(method+" "+Prefix+path, func(w http.ResponseWriter, r *http.Request) { h.serve(w, r, f) })
	}
	h.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		status.WriteMLflow(w, outrigger.Errorf(outrigger.NotFound, "%s %s not found; the model registry of MLflow is served, below %s", r.Method, r.URL.Path, Prefix))
	})
	return h
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.mux.ServeHTTP(w, r) }

func never(why string) answerFunc {
	return func(*call) (any, error) {
		return nil, &outrigger.Error{Kind: outrigger.Invalid, Message: why, Cause: status.ErrNotImplemented}
	}
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request, f answerFunc) {
	c := &call{h: h, r: r, ctx: r.Context()}
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		c.ctx = peer.NewContext(c.ctx, &peer.Peer{Addr: net.TCPAddrFromAddrPort(ap)})
	}
	out, err := any(nil), c.read(w)
	if err == nil {
		out, err = f(c)
	}
	if err != nil {
		status.WriteMLflow(w, err)
		return
	}
	raw, err := json.Marshal(out)
	if err != nil {
		status.WriteMLflow(w, outrigger.Wrap(outrigger.Internal, err, "encode the answer"))
		return
	}
	w.Header().Set("content-type", "application/json")
	w.Header().Set("cache-control", "no-store")
	_, _ = w.Write(append(raw, '\n')) // nobody is left to tell
}

// call is one request.
type call struct {
	h   *Handler
	r   *http.Request
	ctx context.Context
	in  input
}

// input holds the members of all requests; each call looks at its own.
type input struct {
	Name                    string    `json:"name"`
	Version                 number    `json:"version"`
	Alias                   string    `json:"alias"`
	Key                     string    `json:"key"`
	Value                   string    `json:"value"`
	Source                  string    `json:"source"`
	RunID                   string    `json:"run_id"`
	RunLink                 string    `json:"run_link"`
	Description             *string   `json:"description"`
	Tags                    []keyText `json:"tags"`
	Stage                   string    `json:"stage"`
	Stages                  []string  `json:"stages"`
	ArchiveExistingVersions bool      `json:"archive_existing_versions"`

	// Of searches, which have no body.
	filter, pageToken, maxResults string
	orderBy                       []string
}

type keyText struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// number is text that some clients write as a number.
type number string

// UnmarshalJSON implements json.Unmarshaler.
func (n *number) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		return json.Unmarshal(b, (*string)(n))
	}
	var i json.Number
	if err := json.Unmarshal(b, &i); err != nil {
		return err
	}
	*n = number(i.String())
	return nil
}

// read takes the query and, for other methods than GET, the body.
func (c *call) read(w http.ResponseWriter) error {
	q := c.r.URL.Query()
	c.in = input{Name: q.Get("name"), Version: number(q.Get("version")), Alias: q.Get("alias"), Key: q.Get("key"), Stages: q["stages"],
		filter: q.Get("filter"), pageToken: q.Get("page_token"), maxResults: q.Get("max_results"), orderBy: q["order_by"]}
	if c.r.Method == http.MethodGet {
		return nil
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, c.r.Body, rest.MaxBodyBytes))
	if err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "body")
	}
	if len(raw) == 0 {
		return nil
	}
	if err := json.Unmarshal(raw, &c.in); err != nil {
		return outrigger.Errorf(outrigger.Invalid, "body is not the JSON that was expected: %v", err)
	}
	return nil
}

// carry makes a call of the admin API in the caller's name.
func carry[Req proto.Message](c *call, verb string, do func(context.Context, Req) (*pb.Model, error), req Req) (m *pb.Model, err error) {
	if c.h.o.Gate == nil {
		return do(c.ctx, req)
	}
	check, done, err := c.h.o.Gate(c.ctx, verb)
	if done != nil {
		defer func() { done(err) }()
	}
	if err == nil && check != nil {
		err = check(req)
	}
	if err != nil {
		return nil, err
	}
	m, err = do(c.ctx, req)
	return m, err
}

// model reads the model that the request names.
func (c *call) model() (*pb.Model, error) {
	if c.in.Name == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "name is missing; it is the name of a registered model")
	}
	return carry(c, "GetModel", c.h.o.Registry.GetModel, &pb.NameRequest{Name: c.in.Name})
}
