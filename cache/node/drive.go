package node

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// waiting is one key of one read under way.
type waiting struct {
	read  *pendingRead
	index int
}

// pendingRead collects the answers of one Read. Guarded by Agent.mu until done is closed.
type pendingRead struct {
	results     []*pb.ReadResult
	left        int
	asOf        uint64
	incarnation uint64
	err         error
	done        chan struct{}
}

// effects are what steps want done beside the table.
type effects struct {
	fetches   []coherence.Fetch
	ranges    []coherence.FetchRange
	again     []coherence.Input // inputs that outputs caused
	subscribe *coherence.Subscribe
}

// step feeds inputs to the protocol and carries its outputs out.
func (a *Agent) step(ins ...coherence.Input) {
	a.mu.Lock()
	a.run(ins...)
	a.mu.Unlock()
}

// run is step for holders of the mutex.
func (a *Agent) run(ins ...coherence.Input) {
	for len(ins) > 0 {
		for _, in := range ins {
			for _, o := range a.state.Step(in, a.o.Clock()) {
				a.carry(o)
			}
		}
		ins = a.consequences()
	}
	if !a.pressed && a.state.Pressing() {
		a.pressed = true
		a.ticks.Reset(tickEvery)
	}
}

// consequences starts what the outputs carried out so far asked for and returns the
// inputs that follow from them.
func (a *Agent) consequences() []coherence.Input {
	ins := append(a.batch.again, a.launch()...)
	a.batch.again = nil
	return ins
}

// carry does one output. Fetches are collected, so that those of one step share a call.
func (a *Agent) carry(o coherence.Output) {
	set := a.tables.Load()
	switch o := o.(type) {
	case coherence.Install:
		a.install(set.of(o.Key.Tenant), o)
	case coherence.Invalidate:
		if t := set.of(o.Key.Tenant); t != nil {
			t.w.Invalidate(o.Key.String())
		}
	case coherence.Remove:
		if t := set.of(o.Key.Tenant); t != nil {
			t.w.Remove(o.Key.String())
		}
	case coherence.Flush:
		for _, t := range set.list {
			t.w.Flush()
		}
		a.o.Logger.Info("table flushed", "reason", "the feed cannot be continued or the log was replaced")
	case coherence.Lease:
		for _, t := range set.list {
			t.w.SetLease(o.Until)
		}
		if o.Until > 0 {
			a.first.Do(func() { close(a.ready) })
		}
	case coherence.Head:
		for _, t := range set.list {
			t.w.SetHead(o.Position, o.Incarnation)
		}
	case coherence.Fetch:
		a.batch.fetches = append(a.batch.fetches, o)
	case coherence.FetchRange:
		a.batch.ranges = append(a.batch.ranges, o)
	case coherence.Subscribe:
		a.batch.subscribe = &o
	case coherence.Select:
		a.pick(o)
	case coherence.Resubscribe:
		if a.endStream != nil {
			a.endStream()
		}
	case coherence.Stale:
		a.violated(o)
	case coherence.Hit:
		a.hit(o)
	case coherence.Answer:
		for _, id := range o.Waiters {
			a.deliver(id, o.Result, o.AsOf, o.Incarnation)
		}
	case coherence.Failed:
		for _, id := range o.Waiters {
			a.deliverError(id, o.Err)
		}
	}
}

func (a *Agent) install(t *table, o coherence.Install) {
	if t == nil { // of a tenant without a table
		a.batch.again = append(a.batch.again, coherence.Evicted{Key: o.Key})
		return
	}
	w := t.w
	st, payload := shm.Negative, []byte(nil)
	if o.Variable == nil {
		a.buf = Absence{SessionExists: o.SessionExists, AsOf: o.AsOf}.Append(a.buf[:0])
		payload = a.buf
	} else {
		b, err := a.appendVariable(a.buf[:0], o.Variable)
		if err != nil {
			a.forget(w, o.Key, err)
			return
		}
		a.buf = b
		st, payload = shm.Present, b
	}
	if _, _, err := w.Put(o.Key.String(), st, payload); err != nil {
		a.forget(w, o.Key, err)
	}
	if cap(a.buf) > shm.MaxValueBytes {
		a.buf = nil
	}
}

