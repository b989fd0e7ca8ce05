package coherence

import (
	"errors"
	"slices"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// simCall is a request to the authority under way.
type simCall struct {
	open   bool
	failed func()
}

func (c *simCall) end(do func()) {
	if c.open {
		c.open = false
		do()
	}
}

// call asks the authority. The server's part runs there and returns what its answer
// does here; failed runs instead when there is none in time, or the agent dies.
func (n *simNode) call(limit int64, server func() (answer func()), failed func()) {
	c := &simCall{open: true, failed: failed}
	n.calls = slices.DeleteFunc(n.calls, func(c *simCall) bool { return !c.open })
	n.calls = append(n.calls, c)
	life := n.life
	n.w.origin.serve(&n.link, func() {
		answer := server()
		if n.life == life {
			n.receive(func() { c.end(answer) })
		}
	})
	n.w.after(limit, func() {
		if n.life == life {
			n.agent(func() { c.end(failed) })
		}
	})
}

func (n *simNode) fetch(in Input, o Fetch) {
	k := simIDs[o.Key.String()]
	if n.flights[k] != 0 && !repeats(in) {
		n.w.oracle.fail("stampede", "node %d fetches %s although a fetch is under way (after %T)", n.number, o.Key, in)
	}
	n.flights[k], n.issued[k] = o.Flight, n.clock()
	landed := func() {
		if n.flights[k] == o.Flight {
			n.flights[k] = 0
		}
	}
	life := n.life
	n.w.after(max(0, o.After-n.clock()), func() {
		if n.life != life {
			return
		}
		n.call(simLong, func() func() {
			asOf, era := n.w.origin.replica(o.MinPosition), n.w.origin.now
			result := era.result(k, asOf)
			return func() {
				landed()
				n.step(Filled{Key: o.Key, Flight: o.Flight, Result: result, AsOf: asOf, Incarnation: era.incarnation(), Region: "eu"})
			}
		}, func() {
			landed()
			n.step(FillFailed{o.Key, o.Flight, errors.New("no answer")})
		})
	})
}

// repeats reports whether an input makes fetches under way worthless, so that they are
// sent again.
func repeats(in Input) bool {
	switch in.(type) {
	case WriteUnknown, SessionChanged, Wrote:
		return true
	}
	return false
}

func (n *simNode) fetchRange(o FetchRange) {
	n.call(simLong, func() func() {
		resp := n.w.origin.changes(o)
		if resp == nil {
			return func() { n.step(RangeFailed{Range: o.Range, Gone: true}) }
		}
		return func() { n.step(RangeArrived{o.Range, resp}) }
	}, func() { n.step(RangeFailed{Range: o.Range}) })
}

// strong reads at the authority and lets the table learn.
func (n *simNode) strong(r *simRead, attempt int) {
	began, key := n.s.Begin(), simKeys[r.key]
	n.call(simLong, func() func() {
		asOf, era := n.w.origin.authoritative("strong reads are answered by the authority"), n.w.origin.now
		result, at := era.result(r.key, asOf), n.w.now
		return func() {
			if !n.s.Current(era.incarnation(), began) && !n.w.off("late answers of older logs") {
				if attempt < 3 {
					n.strong(r, attempt+1)
				} else {
					r.failed()
				}
				return
			}
			n.step(Offered{Key: key, Began: began, Result: result, AsOf: asOf, Incarnation: era.incarnation(), Region: "eu"})
			r.answered(simAnswer{res: result, era: era.number, asOf: asOf, oldest: r.began, how: "strong", strong: true, at: at})
		}
	}, r.failed)
}

// write forwards an operation and settles the table before the caller hears of it.
func (n *simNode) write(op *simOp, limit int64, done func(simReply), failed func()) {
	began := n.s.Begin()
	n.call(limit, func() func() {
		reply := n.w.origin.write(op)
		era := n.w.origin.now
		return func() {
			n.settle(op, began, reply, era)
			done(reply)
		}
	}, func() {
		n.unsure(op)
		failed()
	})
}

// settle is what the agent makes of an answer to a write.
func (n *simNode) settle(op *simOp, began uint64, reply simReply, era *simEra) {
	if op.kind >= simDeleteSession {
		n.sessionChanged(op, nil)
		return
	}
	if reply.position == 0 {
		return
	}
	in := Wrote{Key: simKeys[op.key], Began: began, Version: era.version(reply.position)}
	if op.kind == simPut {
		in.Variable = era.variable(op.key, reply.position)
	}
	n.step(in)
	if op.kind == simPut {
		n.sessionChanged(op, in.Version) // it may have created the session
	}
}

func (n *simNode) unsure(op *simOp) {
	if op.kind >= simDeleteSession {
		n.sessionChanged(op, nil)
		return
	}
	n.step(WriteUnknown{simKeys[op.key]})
	n.doubt(op)
}

// simDoubt is an operation whose place in the log the agent was not told: it was made
// at this position, or not at all, by the time of the report.
type simDoubt struct {
	era, position uint64
	at            int64
}

func (n *simNode) doubt(op *simOp) {
	era := n.w.origin.now
	for k, to := op.keys(); k < to; k++ {
		if p := era.done[op.number]; era.number > n.doubted[k].era || p > n.doubted[k].position {
			n.doubted[k] = simDoubt{era.number, p, n.w.now}
		}
	}
}

func (n *simNode) sessionChanged(op *simOp, v *pb.Version) {
	n.step(SessionChanged{simKeys[op.key].Tenant, simKeys[op.key].Session, v})
	if op.kind >= simDeleteSession {
		n.doubt(op)
	}
}

// list forwards, and shows nobody on this node anything older afterwards.
func (n *simNode) list(key int, done func(vs []*pb.Variable, era *simEra)) {
	began := n.s.Begin()
	n.call(simLong, func() func() {
		vs, era := n.w.origin.listed(key), n.w.origin.now
		return func() {
			for _, v := range vs {
				n.step(Observed{Began: began, Variable: v})
			}
			done(vs, era)
		}
	}, func() {})
}
