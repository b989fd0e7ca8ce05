package loop

import "github.com/outrigger-mesh/outrigger/proxy/http1"

// chunkedContent is the content of an answer in chunks as far as it came, beside the bytes
// themselves: whoever takes the call over needs those. Trailers are checked and dropped, as
// on the other path.
type chunkedContent struct {
	decoder http1.Chunked
	at      int    // of the answer's bytes, what is decoded; 0 = nothing yet
	content []byte // at most maxRelayAnswer, as the bytes it came from
}

// take decodes what is new in data, the answer from its first byte on, whose content begins
// at head. An error is a *http1.Refusal.
func (d *chunkedContent) take(l *loop, data []byte, head int) (done bool, err error) {
	if d.at == 0 {
		d.decoder.Reset()
		d.at = head
	}
	n, err := d.feed(l, data[d.at:])
	d.at += n
	return d.decoder.Done(), err
}

// feed decodes b up to its end or that of the content: n bytes are used up.
func (d *chunkedContent) feed(l *loop, b []byte) (n int, err error) {
	for n < len(b) && !d.decoder.Done() {
		piece, m, err := d.decoder.Next(b[n:])
		if err != nil {
			return n, err
		}
		n += m
		d.add(l, piece)
	}
	return n, nil
}

func (d *chunkedContent) add(l *loop, piece []byte) {
	if n := len(l.kept); cap(d.content) == 0 && n > 0 {
		d.content, l.kept = l.kept[n-1][:0], l.kept[:n-1]
	}
	if need := len(d.content) + len(piece); need > cap(d.content) {
		d.content = append(make([]byte, 0, max(need+need/2, keptSize)), d.content...)
	}
	d.content = append(d.content, piece...)
}

// drop takes n bytes off the front, and the memory back when nothing is left.
func (d *chunkedContent) drop(l *loop, n int) {
	d.content = d.content[:copy(d.content, d.content[n:])]
	if len(d.content) == 0 {
		l.release(d.content)
		d.content = nil
	}
}

// end gives the memory back.
func (d *chunkedContent) end(l *loop) {
	l.release(d.content)
	d.at, d.content = 0, nil
}
