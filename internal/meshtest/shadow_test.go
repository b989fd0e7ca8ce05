package meshtest

import (
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// A shadow gets a copy of every request and its callers notice nothing, also when it fails or
// takes a minute for an answer; what it does is counted apart, and is no evidence about the
// version that answers. When it is a shadow no more, copies end.
func TestShadowEndToEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		champion, shadow := w.StartModel("v1"), w.StartModel("v2")
		state := func(version, state string, weight uint32) {
			t.Helper()
			if _, err := w.Control.Admin.SetModelVersionState(bg(t), &pb.SetModelVersionStateRequest{Model: ModelName, Version: version, State: state,
				ShadowWeight: weight, Reason: "test", Actor: "test"}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		users := 0
		traffic := func(n int) (slowest time.Duration) {
			t.Helper()
			for range n {
				users++
				began := time.Now()
				code, h, _, err := w.Pods[users%2].Chat(bg(t), fmt.Sprintf("u%d", users), users%3 == 0)
				if err != nil || code != http.StatusOK || h.Get(outrigger.HeaderVersion) != "v1" {
					t.Fatalf("answered %d by %q, %v", code, h.Get(outrigger.HeaderVersion), err)
				}
				slowest = max(slowest, time.Since(began))
				time.Sleep(10 * time.Millisecond)
			}
			return slowest
		}
		time.Sleep(100 * time.Millisecond)
		alone := traffic(30)
		if n := shadow.Served.Load(); n != 0 {
			t.Fatalf("%d requests reached a version that is only registered", n)
		}
		state("v2", "validated", 0)
		state("v2", "shadow", experiments.Buckets)

		traffic(60)
		time.Sleep(time.Second)
		if n := shadow.Served.Load(); n != 60 {
			t.Errorf("%d copies of 60 requests", n)
		}
		shadow.Failing.Store(true)
		if slowest := traffic(30); slowest > alone+time.Millisecond {
			t.Errorf("with a shadow that fails a request takes %v, it was %v", slowest, alone)
		}
		shadow.Failing.Store(false)
		time.Sleep(time.Second) // no copy is under way
		shadow.Token = time.Minute
		if slowest := traffic(30); slowest > alone+time.Millisecond {
			t.Errorf("with a slow shadow a request takes %v, it was %v", slowest, alone)
		}
		if n := champion.Served.Load(); n != 150 {
			t.Errorf("the champion was asked %d times for 150 requests", n)
		}
		time.Sleep(3 * time.Second) // reports take a second
		m, err := w.Control.Admin.ModelMetrics(bg(t), &pb.NameRequest{Name: ModelName})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range m.GetVersions() {
			if v.GetVersion() == "v1" && (v.GetLifetime().GetRequests() != 150 || v.GetLifetime().GetFailures() != 0 || v.GetShadowLifetime().GetRequests() != 0) {
				t.Errorf("the champion: %v", v)
			}
			if v.GetVersion() == "v2" && (v.GetLifetime().GetRequests() != 0 || v.GetShadowLifetime().GetRequests() < 90 || v.GetShadowLifetime().GetFailures() < 30) {
				t.Errorf("the shadow: %v", v)
			}
		}
		before := shadow.Served.Load()
		state("v2", "registered", 0)
		traffic(30)
		time.Sleep(time.Second)
		if n := shadow.Served.Load(); n != before {
			t.Errorf("%d copies after the shadow ended", n-before)
		}
	})
}
