package http2

import (
	"encoding/binary"
	"strings"
)

// input handles the complete frames in b and returns how much that was; it stops early
// when there is much to send. The error ends the connection.
func (c *conn) input(b []byte) (n int, err error) {
	if !c.began {
		if len(b) < len(preface) {
			if !strings.HasPrefix(preface, string(b)) {
				return 0, connError{codeProtocol, "not the preface of HTTP/2"}
			}
			return 0, nil
		}
		if string(b[:len(preface)]) != preface {
			return 0, connError{codeProtocol, "not the preface of HTTP/2"}
		}
		c.began = true
		n = len(preface)
	}
	for len(b)-n >= headLength && len(c.out) <= maxOut && !c.closing {
		f := parseHead(b[n:])
		if f.length > maxFrame {
			return n, connError{codeFrameSize, "frame above SETTINGS_MAX_FRAME_SIZE"}
		}
		end := n + headLength + f.length
		if len(b) < end {
			break
		}
		if err := c.frame(f, b[n+headLength:end]); err != nil {
			return end, err
		}
		n = end
	}
	return n, nil
}

// frame handles one frame.
func (c *conn) frame(f frameHead, p []byte) error {
	switch {
	case c.blockID != 0 && (f.kind != frameContinuation || f.stream != c.blockID):
		return connError{codeProtocol, "a header block was interrupted"}
	case !c.settled && (f.kind != frameSettings || f.flags&flagAck != 0):
		return connError{codeProtocol, "the first frame is not SETTINGS"}
	}
	switch f.kind {
	case frameData:
		return c.data(f, p)
	case frameHeaders:
		return c.headers(f, p)
	case framePriority:
		return c.priority(f, p)
	case frameReset:
		return c.resetFrame(f, p)
	case frameSettings:
		return c.settings(f, p)
	case framePush:
		return connError{codeProtocol, "PUSH_PROMISE from a client"}
	case framePing:
		return c.ping(f, p)
	case frameGoAway:
		return c.goAway(f, p)
	case frameWindow:
		return c.window(f, p)
	case frameContinuation:
		return c.continuation(f, p)
	}
	return c.spend(1)
}

func (c *conn) spend(n int) error {
	if !c.budget.spend(n, c.now) {
		return connError{codeCalm, "too many frames that move no call forward"}
	}
	return nil
}

// refuse ends a stream because of what the peer did with it, or one that is none any more.
func (c *conn) refuse(id uint32, code code) error {
	c.out = appendReset(c.out, id, code)
	c.noteReset(id)
	c.s.stats.refused.Add(1)
	if st := c.streams[id]; st != nil {
		c.close(st)
		st.fail(errGone)
	}
	return c.spend(1)
}

// noteReset remembers a stream the peer may go on sending on for a moment.
func (c *conn) noteReset(id uint32) {
	c.recent[c.recentAt%len(c.recent)] = id
	c.recentAt++
}

// forgetReset is for a stream the peer has reset too: nothing may come after that.
func (c *conn) forgetReset(id uint32) {
	for i, r := range c.recent {
		if r == id {
			c.recent[i] = 0
		}
	}
}

func (c *conn) wasReset(id uint32) bool {
	for _, r := range c.recent {
		if r == id {
			return true
		}
	}
	return false
}

// idle reports whether a stream has not been opened.
func (c *conn) idle(id uint32) bool { return id%2 == 0 || id > c.maxID }

func (c *conn) data(f frameHead, p []byte) error {
	if c.idle(f.stream) && !(c.going && f.stream%2 == 1) {
		return connError{codeProtocol, "DATA on an idle stream"}
	}
	if f.length > c.recvWindow {
		return connError{codeFlowControl, "DATA beyond the connection's window"}
	}
	c.recvWindow -= f.length
	p, ok := unpad(f.flags, p)
	if !ok {
		return connError{codeProtocol, "padding longer than its frame"}
	}
	end := f.flags&flagEndStream != 0
	if len(p) > 0 || end {
		c.budget.earn(1)
	} else if err := c.spend(2); err != nil {
		return err
	}
	st := c.streams[f.stream]
	switch {
	case st == nil:
		c.giveCredit(f.length)
		if c.wasReset(f.stream) || f.stream > c.maxID {
			return c.spend(1)
		}
		return c.refuse(f.stream, codeStreamClosed)
	case st.remoteClosed:
		c.giveCredit(f.length)
		return c.refuse(f.stream, codeStreamClosed)
	case f.length > st.recvWindow:
		c.giveCredit(f.length)
		return c.refuse(f.stream, codeFlowControl)
	}
	st.got += int64(len(p))
	if length := st.head.length; length >= 0 && (st.got > length || end && st.got != length) {
		c.giveCredit(f.length)
		return c.refuse(f.stream, codeProtocol)
	}
	st.recvWindow -= f.length
	st.remoteClosed = end
	if pad := f.length - len(p); pad > 0 {
		c.consumed(st, pad)
	}
	switch {
	case st.pending && end && len(st.body) == 0 && c.inline(st, p):
		c.giveCredit(len(p))
		c.recycle(st)
	case st.pending:
		st.body = append(st.body, p...)
		if end && c.inline(st, st.body) {
			c.giveCredit(len(st.body))
			c.recycle(st)
		} else if end || len(st.body) > maxInline {
			c.handle(st)
		}
	default:
		st.body = append(st.body, p...)
		nudge(st.rwake)
	}
	return nil
}

