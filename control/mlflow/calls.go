package mlflow

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy/models"
)

// Tags that mean something when a version is created.
const (
	tagVersion   = "outrigger.version"
	tagState     = "outrigger.state"
	tagEndpoints = "outrigger.endpoints"
	tagUpstream  = "outrigger.upstream_model"
)

// Metadata that carries what only MLflow knows.
const (
	metaSource  = "mlflow.source"
	metaRunID   = "mlflow.run_id"
	metaRunLink = "mlflow.run_link"
)

// The answers, in the words of model_registry.proto.
type registeredModel struct {
	Name        string         `json:"name"`
	Created     int64          `json:"creation_timestamp"`
	Updated     int64          `json:"last_updated_timestamp"`
	Description string         `json:"description,omitempty"`
	Latest      []modelVersion `json:"latest_versions,omitempty"`
	Tags        []keyText      `json:"tags,omitempty"`
	Aliases     []modelAlias   `json:"aliases,omitempty"`
}

type modelAlias struct {
	Alias   string `json:"alias"`
	Version string `json:"version"`
}

type modelVersion struct {
	Name        string    `json:"name"`
	Version     string    `json:"version"`
	Created     int64     `json:"creation_timestamp"`
	Updated     int64     `json:"last_updated_timestamp"`
	Stage       string    `json:"current_stage"`
	Description string    `json:"description,omitempty"`
	Source      string    `json:"source,omitempty"`
	RunID       string    `json:"run_id,omitempty"`
	RunLink     string    `json:"run_link,omitempty"`
	Status      string    `json:"status"`
	Message     string    `json:"status_message,omitempty"`
	Tags        []keyText `json:"tags,omitempty"`
	Aliases     []string  `json:"aliases,omitempty"`

	number int32
}

// The stages of MLflow, in its order.
const (
	stageNone       = "None"
	stageStaging    = "Staging"
	stageProduction = "Production"
	stageArchived   = "Archived"
)

func stages() []string { return []string{stageNone, stageStaging, stageProduction, stageArchived} }

func stageOf(state string) string {
	switch models.State(state) {
	case models.Registered:
		return stageNone
	case models.Production:
		return stageProduction
	case models.Retired, models.Quarantined:
		return stageArchived
	}
	return stageStaging
}

// stateOf is what setting a stage makes of a version.
func stateOf(stage string) (stageName, state string, err error) {
	for _, s := range stages() {
		if strings.EqualFold(s, stage) {
			to := map[string]models.State{stageNone: models.Registered, stageStaging: models.Validated, stageProduction: models.Production, stageArchived: models.Retired}
			return s, string(to[s]), nil
		}
	}
	return "", "", outrigger.Errorf(outrigger.Invalid, "stage %q is not one of %s", stage, strings.Join(stages(), ", "))
}

func tagsOf(m map[string]string) []keyText {
	out := []keyText{}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, keyText{k, m[k]})
	}
	return out
}

func modelOf(m *pb.Model) registeredModel {
	out := registeredModel{Name: m.GetName(), Created: m.GetCreatedAt().AsTime().UnixMilli(), Updated: m.GetChangedAt().AsTime().UnixMilli(),
		Description: m.GetDescription(), Tags: tagsOf(m.GetTags()), Latest: latest(m, nil)}
	for _, a := range slices.Sorted(maps.Keys(m.GetAliases())) {
		if v := named(m, m.GetAliases()[a]); v != nil {
			out.Aliases = append(out.Aliases, modelAlias{a, strconv.Itoa(int(v.GetNumber()))})
		}
	}
	return out
}

// latest are the newest versions of the stages, all if none is named, in MLflow's order.
func latest(m *pb.Model, of []string) []modelVersion {
	var out []modelVersion
	for _, s := range stages() {
		if len(of) > 0 && !slices.ContainsFunc(of, func(o string) bool { return strings.EqualFold(o, s) }) {
			continue
		}
		for _, v := range slices.Backward(m.GetVersions()) {
			if stageOf(v.GetState()) == s {
				out = append(out, versionOf(m, v))
				break
			}
		}
	}
	return out
}

func versionOf(m *pb.Model, v *pb.ModelVersion) modelVersion {
	tags := map[string]string{tagVersion: v.GetVersion(), tagState: v.GetState()}
	maps.Copy(tags, v.GetTags())
	out := modelVersion{Name: m.GetName(), Version: strconv.Itoa(int(v.GetNumber())), number: v.GetNumber(),
		Created: v.GetRegisteredAt().AsTime().UnixMilli(), Updated: v.GetChangedAt().AsTime().UnixMilli(),
		Stage: stageOf(v.GetState()), Description: v.GetDescription(), Source: v.GetMetadata()[metaSource], RunID: v.GetMetadata()[metaRunID],
		RunLink: v.GetMetadata()[metaRunLink], Status: "READY", Message: v.GetReason(), Tags: tagsOf(tags)}
	if out.Source == "" {
		out.Source = v.GetArtifact()
	}
	for _, a := range slices.Sorted(maps.Keys(m.GetAliases())) {
		if m.GetAliases()[a] == v.GetVersion() {
			out.Aliases = append(out.Aliases, a)
		}
	}
	return out
}

