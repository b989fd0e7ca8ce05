package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger/internal/heap"
)

// wireMessage is a gRPC message of n bytes on the wire.
func wireMessage(n int) []byte {
	b := make([]byte, prefixBytes+n)
	binary.BigEndian.PutUint32(b[1:], uint32(n))
	for i := range n {
		b[prefixBytes+i] = byte(i)
	}
	return b
}

// newInflow reads from body as a call would, within a room of its own.
func newInflow(t interface{ Fatal(...any) }, body io.Reader) (*inflow, *heap.Room, func()) {
	r, err := http.NewRequest(http.MethodPost, "http://x/", body)
	if err != nil {
		t.Fatal(err)
	}
	room := heap.NewRoom(1 << 40)
	r, done := withInflow(r, room)
	return r.Body.(*inflow), room, done
}

// queued returns what is on the books.
func (f *inflow) queued() (messages, ahead int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.queue), f.ahead
}

// However a body comes and whatever it holds, it is read as it is; and when the handler has
// taken all messages nothing is on the books.
func TestInflowChangesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var body []byte
		sizes := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(0, 20), rapid.IntRange(0, 40_000)), 0, 40).Draw(t, "messages")
		for _, n := range sizes {
			body = append(body, wireMessage(n)...)
		}
		cut := rapid.IntRange(0, len(body)).Draw(t, "cut")
		whole := rapid.Bool().Draw(t, "whole")
		if !whole {
			body = body[:cut]
		}
		var from io.Reader = bytes.NewReader(body)
		switch rapid.IntRange(0, 3).Draw(t, "pieces") {
		case 0:
			from = iotest.OneByteReader(from)
		case 1:
			from = iotest.HalfReader(from)
		case 2:
			from = iotest.DataErrReader(from)
		}
		f, room, done := newInflow(t, from)
		var got []byte
		buf := make([]byte, rapid.SampledFrom([]int{1, 7, 512, 16 << 10}).Draw(t, "buffer"))
		for {
			n, err := f.Read(buf)
			got = append(got, buf[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil || n == 0 {
				t.Fatalf("read %d bytes, %v", n, err)
			}
		}
		if !bytes.Equal(got, body) {
			t.Fatalf("read %d bytes, want the %d sent", len(got), len(body))
		}
		if whole {
			for range sizes {
				f.taken()
			}
			if n, ahead := f.queued(); n != 0 || ahead != 0 {
				t.Fatalf("%d messages and %d bytes are on the books when all are taken", n, ahead)
			}
		}
		if done(); !room.Empty() {
			t.Fatal("some of the room was not given back")
		}
	})
}

// A short read costs a whole buffer where it is queued: what comes byte by byte is put
// together first.
func TestInflowReadsWholeBuffers(t *testing.T) {
	f, _, done := newInflow(t, iotest.OneByteReader(bytes.NewReader(append(wireMessage(100_000), wireMessage(3)...))))
	defer done()
	var lengths []int
	for buf := make([]byte, 16<<10); ; {
		n, err := f.Read(buf)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		lengths = append(lengths, n)
	}
	if len(lengths) != 8 || lengths[0] != 16<<10 || lengths[7] != prefixBytes+3 {
		t.Errorf("read in pieces of %v", lengths)
	}
}

// Whoever does not take stops the caller, and taking lets more in.
func TestInflowWaits(t *testing.T) {
	for name, c := range map[string]struct{ size, first, after int }{
		"large":   {300 << 10, 4, 5}, // the handler's, three more, and a part of the next
		"small":   {0, aheadMessages, aheadMessages + 1},
		"a giant": {8 << 20, 1, 2},
	} {
		synctest.Test(t, func(t *testing.T) {
			body, feed := io.Pipe()
			f, room, done := newInflow(t, body)
			var mu sync.Mutex
			sent := 0
			count := func() int { mu.Lock(); defer mu.Unlock(); return sent }
			go func() {
				for b := wireMessage(c.size); ; {
					if _, err := feed.Write(b); err != nil {
						return
					}
					mu.Lock()
					sent++
					mu.Unlock()
				}
			}()
			ended := make(chan error)
			go func() {
				_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 16<<10))
				ended <- err
			}()
			synctest.Wait()
			if n := count(); n != c.first {
				t.Errorf("%s: %d messages were let in before the first was taken, want %d", name, n, c.first)
			}
			f.taken()
			synctest.Wait()
			if n := count(); n != c.after {
				t.Errorf("%s: %d messages were let in before the second was taken, want %d", name, n, c.after)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if err := <-ended; !errors.Is(err, http.ErrBodyReadAfterClose) {
				t.Errorf("%s: a read that waited ended with %v", name, err)
			}
			if done(); !room.Empty() {
				t.Errorf("%s: some of the room was not given back", name)
			}
		})
	}
}

// Without memory small calls are served, also one after the other, and a large message
// ends its call with UNAVAILABLE.
func TestInflowWithoutMemory(t *testing.T) {
	s := grpc.NewServer(grpc.StreamInterceptor(takeMessages), grpc.UnknownServiceHandler(func(_ any, in grpc.ServerStream) error {
		for {
			var m wrapperspb.BytesValue
			if err := in.RecvMsg(&m); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := in.SendMsg(&m); err != nil {
				return err
			}
		}
	}))
	room := heap.NewRoom(1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, done := withInflow(r, room)
		defer done()
		s.ServeHTTP(w, r)
	})}
	h.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan error, 1)
	go func() { served <- h.Serve(l) }()
	defer func() { h.Close(); <-served }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	both := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	stream, err := conn.NewStream(t.Context(), both, "/x.X/Echo")
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		var m wrapperspb.BytesValue
		if err := stream.SendMsg(wrapperspb.Bytes(make([]byte, 1000))); err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(&m); err != nil || len(m.Value) != 1000 {
			t.Fatalf("a small message came back as %d bytes, %v", len(m.Value), err)
		}
	}
	if err := stream.SendMsg(wrapperspb.Bytes(make([]byte, 100_000))); err != nil {
		t.Fatal(err)
	}
	var m wrapperspb.BytesValue
	if err := stream.RecvMsg(&m); status.Code(err) != codes.Unavailable {
		t.Errorf("a large message: %v, want Unavailable", err)
	}
}
