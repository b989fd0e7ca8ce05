package meshtest

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc/codes"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// judge holds what applications observed against the log:
//
//	durable       a write that was acknowledged is in the log once, any other at most once,
//	              and nothing is there that nobody asked for
//	stale         an answer that is not marked was true at some time within the age it states,
//	              and never more than a feed lease before it was asked for
//	bounded       bounded(d): true at most d before the answer
//	session       nothing older than what the same pod showed or acknowledged before, in this
//	              life; marked answers of session reads keep this, too. The same for a client
//	              that carries its token from pod to pod
//	linearizable  strong reads and writes of a variable have one order
//	convergence   once everything is healed every pod answers with the last value, live
type judge struct {
	judgement
	f          *faultRun
	start      time.Time
	states     [len(faultKeys)][]state
	final      []*op
	violations []string
}

// judgement counts what a run had to show.
type judgement struct {
	Reads, Process, Node, Origin, Stale, Failed, Strong, Bounded, Carried int
	Writes, Acked, Unknown, Deletions                                     int
}

func (j *judgement) add(o judgement) {
	j.Reads += o.Reads
	j.Process += o.Process
	j.Node += o.Node
	j.Origin += o.Origin
	j.Stale += o.Stale
	j.Failed += o.Failed
	j.Strong += o.Strong
	j.Bounded += o.Bounded
	j.Carried += o.Carried
	j.Writes += o.Writes
	j.Acked += o.Acked
	j.Unknown += o.Unknown
	j.Deletions += o.Deletions
}

// busy fails when the faults or the clients did nothing.
func (j *judgement) busy(t *testing.T) {
	for what, n := range map[string]int{"process hits": j.Process, "node hits": j.Node, "origin reads": j.Origin, "marked answers": j.Stale,
		"failed reads": j.Failed, "strong reads": j.Strong, "bounded reads": j.Bounded, "reads with a token": j.Carried,
		"acknowledged writes": j.Acked, "unknown outcomes": j.Unknown, "deletions": j.Deletions} {
		if n == 0 {
			t.Errorf("there were no %s", what)
		}
	}
	if 2*j.Failed > j.Reads {
		t.Errorf("%d of %d reads failed", j.Failed, j.Reads)
	}
}

// state is what a variable was from one event of the log on.
type state struct {
	position uint64
	at       time.Duration
	value    string // "" = there is none
	kind     opKind // that made it
	asked    *op    // by whom, nil = not known
}

