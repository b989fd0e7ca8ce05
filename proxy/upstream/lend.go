package upstream

import (
	"net"
	"net/http"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// What follows is for an event loop that carries the simple calls itself (proxy/loop): it
// takes idle connections over, sends on them under this pool's limits, and gives a call
// back, at any point of its answer, that turns out not to be simple.

// Reserve takes a place for a connection to address without waiting; false at the limit,
// or if heads of answers have a time limit of their own here, which loops do not keep.
// Release or the end of a resumed answer gives it back.
func (d *Direct) Reserve(address string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := d.hosts[address]
	if h == nil {
		h = &host{address: address}
		d.hosts[address] = h
	}
	if h.inUse >= d.maxHost || d.headTimeout > 0 {
		d.drop(h)
		return false
	}
	h.inUse++
	return true
}

// Release gives back a place that Reserve took.
func (d *Direct) Release(address string) { d.leave(address, nil) }

// Take gives away an idle connection to address that has nothing to read, nil if there is
// none. It is the caller's from then on.
func (d *Direct) Take(address string) *net.TCPConn {
	for {
		d.mu.Lock()
		h := d.hosts[address]
		if h == nil {
			d.mu.Unlock()
			return nil
		}
		l := d.pop(h)
		d.drop(h)
		d.mu.Unlock()
		if l == nil {
			return nil
		}
		if t, ok := l.nc.(*net.TCPConn); ok && l.usable() {
			return t
		}
		l.nc.Close()
	}
}

// Resume goes on with a request that was sent on nc by somebody else, to address, under a
// place that Reserve took: read is what has come of the answer. whole says that the request
// was written to its end; else nc is not used again. It behaves as RoundTrip from there on;
// r's body is not looked at.
func (d *Direct) Resume(r *http.Request, address string, nc net.Conn, read []byte, whole bool) (*http.Response, error) {
	return d.resume(r, address, nc, read, whole, nil, nil)
}

// ResumeStream is Resume in the middle of content in chunks: read is the answer's head and
// what follows content, of which content was decoded and not used up, and chunks the state
// of the coding after that.
func (d *Direct) ResumeStream(r *http.Request, address string, nc net.Conn, read []byte, whole bool, chunks *http1.Chunked, content []byte) (*http.Response, error) {
	return d.resume(r, address, nc, read, whole, chunks, content)
}

func (d *Direct) resume(r *http.Request, address string, nc net.Conn, read []byte, whole bool, chunks *http1.Chunked, content []byte) (*http.Response, error) {
	x := d.begin(r.Context(), newLink(nc), address)
	x.s.buf = append(x.s.buf[:0], read...)
	x.got = len(read)
	resp, err := x.receive(r, whole)
	if err != nil {
		nc.Close()
		x.free()
		d.leave(address, nil)
		return nil, endOf(r.Context(), err)
	}
	if chunks != nil && x.left == -1 {
		x.s.chunked, x.ready = *chunks, content
	}
	return resp, nil
}
