// Package flight is one answer on its way, with everybody who reads it along: the byte
// stream below single flight, of a process (proxy/inference/answers) and of a node
// (cache/shelf).
//
//	f := flight.New[http.Header](1<<20, unlist, nil)
//	f.Begin(header, true); f.Write(b); f.End(true)   // the leader, one call at a time
//	p, err := f.Read(ctx, begun, seen)               // any number of readers, at any time
//
// # Promises
//
//   - Readers get every byte once and in order, from the first one, whenever they begin,
//     and then whether the answer is whole or lost.
//   - An answer longer than the limit is no longer listed, so that nobody joins. One that is
//     worth something only whole is lost there. One that is read piece by piece goes
//     on for who reads it already; a reader that is further behind than the limit loses it,
//     and nobody waits for such a reader. So it is with one that grows while there is no
//     memory for more.
//   - At most twice the limit and one piece are held.
//
// Whoever lists flights counts its readers with Enter before they read, and takes the flight
// off its list in unlist. Nothing runs in the background; all methods are safe for
// concurrent use, apart from what is said of the leader.
package flight

import (
	"context"
	"sync"
	"sync/atomic"
)

// Flight is one answer; H is what comes before its bytes.
type Flight[H any] struct {
	limit   int
	unlist  func()
	full    func() bool
	readers atomic.Int64
	idle    atomic.Pointer[func()] // called when the last reader leaves

	mu     sync.Mutex
	head   H
	begun  bool
	pieces bool // of use before it is whole
	long   bool // longer than the limit
	base   int  // bytes let go before body
	body   []byte
	state  state
	grew   chan struct{} // closed and replaced at every change
}

type state uint8

const (
	running state = iota
	whole
	lost
)

// New returns a flight of an answer that is kept as far as limit bytes. unlist is called
// when nobody may join any more, possibly more than once and never with a lock held.
// full, if not nil, reports that there is no memory for more, which makes the answer one that is
// longer than the limit.
func New[H any](limit int, unlist func(), full func() bool) *Flight[H] {
	return &Flight[H]{limit: limit, unlist: unlist, full: full, grew: make(chan struct{})}
}

// change wakes the readers; f.mu is held.
func (f *Flight[H]) change() {
	close(f.grew)
	f.grew = make(chan struct{})
}

// Begin says that an answer begins. head must not change afterwards. pieces: its readers
// can use it as it comes.
func (f *Flight[H]) Begin(head H, pieces bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == running && !f.begun {
		f.head, f.begun, f.pieces = head, true, pieces
		f.change()
	}
}

// Write adds a copy of b to an answer that has begun.
func (f *Flight[H]) Write(b []byte) {
	f.mu.Lock()
	outgrown := f.state == running && !f.long && (len(f.body)+len(b) > f.limit || f.full != nil && f.full())
	if outgrown {
		f.long = true
		f.mu.Unlock()
		f.unlist() // from here on there are no more readers than now
		f.mu.Lock()
		if !f.pieces || !f.Followed() {
			f.mu.Unlock()
			f.End(false)
			return
		}
	}
	defer f.mu.Unlock()
	if f.state != running {
		return
	}
	if behind := len(f.body) - f.limit; f.long && behind > 0 && len(f.body)+len(b) > 2*f.limit {
		// Readers hold slices of the old bytes: these stay as they are.
		f.body = append(make([]byte, 0, 2*f.limit), f.body[behind:]...)
		f.base += behind
	}
	// Readers hold slices; append never touches what is below its length.
	f.body = append(f.body, b...)
	f.change()
}

// Fill begins and ends the flight with an answer that is there already; neither head nor body
// may change afterwards. It does nothing to a flight that has begun.
func (f *Flight[H]) Fill(head H, body []byte) {
	f.mu.Lock()
	if f.state == running && !f.begun {
		f.head, f.begun, f.body = head, true, body
	}
	f.mu.Unlock()
	f.End(true)
}

// Got returns what was written until now, for the leader to keep: begun is false before
// Begin and after the flight was lost, all is false if there was more than body. body must not
// be modified; it is a copy if it would hold much more memory than its bytes need.
func (f *Flight[H]) Got() (head H, body []byte, begun, all bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.body)
	if body = f.body[:n:n]; cap(f.body)-n > n/8 {
		body = append(make([]byte, 0, n), body...)
	}
	return f.head, body, f.begun && f.state != lost, !f.long
}

// End ends the flight: all is well, or the answer is lost. What never began is lost. After
// the first End it only unlists.
func (f *Flight[H]) End(well bool) {
	f.mu.Lock()
	if f.state == running {
		f.state = lost
		if well && f.begun {
			f.state = whole
		}
		f.change()
	}
	f.mu.Unlock()
	f.unlist()
}

// Enter counts a reader.
func (f *Flight[H]) Enter() { f.readers.Add(1) }

// Leave says that a reader reads no more.
func (f *Flight[H]) Leave() {
	if f.readers.Add(-1) == 0 {
		if idle := f.idle.Load(); idle != nil {
			(*idle)()
		}
	}
}

// Followed reports whether anybody besides the leader waits for the answer.
func (f *Flight[H]) Followed() bool { return f.readers.Load() > 0 }

// OnIdle has fn called whenever the last reader leaves; the leader uses it to give up an
// answer nobody waits for any more. fn must not block.
func (f *Flight[H]) OnIdle(fn func()) { f.idle.Store(&fn) }

// Progress is what a reader sees of a flight.
type Progress[H any] struct {
	Head  H
	Begun bool
	New   []byte // bytes after those seen; must not be modified
	Whole bool
	Lost  bool // also when the reader is too far behind
}

// Read waits until the flight has more than the reader has seen, seen bytes and with
// begun its head, or has ended. The error is the context's.
func (f *Flight[H]) Read(ctx context.Context, begun bool, seen int) (Progress[H], error) {
	for {
		p, grew := f.look(seen)
		if p.Whole || p.Lost || len(p.New) > 0 || !begun && p.Begun {
			return p, nil
		}
		select {
		case <-grew:
		case <-ctx.Done():
			return p, ctx.Err()
		}
	}
}

// Await waits until the flight has ended. The error is the context's.
func (f *Flight[H]) Await(ctx context.Context) (Progress[H], error) {
	for {
		p, grew := f.look(0)
		if p.Whole || p.Lost {
			return p, nil
		}
		select {
		case <-grew:
		case <-ctx.Done():
			return p, ctx.Err()
		}
	}
}

func (f *Flight[H]) look(seen int) (Progress[H], <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := Progress[H]{Head: f.head, Begun: f.begun, Whole: f.state == whole, Lost: f.state == lost}
	if seen < f.base {
		p.Whole, p.Lost = false, true
	} else {
		p.New = f.body[seen-f.base : len(f.body) : len(f.body)]
	}
	return p, f.grew
}
