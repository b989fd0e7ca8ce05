package loop

import (
	"net/http"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// stage is how far a stream has come. Until its first bytes go out, link.in is the answer
// from its first byte on, so that a worker can begin again; from then on it is the answer's
// head, and what follows is decoded as it comes.
type stage uint8

const (
	noStream     stage = iota // or not known yet
	streamHeld                // nothing is out
	streamPassed              // the head is out, and content
)

// streams reports whether the answer in l.answer is passed on as it comes.
func (l *loop) streams(k *link) bool {
	if k.flow == noStream {
		if _, ok := k.call.Streams(&l.answer); ok {
			k.flow = streamHeld
		}
	}
	return k.flow == streamHeld
}

// streamBegins handles what came of a stream of which nothing is out: data is the answer
// from its first byte on, its head has n bytes. ended: the loop has nothing more to do with
// the call; begun: the answer is under way to the client.
func (l *loop) streamBegins(k *link, data []byte, n int) (ended, begun bool) {
	done, err := k.chunks.take(l, data, n)
	if err != nil || k.chunks.at > maxRelayAnswer {
		l.surrender(k, data, false)
		return true, false
	}
	closing := k.c.ends || l.draining
	out, used, v := k.call.Pass(&l.answer, k.chunks.content, done, l.out[:0], l.date, closing)
	excess := data[k.chunks.at:]
	if len(out) == 0 {
		if v == StreamGoesOn {
			k.chunks.drop(l, used)
			return false, false
		}
		l.surrender(k, data, false) // from the first byte on
		return true, false
	}
	if v != StreamEnds {
		limit, _ := k.call.Streams(&l.answer)
		k.deadline = k.began + int64(limit)
	}
	k.c.ends, k.flow = closing, streamPassed
	k.in = l.hold(k.in, data[:n])
	return l.streamGoes(k, out, used, v, excess), true
}

// streamed handles what came of a stream that is under way; it returns true if the loop has
// nothing more to do with the call.
func (l *loop) streamed(k *link, data []byte) bool {
	n, err := k.chunks.feed(l, data)
	if err != nil {
		l.surrender(k, append(k.in, data[n:]...), false) // the decoder says it again
		return true
	}
	done, excess := k.chunks.decoder.Done(), data[n:]
	out, used, v := k.call.Pass(nil, k.chunks.content, done, l.out[:0], nil, false)
	return l.streamGoes(k, out, used, v, excess)
}

// keeps reports whether the server keeps the connection after the answer whose head is k.in.
func (l *loop) keeps(k *link) bool {
	seen := 0
	_, err := l.answer.Parse(k.in, &seen, http.MethodPost, http1.Limits{})
	return err == nil && l.answer.KeepAlive()
}

// streamGoes sends out and does what v says. A client that does not keep up is a worker's,
// who can wait.
func (l *loop) streamGoes(k *link, out []byte, used int, v Verdict, excess []byte) bool {
	if cap(out) <= 2*flushAt {
		l.out = out[:0]
	}
	k.chunks.drop(l, used)
	if v == StreamEnds {
		l.settle(k, out, len(k.out) == 0 && len(excess) == 0 && l.keeps(k))
		return true
	}
	unsent, ok := l.offer(k.c, out)
	if !ok {
		return true
	}
	if v == StreamResumes || len(unsent) > 0 || len(k.chunks.content) > maxStreamPart {
		l.surrenderWith(k, append(k.in, excess...), false, unsent)
		return true
	}
	return false
}

// offer writes b to a client and returns what it does not take now; ok is false if the
// connection failed, and is dropped.
func (l *loop) offer(c *conn, b []byte) (rest []byte, ok bool) {
	for len(b) > 0 {
		n, e := rawWrite(c.fd, b)
		switch e {
		case 0:
			b = b[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			return b, true
		default:
			l.drop(c)
			return nil, false
		}
	}
	return nil, true
}
