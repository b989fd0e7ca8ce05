package control_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

const secretOf = "0123456789abcdef of "

// people is an access file with a viewer, three operators and an administrator.
func people(t testing.TB) func() authz.Policy {
	var file strings.Builder
	for name, role := range map[string]authz.Role{"vera": authz.Viewer, "otto": authz.Operator, "olga": authz.Operator, "oscar": authz.Operator, "ada": authz.Admin} {
		fmt.Fprintln(&file, authz.Line(name, role, secretOf+name))
	}
	p, err := authz.Parse(file.String())
	if err != nil {
		t.Fatal(err)
	}
	return func() authz.Policy { return p }
}

func as(ctx context.Context, name string) context.Context {
	if name == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+secretOf+name)
}

// guarded is a control plane with people, and a rollout "r" by otto that waits in its first
// phase for one approval of two people.
func guarded(t testing.TB) *plane {
	p := start(t, memory.New(), func(o *control.Options) { o.Access = people(t) })
	p.register("chat", "v1", "v2")
	_, err := p.admin.StartRollout(as(t.Context(), "otto"), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2",
		Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 100, Gates: []*pb.RolloutGate{{Name: "yes", Kind: deploy.GateApproval, Approvals: 2}}},
			{Name: "full", Weight: 10_000}}})
	if err != nil {
		t.Fatal(err)
	}
	if got := p.rollout("r").GetAuthor(); got != "otto" {
		t.Fatalf("the author is %q", got)
	}
	return p
}

func (p *plane) refused() []*pb.Event { return p.events("audit/refused") }

