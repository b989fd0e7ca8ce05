package feed

import (
	"errors"
	"io"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// AppendMessage appends m as a frame. Errors are those of proto.Marshal.
func AppendMessage(b []byte, m proto.Message) ([]byte, error) {
	b, at := Begin(b)
	b, err := proto.MarshalOptions{}.MarshalAppend(b, m)
	if err != nil {
		return b[:at-headerBytes], err
	}
	End(b, at)
	return b, nil
}

// Begin appends room for the header of a message that is encoded by appending to the
// result; End(b, at) completes it.
func Begin(b []byte) (_ []byte, at int) {
	b = append(b, kindMessage, 0, 0, 0)
	return b, len(b)
}

// End writes the length of the message that Begin returned at for; it ends where b does.
func End(b []byte, at int) { putLength(b[at-headerBytes:], len(b)-at) }

func putLength(header []byte, n int) {
	header[1], header[2], header[3] = byte(n>>16), byte(n>>8), byte(n)
}

// AppendEnd appends the last frame of a sender: why it ends.
func AppendEnd(b []byte, err error) []byte {
	kind, text := outrigger.KindOf(err), err.Error()
	var e *outrigger.Error
	if kind == outrigger.Internal || !errors.As(err, &e) {
		text = "internal error" // the cause stays in the server's log
	}
	reason := kind.String() + ": " + text
	reason = reason[:min(len(reason), maxReason)]
	at := len(b) + headerBytes
	b = append(append(b, kindEnd, 0, 0, 0), reason...)
	End(b, at)
	return b
}

// heartbeatPrefix is the encoding of a FeedRequest with a Heartbeat, up to its sent.
const heartbeatPrefix = "\x12\x09\x09"

// appendRequest appends r as a frame. Heartbeats, which are nearly all of them, are
// written by hand.
func appendRequest(b []byte, r *pb.FeedRequest) ([]byte, error) {
	hb, ok := r.GetKind().(*pb.FeedRequest_Heartbeat)
	if !ok || hb.Heartbeat.GetSent() == 0 || len(r.ProtoReflect().GetUnknown()) > 0 {
		return AppendMessage(b, r)
	}
	return appendHeartbeat(b, hb.Heartbeat.Sent), nil
}

// appendHeartbeat appends the frame of a heartbeat. sent is not 0.
func appendHeartbeat(b []byte, sent uint64) []byte {
	b, at := Begin(b)
	b = protowire.AppendFixed64(append(b, heartbeatPrefix...), sent)
	End(b, at)
	return b
}

// heartbeat reads what appendRequest wrote by hand.
func heartbeat(raw []byte) (sent uint64, ok bool) {
	if len(raw) != len(heartbeatPrefix)+8 || string(raw[:len(heartbeatPrefix)]) != heartbeatPrefix {
		return 0, false
	}
	sent, _ = protowire.ConsumeFixed64(raw[len(heartbeatPrefix):])
	return sent, true
}

// reader cuts a connection into frames.
type reader struct {
	from io.Reader
	max  int // bytes of a message

	buf        []byte
	start, end int // of what is in buf and not taken yet
}

const (
	firstBuffer = 4 << 10
	// requestBuffer is what a server begins with: most of what comes is a heartbeat, and
	// there is one for each node.
	requestBuffer = 512
	keepBuffer    = 64 << 10 // a larger buffer is let go of once it is empty
)

// next returns the body of the next message, valid until the following call. The end of
// the connection between two frames is io.EOF.
func (r *reader) next() ([]byte, error) {
	if err := r.need(headerBytes); err != nil {
		return nil, err
	}
	h := r.buf[r.start : r.start+headerBytes]
	kind, n := h[0], int(h[1])<<16|int(h[2])<<8|int(h[3])
	switch {
	case kind == kindEnd && n <= maxReason:
	case kind != kindMessage:
		return nil, outrigger.Errorf(outrigger.Invalid, "a feed frame of kind 0x%02x with %d bytes: this is not %s", kind, n, Protocol)
	case n > r.max:
		return nil, outrigger.Errorf(outrigger.Invalid, "a feed frame has %d bytes, at most %d are allowed", n, r.max)
	}
	if err := r.need(headerBytes + n); err != nil {
		return nil, cutOff(err)
	}
	body := r.buf[r.start+headerBytes : r.start+headerBytes+n]
	r.start += headerBytes + n
	if kind == kindEnd {
		return nil, ended(string(body))
	}
	return body, nil
}

// cutOff makes an end of the connection inside a frame an error.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ended is the error that an end frame stands for.
func ended(reason string) error {
	kind, text, _ := strings.Cut(reason, ": ")
	for _, k := range outrigger.Kinds() {
		if k.String() == kind {
			return outrigger.Errorf(k, "%s", text)
		}
	}
	return outrigger.Errorf(outrigger.Unavailable, "the feed was ended: %q", reason)
}

// need reads until n bytes are there.
func (r *reader) need(n int) error {
	if r.end-r.start >= n {
		return nil
	}
	switch {
	case r.start == r.end && len(r.buf) > keepBuffer && n <= keepBuffer:
		r.buf, r.start, r.end = make([]byte, max(firstBuffer, n)), 0, 0
	case r.start == r.end && len(r.buf) >= n:
		r.start, r.end = 0, 0
	case len(r.buf)-r.start < n:
		to := r.buf
		if len(to) < n {
			to = make([]byte, max(firstBuffer, n))
		}
		r.end = copy(to, r.buf[r.start:r.end])
		r.buf, r.start = to, 0
	}
	for r.end-r.start < n {
		got, err := r.from.Read(r.buf[r.end:])
		r.end += got
		if err != nil && r.end-r.start < n {
			if r.end > r.start {
				return cutOff(err)
			}
			return err
		}
	}
	return nil
}