func newJudge(t *testing.T, f *faultRun) *judge {
	j := &judge{f: f, start: f.start}
	for k := range j.states {
		j.states[k] = []state{{at: math.MinInt64}}
	}
	for e, err := range f.w.Log.ReadAll(context.Background(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		for k, id := range faultKeys {
			if s, ok := after(e, id); ok {
				s.position, s.at = e.GetPosition(), e.GetAt().AsTime().Sub(f.start)
				j.states[k] = append(j.states[k], s)
			}
		}
	}
	return j
}

// after returns what an event leaves of a variable it concerns.
func after(e *pb.Event, id [2]string) (state, bool) {
	switch e.GetAggregate() {
	case "var/" + outrigger.DefaultTenant + "/" + id[0] + "/" + id[1]:
		switch p := e.GetPayload().(type) {
		case *pb.Event_VariableRegistered:
			return state{value: string(p.VariableRegistered.GetValue().GetJson()), kind: opRegister}, true
		case *pb.Event_VariableSet:
			return state{value: string(p.VariableSet.GetValue().GetJson()), kind: opSet}, true
		case *pb.Event_VariableDeleted:
			return state{kind: opDelete}, true
		}
	case "session/" + outrigger.DefaultTenant + "/" + id[0]:
		if e.GetSessionDeleted() != nil {
			return state{kind: opCleanup}, true
		}
	}
	return state{}, false
}

func (j *judge) fail(kind string, o *op, format string, args ...any) {
	text := fmt.Sprintf("%s: %v\n    %s", kind, o, fmt.Sprintf(format, args...))
	if len(j.violations) == 0 { // what the same node and the same carrier were told before
		for _, p := range j.f.ops {
			near := p.key == o.key && p.pod/faultPods == o.pod/faultPods && p.to > o.from-400*time.Millisecond
			if p.from <= o.to && (near || o.carrier >= 0 && p.carrier == o.carrier && faultKeys[p.key][0] == faultKeys[o.key][0]) {
				text += "\n        " + p.String()
			}
		}
	}
	j.violations = append(j.violations, text)
}

// report shows the first violations with what the log says about their variable.
func (j *judge) report() string { return strings.Join(j.violations[:min(len(j.violations), 4)], "\n") }

func (j *judge) settled(o *op) { j.final = append(j.final, o) }

// all applies every rule.
func (j *judge) all() {
	slices.SortFunc(j.f.ops, func(a, b *op) int { return cmp.Compare(a.began, b.began) })
	j.count()
	j.durable()
	for _, o := range j.f.ops {
		if o.kind == opGet && o.code == codes.OK {
			j.fresh(o)
		}
	}
	j.sessions()
	for k := range faultKeys {
		j.linearizable(k)
	}
	for _, o := range j.final {
		last := j.states[o.key][len(j.states[o.key])-1]
		if o.code != codes.OK || o.value != last.value || o.stale || !o.live {
			j.fail("convergence", o, "the last value is %q, written at %v", last.value, last.at)
		}
	}
}

func (j *judge) count() {
	for _, o := range j.f.ops {
		if o.kind != opGet {
			j.Writes++
			switch {
			case o.code == codes.OK:
				j.Acked++
			case !certain(o.code):
				j.Unknown++
			}
			if o.kind >= opDelete {
				j.Deletions++
			}
			continue
		}
		j.Reads++
		switch {
		case o.code != codes.OK:
			j.Failed++
			continue
		case o.tier == "process":
			j.Process++
		case o.tier == "node":
			j.Node++
		default:
			j.Origin++
		}
		if o.stale {
			j.Stale++
		}
		if o.carrier >= 0 {
			j.Carried++
		}
		switch o.level.Level {
		case outrigger.Strong:
			j.Strong++
		case outrigger.Bounded:
			j.Bounded++
		}
	}
}

// certain reports whether a failed write certainly changed nothing.
func certain(c codes.Code) bool {
	switch c {
	case codes.NotFound, codes.AlreadyExists, codes.InvalidArgument, codes.FailedPrecondition, codes.Aborted:
		return true
	}
	return false
}

// durable finds the request behind every event.
func (j *judge) durable() {
	written := map[string]*op{}
	for _, o := range j.f.ops {
		if o.kind == opSet || o.kind == opRegister {
			written[o.value] = o
		}
	}
	times := map[*op]int{}
	for k := range j.states {
		for i := 1; i < len(j.states[k]); i++ {
			s := &j.states[k][i]
			if s.kind == opSet || s.kind == opRegister {
				s.asked = written[s.value]
			} else {
				s.asked = j.deletion(k, *s)
			}
			if s.asked == nil || s.asked.kind != s.kind && s.kind < opDelete {
				j.fail("durable", &op{kind: s.kind, key: k, value: s.value, from: s.at}, "nobody asked for the event at position %d", s.position)
				continue
			}
			if s.kind < opDelete {
				if times[s.asked]++; times[s.asked] == 2 {
					j.fail("durable", s.asked, "it was written twice, the second time at position %d", s.position)
				}
			}
			if certain(s.asked.code) && s.kind < opDelete {
				j.fail("durable", s.asked, "it was refused, and is in the log at position %d", s.position)
			}
		}
	}
	for _, o := range j.f.ops {
		if (o.kind == opSet || o.kind == opRegister) && o.code == codes.OK && times[o] == 0 {
			j.fail("durable", o, "it was acknowledged and is not in the log")
		}
	}
}

// deletion finds a request that may be behind a deletion: the one that ended first of
// those under way at the time, or that never told how it ended.
func (j *judge) deletion(key int, s state) (found *op) {
	for _, o := range j.f.ops {
		same := o.kind == s.kind && (o.key == key || s.kind == opCleanup && faultKeys[o.key][0] == faultKeys[key][0])
		if !same || o.from > s.at || certain(o.code) || o.code == codes.OK && o.to < s.at {
			continue
		}
		if found == nil || end(o) < end(found) {
			found = o
		}
	}
	return found
}

// end is when a write had taken effect at the latest, as far as its client knows.
func end(o *op) time.Duration {
	if o.code == codes.OK {
		return o.to
	}
	return math.MaxInt64
}

// held reports whether a variable had a value at some time from lo on and at or after
// position from; position is the earliest state that explains it.
func (j *judge) held(key int, value string, lo time.Duration, from uint64) (position uint64, ok bool) {
	h := j.states[key]
	for i := len(h) - 1; i >= 0; i-- {
		if i+1 < len(h) && (h[i+1].at < lo || h[i+1].position <= from) {
			break
		}
		if h[i].value == value {
			position, ok = h[i].position, true
		}
	}
	return position, ok
}

// fresh checks what is promised about time.
func (j *judge) fresh(o *op) {
	if o.stale {
		if o.level.Level == outrigger.Strong || o.level.Level == outrigger.Bounded {
			j.fail("stale", o, "a %s read must fail instead", o.level)
		}
		return
	}
	kind, lo := "stale", o.to-o.age-time.Millisecond
	switch o.level.Level {
	case outrigger.Strong:
		kind, lo = "linearizable", o.from
	case outrigger.Bounded:
		kind, lo = "bounded", max(lo, o.to-o.level.MaxAge-time.Millisecond)
	default:
		lo = max(lo, o.from-j.f.lease-time.Millisecond)
	}
	if _, ok := j.held(o.key, o.value, lo, 0); !ok {
		j.fail(kind, o, "not true at any time after %v: %s", lo, j.around(o.key, lo))
	}
}

// around shows a variable's history about a time.
func (j *judge) around(key int, t time.Duration) string {
	var b strings.Builder
	for i, s := range j.states[key] {
		if last := i+1 == len(j.states[key]); (last || j.states[key][i+1].at > t-500*time.Millisecond) && s.at < t+time.Second {
			fmt.Fprintf(&b, "%q@%d at %v; ", s.value, s.position, s.at)
		}
	}
	return b.String()
}

// scope is somebody who must not see older things than before.
type scope struct{ pod, life, carrier int }

// sessions replays requests and answers in the order they happened and keeps, for every
// scope, the oldest state that may still be shown.
func (j *judge) sessions() {
	type edge struct {
		tick uint64
		o    *op
		over bool
	}
	var edges []edge
	for _, o := range j.f.ops {
		edges = append(edges, edge{o.began, o, false}, edge{o.ended, o, true})
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.tick, b.tick) })
	floors := map[scope]*[len(faultKeys)]uint64{}
	at := func(s scope) *[len(faultKeys)]uint64 {
		if floors[s] == nil {
			floors[s] = new([len(faultKeys)]uint64)
		}
		return floors[s]
	}
	asked := map[*op]uint64{}
	for _, e := range edges {
		o := e.o
		scopes := []scope{{o.pod, o.life, -1}}
		if o.carrier >= 0 {
			scopes = append(scopes, scope{-1, 0, o.carrier})
		}
		if !e.over {
			for _, s := range scopes {
				asked[o] = max(asked[o], at(s)[o.key])
			}
			continue
		}
		if o.code != codes.OK {
			continue
		}
		for k, p := range j.shown(o, asked[o]) {
			for _, s := range scopes {
				at(s)[k] = max(at(s)[k], p)
			}
		}
	}
}