func named(m *pb.Model, name string) *pb.ModelVersion {
	for _, v := range m.GetVersions() {
		if v.GetVersion() == name {
			return v
		}
	}
	return nil
}

// version reads the version that the request names, by its number.
func (c *call) version() (*pb.Model, *pb.ModelVersion, error) {
	m, err := c.model()
	if err != nil {
		return nil, nil, err
	}
	n, err := strconv.ParseInt(string(c.in.Version), 10, 32)
	if err != nil {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "version is %q, it must be a whole number", string(c.in.Version))
	}
	for _, v := range m.GetVersions() {
		if int64(v.GetNumber()) == n {
			return m, v, nil
		}
	}
	return nil, nil, outrigger.Errorf(outrigger.NotFound, "Model Version (name=%s, version=%d) not found", m.GetName(), n)
}

type modelAnswer struct {
	Model registeredModel `json:"registered_model"`
}

type versionAnswer struct {
	Version modelVersion `json:"model_version"`
}

type nothing struct{}

func answerModel(m *pb.Model, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return modelAnswer{modelOf(m)}, nil
}

func answerVersion(m *pb.Model, name string, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return versionAnswer{versionOf(m, named(m, name))}, nil
}

func createModel(c *call) (any, error) {
	// As MLflow's own server: its clients name versions by models:/NAME/VERSION.
	if strings.Contains(c.in.Name, "/") {
		return nil, outrigger.Errorf(outrigger.Invalid, "name %q contains '/', which names of registered models cannot", c.in.Name)
	}
	req := &pb.CreateModelRequest{Model: c.in.Name, Tags: tagMap(c.in.Tags)}
	if c.in.Description != nil {
		req.Description = *c.in.Description
	}
	return answerModel(carry(c, "CreateModel", c.h.o.Registry.CreateModel, req))
}

func tagMap(tags []keyText) map[string]string {
	out := make(map[string]string, len(tags))
	for _, t := range tags {
		out[t.Key] = t.Value
	}
	return out
}

func getModel(c *call) (any, error) { return answerModel(c.model()) }

func updateModel(c *call) (any, error) {
	text := ""
	if c.in.Description != nil {
		text = *c.in.Description
	}
	return answerModel(carry(c, "AnnotateModel", c.h.o.Registry.AnnotateModel, &pb.AnnotateModelRequest{Model: c.in.Name, Description: &text}))
}

func latestVersions(c *call) (any, error) {
	for _, s := range c.in.Stages {
		if _, _, err := stateOf(s); err != nil {
			return nil, err
		}
	}
	m, err := c.model()
	if err != nil {
		return nil, err
	}
	return struct {
		Versions []modelVersion `json:"model_versions,omitempty"`
	}{latest(m, c.in.Stages)}, nil
}

func setModelTag(c *call) (any, error) {
	_, err := carry(c, "AnnotateModel", c.h.o.Registry.AnnotateModel,
		&pb.AnnotateModelRequest{Model: c.in.Name, SetTags: map[string]string{c.in.Key: c.in.Value}})
	return nothing{}, err
}

func deleteModelTag(c *call) (any, error) {
	_, err := carry(c, "AnnotateModel", c.h.o.Registry.AnnotateModel, &pb.AnnotateModelRequest{Model: c.in.Name, DeleteTags: []string{c.in.Key}})
	return nothing{}, err
}

func setAlias(c *call) (any, error) {
	m, v, err := c.version()
	if err != nil {
		return nil, err
	}
	_, err = carry(c, "MoveAlias", c.h.o.Registry.MoveAlias, &pb.MoveAliasRequest{Model: m.GetName(), Alias: c.in.Alias, To: v.GetVersion()})
	return nothing{}, err
}

func getAlias(c *call) (any, error) {
	m, err := c.model()
	if err != nil {
		return nil, err
	}
	v := named(m, m.GetAliases()[c.in.Alias])
	if v == nil {
		// MLflow's own answer; its clients tell the two apart.
		return nil, outrigger.Errorf(outrigger.Invalid, "Registered model alias %s not found.", c.in.Alias)
	}
	return versionAnswer{versionOf(m, v)}, nil
}

