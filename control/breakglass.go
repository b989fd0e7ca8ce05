package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
)

// Limits of break-glass kills.
const (
	defaultGlassTTL = time.Hour
	maxGlassTTL     = 24 * time.Hour
	maxKills        = 1000
	glassRetry      = time.Second
)

// kill is one version taken out of the policy before the log knows.
type kill struct {
	Model   string    `json:"model"`
	Version string    `json:"version"`
	Actor   string    `json:"actor"`
	Reason  string    `json:"reason"`
	At      time.Time `json:"at"`
	Until   time.Time `json:"until"`
}

// breakGlass is the overlay of the policy: the one exception to "event first". A kill is
// on disk (if there is a path) before it is in force, in force before it is in the log,
// and let go once the log has it, or when its time is over. It lives on the replica that
// was asked, and survives its restart.
type breakGlass struct {
	path   string // "" = in memory only
	log    eventlog.Appender
	facts  *facts.Projection
	now    func() time.Time
	logger *slog.Logger

	mu    sync.Mutex // writers only; held over the write of the file, which is small
	kills atomic.Pointer[[]kill]
	turn  atomic.Uint64 // counts changes: with a position it names a policy
	wake  chan struct{} // capacity 1: the publisher
	retry chan struct{} // capacity 1: run
}

// newBreakGlass reads what an earlier life left. An unreadable file is an error: it holds
// a decision of a person.
func newBreakGlass(path string, log eventlog.Appender, f *facts.Projection, now func() time.Time, logger *slog.Logger) (*breakGlass, error) {
	b := &breakGlass{path: path, log: log, facts: f, now: now, logger: logger, wake: make(chan struct{}, 1), retry: make(chan struct{}, 1)}
	var kills []kill
	if path != "" {
		raw, err := os.ReadFile(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return nil, outrigger.Wrap(outrigger.Invalid, err, "the file of emergency kills")
		default:
			if err := json.Unmarshal(raw, &kills); err != nil {
				return nil, outrigger.Errorf(outrigger.Invalid, "the file of emergency kills %s is damaged: %v; repair or remove it", path, err)
			}
		}
	}
	b.kills.Store(&kills)
	if len(kills) > 0 {
		b.retry <- struct{}{}
	}
	return b, nil
}

// overlay returns the kills in force, for compile, and the turn they belong to.
func (b *breakGlass) overlay() ([]compile.Kill, uint64) {
	turn := b.turn.Load()
	var out []compile.Kill
	for _, k := range *b.kills.Load() {
		out = append(out, compile.Kill{Model: k.Model, Version: k.Version})
	}
	return out, turn
}

// set stores kills durably and puts them in force.
func (b *breakGlass) set(change func([]kill) []kill) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := change(slices.Clone(*b.kills.Load()))
	if err := b.save(next); err != nil {
		return outrigger.Wrap(outrigger.Unavailable, err, "the file of emergency kills")
	}
	b.kills.Store(&next)
	b.turn.Add(1)
	for _, c := range []chan struct{}{b.wake, b.retry} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
	return nil
}

