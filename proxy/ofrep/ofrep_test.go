package ofrep_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	provider "github.com/open-feature/go-sdk-contrib/providers/ofrep"
	"github.com/open-feature/go-sdk/openfeature"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/proxy/ofrep"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// split is a model of which half of the users find the treatment's settings.
func split(experiment string) policy.Model {
	return policy.Model{Name: "chat", Salt: "experiment:" + experiment, Unit: experiments.UnitUser, WeightEpoch: 7, Experiment: experiment,
		Arms: []policy.Arm{
			{Name: "control", Version: "v1", Ranges: []experiments.Range{{Start: 0, End: 5000}}, Settings: []policy.Setting{
				{Name: "enabled", JSON: "false"}, {Name: "prompt", JSON: `"old"`}, {Name: "temperature", JSON: "0.2"}}},
			{Name: "treatment", Version: "v2", Ranges: []experiments.Range{{Start: 5000, End: 10_000}}, Settings: []policy.Setting{
				{Name: "enabled", JSON: "true"}, {Name: "prompt", JSON: `"new"`}, {Name: "temperature", JSON: "0.7"}, {Name: "only_here", JSON: "[1]"}}},
		}, Versions: []policy.Version{{Name: "v1"}, {Name: "v2"}}}
}

type world struct {
	policy   *policy.Policy
	recorder *inference.Recorder
	handler  *ofrep.Handler
}

func newWorld() *world {
	w := &world{policy: &policy.Policy{Models: []policy.Model{split("ab"), {Name: "plain", Salt: "s"}}}, recorder: inference.NewRecorder(inference.RecorderOptions{})}
	w.handler = ofrep.New(ofrep.Options{Policy: func() *policy.Policy { return w.policy }, Region: "eu", Recorder: w.recorder})
	return w
}

func (w *world) post(path, body, tag string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
	if tag != "" {
		r.Header.Set("if-none-match", tag)
	}
	rec := httptest.NewRecorder()
	w.handler.ServeHTTP(rec, r)
	return rec
}

// exposed counts the unit rows reported since the last call, by arm.
func (w *world) exposed() map[string]int {
	out := map[string]int{}
	for _, d := range w.recorder.Drain(time.Time{}) {
		for _, u := range d.Units {
			if d.Region == "eu" && d.WeightEpoch == 7 && u.N == 0 && d.Requests == 0 {
				out[d.Arm]++
			}
		}
	}
	return out
}

const flags = "/ofrep/v1/evaluate/flags"

// arm is what the bucket rule says of a user.
func arm(user string) string {
	if experiments.Bucket("experiment:ab", user) < 5000 {
		return "control"
	}
	return "treatment"
}

// The same unit gets the arm that its model calls get, and is exposed once.
func TestAssignmentIsThatOfModelCalls(t *testing.T) {
	w := newWorld()
	model := w.policy.Models[0]
	want := map[string]int{}
	for i := range 400 {
		user := fmt.Sprintf("user-%d", i)
		a, err := inference.Assign(&model, user, inference.PolicyStatus{})
		if err != nil {
			t.Fatal(err)
		}
		want[a.Arm]++
		for range 2 {
			rec := w.post(flags+"/ab.prompt", `{"context":{"targetingKey":"`+user+`"}}`, "")
			var got struct{ Key, Reason, Variant, Value string }
			if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil || rec.Code != 200 {
				t.Fatalf("%d %s: %v", rec.Code, rec.Body, err)
			}
			if value := map[string]string{"control": "old", "treatment": "new"}[a.Arm]; got.Variant != a.Arm || got.Value != value || got.Reason != "SPLIT" || got.Key != "ab.prompt" {
				t.Fatalf("%s is in arm %s: %s", user, a.Arm, rec.Body)
			}
		}
	}
	if got := w.exposed(); got["control"] != want["control"] || got["treatment"] != want["treatment"] || want["control"] < 150 {
		t.Errorf("exposed %v, want %v", got, want)
	}
	w.post(flags, `{"context":{"targetingKey":"user-1"}}`, "")
	if got := w.exposed(); len(got) != 0 {
		t.Errorf("exposed again: %v", got)
	}
}

