package meshtest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// ask sends a request to the pod's sidecar and returns status, head and body.
func (p *Pod) ask(ctx context.Context, path, body string, fields map[string]string) (int, http.Header, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://sidecar"+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header.Set("content-type", "application/json")
	for k, v := range fields {
		req.Header.Set(k, v)
	}
	resp, err := p.HTTP.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, raw, err
}

// An experiment from the control plane to the application: who is meant and lies within
// coverage and namespace finds the arm's settings over OpenFeature at one sidecar and is
// served by the arm's version at another; nobody else is touched, testers are no evidence,
// and when the rule has decided everybody is back on the champion.
func TestExperimentEndToEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		w.StartModel("v1")
		bad := w.StartModel("v2")
		admin := w.Control.Admin
		if _, err := admin.CreateExperiment(bg(t), &pb.CreateExperimentRequest{Name: "ab", Model: ModelName, Actor: "test",
			Enrolment: &pb.ExperimentEnrolment{Target: `attributes.plan == "pro"`, Coverage: 8000, Namespace: "prompts", NamespaceStart: 2000},
			Arms: []*pb.ExperimentArm{{Name: "control", Version: "v1", Weight: 5000, Configuration: map[string]string{"prompt": `"old"`}},
				{Name: "treatment", Version: "v2", Weight: 5000, Configuration: map[string]string{"prompt": `"new"`}}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := admin.PlanExperiment(bg(t), &pb.PlanExperimentRequest{Name: "ab", Actor: "test", Plan: &pb.ExperimentPlan{Baseline: .9, Mde: .05,
			Metrics: []*pb.ExperimentMetric{{Name: "success_rate"}}, MinDuration: durationpb.New(time.Minute), MaxDuration: durationpb.New(time.Hour)}}); err != nil {
			t.Fatal(err)
		}
		if _, err := admin.SetExperimentState(bg(t), &pb.SetExperimentStateRequest{Name: "ab", State: "running", Actor: "test"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		chat := func(p *Pod, user string, fields map[string]string) (int, http.Header) {
			code, h, _, err := p.ask(bg(t), "/v1/chat/completions", fmt.Sprintf(`{"model":%q,"max_tokens":1,"user":%q,"messages":[]}`, ModelName, user), fields)
			if err != nil {
				t.Fatal(err)
			}
			return code, h
		}
		flag := func(p *Pod, user, plan string) (int, string) {
			code, _, raw, err := p.ask(bg(t), "/ofrep/v1/evaluate/flags/ab.prompt", fmt.Sprintf(`{"context":{"targetingKey":%q,"plan":%q}}`, user, plan), nil)
			if err != nil {
				t.Fatal(err)
			}
			var got struct{ Variant, Value string }
			if err := json.Unmarshal(raw, &got); err != nil {
				t.Fatalf("%s: %v", raw, err)
			}
			return code, got.Variant + "=" + got.Value
		}
		enrolled := map[string]int{}
		const users = 1600
		for i := range users {
			bad.Failing.Store(i%3 == 0) // often enough to tell, never so often that the breaker opens
			user, plan := fmt.Sprintf("user-%d", i), "free"
			if i%4 != 0 {
				plan = "pro"
			}
			in := plan == "pro" && experiments.Bucket("coverage:ab", user) < 8000 && experiments.Bucket("namespace:prompts", user) >= 2000
			code, value := flag(w.Pods[0], user, plan)
			_, h := chat(w.Pods[1], user, map[string]string{"plan": plan})
			arm := h.Get(outrigger.HeaderArm)
			if !in {
				if code != http.StatusNotFound || arm != policy.ArmNotEnrolled || h.Get(outrigger.HeaderVersion) != "v1" {
					t.Fatalf("%s (%s) takes no part: flag %d %s, arm %s, version %s", user, plan, code, value, arm, h.Get(outrigger.HeaderVersion))
				}
				continue
			}
			want := map[string]string{"control": "control=old", "treatment": "treatment=new"}[arm]
			if code != http.StatusOK || value != want || want == "" {
				t.Fatalf("%s (%s): flag %d %s at one sidecar, arm %s at the other", user, plan, code, value, arm)
			}
			enrolled[arm]++
		}
		total := enrolled["control"] + enrolled["treatment"]
		if total < users/3 || enrolled["control"] < total/3 || enrolled["treatment"] < total/3 {
			t.Fatalf("enrolled %v of %d", enrolled, users)
		}
		grant, err := w.Keys.SignGrant(identity.Grant{Experiment: "ab", Arm: "treatment", Until: time.Now().Add(time.Hour)}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, h := chat(w.Pods[0], "tester", map[string]string{inference.HeaderForce: grant}); h.Get(outrigger.HeaderVersion) != "v2" || h.Get(outrigger.HeaderArm) != policy.ArmForced {
			t.Errorf("forced: %v", h)
		}
		if code, _ := chat(w.Pods[0], "tester", map[string]string{inference.HeaderForce: "treatment"}); code != http.StatusUnauthorized {
			t.Errorf("forced without a grant: %d", code)
		}
		time.Sleep(3 * time.Second) // reports take a second
		r, err := admin.ExperimentResults(bg(t), &pb.NameRequest{Name: "ab"})
		if err != nil {
			t.Fatal(err)
		}
		if e := r.Results.AsMap()["exposure"].(map[string]any); e["units"] != float64(total) || e["multiple"] != 0.0 {
			t.Errorf("exposure %v, want the %d units that take part", e, total)
		}
		time.Sleep(2 * time.Minute)
		if r, err = admin.ExperimentResults(bg(t), &pb.NameRequest{Name: "ab"}); err != nil || r.Experiment.State != "concluded" || r.Experiment.Serve != "control" {
			t.Fatalf("%v, %v", r.GetExperiment(), err)
		}
		if code, _ := flag(w.Pods[0], "user-1", "pro"); code != http.StatusNotFound {
			t.Errorf("flag after the end: %d", code)
		}
		for i := range 50 {
			if code, h := chat(w.Pods[i%2], fmt.Sprintf("user-%d", i), map[string]string{"plan": "pro"}); code != 200 || h.Get(outrigger.HeaderVersion) != "v1" {
				t.Fatalf("after the end: %d, %s", code, h.Get(outrigger.HeaderVersion))
			}
		}
	})
}