// TestRefusedActionsChangeNothing: whoever may not, whoever pretends, whoever looks at an old
// state and whoever asks for what cannot be is refused; the log says so, and the rollout, the
// models and the policy stay what they were.
func TestRefusedActionsChangeNothing(t *testing.T) {
	p := guarded(t)
	if _, err := p.admin.HoldRollout(as(t.Context(), "olga"), &pb.RolloutActionRequest{Id: "r"}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.admin.ResumeRollout(as(t.Context(), "olga"), &pb.RolloutActionRequest{Id: "r"}); err != nil {
		t.Fatal(err)
	}
	now := p.rollout("r").GetSequence()
	approve := func(r *pb.ApproveRolloutRequest) func(context.Context) error {
		return func(ctx context.Context) error { r.Id = "r"; _, err := p.admin.ApproveRollout(ctx, r); return err }
	}
	type call = func(context.Context) error
	action := func(f func(context.Context, *pb.RolloutActionRequest) error, r *pb.RolloutActionRequest) call {
		return func(ctx context.Context) error { r.Id = "r"; return f(ctx, r) }
	}
	abort := func(ctx context.Context, r *pb.RolloutActionRequest) error {
		_, err := p.admin.AbortRollout(ctx, r)
		return err
	}
	promote := func(ctx context.Context, r *pb.RolloutActionRequest) error {
		_, err := p.admin.AdvanceRollout(ctx, r)
		return err
	}
	resume := func(ctx context.Context, r *pb.RolloutActionRequest) error {
		_, err := p.admin.ResumeRollout(ctx, r)
		return err
	}
	for _, c := range []struct {
		name, who string
		do        call
		kind      outrigger.Kind
		verb      string
	}{
		{"nobody approves", "", approve(&pb.ApproveRolloutRequest{}), outrigger.Unauthorised, "ApproveRollout"},
		{"a stranger aborts", "eve", action(abort, &pb.RolloutActionRequest{}), outrigger.Unauthorised, "AbortRollout"},
		{"a viewer approves", "vera", approve(&pb.ApproveRolloutRequest{}), outrigger.Denied, "ApproveRollout"},
		{"a viewer aborts", "vera", action(abort, &pb.RolloutActionRequest{}), outrigger.Denied, "AbortRollout"},
		{"the author approves", "otto", approve(&pb.ApproveRolloutRequest{}), outrigger.Denied, "ApproveRollout"},
		{"the author approves as somebody else", "otto", approve(&pb.ApproveRolloutRequest{Actor: "olga"}), outrigger.Denied, "ApproveRollout"},
		{"an abort in another's name", "olga", action(abort, &pb.RolloutActionRequest{Actor: "ada"}), outrigger.Denied, "AbortRollout"},
		{"a stale approval", "olga", approve(&pb.ApproveRolloutRequest{ExpectedSequence: now - 1}), outrigger.Conflict, "ApproveRollout"},
		{"a stale promotion", "olga", action(promote, &pb.RolloutActionRequest{ExpectedSequence: now - 1}), outrigger.Conflict, "AdvanceRollout"},
		{"a gate that has not passed", "olga", action(promote, &pb.RolloutActionRequest{}), outrigger.Locked, "AdvanceRollout"},
		{"an operator forces", "olga", action(promote, &pb.RolloutActionRequest{Force: true}), outrigger.Denied, "AdvanceRollout"},
		{"a phase that is over", "ada", action(promote, &pb.RolloutActionRequest{ToPhase: "canary"}), outrigger.Invalid, "AdvanceRollout"},
		{"nothing is held", "olga", action(resume, &pb.RolloutActionRequest{}), outrigger.Locked, "ResumeRollout"},
		{"a gate that is not there", "olga", approve(&pb.ApproveRolloutRequest{Gate: "no"}), outrigger.Locked, "ApproveRollout"},
		{"an operator configures a model", "olga", func(ctx context.Context) error {
			_, err := p.admin.ConfigureModel(ctx, &pb.ConfigureModelRequest{Model: "chat", TimeoutMs: 5})
			return err
		}, outrigger.Denied, "ConfigureModel"},
		{"an operator moves the champion", "olga", func(ctx context.Context) error {
			_, err := p.admin.MoveAlias(ctx, &pb.MoveAliasRequest{Model: "chat", Alias: "champion", To: "v2"})
			return err
		}, outrigger.Denied, "MoveAlias"},
		{"break-glass by a viewer", "vera", func(ctx context.Context) error {
			_, err := p.admin.BreakGlass(ctx, &pb.BreakGlassRequest{Model: "chat", Version: "v2", Reason: "fun"})
			return err
		}, outrigger.Denied, "BreakGlass"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, model, log := p.rollout("r"), p.model("chat"), len(p.refused())
			wantKind(t, status.FromGRPC(c.do(as(t.Context(), c.who)), nil), c.kind)
			after := p.rollout("r")
			before.Evidence, after.Evidence, before.Gates, after.Gates, before.Waiting, after.Waiting = nil, nil, nil, nil, "", ""
			if !proto.Equal(before, after) || !proto.Equal(model, p.model("chat")) {
				t.Errorf("it changed something:\n%v\n%v", before, after)
			}
			events := p.refused()
			if len(events) != log+1 {
				t.Fatalf("%d refusals are in the log, want one more than %d", len(events), log)
			}
			e := events[log]
			got := e.GetActionRefused()
			if got.GetVerb() != c.verb || got.GetKind() != c.kind.String() || got.GetReason() == "" || strings.Contains(got.GetReason(), secretOf) {
				t.Errorf("recorded as %v", got)
			}
			if c.kind != outrigger.Unauthorised && e.GetActor() != c.who {
				t.Errorf("recorded under %q, was %q", e.GetActor(), c.who)
			}
		})
	}
	if got := p.rollout("r").GetApprovals(); len(got) != 0 {
		t.Errorf("approvals %v", got)
	}
}