// appendVariable is AppendVariable, and takes the bytes as they came on the feed if it can.
func (a *Agent) appendVariable(b []byte, v *pb.Variable) ([]byte, error) {
	if a.feed != nil {
		if b, ok := a.feed.AppendVariable(b, v); ok {
			return b, nil
		}
	}
	return AppendVariable(b, v)
}

// pick hands a select to the goroutine that sends. Only one is unanswered at a time, so it
// has room; one that is left behind all the same is asked for again.
func (a *Agent) pick(o coherence.Select) {
	select {
	case a.selects <- &pb.Select{Number: o.Number, Add: o.Add, Remove: o.Remove}:
	default:
		return
	}
	if c := a.conversing; c != nil {
		_ = c.Until(time.Unix(1, 0)) // fails when the feed has ended, and with it the wait
	}
}

// forget keeps a value that cannot be stored from leaving an older one behind.
func (a *Agent) forget(w *shm.Writer, key outrigger.Key, why error) {
	w.Remove(key.String())
	a.batch.again = append(a.batch.again, coherence.Evicted{Key: key})
	a.o.Logger.Debug("value is not kept", "key", key.String(), "error", why)
}

// hit answers readers from the table, or sends them round again if it has lost the key.
func (a *Agent) hit(o coherence.Hit) {
	r, ok := a.lookUp(o.Key)
	if !ok {
		a.batch.again = append(a.batch.again, coherence.Evicted{Key: o.Key})
		for _, id := range o.Waiters {
			a.batch.again = append(a.batch.again, coherence.Read{Key: o.Key, Waiter: id, Min: o.AsOf})
		}
		return
	}
	if t := a.tables.Load().of(o.Key.Tenant); t != nil {
		t.w.Touch(shm.Hash(o.Key.String())) // lookUp has found it
	}
	_, incarnation, _ := a.state.Position()
	for _, id := range o.Waiters {
		a.deliver(id, r, o.AsOf, incarnation)
	}
}

func (a *Agent) lookUp(key outrigger.Key) (*pb.ReadResult, bool) {
	t := a.tables.Load().of(key.Tenant)
	if t == nil {
		return nil, false
	}
	id := key.String()
	e, b := t.r.Get(id, a.value[:0])
	a.value = b
	switch e.State {
	case shm.Negative:
		absence, ok := ParseAbsence(b)
		return &pb.ReadResult{SessionExists: absence.SessionExists}, ok
	case shm.Present:
		v, err := ParseVariable(id, b)
		if err != nil {
			return nil, false
		}
		return &pb.ReadResult{Variable: v, SessionExists: true}, true
	}
	return nil, false
}

func (a *Agent) deliver(id coherence.Waiter, r *pb.ReadResult, asOf, incarnation uint64) {
	w, ok := a.waiters[id]
	if !ok {
		return // its caller has gone
	}
	p := w.read
	if p.left == len(p.results) {
		p.asOf, p.incarnation = asOf, incarnation
	}
	if incarnation != p.incarnation {
		p.err = outrigger.Errorf(outrigger.Unavailable, "the log was replaced while it was being read; retry")
	}
	p.results[w.index], p.asOf = r, min(p.asOf, asOf)
	a.answered(id, p)
}

func (a *Agent) deliverError(id coherence.Waiter, err error) {
	if w, ok := a.waiters[id]; ok {
		w.read.err = err
		a.answered(id, w.read)
	}
}

func (a *Agent) answered(id coherence.Waiter, p *pendingRead) {
	delete(a.waiters, id)
	if p.left--; p.left == 0 {
		close(p.done)
	}
}

// launch starts the calls that steps asked for, fetches that may leave at once in one.
// It returns the failures of what could not be started.
func (a *Agent) launch() (failed []coherence.Input) {
	for _, r := range a.batch.ranges {
		if !a.spawn(func(ctx context.Context) { a.fetchRange(ctx, r) }) {
			failed = append(failed, coherence.RangeFailed{Range: r.Range})
		}
	}
	if len(a.batch.fetches) == 0 {
		a.batch.ranges = nil
		return failed
	}
	now := a.o.Clock()
	for rest := a.batch.fetches; len(rest) > 0; {
		n := 1
		for rest[0].After <= now && n < len(rest) && rest[n].After <= now && n < outrigger.MaxBatch {
			n++
		}
		group := rest[:n:n]
		rest = rest[n:]
		if !a.spawn(func(ctx context.Context) { a.fetch(ctx, group) }) {
			failed = append(failed, fillsFailed(group, outrigger.Errorf(outrigger.Unavailable, "the node agent is not running"))...)
		}
	}
	a.batch.ranges, a.batch.fetches = nil, nil
	return failed
}

