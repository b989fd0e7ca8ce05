package coherence

// newRoamer starts a client that goes from node to node and carries a token: the
// incarnation and position its answers were as new as.
func newRoamer(w *simWorld, number int) {
	scope := &simScope{}
	var era, position uint64
	learn := func(e, at uint64) {
		if at == 0 {
			return // a write that changed nothing is at no position
		}
		if e > era {
			era, position = e, 0
		}
		if e == era {
			position = max(position, at)
		}
	}
	w.every(30*simMs, func() {
		n, key := w.nodes[w.r.IntN(len(w.nodes))], w.pick()
		w.tally.roamed++
		if w.r.IntN(8) == 0 && w.now < w.calm+300*simMs {
			op := w.newOp()
			n.agent(func() {
				node := n.scope
				n.write(op, simLong, func(reply simReply) {
					w.oracle.acked(op, reply, scope, node)
					learn(reply.era, reply.position)
				}, func() { w.tally.unknown++ })
			})
			return
		}
		r := w.newRead(key, scope, n.scope)
		r.through, r.doubted = true, n.doubted[key]
		r.answered = func(a simAnswer) {
			w.oracle.check(n, r, a)
			learn(a.era, a.asOf)
		}
		r.failed = func() { w.tally.failed++ }
		n.agent(func() {
			// A token of another log than the node follows cannot be compared.
			if _, incarnation, _ := n.s.Position(); position > 0 && incarnation != era+100 {
				n.strong(r, 1)
				return
			}
			n.read(r, position)
		})
	})
}

// newWriter starts a client of the authority itself. It sends some requests twice and
// may crash between the two.
func newWriter(w *simWorld, number int) {
	link := &simLink{}
	w.every(60*simMs, func() {
		if w.now > w.calm+300*simMs {
			return
		}
		op, scope := w.newOp(), &simScope{}
		acked := false
		for range 1 + w.r.IntN(2) {
			w.origin.serve(link, func() {
				reply := w.origin.write(op)
				w.send(link, func() {
					if !acked {
						acked = true
						w.oracle.acked(op, reply, scope)
					}
				})
			})
		}
	})
	w.every(300*simMs, func() {
		if w.chance(20) {
			link.cut = w.now + w.r.Int64N(200*simMs)
		}
	})
}
