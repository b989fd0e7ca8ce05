package inference

import (
	"context"
	"net/http"
	"time"
)

// try is one attempt: the endpoint asked, and a second one if hedging brought it in.
type try struct {
	c      *call
	t      *target
	report func(error)
	spare  []*target // endpoints not asked yet
	limit  int       // of attempts
	began  time.Time // of the request that answered

	resumed *resumption // the request is out already; nil = not

	pending chan arrival // answers of requests that lost; nil without a hedge
	lost    int          // how many of them are still to come
	cancel  []context.CancelFunc
	hedged  bool // a second request holds a connection and counts as a retry
}

// arrival is the answer of one of two requests.
type arrival struct {
	side side
	resp *http.Response
	err  error
}

// side is one request of a hedged attempt.
type side struct {
	t      *target
	report func(error)
	began  time.Time
}

// hedgeable: only where asking twice is harmless, and never when a sequence's state would
// see the request twice.
func (c *call) hedgeable() bool {
	return c.h.o.HedgeAfter > 0 && c.api.Idempotent && !c.streams && c.env.Sequence == ""
}

// send makes the request and returns the head of the answer. If none came after
// HedgeAfter it asks another endpoint as well and takes what answers well first; then
// y.t, y.report and y.began are those of the answer returned.
func (y *try) send(ctx context.Context) (*http.Response, error) {
	c := y.c
	if s := y.resumed; s != nil {
		y.began = s.from.began
		return y.takeOver(c.outgoing(ctx, y.t), s)
	}
	y.t.inflight.Add(1)
	y.t.silent.Add(1)
	y.began = c.h.now()
	if !c.hedgeable() || len(y.spare) == 0 {
		return c.transport().RoundTrip(c.outgoing(ctx, y.t))
	}
	y.pending = make(chan arrival, 2)
	y.launch(ctx, side{y.t, y.report, y.began})
	timer := time.NewTimer(c.h.o.HedgeAfter)
	defer timer.Stop()
	select {
	case a := <-y.pending:
		y.lost--
		return a.resp, a.err
	case <-timer.C:
	}
	if !y.second(ctx) {
		a := <-y.pending
		y.lost--
		return a.resp, a.err
	}
	return y.better()
}

// launch asks one endpoint; the answer arrives at pending, which has room for it.
func (y *try) launch(ctx context.Context, s side) {
	ctx, cancel := context.WithCancel(ctx)
	y.cancel = append(y.cancel, cancel)
	y.lost++
	req := y.c.outgoing(ctx, s.t)
	go func() {
		resp, err := y.c.transport().RoundTrip(req)
		y.pending <- arrival{s, resp, err}
	}()
}

// second asks the next endpoint that may be asked, within the bounds of every retry.
func (y *try) second(ctx context.Context) bool {
	c := y.c
	for _, t := range y.spare {
		if c.attempts >= y.limit || t.out(c.h.now().UnixNano()) {
			break
		}
		report, err := t.breaker.Allow()
		if err != nil {
			continue
		}
		gate := c.gate()
		if c.rpc == nil && !gate.conns.try(limitOf(c.assign.Version).connections) {
			report(errExcluded)
			break
		}
		if !c.mayRetry() {
			if c.rpc == nil {
				gate.conns.leave()
			}
			report(errExcluded)
			break
		}
		y.hedged = true
		c.attempts++
		t.inflight.Add(1)
		t.silent.Add(1)
		y.launch(ctx, side{t, report, c.h.now()})
		return true
	}
	return false
}

// better returns the first good answer of the two, or the last bad one.
func (y *try) better() (*http.Response, error) {
	a := <-y.pending
	y.lost--
	if a.err != nil || retryableStatus(a.resp.StatusCode) {
		y.discard(a, errEndpoint)
		a = <-y.pending
		y.lost--
	}
	y.t, y.report, y.began = a.side.t, a.side.report, a.side.began
	y.c.region = y.t.endpoint.Region
	return a.resp, a.err
}

// discard drops an answer that is not used, with its verdict on the endpoint.
func (y *try) discard(a arrival, verdict error) {
	a.side.t.silent.Add(-1)
	if a.resp != nil {
		if a.resp.StatusCode < 500 {
			verdict = errExcluded // busy, not broken
		}
		a.resp.Body.Close()
	}
	if verdict == errEndpoint {
		a.side.t.judge(false)
		y.c.penalise(a.side.t)
	}
	a.side.report(verdict)
	a.side.t.inflight.Add(-1)
}

// leave ends the attempt: the request that lost is cancelled and waited for.
func (y *try) leave() {
	for _, cancel := range y.cancel {
		cancel()
	}
	for ; y.lost > 0; y.lost-- {
		y.discard(<-y.pending, errExcluded)
	}
	y.t.inflight.Add(-1)
	if y.hedged {
		y.c.retried()
		if y.c.rpc == nil {
			y.c.gate().conns.leave()
		}
	}
}