func (c *conn) headers(f frameHead, p []byte) error {
	if f.stream%2 == 0 {
		return connError{codeProtocol, "HEADERS on a stream that is no client's"}
	}
	p, ok := unpad(f.flags, p)
	if ok && f.flags&flagPriority != 0 {
		if ok = len(p) >= 5; ok {
			if binary.BigEndian.Uint32(p)&maxStreamID == f.stream {
				return connError{codeProtocol, "a stream that depends on itself"}
			}
			p = p[5:]
		}
	}
	if !ok {
		return connError{codeProtocol, "HEADERS shorter than what it announces"}
	}
	end := f.flags&flagEndStream != 0
	if f.flags&flagEndHeaders != 0 {
		return c.endBlock(f.stream, p, end)
	}
	c.blockID, c.blockEnd, c.pieces = f.stream, end, 0
	c.block = append(c.block[:0], p...)
	return nil
}

func (c *conn) continuation(f frameHead, p []byte) error {
	if c.blockID == 0 {
		return connError{codeProtocol, "CONTINUATION of nothing"}
	}
	if c.pieces++; c.pieces > maxContinuations || len(c.block)+len(p) > maxBlock {
		return connError{codeCalm, "header block too long"}
	}
	c.block = append(c.block, p...)
	if f.flags&flagEndHeaders == 0 {
		return nil
	}
	block := c.block
	if c.block = nil; cap(block) <= maxFrame {
		c.block = block[:0]
	}
	id := c.blockID
	c.blockID = 0
	return c.endBlock(id, block, c.blockEnd)
}

// endBlock handles a complete header block: a request or a trailer.
func (c *conn) endBlock(id uint32, block []byte, end bool) error {
	h := c.in.recall(block)
	wrong := ""
	if h == nil || c.streams[id] != nil {
		if err := c.in.decode(block); err != nil {
			return connError{codeCompression, "header block: " + err.Error()}
		}
		h = nil
	}
	if st := c.streams[id]; st != nil {
		return c.trailer(st, end)
	}
	if id <= c.maxID {
		switch {
		case c.wasReset(id):
			return c.spend(1)
		case id == c.maxID:
			return connError{codeStreamClosed, "HEADERS on a closed stream"}
		}
		return connError{codeProtocol, "stream numbers go backwards"}
	}
	if c.going {
		return c.spend(1) // the peer knows that it is not taken
	}
	c.maxID = id
	tooLarge := h == nil && c.in.size > maxFields
	if h == nil && !tooLarge {
		if h, wrong = newHead(c.in.fields); wrong == "" && c.s.o.Inline != nil {
			h.class = c.s.o.Inline.Class(h)
		}
		if wrong == "" {
			c.in.remember(block, h)
		}
	}
	switch {
	case len(c.streams) >= c.s.o.MaxStreams || c.running >= c.s.o.MaxStreams:
		return c.refuse(id, codeRefused)
	case tooLarge:
		return c.tooLarge(id, end)
	case wrong != "" || end && h.length > 0:
		return c.refuse(id, codeProtocol)
	}
	c.open(id, h, end)
	return nil
}

// tooLarge answers a request whose fields are more than is taken.
func (c *conn) tooLarge(id uint32, end bool) error {
	block := AppendField(AppendStatus(c.acknowledgeTable(nil), 431), "content-length", "0")
	c.out = appendFields(c.out, id, flagEndStream, block, c.peerFrame)
	c.s.stats.refused.Add(1)
	if !end {
		c.out = appendReset(c.out, id, codeNone)
		c.noteReset(id)
	}
	return c.spend(1)
}

func (c *conn) trailer(st *stream, end bool) error {
	switch {
	case st.remoteClosed:
		return c.refuse(st.id, codeStreamClosed)
	case !end || c.in.size > maxFields || st.head.length >= 0 && st.got != st.head.length:
		return c.refuse(st.id, codeProtocol)
	}
	for _, f := range c.in.fields {
		if checkField(f) != "" {
			return c.refuse(st.id, codeProtocol)
		}
	}
	st.trailer = append(st.trailer, c.in.fields...)
	st.remoteClosed = true
	switch {
	case st.pending:
		c.handle(st)
	default:
		nudge(st.rwake)
	}
	return nil
}