// The tag names the answer and the context, so 304 means that both are the same.
func TestBulk(t *testing.T) {
	w := newWorld()
	rec := w.post(flags, `{"context":{"targetingKey":"ann","plan":"free"}}`, "")
	var got struct {
		Flags []struct{ Key, Variant string }
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil || rec.Code != 200 || len(got.Flags) < 4 || got.Flags[0].Key != "ab" || got.Flags[1].Key != "ab.enabled" {
		t.Fatalf("%d %s: %v", rec.Code, rec.Body, err)
	}
	if n := w.exposed(); n[arm("ann")] != 1 {
		t.Errorf("exposed %v", n)
	}
	tag := rec.Header().Get("etag")
	again := func(body string) int { return w.post(flags, body, `"other", W/`+tag).Code }
	if c := again(`{"context":{"plan":"free","targetingKey":"ann"}}`); c != 304 {
		t.Errorf("same context in another order: %d", c)
	}
	if c := again(`{"context":{"targetingKey":"ann","plan":"paid"}}`); c != 200 {
		t.Errorf("other context: %d", c)
	}
	w.policy.Models[0].Arms[0].Settings[0].JSON, w.policy.Models[0].Arms[1].Settings[0].JSON = "null", "null"
	if c := again(`{"context":{"targetingKey":"ann","plan":"free"}}`); c != 200 {
		t.Errorf("other values: %d", c)
	}
}

func TestErrors(t *testing.T) {
	w := newWorld()
	good, stranger := `{"context":{"targetingKey":"ann"}}`, "treatment"
	user := "ann"
	for arm(user) == stranger { // somebody of the control, who has no only_here
		user += "n"
	}
	for _, c := range []struct {
		path, body string
		status     int
		code       string
	}{
		{flags + "/zz", good, 404, "FLAG_NOT_FOUND"},
		{flags + "/abc", good, 404, "FLAG_NOT_FOUND"},
		{flags + "/ab.only_here", `{"context":{"targetingKey":"` + user + `"}}`, 404, "FLAG_NOT_FOUND"},
		{flags + "/ab", `{"context":{}}`, 400, "TARGETING_KEY_MISSING"},
		{flags, `{}`, 400, "TARGETING_KEY_MISSING"},
		{flags + "/ab", `{"context":{"targetingKey":7}}`, 400, "INVALID_CONTEXT"},
		{flags + "/ab", `{"context":[]}`, 400, "INVALID_CONTEXT"},
		{flags + "/ab", `{"context":`, 400, "PARSE_ERROR"},
		{flags + "/ab", `{"context":{"targetingKey":"` + strings.Repeat("x", 1025) + `"}}`, 400, "INVALID_CONTEXT"},
		{flags + "/ab", strings.Repeat(" ", ofrep.MaxBody+1), 413, "INVALID_CONTEXT"},
		{"/ofrep/v1/configuration", good, 404, ""},
	} {
		rec := w.post(c.path, c.body, "")
		var got struct{ Key, ErrorCode, ErrorDetails string }
		if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil || rec.Code != c.status || got.ErrorCode != c.code || got.ErrorDetails == "" {
			t.Errorf("%s %.60s: %d %s", c.path, c.body, rec.Code, rec.Body)
		}
	}
	if n := w.exposed(); len(n) != 0 {
		t.Errorf("errors exposed %v", n)
	}
	w.policy = nil
	if rec := w.post(flags+"/ab", good, ""); rec.Code != 503 || rec.Header().Get("retry-after") == "" {
		t.Errorf("without a policy: %d", rec.Code)
	}
	rec := httptest.NewRecorder()
	w.handler.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, flags+"/ab", nil))
	if rec.Code != 405 {
		t.Errorf("GET: %d", rec.Code)
	}
}

// The OpenFeature SDK for Go with its OFREP provider.
func TestGoSDK(t *testing.T) {
	w := newWorld()
	srv := httptest.NewServer(w.handler)
	defer srv.Close()
	if err := openfeature.SetProviderAndWait(provider.NewProvider(srv.URL)); err != nil {
		t.Fatal(err)
	}
	client := openfeature.NewDefaultClient()
	ctx := context.Background()
	for _, user := range []string{"ann", "ben", "cat", "dan"} {
		who := openfeature.NewEvaluationContext(user, nil)
		on, err := client.BooleanValueDetails(ctx, "ab.enabled", false, who)
		if err != nil || on.Variant != arm(user) || on.Value != (arm(user) == "treatment") {
			t.Errorf("%s: %+v, %v", user, on, err)
		}
		if temperature, err := client.FloatValue(ctx, "ab.temperature", -1, who); err != nil || temperature != map[string]float64{"control": .2, "treatment": .7}[arm(user)] {
			t.Errorf("%s: temperature %v, %v", user, temperature, err)
		}
		if all, err := client.ObjectValue(ctx, "ab", nil, who); err != nil || all.(map[string]any)["enabled"] != (arm(user) == "treatment") {
			t.Errorf("%s: %v, %v", user, all, err)
		}
	}
	if d, err := client.BooleanValueDetails(ctx, "zz", true, openfeature.NewEvaluationContext("ann", nil)); err == nil || !d.Value || d.ErrorCode != openfeature.FlagNotFoundCode {
		t.Errorf("unknown flag: %+v, %v", d, err)
	}
	if d, err := client.BooleanValueDetails(ctx, "ab.enabled", true, openfeature.EvaluationContext{}); err == nil || !d.Value || d.ErrorCode != openfeature.TargetingKeyMissingCode {
		t.Errorf("without a key: %+v, %v", d, err)
	}
}

