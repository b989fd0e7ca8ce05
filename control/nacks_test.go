package control_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// standing returns the alerts about rejections that stand, oldest first, by id.
func (p *plane) standing() map[string]string {
	p.t.Helper()
	out, err := p.srv.Admin().ListAlerts(context.Background(), &pb.ListRequestAll{})
	if err != nil {
		p.t.Fatal(err)
	}
	found := map[string]string{}
	for _, a := range out.GetAlerts() {
		if strings.HasPrefix(a.GetId(), "nack-") && a.GetResolvedAt() == nil {
			found[a.GetId()] = a.GetSummary()
		}
	}
	return found
}

// A rejection is an alert at once and for as long as it stands:
//
//  1. two of three sidecars reject the policy of "chat" once it has a second version
//  2. one alert names the resource, the first node and its reason
//  3. one of them accepts: the alert stands, and says a minute later that it is one node
//  4. the other accepts: the alert is resolved
func TestRejectionsAreAlerts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		p.register("chat", "v1")
		good, a, b := p.join("node-1/pod"), p.join("node-2/pod"), p.join("node-3/pod")
		defer good.leave()
		defer a.leave()
		defer b.leave()
		settle()
		a.refuse("chat", "no room for it")
		b.refuse("chat", "no room for it")
		if _, err := p.admin.ConfigureModel(t.Context(), &pb.ConfigureModelRequest{Model: "chat", Unit: "user"}); err != nil {
			t.Fatal(err)
		}
		settle()
		got := p.standing()
		text := got["nack-ModelPolicy-chat"]
		if len(got) != 1 || !strings.Contains(text, "ModelPolicy chat is rejected by node node-") ||
			!strings.Contains(text, "and 1 more") || !strings.Contains(text, "no room for it") {
			t.Fatalf("alerts %q", got)
		}

		a.refuse("", "")
		p.touch("chat", "session")
		time.Sleep(2 * time.Minute)
		settle()
		text = p.standing()["nack-ModelPolicy-chat"]
		if !strings.Contains(text, "rejected by node node-3/pod (group") {
			t.Fatalf("after one accepted: %q", p.standing())
		}
		b.refuse("", "")
		p.touch("chat", "request")
		settle()
		if got := p.standing(); len(got) != 0 {
			t.Fatalf("after all accepted: %q", got)
		}
		if n := len(p.events("alert/nack-ModelPolicy-chat")); n != 3 { // both, one, resolved
			t.Errorf("%d events about one alert: %v", n, kinds(p.events("alert/nack-ModelPolicy-chat")))
		}
	})
}

// A node that leaves takes its rejection along, a minute later.
func TestRejectionOfANodeThatLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		p.register("chat", "v1")
		car := p.join("node-1/pod")
		settle()
		car.refuse("chat", "no")
		p.touch("chat", "user")
		settle()
		car.leave()
		settle()
		if len(p.standing()) != 1 {
			t.Fatalf("just left: %q", p.standing())
		}
		time.Sleep(2 * time.Minute)
		settle()
		if len(p.standing()) != 0 {
			t.Fatalf("long gone: %q", p.standing())
		}
	})
}

// touch changes what a model randomises, and so its policy.
func (p *plane) touch(model, unit string) {
	p.t.Helper()
	if _, err := p.admin.ConfigureModel(context.Background(), &pb.ConfigureModelRequest{Model: model, Unit: unit}); err != nil {
		p.t.Fatal(err)
	}
}