func (c *conn) priority(f frameHead, p []byte) error {
	switch {
	case f.stream == 0:
		return connError{codeProtocol, "PRIORITY of the connection"}
	case len(p) != 5:
		return c.refuse(f.stream, codeFrameSize)
	case binary.BigEndian.Uint32(p)&maxStreamID == f.stream:
		return c.refuse(f.stream, codeProtocol)
	}
	return c.spend(1) // RFC 9113 section 5.3.2 deprecates it
}

func (c *conn) resetFrame(f frameHead, p []byte) error {
	switch {
	case len(p) != 4:
		return connError{codeFrameSize, "RST_STREAM of a wrong length"}
	case f.stream == 0 || c.idle(f.stream) && !(c.going && f.stream%2 == 1):
		return connError{codeProtocol, "RST_STREAM of an idle stream"}
	}
	c.forgetReset(f.stream)
	if st := c.streams[f.stream]; st != nil {
		st.remoteClosed = true
		c.close(st)
		st.fail(errGone)
		return c.spend(2)
	}
	return c.spend(1)
}

func (c *conn) settings(f frameHead, p []byte) error {
	switch {
	case f.stream != 0:
		return connError{codeProtocol, "SETTINGS of a stream"}
	case f.flags&flagAck != 0:
		if len(p) != 0 {
			return connError{codeFrameSize, "acknowledgement with settings"}
		}
		return c.spend(1)
	case len(p)%6 != 0:
		return connError{codeFrameSize, "SETTINGS of a wrong length"}
	}
	c.settled = true
	for n := 1 + len(p)/6; len(p) > 0; p = p[6:] {
		if err := c.setting(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])); err != nil {
			return err
		}
		if len(p) == 6 {
			if err := c.spend(n); err != nil {
				return err
			}
		}
	}
	c.out = appendHead(c.out, 0, frameSettings, flagAck, 0)
	return c.spend(1)
}

func (c *conn) setting(id uint16, v uint32) error {
	switch id {
	case settingTableSize:
		// What is sent uses no table; a decoder may still insist on hearing so.
		c.shrunk = c.shrunk || v < 4096
	case settingPush:
		if v > 1 {
			return connError{codeProtocol, "SETTINGS_ENABLE_PUSH is neither 0 nor 1"}
		}
	case settingMaxFrame:
		if v < maxFrame || v > 1<<24-1 {
			return connError{codeProtocol, "SETTINGS_MAX_FRAME_SIZE out of range"}
		}
		c.peerFrame = min(int(v), 64<<10) // longer ones would keep others waiting
	case settingInitialWindow:
		if v > maxWindow {
			return connError{codeFlowControl, "SETTINGS_INITIAL_WINDOW_SIZE out of range"}
		}
		d := int(v) - c.peerWindow
		c.peerWindow = int(v)
		for _, st := range c.streams {
			if st.sendWindow += d; st.sendWindow > maxWindow {
				return connError{codeFlowControl, "a window beyond 2^31-1"}
			}
		}
		c.wake()
	}
	return nil
}

func (c *conn) ping(f frameHead, p []byte) error {
	switch {
	case len(p) != 8:
		return connError{codeFrameSize, "PING of a wrong length"}
	case f.stream != 0:
		return connError{codeProtocol, "PING of a stream"}
	case f.flags&flagAck == 0:
		c.out = append(appendHead(c.out, 8, framePing, flagAck, 0), p...)
	case string(p) == drainPing && !c.pinged:
		c.pinged = true
		close(c.acked)
	}
	return c.spend(1)
}

func (c *conn) goAway(f frameHead, p []byte) error {
	switch {
	case f.stream != 0:
		return connError{codeProtocol, "GOAWAY of a stream"}
	case len(p) < 8:
		return connError{codeFrameSize, "GOAWAY of a wrong length"}
	}
	return c.spend(1) // what the peer has begun goes on, and then it closes
}

func (c *conn) window(f frameHead, p []byte) error {
	if len(p) != 4 {
		return connError{codeFrameSize, "WINDOW_UPDATE of a wrong length"}
	}
	n := int(binary.BigEndian.Uint32(p) & maxWindow)
	if err := c.spend(1); err != nil {
		return err
	}
	if f.stream == 0 {
		if n == 0 {
			return connError{codeProtocol, "WINDOW_UPDATE of nothing"}
		}
		if c.sendWindow += n; c.sendWindow > maxWindow {
			return connError{codeFlowControl, "a window beyond 2^31-1"}
		}
		c.wake()
		return nil
	}
	if c.idle(f.stream) && !(c.going && f.stream%2 == 1) {
		return connError{codeProtocol, "WINDOW_UPDATE of an idle stream"}
	}
	if n == 0 {
		return c.refuse(f.stream, codeProtocol)
	}
	if st := c.streams[f.stream]; st != nil {
		if st.sendWindow += n; st.sendWindow > maxWindow {
			return c.refuse(f.stream, codeFlowControl)
		}
		nudge(st.wwake)
	}
	return nil
}
