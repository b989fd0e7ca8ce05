package dashboard

import (
	"fmt"
	"strings"
	"unicode/utf8"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// maxDetail bounds the text of one audit line, in bytes.
const maxDetail = 200

// entryOf turns an event into a line people can read.
func entryOf(e *pb.Event) auditEntry {
	m := e.ProtoReflect()
	kind := ""
	if fd := m.WhichOneof(m.Descriptor().Oneofs().ByName("payload")); fd != nil {
		kind = string(fd.Name())
	}
	return auditEntry{Position: e.GetPosition(), At: e.GetAt().AsTime(), Kind: strings.ReplaceAll(kind, "_", " "),
		Aggregate: e.GetAggregate(), Actor: e.GetActor(), Detail: clip(detail(e))}
}

func detail(e *pb.Event) string {
	switch p := e.GetPayload().(type) {
	// Values of variables are not shown: they belong to the apps, and may be secret.
	case *pb.Event_VariableRegistered:
		return p.VariableRegistered.GetValue().GetType()
	case *pb.Event_VariableSet:
		return fmt.Sprintf("version %d, %s", p.VariableSet.GetVersion().GetCounter(), p.VariableSet.GetValue().GetType())
	case *pb.Event_OptimizationStarted:
		return p.OptimizationStarted.GetOptimizer()
	case *pb.Event_OptimizationStopped:
		return p.OptimizationStopped.GetReason()
	case *pb.Event_DependencyAdded:
		return p.DependencyAdded.GetDependency().GetFrom() + " → " + p.DependencyAdded.GetDependency().GetTo()
	case *pb.Event_SessionDeleted:
		return p.SessionDeleted.GetReason()
	case *pb.Event_ModelVersionRegistered:
		return fmt.Sprintf("%s, %d endpoints", p.ModelVersionRegistered.GetVersion(), len(p.ModelVersionRegistered.GetEndpoints()))
	case *pb.Event_ModelVersionState:
		return join(p.ModelVersionState.GetVersion()+" is "+p.ModelVersionState.GetState(), p.ModelVersionState.GetReason())
	case *pb.Event_AliasMoved:
		return fmt.Sprintf("%s: %s → %s", p.AliasMoved.GetAlias(), orNone(p.AliasMoved.GetFrom()), orNone(p.AliasMoved.GetTo()))
	case *pb.Event_ExperimentChanged:
		return join(p.ExperimentChanged.GetState(), p.ExperimentChanged.GetReason())
	case *pb.Event_RolloutStarted:
		return fmt.Sprintf("%s: %s → %s", p.RolloutStarted.GetModel(), p.RolloutStarted.GetLastGood(), p.RolloutStarted.GetCandidate())
	case *pb.Event_RolloutAdvanced:
		return join(fmt.Sprintf("phase %d", p.RolloutAdvanced.GetPhase()), p.RolloutAdvanced.GetReason())
	case *pb.Event_RollbackStarted:
		return p.RollbackStarted.GetReason()
	case *pb.Event_RollbackCompleted:
		return fmt.Sprintf("%d acknowledged, %d missing", p.RollbackCompleted.GetAcked(), len(p.RollbackCompleted.GetLaggards()))
	case *pb.Event_RolloutEnded:
		return join(p.RolloutEnded.GetOutcome(), p.RolloutEnded.GetReason())
	case *pb.Event_RegionRegistered:
		return p.RegionRegistered.GetRegion().GetHealth()
	case *pb.Event_AlertNotified:
		if !p.AlertNotified.GetDelivered() {
			return p.AlertNotified.GetRoute() + " was not told (" + p.AlertNotified.GetTold() + "): " + p.AlertNotified.GetError()
		}
		return p.AlertNotified.GetRoute() + " was told: " + p.AlertNotified.GetTold()
	case *pb.Event_AlertRaised:
		return p.AlertRaised.GetSeverity() + ": " + p.AlertRaised.GetSummary()
	case *pb.Event_RolloutApproved:
		verb := "approved by "
		if p.RolloutApproved.GetWithdrawn() {
			verb = "approval withdrawn by "
		}
		return join(p.RolloutApproved.GetGate()+" "+verb+p.RolloutApproved.GetApprover(), p.RolloutApproved.GetComment())
	case *pb.Event_RolloutGateDecided:
		return join(p.RolloutGateDecided.GetGate()+" "+p.RolloutGateDecided.GetOutcome(), p.RolloutGateDecided.GetReason())
	case *pb.Event_RolloutHeld:
		return p.RolloutHeld.GetReason()
	case *pb.Event_RolloutResumed:
		return p.RolloutResumed.GetReason()
	case *pb.Event_RolloutSteppedBack:
		return join(fmt.Sprintf("to phase %d", p.RolloutSteppedBack.GetPhase()), p.RolloutSteppedBack.GetReason())
	case *pb.Event_ActionRefused:
		return join(p.ActionRefused.GetVerb()+" "+p.ActionRefused.GetTarget(), p.ActionRefused.GetReason())
	case *pb.Event_AlertSilenced:
		return join("until "+stamp(p.AlertSilenced.GetUntil()), p.AlertSilenced.GetReason())
	case *pb.Event_AlertResolved:
		return p.AlertResolved.GetReason()
	case *pb.Event_ConfigCanaryStarted:
		return join(fmt.Sprintf("policy changes go to %.4g %% of the xDS clients first, and %d by name", float64(p.ConfigCanaryStarted.GetShare())/100, len(p.ConfigCanaryStarted.GetNodes())), p.ConfigCanaryStarted.GetReason())
	case *pb.Event_ConfigCanaryEnded:
		verb := "policy %d rolled back"
		if p.ConfigCanaryEnded.GetWidened() {
			verb = "policy %d widened to every xDS client"
		}
		return join(fmt.Sprintf(verb, p.ConfigCanaryEnded.GetPolicy()), p.ConfigCanaryEnded.GetReason())
	case *pb.Event_PushRecorded:
		return fmt.Sprintf("policy %d, %d acknowledged, %d rejected", p.PushRecorded.GetPush(), p.PushRecorded.GetAcked(), len(p.PushRecorded.GetNacked()))
	}
	return ""
}

func join(a, b string) string {
	if b == "" {
		return a
	}
	return a + ": " + b
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// clip shortens at a character boundary.
func clip(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	cut := maxDetail
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}