func deleteAlias(c *call) (any, error) {
	m, err := c.model()
	if err != nil {
		return nil, err
	}
	if _, ok := m.GetAliases()[c.in.Alias]; !ok && c.in.Alias != "" {
		return nothing{}, nil // gone already, which MLflow calls success
	}
	_, err = carry(c, "DeleteAlias", c.h.o.Registry.DeleteAlias, &pb.DeleteAliasRequest{Model: c.in.Name, Alias: c.in.Alias})
	return nothing{}, err
}

func createVersion(c *call) (any, error) {
	m, err := c.model()
	if err != nil {
		return nil, err
	}
	if c.in.Source == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "source is missing; it says where the version's files are")
	}
	req := &pb.RegisterModelVersionRequest{Model: m.GetName(), Tags: tagMap(c.in.Tags), Metadata: map[string]string{metaSource: c.in.Source}}
	for key, value := range map[string]string{metaRunID: c.in.RunID, metaRunLink: c.in.RunLink} {
		if value != "" {
			req.Metadata[key] = value
		}
	}
	if c.in.Description != nil {
		req.Description = *c.in.Description
	}
	if _, digest, ok := strings.Cut("/"+c.in.Source, "/v1/artifacts/"); ok && models.CheckDigest("", digest) == nil {
		req.Artifact = digest
	} else if models.CheckDigest("", c.in.Source) == nil {
		req.Artifact = c.in.Source
	}
	req.UpstreamModel = req.Tags[tagUpstream]
	for entry := range strings.SplitSeq(req.Tags[tagEndpoints], ",") {
		if address, region, _ := strings.Cut(strings.TrimSpace(entry), "@"); address != "" {
			req.Endpoints = append(req.Endpoints, &pb.Endpoint{Address: address, Region: region, Weight: 1})
		}
	}
	req.WithoutEndpoints = len(req.Endpoints) == 0
	out, err := carry(c, "RegisterModelVersion", c.h.o.Registry.RegisterModelVersion, req)
	if err != nil {
		return nil, err
	}
	// Others may have registered since: ours is the one that the request's decision named.
	return answerVersion(out, req.GetVersion(), nil)
}

func getVersion(c *call) (any, error) {
	m, v, err := c.version()
	return answerVersion(m, v.GetVersion(), err)
}

// annotate changes what is beside the version that the request names.
func (c *call) annotate(edit func(*pb.AnnotateModelRequest)) (*pb.Model, string, error) {
	m, v, err := c.version()
	if err != nil {
		return nil, "", err
	}
	req := &pb.AnnotateModelRequest{Model: m.GetName(), Version: v.GetVersion()}
	edit(req)
	m, err = carry(c, "AnnotateModel", c.h.o.Registry.AnnotateModel, req)
	return m, v.GetVersion(), err
}

func updateVersion(c *call) (any, error) {
	text := ""
	if c.in.Description != nil {
		text = *c.in.Description
	}
	return answerVersion(c.annotate(func(r *pb.AnnotateModelRequest) { r.Description = &text }))
}

func setVersionTag(c *call) (any, error) {
	_, _, err := c.annotate(func(r *pb.AnnotateModelRequest) { r.SetTags = map[string]string{c.in.Key: c.in.Value} })
	return nothing{}, err
}

func deleteVersionTag(c *call) (any, error) {
	_, _, err := c.annotate(func(r *pb.AnnotateModelRequest) { r.DeleteTags = []string{c.in.Key} })
	return nothing{}, err
}

func downloadURI(c *call) (any, error) {
	m, v, err := c.version()
	if err != nil {
		return nil, err
	}
	uri := versionOf(m, v).Source
	if v.GetArtifact() != "" {
		uri = "http://" + c.r.Host + "/v1/artifacts/" + v.GetArtifact()
	}
	return struct {
		URI string `json:"artifact_uri"`
	}{uri}, nil
}

func transition(c *call) (any, error) {
	stage, state, err := stateOf(c.in.Stage)
	if err != nil {
		return nil, err
	}
	if c.in.ArchiveExistingVersions && stage != stageProduction {
		return nil, outrigger.Errorf(outrigger.Invalid, "archive_existing_versions is true with stage %s; it goes with Production only", stage)
	}
	m, v, err := c.version()
	if err != nil {
		return nil, err
	}
	if stageOf(v.GetState()) == stage {
		return versionAnswer{versionOf(m, v)}, nil
	}
	m, err = carry(c, "SetModelVersionState", c.h.o.Registry.SetModelVersionState, &pb.SetModelVersionStateRequest{
		Model: m.GetName(), Version: v.GetVersion(), State: state, Reason: "stage " + stage, RetireReplaced: c.in.ArchiveExistingVersions})
	return answerVersion(m, v.GetVersion(), err)
}