// save replaces the file and syncs it and its directory.
func (b *breakGlass) save(kills []kill) error {
	if b.path == "" {
		return nil
	}
	raw, err := json.Marshal(kills)
	if err != nil {
		return err
	}
	tmp, err := os.OpenFile(b.path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = tmp.Write(raw)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(b.path+".new", b.path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(b.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// run brings kills into the log and lets them go, until ctx ends.
func (b *breakGlass) run(ctx context.Context) error {
	select {
	case <-b.facts.Ready():
	case <-ctx.Done():
		return nil
	}
	timer := time.NewTimer(glassRetry)
	defer timer.Stop()
	for {
		for _, k := range *b.kills.Load() {
			b.settle(ctx, k)
		}
		var tick <-chan time.Time
		if len(*b.kills.Load()) > 0 {
			timer.Reset(glassRetry)
			tick = timer.C
		}
		select {
		case <-tick:
		case <-b.retry:
		case <-ctx.Done():
			return nil
		}
	}
}

// settle records one kill and lets it go when the facts show what it did.
func (b *breakGlass) settle(ctx context.Context, k kill) {
	f := b.facts.Facts()
	done := recorded(f, k)
	if !done && k.Until.After(b.now()) {
		if err := b.record(ctx, f, k); err != nil {
			b.logger.Warn("emergency kill not in the log yet; it stays in force here", "model", k.Model, "version", k.Version, "until", k.Until, "error", err)
			return
		}
		done = true
	}
	if !done {
		b.logger.Error("emergency kill ends: its time is over and the log never took it", "model", k.Model, "version", k.Version, "actor", k.Actor)
	}
	err := b.set(func(in []kill) []kill { return slices.DeleteFunc(in, func(o kill) bool { return o == k }) })
	if err != nil {
		b.logger.Warn("emergency kill not let go; trying again", "error", err)
	}
}

// recorded reports whether the facts have the version out already.
func recorded(f *facts.Facts, k kill) bool {
	m := f.Model(k.Model)
	return m == nil || m.Version(k.Version) == nil || !m.Version(k.Version).Servable()
}

// record appends what the kill means: a rollback of the rollout whose candidate it is,
// else the version's quarantine.
func (b *breakGlass) record(ctx context.Context, f *facts.Facts, k kill) error {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	meta := map[string]string{"break_glass_at": k.At.UTC().Format(time.RFC3339Nano)}
	var writes []eventlog.Write
	m := f.Model(k.Model)
	if ro := f.Rollout(m.Rollout); ro != nil && ro.Live() && ro.Candidate == k.Version {
		writes = append(writes, onRollout(f, ro, &pb.Event{Metadata: maps.Clone(meta), Payload: &pb.Event_RollbackStarted{RollbackStarted: &pb.RollbackStarted{
			Reason: "emergency: " + k.Reason, FromVersion: ro.Candidate, ToVersion: ro.LastGood, DecidedAt: timestamppb.New(k.At), Mode: "emergency",
			ReturnPhase: uint32(ro.ReturnPhase), Notify: ro.Notify, Metadata: meta}}}))
	}
	writes = append(writes, toModel(f, k.Model, versionState(k.Version, facts.Quarantined, "emergency: "+k.Reason)),
		eventlog.Write{Aggregate: facts.AlertPrefix + "emergency-" + nameOf(k.Model), Expect: eventlog.Any, Events: []*pb.Event{{Payload: &pb.Event_AlertRaised{
			AlertRaised: &pb.AlertRaised{Severity: "critical", Summary: k.Actor + " took version " + k.Version + " of model " + k.Model + " out: " + k.Reason, Numbers: meta}}}}})
	stamp(ctx, k.Actor, "", writes)
	done, err := b.log.Append(ctx, "glass/"+k.Model+"/"+k.Version+"/"+k.At.UTC().Format(time.RFC3339Nano), writes...)
	if err != nil {
		return err
	}
	_, err = b.facts.Wait(ctx, done.Last)
	return err
}

// BreakGlass takes a version out of the policy of this replica at once. It works while
// the log takes no writes; the log gets it as soon as it does.
func (a *admin) BreakGlass(ctx context.Context, r *pb.BreakGlassRequest) (*pb.BreakGlassResponse, error) {
	if err := errors.Join(checkActor(r.GetActor()), checkReason(r.GetReason())); err != nil {
		return nil, err
	}
	ttl := cmp.Or(r.GetTtl().AsDuration(), defaultGlassTTL)
	if r.GetReason() == "" || ttl < time.Second || ttl > maxGlassTTL {
		return nil, invalid("an emergency needs a reason, and a ttl of 1s to %v (0 means %v); got %q and %v", maxGlassTTL, defaultGlassTTL, r.GetReason(), ttl)
	}
	f := a.facts.Facts()
	m, err := model(f, r.GetModel())
	if err != nil {
		return nil, err
	}
	k := kill{Model: m.Name, Version: r.GetVersion(), Actor: cmp.Or(r.GetActor(), anonymous), Reason: r.GetReason(), At: a.now(), Until: a.now().Add(ttl)}
	if ro := f.Rollout(m.Rollout); k.Version == "" && ro != nil {
		k.Version = ro.Candidate
	}
	serves := compile.Instead(m, k.Version)
	switch {
	case m.Version(k.Version) == nil:
		return nil, outrigger.Errorf(outrigger.NotFound, "version %q of model %q not found; registered are %s", k.Version, m.Name, versionNames(m))
	case serves == "":
		return nil, locked("nothing but version %q of model %q could serve; it stays", k.Version, m.Name)
	}
	if !recorded(f, k) {
		full := false
		err := a.glass.set(func(in []kill) []kill {
			in = slices.DeleteFunc(in, func(o kill) bool { return o.Model == k.Model && o.Version == k.Version })
			if full = len(in) >= maxKills; full {
				return in
			}
			return append(in, k)
		})
		if err == nil && full {
			err = outrigger.Errorf(outrigger.Exhausted, "%d versions are out already, the limit is %d", maxKills, maxKills)
		}
		if err != nil {
			return nil, err
		}
	}
	out := &pb.BreakGlassResponse{Model: k.Model, Version: k.Version, Serves: serves, Until: timestamppb.New(k.Until), Recorded: recorded(f, k)}
	if !out.Recorded {
		out.Pending = "in force on this replica; the log gets it as soon as it takes writes"
		a.glassRecorded(ctx, k, out)
	}
	return out, nil
}

// glassWait is how long an emergency call waits to be able to say that the log has it.
const glassWait = 500 * time.Millisecond

func (a *admin) glassRecorded(ctx context.Context, k kill, out *pb.BreakGlassResponse) {
	ctx, cancel := context.WithTimeout(ctx, glassWait)
	defer cancel()
	if err := a.glass.record(ctx, a.facts.Facts(), k); err == nil || recorded(a.facts.Facts(), k) {
		out.Recorded, out.Pending = true, ""
	}
}
