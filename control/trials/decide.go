package trials

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
)

func sortedKeys(m map[uint32]*unit) []uint32 { return slices.Sorted(maps.Keys(m)) }

// writes are a verdict's events.
func (s *Service) writes(f *facts.Facts, e *facts.Experiment, t *trial, v experiments.Verdict) ([]eventlog.Write, error) {
	m := f.Model(e.Model)
	if m == nil {
		return nil, outrigger.Errorf(outrigger.Internal, "experiment %q is about the unknown model %q", e.Name, e.Model)
	}
	own := eventlog.Write{Aggregate: facts.ExperimentPrefix + e.Name, Expect: int64(f.Sequence(facts.ExperimentPrefix + e.Name))}
	out := eventlog.Write{Aggregate: facts.ModelPrefix + m.Name, Expect: int64(f.Sequence(facts.ModelPrefix + m.Name))}
	reason := strings.Join(v.Result.Decision.Reasons, "; ")
	for _, n := range v.Next {
		c := &pb.ExperimentChanged{State: string(n.To), Reason: reason, Look: n.Look, Outcome: string(n.Outcome), Serve: n.Serve, Cause: string(n.Cause)}
		if n.To != experiments.StateRunning {
			results, err := json.Marshal(map[string]any{"results": plain(reflect.ValueOf(v.Result)), "ledger": t.counts()})
			if err != nil {
				return nil, outrigger.Wrap(outrigger.Internal, err, "encode results")
			}
			c.Results = results
			out.Events = release(m, e, n)
		}
		own.Events = append(own.Events, event(&pb.Event{Payload: &pb.Event_ExperimentChanged{ExperimentChanged: c}}))
	}
	writes := []eventlog.Write{own}
	if len(out.Events) > 0 {
		writes = append(writes, out)
	}
	return writes, nil
}

func event(e *pb.Event) *pb.Event {
	e.Actor, e.Source, e.Schema = "trials", "control", 1
	return e
}

// release ends the test in the model's own history: the challenger's name is free again,
// and a version that ships becomes the champion with the old one as last good.
func release(m *facts.Model, e *facts.Experiment, n experiments.Transition) (out []*pb.Event) {
	alias := func(name, to string) {
		if from := m.Aliases[name]; from != to {
			out = append(out, event(&pb.Event{Payload: &pb.Event_AliasMoved{AliasMoved: &pb.AliasMoved{Alias: name, From: from, To: to}}}))
		}
	}
	alias(facts.Challenger, "")
	if n.Outcome != experiments.OutcomeShip || e.Plan.GetKeepChampion() {
		return out
	}
	i := slices.IndexFunc(e.Arms, func(a facts.ExperimentArm) bool { return a.Name == n.Serve })
	if i < 0 || !m.Version(e.Arms[i].Version).Servable() || e.Arms[i].Version == m.Aliases[facts.Champion] {
		return out // it won and may not serve any more: a person must look
	}
	winner := e.Arms[i].Version
	alias(facts.LastGood, m.Aliases[facts.Champion])
	alias(facts.Champion, winner)
	return append(out, event(&pb.Event{Payload: &pb.Event_ModelVersionState{ModelVersionState: &pb.ModelVersionState{
		Version: winner, State: facts.Production, Reason: "champion: won experiment " + e.Name}}}))
}

// Results returns what is known of an experiment, as of now while reports may still
// come, else as of its decision; both are nil for one without a plan or not started.
// results is experiments.Result with names in snake_case, in which bounds that are
// infinite are null; ledger says what was counted and what was left out. The error has
// kind Internal.
func (s *Service) Results(e *facts.Experiment, now time.Time) (results, ledger *structpb.Struct, err error) {
	if e.Life.Plan == nil || e.Life.StartedAt.IsZero() {
		return nil, nil, nil
	}
	t := s.trial(e)
	var both map[string]any
	if t == nil {
		if e.Results == nil {
			return nil, nil, nil
		}
		if err := json.Unmarshal(e.Results, &both); err != nil {
			return nil, nil, outrigger.Wrap(outrigger.Internal, err, "decode recorded results")
		}
	} else {
		v, err := s.verdict(t, e, now)
		if err != nil {
			return nil, nil, err
		}
		both = map[string]any{"results": plain(reflect.ValueOf(v.Result)), "ledger": t.counts()}
	}
	if results, err = section(both, "results"); err != nil {
		return nil, nil, err
	}
	ledger, err = section(both, "ledger")
	return results, ledger, err
}

func section(both map[string]any, name string) (*structpb.Struct, error) {
	m, ok := both[name].(map[string]any)
	if !ok {
		return nil, outrigger.Errorf(outrigger.Internal, "recorded results have no section %q", name)
	}
	out, err := structpb.NewStruct(m)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, fmt.Sprintf("section %q", name))
	}
	return out, nil
}

// counts says what the evidence is made of.
func (t *trial) counts() map[string]any {
	l := t.ledger
	return map[string]any{
		"without_unit":         t.shown(),
		"rows":                 float64(l.rows.Load()),
		"rows_bad":             float64(l.bad.Load()),
		"rows_without_room":    float64(l.full.Load()),
		"rows_too_late":        float64(l.late.Load()),
		"rows_lost_in_sidecar": float64(l.dropped.Load()),
		"outcomes":             float64(l.outcomes.Load()),
		"outcomes_repeated":    float64(l.repeated.Load()),
	}
}

// plain turns a result into what JSON can hold.
func plain(v reflect.Value) any {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return plain(v.Elem())
	case reflect.Struct:
		out := map[string]any{}
		plainFields(v, out)
		return out
	case reflect.Slice:
		out := make([]any, v.Len())
		for i := range out {
			out[i] = plain(v.Index(i))
		}
		return out
	case reflect.Float64:
		if f := v.Float(); !math.IsInf(f, 0) && !math.IsNaN(f) {
			return f
		}
		return nil
	case reflect.Uint64, reflect.Uint32:
		return float64(v.Uint())
	case reflect.Int:
		return float64(v.Int())
	case reflect.Bool:
		return v.Bool()
	}
	return v.String()
}

// plainFields flattens embedded structs, as encoding/json does.
func plainFields(v reflect.Value, out map[string]any) {
	for i := range v.NumField() {
		switch f := v.Type().Field(i); {
		case f.Anonymous && f.Type.Kind() == reflect.Struct:
			plainFields(v.Field(i), out)
		case f.IsExported():
			out[snake(f.Name)] = plain(v.Field(i))
		}
	}
}

// snake writes NominalP as nominal_p and EValue as e_value.
func snake(name string) string {
	var b strings.Builder
	rs := []rune(name)
	for i, r := range rs {
		if unicode.IsUpper(r) && i > 0 && (unicode.IsLower(rs[i-1]) || i+1 < len(rs) && unicode.IsLower(rs[i+1])) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
