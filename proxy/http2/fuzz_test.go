package http2

import (
	"context"
	"net/http"
	"reflect"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// FuzzFrames: whatever a peer sends after its preface, cut anywhere, the connection ends or
// goes on within its bounds, and its books are balanced.
func FuzzFrames(f *testing.F) {
	r := &raw{}
	r.enc = hpack.NewEncoder(&r.buf)
	block := func(fields ...string) []byte {
		r.buf.Reset()
		for i := 0; i < len(fields); i += 2 {
			_ = r.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
		return append([]byte(nil), r.buf.Bytes()...)
	}
	settings := appendHead(nil, 0, frameSettings, 0, 0)
	hit := appendFields(append([]byte(nil), settings...), 1, 0, block(":method", "POST", ":scheme", "http", ":path", "/hit"), maxFrame)
	f.Add(append(appendHead(hit, 8, frameData, flagEndStream, 1), "question"...), 5)
	f.Add(appendFields(append([]byte(nil), settings...), 1, flagEndStream, block(get...), 3), 1)
	f.Add(appendReset(appendWindow(append([]byte(nil), settings...), 0, 5), 1, codeCancel), 9)
	f.Add(append(appendHead(append([]byte(nil), settings...), 8, framePing, 0, 0), "12345678"...), 0)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		s, err := New(Options{MaxStreams: 8, Inline: static{body: make([]byte, 20)}, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte("x"))
		})})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		rn := &run{s: s, base: ctx}
		c := newConn(rn, &nowhere{})
		defer func() {
			cancel()
			c.kill()
			rn.wg.Wait()
			if c.running != 0 || len(c.streams) != 0 {
				t.Fatalf("%d handlers and %d streams are left", c.running, len(c.streams))
			}
			if unread := connWindow - c.recvWindow - c.credit; unread != 0 && !c.closing && c.err == errKilled {
				t.Fatalf("%d bytes of the connection's window are lost", unread)
			}
		}()
		c.buf = make([]byte, maxBuffer)
		all := append([]byte(preface), b...)
		for first := true; len(all) > 0; first = false {
			n := len(all)
			if first && cut > 0 {
				n = min(n, len(preface)+cut%(len(b)+1))
			}
			n = min(n, len(c.buf)-c.end)
			if n == 0 {
				return
			}
			c.end += copy(c.buf[c.end:], all[:n])
			all = all[n:]
			if !c.work() {
				return
			}
			c.mu.Lock()
			streams, running, credit := len(c.streams), c.running, c.recvWindow
			c.mu.Unlock()
			if streams > 8 || running > 8 || credit < 0 || credit > connWindow {
				t.Fatalf("%d streams, %d handlers, window %d", streams, running, credit)
			}
		}
	})
}

// FuzzNeutral: a block that is said to leave the dynamic table alone decodes to the same
// fields again.
func FuzzNeutral(f *testing.F) {
	f.Add([]byte{0x82, 0x86, 0x84}, []byte{0x40, 1, 'a', 1, 'b'})
	f.Add([]byte{0xbe, 0x0f, 0x10, 1, 'x'}, []byte{0x40, 1, 'a', 1, 'b'})
	f.Fuzz(func(t *testing.T, block, before []byte) {
		b := newBlocks()
		if b.decode(before) != nil || !neutral(block) || b.decode(block) != nil {
			return
		}
		first := append([]hpack.HeaderField(nil), b.fields...)
		if err := b.decode(block); err != nil || !reflect.DeepEqual(first, append([]hpack.HeaderField(nil), b.fields...)) {
			t.Fatalf("%v, then %v, %v", first, b.fields, err)
		}
	})
}
