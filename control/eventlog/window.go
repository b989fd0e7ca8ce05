package eventlog

// Outcome is what a request id stands for: the positions its append was given.
type Outcome struct{ First, Last uint64 }

// Window remembers the outcomes of the last n request ids, oldest forgotten first. It
// is plain state for one goroutine at a time. Cost: about 100 bytes and the id itself
// per entry.
type Window struct {
	byID map[string]Outcome
	ring []string // ids in order of arrival; next is the oldest once the ring is full
	next int
	size int
}

// NewWindow returns a window of n ids, n ≥ 1.
func NewWindow(n int) *Window {
	return &Window{byID: make(map[string]Outcome), size: max(n, 1)}
}

// Get returns the outcome of id, if it is remembered.
func (w *Window) Get(id string) (Outcome, bool) {
	o, ok := w.byID[id]
	return o, ok
}

// Len is the number of ids remembered.
func (w *Window) Len() int { return len(w.byID) }

// Add remembers a new id (one for which Get said no) and returns the outcome it had to
// forget, if any.
func (w *Window) Add(id string, o Outcome) (forgotten Outcome, evicted bool) {
	w.byID[id] = o
	if len(w.ring) < w.size {
		w.ring = append(w.ring, id)
		return Outcome{}, false
	}
	old := w.ring[w.next]
	forgotten = w.byID[old]
	delete(w.byID, old)
	w.ring[w.next] = id
	w.next = (w.next + 1) % w.size
	return forgotten, true
}