// The OpenFeature SDK for Node with its OFREP provider.
func TestNodeSDK(t *testing.T) {
	root := filepath.Join("..", "..")
	out, err := exec.Command("bash", filepath.Join(root, ".ci", "node")).CombinedOutput()
	if err == nil {
		_, err = exec.LookPath("node")
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%v: %s", err, out)
		}
		t.Skipf("%v: %s", err, out)
	}
	w := newWorld()
	srv := httptest.NewServer(w.handler)
	defer srv.Close()
	modules, err := filepath.Abs(filepath.Join(root, ".cache", "npm"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "node", filepath.Join("testdata", "ofrep.mjs"), srv.URL, modules)
	cmd.Stderr = &stderr
	raw, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.Bytes())
	}
	var got map[string]map[string]any
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	for _, user := range []string{"ann", "ben", "cat", "dan"} {
		on := arm(user) == "treatment"
		want := map[bool]string{false: "control SPLIT false 0.2 old", true: "treatment SPLIT true 0.7 new"}[on]
		g := got[user]
		if have := fmt.Sprint(g["variant"], " ", g["reason"], " ", g["enabled"], " ", g["temperature"], " ", g["prompt"]); have != want || g["all"].(map[string]any)["enabled"] != on {
			t.Errorf("%s: %s, want %s; %v", user, have, want, g["all"])
		}
	}
	if u, n := fmt.Sprint(got["unknown"]), fmt.Sprint(got["nobody"]); u != "map[code:FLAG_NOT_FOUND value:true]" || n != "map[code:TARGETING_KEY_MISSING value:true]" {
		t.Errorf("unknown flag %s, without a key %s", u, n)
	}
}

// Who takes no part in an experiment finds no flag, and the application uses its default:
// by members of the context, by fields of the head, by gates. Nobody outside is exposed.
func TestWhoTakesPart(t *testing.T) {
	w := newWorld()
	m := &w.policy.Models[0]
	m.Versions = append(m.Versions, policy.Version{Name: "v0"})
	m.Enrolment = policy.Enrolment{Target: `attributes.plan == "pro" && (!has(attributes.age) || int(attributes.age) >= 18)`, Version: "v0"}
	for body, code := range map[string]int{
		`{"context":{"targetingKey":"u","plan":"pro"}}`:          200,
		`{"context":{"targetingKey":"u","plan":"pro","age":42}}`: 200,
		`{"context":{"targetingKey":"u","plan":"pro","age":7}}`:  404,
		`{"context":{"targetingKey":"u","plan":"free"}}`:         404,
		`{"context":{"targetingKey":"u"}}`:                       404,
		`{"context":{"targetingKey":"u","plan":["pro"]}}`:        404,
	} {
		rec := w.post(flags+"/ab.prompt", body, "")
		if rec.Code != code || code == 404 && !strings.Contains(rec.Body.String(), "FLAG_NOT_FOUND") {
			t.Errorf("%s: %d %s, want %d", body, rec.Code, rec.Body, code)
		}
	}
	w.exposed()
	if rec := w.post(flags, `{"context":{"targetingKey":"free-1","plan":"free"}}`, ""); rec.Code != 200 || strings.Contains(rec.Body.String(), `"ab"`) {
		t.Errorf("bulk: %d %s", rec.Code, rec.Body)
	}
	r := httptest.NewRequest(http.MethodPost, flags+"/ab", strings.NewReader(`{"context":{"targetingKey":"free-1"}}`))
	r.Header.Set("plan", "pro")
	rec := httptest.NewRecorder()
	if w.handler.ServeHTTP(rec, r); rec.Code != 200 {
		t.Errorf("by a field of the head: %d %s", rec.Code, rec.Body)
	}
	if got := w.exposed(); got["control"]+got["treatment"] != 1 {
		t.Errorf("exposed %v, want one", got)
	}
	// A new policy is a new enrolment.
	next := *w.policy
	next.Models = append([]policy.Model(nil), next.Models...)
	next.Models[0].Enrolment = policy.Enrolment{Gates: []policy.Gate{{Salt: "coverage:ab", Range: experiments.Range{Start: 0, End: 5000}}}, Version: "v0"}
	w.policy = &next
	in := 0
	for i := range 400 {
		user := fmt.Sprintf("user-%d", i)
		code := w.post(flags+"/ab", `{"context":{"targetingKey":"`+user+`"}}`, "").Code
		if want := experiments.Bucket("coverage:ab", user) < 5000; want != (code == 200) {
			t.Fatalf("%s: %d", user, code)
		} else if want {
			in++
		}
	}
	if in < 150 || in > 250 {
		t.Errorf("%d of 400 take part, want about half", in)
	}
}
