package control_test

import (
	"context"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// TestCatalogue follows a model that is written down before anything answers for it, over
// a restart.
func TestCatalogue(t *testing.T) {
	log := memory.New()
	p := start(t, log, nil)
	ctx, a := context.Background(), p.srv.Admin()
	refused := func(err error, kind outrigger.Kind, texts ...string) {
		t.Helper()
		wantKind(t, err, kind)
		for _, text := range texts {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%v does not say %q", err, text)
			}
		}
	}
	m, err := a.CreateModel(ctx, &pb.CreateModelRequest{Model: "chat", Description: "answers", Tags: map[string]string{"team": "blue"}, Actor: "ann"})
	if err != nil || len(m.Versions) != 0 || m.Description != "answers" || m.Tags["team"] != "blue" || m.CreatedAt == nil {
		t.Fatalf("%v, %v", m, err)
	}
	_, err = a.CreateModel(ctx, &pb.CreateModelRequest{Model: "chat"})
	refused(err, outrigger.Exists, `"chat"`)
	_, err = a.CreateModel(ctx, &pb.CreateModelRequest{Model: "x", Tags: map[string]string{"k": strings.Repeat("v", 5001)}})
	refused(err, outrigger.Invalid, `tag "k"`, "5001", "5000")
	if alerts, err := a.ListAlerts(ctx, &pb.ListRequestAll{}); err != nil || len(alerts.Alerts) != 0 {
		t.Errorf("a model that nobody expects answers of is an alert: %v, %v", alerts, err)
	}
	_, err = a.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: "chat"})
	refused(err, outrigger.Invalid, "endpoints has 0 entries")
	// Numbers are names where there is no name, the same request twice is one version.
	for range 2 {
		m, err = a.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: "chat", WithoutEndpoints: true, RequestId: "r1"})
	}
	if err != nil || len(m.Versions) != 1 || m.Versions[0].Version != "1" || m.Versions[0].State != "registered" || len(m.Aliases) != 0 {
		t.Fatalf("%v, %v", m, err)
	}
	// Nothing answers, so a record may be called the champion.
	if _, err = a.MoveAlias(ctx, &pb.MoveAliasRequest{Model: "chat", Alias: "champion", To: "1"}); err != nil {
		t.Fatal(err)
	}
	ep := []*pb.Endpoint{{Address: "10.0.0.1:80"}}
	for range 2 {
		if m, err = a.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: "chat", Endpoints: ep}); err != nil {
			t.Fatal(err)
		}
	}
	if m.Versions[2].Version != "3" || m.Versions[2].Number != 3 {
		t.Fatalf("%v", m.Versions)
	}
	if m, err = a.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "2", State: "production"}); err != nil || m.Aliases["champion"] != "2" {
		t.Fatalf("%v, %v", m, err)
	}
	// From now on a record cannot take over.
	_, err = a.MoveAlias(ctx, &pb.MoveAliasRequest{Model: "chat", Alias: "champion", To: "1"})
	refused(err, outrigger.Locked, `"1"`, "no endpoint")
	_, err = a.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "1", State: "production"})
	refused(err, outrigger.Locked, "no endpoint")
	_, err = a.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "1", State: "shadow", ShadowWeight: 10})
	refused(err, outrigger.Locked, "no endpoint")
	// Retiring what is replaced is part of the same change.
	if m, err = a.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "3", State: "production", RetireReplaced: true}); err != nil ||
		m.Versions[1].State != "retired" || m.Versions[2].State != "production" {
		t.Fatalf("%v, %v", m, err)
	}
	_, err = a.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "1", State: "validated", RetireReplaced: true})
	refused(err, outrigger.Invalid, "retire_replaced")

	text := "of the first"
	if _, err = a.AnnotateModel(ctx, &pb.AnnotateModelRequest{Model: "chat", Version: "1", Description: &text, SetTags: map[string]string{"a": "1", "b": "2"}}); err != nil {
		t.Fatal(err)
	}
	if _, err = a.AnnotateModel(ctx, &pb.AnnotateModelRequest{Model: "chat", Version: "1", DeleteTags: []string{"a", "z"}}); err != nil {
		t.Fatal(err)
	}
	_, err = a.AnnotateModel(ctx, &pb.AnnotateModelRequest{Model: "chat", Version: "9"})
	refused(err, outrigger.NotFound, `"9"`)
	cost := "requests * 2.0"
	if _, err = a.ConfigureModel(ctx, &pb.ConfigureModelRequest{Model: "chat", Cost: &cost}); err != nil {
		t.Fatal(err)
	}
	p.stop()
	p = start(t, log, nil)
	m, err = p.srv.Admin().GetModel(ctx, &pb.NameRequest{Name: "chat"})
	if err != nil || m.Cost != cost || m.Tags["team"] != "blue" || m.Versions[0].Description != text || len(m.Versions[0].Tags) != 1 || m.Versions[0].Tags["b"] != "2" {
		t.Errorf("after a restart: %v, %v", m, err)
	}
}

// TestShadowWeight: a shadow's share is a setting of its state and goes with it.
func TestShadowWeight(t *testing.T) {
	p := newPlane(t)
	p.register("chat", "v1", "v2")
	ctx, a := context.Background(), p.srv.Admin()
	set := func(state string, weight uint32) (*pb.ModelVersion, error) {
		m, err := a.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "v2", State: state, ShadowWeight: weight})
		if err != nil {
			return nil, err
		}
		return m.Versions[1], nil
	}
	for _, s := range []struct {
		state  string
		weight uint32
	}{{"shadow", 500}, {"shadow", 700}, {"shadow", 0}, {"shadow", 10_000}, {"registered", 0}, {"shadow", 0}} {
		v, err := set(s.state, s.weight)
		if err != nil || v.State != s.state || v.ShadowWeight != s.weight {
			t.Fatalf("%v: %v, %v", s, v, err)
		}
	}
	if _, err := set("shadow", 10_001); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), "10001") {
		t.Errorf("more than everybody: %v", err)
	}
}
