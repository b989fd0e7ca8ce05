package inference

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// Bodies of more than smallBody bytes share room for largeBodies of the largest size, so that
// what requests may hold does not grow with MaxInFlight times MaxBody.
const (
	smallBody   = 1 << 20
	largeBodies = 8
)

// callBytes is what a call takes of the room besides its bodies: goroutines, buffers of its
// connections, the parsed head.
const callBytes = 32 << 10

// errTooLarge says that a body exceeds MaxBody, errNoRoom that others fill the room for
// bodies.
var (
	errTooLarge = errors.New("larger than the limit")
	errNoRoom   = errors.New("no room for bodies")
)

// noRoom is what they are told for whom there is none.
var noRoom = apiError{status: http.StatusServiceUnavailable, code: "overloaded", retryAfter: overloadDelay, retry: retryYes,
	message: "the sidecar holds as much of other calls as it may; try again"}

// readBody reads the whole body within the limit, decoded; it has answered if it returns
// false. Compressed bodies (Triton's clients can send them) are decoded because the model is
// named inside, and go on decoded: not every model server would do it.
func (c *call) readBody() bool {
	if c.api.Get {
		return true
	}
	coding := strings.ToLower(first(c.r.Header, hdrEncoding))
	switch coding {
	case "", "identity", "gzip", "x-gzip", "deflate":
	default:
		c.refuse(apiError{status: http.StatusUnsupportedMediaType, kind: invalidRequest, code: "unsupported_encoding",
			message: "the request body is encoded (" + coding + "); the model cannot be read from it. Send it plain or as gzip or deflate"})
		return false
	}
	if c.r.ContentLength > c.h.o.MaxBody {
		c.tooLarge()
		return false
	}
	body, err := c.readWhole(c.r.Body, c.r.ContentLength)
	if err == nil && coding != "" && coding != "identity" {
		c.encoded = body
		body, err = c.decode(coding, body)
	}
	c.body, c.asked, c.again = body, len(body), isClientRetry(c.r.Header)
	switch {
	case err == nil:
		return true
	case errors.Is(err, errTooLarge):
		c.tooLarge()
	case errors.Is(err, errNoRoom):
		c.w.Header()["Connection"] = []string{"close"}
		c.refuse(noRoom)
	case c.encoded != nil:
		c.refuse(apiError{status: http.StatusBadRequest, kind: invalidRequest, code: "invalid_body", retry: retryNo,
			message: "the request body is not what its Content-Encoding says (" + coding + ")"})
	default:
		c.refuse(apiError{status: http.StatusBadRequest, kind: invalidRequest, code: "body_incomplete", message: "the request body ended early"})
	}
	return false
}

const hdrEncoding = "Content-Encoding"

func (c *call) tooLarge() {
	c.w.Header()["Connection"] = []string{"close"} // rather than reading the rest
	c.refuse(apiError{status: http.StatusRequestEntityTooLarge, kind: invalidRequest, code: "request_too_large", retry: retryNo,
		message: "request body exceeds the limit of " + strconv.FormatInt(c.h.o.MaxBody, 10) + " bytes (sidecar --model-max-body)"})
}

// readWhole reads r, of claimed bytes if that is not negative. The buffer grows with what
// arrives: a claimed length must not reserve memory.
func (c *call) readWhole(r io.Reader, claimed int64) ([]byte, error) {
	limit := c.h.o.MaxBody
	begin := int(min(max(claimed, 0)+1, 64<<10))
	if !c.grow(begin) {
		return nil, errNoRoom
	}
	body, whole, err := readUpTo(r, make([]byte, 0, begin), int(min(limit, smallBody))+1, c.grow)
	if err != nil || whole {
		return body, err
	}
	if limit <= smallBody {
		return nil, errTooLarge
	}
	want := limit
	if claimed > 0 {
		want = claimed
	}
	if !c.claim(want) {
		return nil, errNoRoom
	}
	if body, whole, err = readUpTo(r, body, int(limit)+1, c.grow); err == nil && !whole {
		return nil, errTooLarge
	}
	return body, err
}

// claim takes n bytes of the room for large bodies, until release.
func (c *call) claim(n int64) bool {
	if c.h.large.Add(n) > largeBodies*c.h.o.MaxBody {
		c.h.large.Add(-n)
		return false
	}
	c.large += n
	return true
}

// grow takes n bytes of the process's memory, until release. One goroutine of a call uses it.
// The request of a call that a loop has begun is in the loop's memory already.
func (c *call) grow(n int) bool {
	if c.resumed != nil {
		return true
	}
	if !c.h.o.Room.Take(int64(n)) {
		return false
	}
	c.taken += int64(n)
	return true
}

// release gives back what the call has of the process's memory, and its body of the room for
// large ones.
func (c *call) release() {
	c.h.o.Room.Give(c.taken)
	c.taken = 0
	if c.large > 0 {
		c.h.large.Add(-c.large)
		c.large = 0
	}
}

// decode undoes the coding of a body.
func (c *call) decode(coding string, body []byte) ([]byte, error) {
	var r io.ReadCloser
	var err error
	if coding == "deflate" {
		r, err = zlib.NewReader(bytes.NewReader(body))
	} else {
		r, err = gzip.NewReader(bytes.NewReader(body))
	}
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return c.readWhole(r, -1)
}