// shown returns, per variable, the position an answer proves to its client. A read is
// checked against what its scopes had seen when it was asked.
func (j *judge) shown(o *op, floor uint64) map[int]uint64 {
	switch o.kind {
	case opGet:
		if o.stale && o.level.Level == outrigger.Eventual {
			return nil // it may go back
		}
		lo := o.to - o.age - time.Millisecond
		if o.stale {
			lo = math.MinInt64
		}
		p, ok := j.held(o.key, o.value, lo, floor)
		if !ok {
			if _, ok := j.held(o.key, o.value, math.MinInt64, floor); !ok {
				j.fail("session", o, "position %d had been seen: %s", floor, j.around(o.key, o.from))
			}
			return nil
		}
		return map[int]uint64{o.key: p}
	case opSet, opRegister:
		for _, s := range j.states[o.key] {
			if s.asked == o {
				return map[int]uint64{o.key: s.position}
			}
		}
	default:
		// A deletion's answer tells no position; its event is one of those in its time.
		out := map[int]uint64{}
		for k := range faultKeys {
			if k != o.key && (o.kind != opCleanup || faultKeys[k][0] != faultKeys[o.key][0]) {
				continue
			}
			for _, s := range j.states[k] {
				if s.kind == o.kind && s.at >= o.from && s.at <= o.to {
					out[k] = s.position
					break
				}
			}
		}
		return out
	}
	return nil
}

// register is the sequential specification: a variable holds a value or none.
var register = porcupine.Model{
	Init: func() any { return "" },
	Step: func(s, in, out any) (bool, any) {
		if in == nil {
			return out == s, s
		}
		return true, in
	},
}

// slack bounds how long before and after its commit a write may count as under way; a
// search over writes that last seconds would not end.
const slack = 40 * time.Millisecond

// linearizable hands a variable's writes and strong reads to porcupine.
func (j *judge) linearizable(key int) {
	var h []porcupine.Operation
	for _, s := range j.states[key][1:] {
		if s.asked == nil {
			return // reported already
		}
		o := porcupine.Operation{Input: s.value, Call: int64(max(s.asked.from, s.at-slack)), Return: int64(s.at + slack)}
		if s.asked.code == codes.OK {
			o.Return = int64(min(s.asked.to, s.at+slack))
		}
		h = append(h, o)
	}
	var reads []*op
	for _, o := range j.f.ops {
		if o.key == key && o.kind == opGet && o.code == codes.OK && o.level.Level == outrigger.Strong {
			reads = append(reads, o)
		}
	}
	// A read that lasted longer on both sides than another of the same value is implied.
	slices.SortStableFunc(reads, func(a, b *op) int { return cmp.Or(cmp.Compare(a.to, b.to), cmp.Compare(b.from, a.from)) })
	latest := map[string]time.Duration{}
	for _, o := range reads {
		if from, ok := latest[o.value]; !ok || from < o.from {
			latest[o.value] = o.from
			h = append(h, porcupine.Operation{Output: o.value, Call: int64(o.from), Return: int64(o.to)})
		}
	}
	if !porcupine.CheckOperations(register, h) {
		j.violations = append(j.violations, fmt.Sprintf("linearizable: no order explains the strong reads of %v: %s", faultKeys[key], j.around(key, 0)))
	}
}
