package control_test

import (
	"maps"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// outriggerError undoes the translation to gRPC.
func outriggerError(err error) error { return status.FromGRPC(err, nil) }

// splitOf returns the weights of versions, in 1/10,000.
func splitOf(arms []*pb.ExperimentArm) map[string]uint32 {
	out := map[string]uint32{}
	for _, a := range arms {
		if a.GetWeight() > 0 {
			out[a.GetVersion()] += a.GetWeight()
		}
	}
	return out
}

// TestServedAt asks, for the moment of every change, who answered then; the answer is
// what GetModel said at that moment, also after a restart.
func TestServedAt(t *testing.T) {
	log := memory.New()
	p := start(t, log, nil)
	type moment struct {
		at      time.Time
		shares  map[string]uint32
		aliases map[string]string
		epoch   uint64
	}
	var moments []moment
	see := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		m, err := p.admin.GetModel(t.Context(), &pb.NameRequest{Name: "chat"})
		if err != nil {
			t.Fatal(err)
		}
		all := p.events("model/chat")
		moments = append(moments, moment{all[len(all)-1].GetAt().AsTime(), splitOf(m.Arms), m.Aliases, m.WeightEpoch})
	}
	before := time.Now()
	p.register("chat", "v1")
	see(nil)
	p.register("chat", "v1b", "v2", "v3")
	_, err := p.admin.MoveAlias(t.Context(), &pb.MoveAliasRequest{Model: "chat", Alias: "champion", To: "v2", Expected: new("v1"), Actor: "bob"})
	see(err)
	_, err = p.admin.CreateExperiment(t.Context(), &pb.CreateExperimentRequest{Name: "e", Model: "chat", Start: true, Actor: "eve",
		Arms: []*pb.ExperimentArm{{Name: "a", Version: "v2", Weight: 4000}, {Name: "b", Version: "v3", Weight: 6000}}})
	see(err)
	_, err = p.admin.SetExperimentState(t.Context(), &pb.SetExperimentStateRequest{Name: "e", State: "stopped"})
	see(err)
	for i := range moments {
		if i > 0 && maps.Equal(moments[i].shares, moments[i-1].shares) {
			t.Fatalf("moments %d and %d do not differ; the test shows nothing", i-1, i)
		}
	}
	check := func() {
		t.Helper()
		for i, m := range moments {
			got, err := p.admin.ServedAt(t.Context(), &pb.ServedAtRequest{Model: "chat", At: timestamppb.New(m.at)})
			if err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(splitOf(got.Arms), m.shares) || !maps.Equal(got.Aliases, m.aliases) || got.WeightEpoch != m.epoch || got.Since.AsTime().After(m.at) {
				t.Errorf("moment %d: %v, want %v", i, got, m)
			}
			if (got.Experiment == "e") != (i == 2) {
				t.Errorf("moment %d: experiment %q", i, got.Experiment)
			}
			// The instant before belongs to what was before.
			got, err = p.admin.ServedAt(t.Context(), &pb.ServedAtRequest{Model: "chat", At: timestamppb.New(got.Since.AsTime().Add(-1))})
			if i == 0 {
				if wantKind(t, outriggerError(err), outrigger.NotFound); got != nil {
					t.Errorf("before the first: %v", got)
				}
			} else if err != nil || !maps.Equal(splitOf(got.Arms), moments[i-1].shares) {
				t.Errorf("before moment %d: %v %v, want %v", i, got, err, moments[i-1].shares)
			}
		}
	}
	check()
	got, err := p.admin.ServedAt(t.Context(), &pb.ServedAtRequest{Model: "chat", At: timestamppb.New(moments[1].at)})
	if err != nil || got.Actor != "bob" {
		t.Errorf("champion moved by %q, %v; want bob", got.GetActor(), err)
	}
	now, err := p.admin.ServedAt(t.Context(), &pb.ServedAtRequest{Model: "chat"})
	if err != nil || splitOf(now.Arms)["v2"] != 10_000 {
		t.Errorf("now: %v, %v", now, err)
	}
	for _, at := range []*timestamppb.Timestamp{timestamppb.New(time.Now().Add(time.Hour)), {Nanos: -1}} {
		_, err := p.admin.ServedAt(t.Context(), &pb.ServedAtRequest{Model: "chat", At: at})
		wantKind(t, outriggerError(err), outrigger.Invalid)
	}
	_, err = p.admin.ServedAt(t.Context(), &pb.ServedAtRequest{Model: "chat", At: timestamppb.New(before)})
	wantKind(t, outriggerError(err), outrigger.NotFound)

	p.stop()
	p = start(t, log, nil)
	check()
}

// TestRegistrationContent registers a version with everything and reads it back.
func TestRegistrationContent(t *testing.T) {
	p := newPlane(t)
	p.register("base", "v7")
	r := &pb.RegisterModelVersionRequest{Model: "chat", Version: "v1", Endpoints: []*pb.Endpoint{{Address: "h:1"}},
		Parameters: map[string]string{"temperature": "0.2"}, Pins: map[string]int32{"prod/prompt": 3}, Parents: []string{"base@v7"}}
	m, err := p.admin.RegisterModelVersion(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	v := m.Versions[0]
	if v.Number != 1 || v.Parameters["temperature"] != "0.2" || v.Pins["prod/prompt"] != 3 || v.Parents[0] != "base@v7" || len(v.Digest) != 71 {
		t.Errorf("version: %v", v)
	}
	r.Version, r.Digest, r.Parents = "v2", v.Digest, []string{"v1"}
	if m, err = p.admin.RegisterModelVersion(t.Context(), r); err != nil || m.Versions[1].Number != 2 || m.Versions[1].Digest != v.Digest {
		t.Errorf("the same content elsewhere: %v, %v", m, err)
	}
	for name, c := range map[string]struct {
		edit func(*pb.RegisterModelVersionRequest)
		kind outrigger.Kind
	}{
		"digest mismatch":  {func(r *pb.RegisterModelVersionRequest) { r.Parameters["temperature"] = "0.3" }, outrigger.Conflict},
		"digest malformed": {func(r *pb.RegisterModelVersionRequest) { r.Digest = "md5:1" }, outrigger.Invalid},
		"artifact":         {func(r *pb.RegisterModelVersionRequest) { r.Artifact = "x" }, outrigger.Invalid},
		"unknown parent":   {func(r *pb.RegisterModelVersionRequest) { r.Parents = []string{"base@v8"} }, outrigger.NotFound},
		"parent twice":     {func(r *pb.RegisterModelVersionRequest) { r.Parents = []string{"v1", "chat@v1"} }, outrigger.Invalid},
		"pin":              {func(r *pb.RegisterModelVersionRequest) { r.Pins = map[string]int32{"prompt": 3} }, outrigger.Invalid},
	} {
		bad := &pb.RegisterModelVersionRequest{Model: "chat", Version: "v3", Endpoints: r.Endpoints, Digest: r.Digest,
			Parameters: maps.Clone(r.Parameters), Pins: maps.Clone(r.Pins)}
		c.edit(bad)
		head := p.log.Head()
		_, err := p.admin.RegisterModelVersion(t.Context(), bad)
		if err = outriggerError(err); outrigger.KindOf(err) != c.kind || p.log.Head() != head {
			t.Errorf("%s: %v (head %d, was %d), want kind %v and nothing written", name, err, p.log.Head(), head, c.kind)
		}
	}
}