func fillsFailed(group []coherence.Fetch, err error) []coherence.Input {
	ins := make([]coherence.Input, len(group))
	for i, f := range group {
		ins[i] = coherence.FillFailed{Key: f.Key, Flight: f.Flight, Err: err}
	}
	return ins
}

// spawn runs do in a goroutine that Run waits for; false when the agent is not running.
func (a *Agent) spawn(do func(context.Context)) bool {
	ctx := a.runCtx
	if ctx == nil || ctx.Err() != nil {
		return false
	}
	a.work.Go(func() { do(ctx) })
	return true
}

// stopped fails everybody who waits; no fetch will answer them.
func (a *Agent) stopped() {
	err := outrigger.Errorf(outrigger.Unavailable, "the node agent is stopping")
	for id := range a.waiters {
		a.deliverError(id, err)
	}
}

func (a *Agent) fetch(ctx context.Context, group []coherence.Fetch) {
	ctx, cancel := context.WithTimeout(ctx, a.o.FetchTimeout)
	defer cancel()
	if wait := time.Duration(group[0].After - a.o.Clock()); wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	a.readGroup(ctx, group)
}

func (a *Agent) readGroup(ctx context.Context, group []coherence.Fetch) {
	req := &pb.ReadRequest{}
	for _, f := range group {
		req.Keys = append(req.Keys, wire.KeyPB(f.Key))
		req.MinPosition = max(req.MinPosition, f.MinPosition)
	}
	resp, err := a.coh.Read(ctx, req)
	if gstatus.Code(err) == codes.ResourceExhausted && len(group) > 1 {
		// Together the values may exceed what one gRPC message may hold.
		a.readGroup(ctx, group[:len(group)/2])
		a.readGroup(ctx, group[len(group)/2:])
		return
	}
	if err == nil && len(resp.GetResults()) != len(group) {
		err = outrigger.Errorf(outrigger.Internal, "the origin answered %d of %d keys", len(resp.GetResults()), len(group))
	}
	if err != nil {
		a.step(fillsFailed(group, originError(err))...)
		return
	}
	ins := make([]coherence.Input, len(group))
	for i, f := range group {
		ins[i] = coherence.Filled{Key: f.Key, Flight: f.Flight, Result: resp.Results[i],
			AsOf: resp.GetAsOf(), Incarnation: resp.GetIncarnation(), Region: resp.GetRegion()}
	}
	a.step(ins...)
}

// originError says of a failed read that it was the origin's; a read changes nothing, so
// everything that is not the origin's own refusal is Unavailable.
func originError(err error) error {
	err = status.FromGRPC(err, nil)
	switch outrigger.KindOf(err) {
	case outrigger.Invalid, outrigger.Denied, outrigger.Unauthorised, outrigger.Exhausted, outrigger.NotFound:
		return err
	}
	return outrigger.Wrap(outrigger.Unavailable, err, "the origin cannot be read")
}

func (a *Agent) fetchRange(ctx context.Context, r coherence.FetchRange) {
	ctx, cancel := context.WithTimeout(ctx, a.o.FetchTimeout)
	defer cancel()
	resp, err := a.coh.Changes(ctx, &pb.ChangesRequest{Incarnation: r.Incarnation, From: r.From, To: r.To})
	if err != nil {
		a.o.Logger.Info("gap in the feed could not be closed", "from", r.From, "to", r.To, "error", err)
		a.step(coherence.RangeFailed{Range: r.Range, Gone: outrigger.IsKind(status.FromGRPC(err, nil), outrigger.Stale)})
		return
	}
	a.step(coherence.RangeArrived{Range: r.Range, Response: resp})
	a.observeLag(resp.GetChanges())
}
