package dashboard

import (
	"net/http"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// writeTimeout is how long a viewer may take to accept one frame.
const writeTimeout = 10 * time.Second

// hub hands the latest frame to every stream. There is no queue: a stream that comes back
// late finds the newest frame.
type hub struct {
	limit   int
	arrived chan struct{} // capacity 1: somebody came and there is no recent frame

	mu      sync.Mutex
	count   int
	frame   []byte
	changed chan struct{} // closed and replaced with every frame
	closed  bool
}

func newHub(limit int) *hub {
	return &hub{limit: limit, arrived: make(chan struct{}, 1), changed: make(chan struct{})}
}

func (h *hub) viewers() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.count
}

// enter counts a viewer in; false when there is no room or the hub is closed.
func (h *hub) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || h.count >= h.limit {
		return false
	}
	h.count++
	if h.count == 1 {
		h.frame = nil // whatever it was, nobody has kept it current
	}
	if h.frame == nil {
		select {
		case h.arrived <- struct{}{}:
		default:
		}
	}
	return true
}

func (h *hub) leave() {
	h.mu.Lock()
	h.count--
	h.mu.Unlock()
}

func (h *hub) publish(frame []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.frame = frame
	close(h.changed)
	h.changed = make(chan struct{})
}

// latest returns the newest frame (nil if there is none), a channel that closes when
// there is a newer one, and whether the hub is closed.
func (h *hub) latest() ([]byte, <-chan struct{}, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.frame, h.changed, h.closed
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	close(h.changed)
	h.changed = make(chan struct{}) // never closed again: readers look at closed
}

// events is one stream.
func (d *Dashboard) events(w http.ResponseWriter, r *http.Request) {
	if !d.hub.enter() {
		status.WriteHTTP(w, outrigger.Errorf(outrigger.Unavailable, "the status page has %d viewers already or is stopping; close one", d.hub.limit))
		return
	}
	defer d.hub.leave()
	h := w.Header()
	h.Set("content-type", "text/event-stream")
	h.Set("cache-control", "no-store")
	h.Set("x-accel-buffering", "no") // proxies in front must not hold frames back
	if r.Method == http.MethodHead {
		return
	}
	out := http.NewResponseController(w)
	for {
		frame, newer, closed := d.hub.latest()
		if closed {
			return
		}
		if frame != nil {
			// Not every ResponseWriter has deadlines; those that do not are in tests.
			_ = out.SetWriteDeadline(time.Now().Add(writeTimeout))
			if _, err := w.Write(frame); err != nil {
				return
			}
		}
		if err := out.Flush(); err != nil {
			return
		}
		select {
		case <-newer:
		case <-r.Context().Done():
			return
		}
	}
}
