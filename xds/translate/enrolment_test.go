package translate_test

import (
	"testing"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Clients that cannot tell who takes part in an experiment send nobody into its arms.
func TestOthersSendNobodyIntoALimitedExperiment(t *testing.T) {
	p := &policy.Policy{Models: []policy.Model{{Name: "chat", Salt: "experiment:ab", Unit: experiments.UnitUser, Experiment: "ab", MaxAttempts: 1,
		Arms: []policy.Arm{{Name: "a", Version: "v1", Ranges: []experiments.Range{{Start: 0, End: 5000}}},
			{Name: "b", Version: "v2", Ranges: []experiments.Range{{Start: 5000, End: 10_000}}}},
		Versions:  []policy.Version{{Name: "v1"}, {Name: "v2"}, {Name: "v0"}},
		Enrolment: policy.Enrolment{Target: `attributes.plan == "pro"`, Version: "v0"}}}}
	for kind, want := range map[translate.Kind]int{translate.KindSidecar: 2, translate.KindGRPC: 0, translate.KindEnvoy: 0} {
		res, err := translate.EncodeFor(kind, p, translate.Options{})
		if err != nil {
			t.Fatal(err)
		}
		rc, ok := res.Get(xds.TypeRoute, translate.ListenerName("chat")).(*route.RouteConfiguration)
		if !ok {
			t.Fatalf("%s: no routes", kind)
		}
		experimental, outside := 0, 0
		for _, r := range rc.GetVirtualHosts()[0].GetRoutes() {
			switch r.GetRoute().GetCluster() {
			case translate.ClusterName("chat", "v1"), translate.ClusterName("chat", "v2"):
				if r.GetName() != policy.ArmUnassigned {
					experimental++
				}
			case translate.ClusterName("chat", "v0"):
				outside++
			}
		}
		if experimental != want || want == 0 && outside == 0 {
			t.Errorf("%s: %d routes lead into the experiment, want %d; %d outside", kind, experimental, want, outside)
		}
		if problems := translate.Lint(p, kind); (kind == translate.KindSidecar) != (len(problems) == 0) {
			t.Errorf("%s: %v", kind, problems)
		}
	}
}