// TestApprovalsCarryTheCredentialsName: two people say yes under their own names, one of them
// twice, and only then is the gate open.
func TestApprovalsCarryTheCredentialsName(t *testing.T) {
	p := guarded(t)
	for _, who := range []string{"olga", "olga", "oscar"} {
		if _, err := p.admin.AdvanceRollout(as(t.Context(), "otto"), &pb.RolloutActionRequest{Id: "r"}); !outrigger.IsKind(status.FromGRPC(err, nil), outrigger.Locked) {
			t.Fatalf("open before %s said yes: %v", who, err)
		}
		if _, err := p.admin.ApproveRollout(as(t.Context(), who), &pb.ApproveRolloutRequest{Id: "r"}); err != nil {
			t.Fatal(err)
		}
	}
	var names []string
	for _, a := range p.rollout("r").GetApprovals() {
		names = append(names, a.GetApprover())
	}
	if strings.Join(names, " ") != "olga oscar" {
		t.Errorf("approved by %v", names)
	}
	for _, e := range p.events("rollout/r") {
		if a := e.GetRolloutApproved(); a != nil && a.GetApprover() != e.GetActor() {
			t.Errorf("%v", e)
		}
	}
}

// TestConflictingOperators: of many who act on the same state exactly one succeeds; the others
// are told that it moved on.
func TestConflictingOperators(t *testing.T) {
	p := guarded(t)
	at := p.rollout("r").GetSequence()
	const n = 8
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			ctx, r := as(t.Context(), []string{"olga", "oscar"}[i%2]), &pb.RolloutActionRequest{Id: "r", ExpectedSequence: at, Reason: fmt.Sprint(i)}
			if i%2 == 0 {
				_, errs[i] = p.admin.HoldRollout(ctx, r)
			} else {
				_, errs[i] = p.admin.AbortRollout(ctx, r)
			}
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			wantKind(t, status.FromGRPC(err, nil), outrigger.Conflict)
		}
	}
	decided := 0
	for _, e := range p.events("rollout/r") {
		if kind := eventlog.EventKind(e); kind == "rollout_held" || kind == "rollback_started" {
			decided++
		}
	}
	if won != 1 || decided != 1 || len(p.refused()) != n-1 {
		t.Errorf("%d of %d succeeded, %d decisions, %d refusals recorded", won, n, decided, len(p.refused()))
	}
}

// TestRESTActsAsTheCredential: the header that says who is acting is a claim like any other.
func TestRESTActsAsTheCredential(t *testing.T) {
	p := guarded(t)
	h := p.srv.Handler()
	bearer := func(name string) string { return "Authorization: Bearer " + secretOf + name }
	for _, c := range []struct {
		target  string
		headers []string
		status  int
	}{
		{"/v1/rollouts/r/approve", []string{bearer("otto"), "X-Outrigger-Actor: olga"}, 403},
		{"/v1/rollouts/r/approve", []string{bearer("vera")}, 403},
		{"/v1/rollouts/r/approve", []string{bearer("eve")}, 401},
		{"/v1/models/chat", []string{bearer("olga")}, 403},
		{"/v1/rollouts/r/approve", []string{bearer("olga")}, 200},
	} {
		before := len(p.refused())
		if w := call(h, "POST", c.target, "", c.headers...); w.Code != c.status {
			t.Errorf("%s %v: %d %s", c.target, c.headers, w.Code, w.Body)
		}
		if recorded := len(p.refused()) > before; recorded != (c.status != 200) {
			t.Errorf("%s %v: recorded %v", c.target, c.headers, recorded)
		}
	}
	if a := p.rollout("r").GetApprovals(); len(a) != 1 || a[0].GetApprover() != "olga" {
		t.Errorf("approved by %v", a)
	}
}

// TestRefusalsAreBounded: whoever hammers on the door does not fill the log.
func TestRefusalsAreBounded(t *testing.T) {
	p := guarded(t)
	for range 200 {
		if _, err := p.admin.AbortRollout(as(t.Context(), "eve"), &pb.RolloutActionRequest{Id: "r"}); err == nil {
			t.Fatal("let in")
		}
	}
	if n := len(p.refused()); n < 60 || n > 120 {
		t.Errorf("%d refusals recorded of 200", n)
	}
}
