package flight_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger/internal/flight"
)

// read is a whole reader: what it got and how it ended.
func read(f *flight.Flight[string]) (head, body, end string) {
	begun := false
	for {
		p, err := f.Read(context.Background(), begun, len(body))
		begun, head = begun || p.Begun, p.Head
		body += string(p.New)
		switch {
		case err != nil:
			return head, body, err.Error()
		case p.Whole:
			return head, body, "whole"
		case p.Lost:
			return head, body, "lost"
		}
	}
}

// The law: whatever the leader does and whenever readers come, a reader is told what was
// written, from its first byte, in order, and how it ended; what is beyond the limit is read
// by those who were there, if it is of use in pieces, and nothing joins after unlist.
func TestReadersGetEveryByte(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		const limit = 16
		var (
			unlisted atomic.Bool
			wg       sync.WaitGroup
			f        *flight.Flight[string]
		)
		f = flight.New[string](limit, func() { unlisted.Store(true) }, nil)
		pieces := rapid.Bool().Draw(r, "pieces")
		type reader struct{ head, body, end string }
		var readers []*reader
		join := func() {
			if unlisted.Load() {
				return
			}
			f.Enter()
			x := &reader{}
			readers = append(readers, x)
			wg.Go(func() {
				defer f.Leave()
				x.head, x.body, x.end = read(f)
			})
		}
		var written []byte
		begun, lost := false, false
		r.Repeat(map[string]func(*rapid.T){
			"join": func(*rapid.T) { join() },
			"begin": func(*rapid.T) {
				f.Begin("head", pieces)
				begun = true
			},
			"write": func(r *rapid.T) {
				if !begun {
					r.Skip("an answer begins first")
				}
				b := rapid.SliceOfN(rapid.Byte(), 1, 7).Draw(r, "bytes")
				if !lost && !unlisted.Load() && len(written)+len(b) > limit {
					lost = !pieces || len(readers) == 0
				}
				f.Write(b)
				if !lost {
					written = append(written, b...)
				}
				clear(b) // the flight has its own
			},
		})
		well := rapid.Bool().Draw(r, "well")
		_, body, stands, all := f.Got()
		if stands != (begun && !lost) || all != (len(written) <= limit && !lost) {
			r.Fatalf("begun %v, all %v with %d bytes; lost %v", stands, all, len(written), lost)
		}
		if stands && all && !bytes.Equal(body, written) {
			r.Fatalf("got %q of %q", body, written)
		}
		f.End(well)
		f.End(!well) // does nothing
		wg.Wait()
		if !unlisted.Load() || f.Followed() {
			r.Fatalf("ended, and listed (%v) or followed (%v)", !unlisted.Load(), f.Followed())
		}
		for _, x := range readers {
			want := "lost"
			if well && begun && !lost {
				want = "whole"
			}
			whole := x.end == want && (lost || x.body == string(written))
			behind := x.end == "lost" && len(written) > limit && bytes.HasPrefix(written, []byte(x.body))
			if !whole && !behind || begun && x.head != "head" {
				r.Fatalf("read %q, %s with head %q; written %q, want %s", x.body, x.end, x.head, written, want)
			}
		}
	})
}

// A reader that keeps up reads a stream of any length; one that stands still loses it and
// holds nobody up; what is held stays within twice the limit and a piece.
func TestLongStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit, piece = 1 << 10, 100
		f := flight.New[string](limit, func() {}, nil)
		f.Enter()
		f.Begin("h", true)
		got := make(chan string, 1)
		go func() {
			_, body, end := read(f)
			got <- end + body
		}()
		var want bytes.Buffer
		for i := range 100 {
			b := []byte(fmt.Sprintf("%0*d", piece, i))
			want.Write(b)
			f.Write(b)
			synctest.Wait()
			if _, body, _, _ := f.Got(); cap(body) > 2*limit+piece {
				t.Fatalf("%d bytes are held", cap(body))
			}
		}
		if p, err := f.Read(t.Context(), false, 0); !p.Lost || err != nil {
			t.Errorf("a reader %d bytes behind: %+v, %v", want.Len(), p, err)
		}
		if p, err := f.Read(t.Context(), true, want.Len()-limit/2); p.Lost || err != nil || string(p.New) != want.String()[want.Len()-limit/2:] {
			t.Errorf("a reader %d bytes behind: lost %v, %v", limit/2, p.Lost, err)
		}
		f.End(true)
		if s := <-got; s != "whole"+want.String() {
			t.Errorf("who keeps up read %d bytes, %.20q", len(s), s)
		}
	})
}

// What came from elsewhere fills a flight at once, and readers leave when their time is up.
func TestFillAndAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		unlisted := 0
		f := flight.New[string](10, func() { unlisted++ }, nil)
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 2)
		go func() { _, err := f.Await(ctx); errs <- err }()
		go func() { _, err := f.Read(ctx, false, 0); errs <- err }()
		synctest.Wait()
		cancel()
		for range 2 {
			if err := <-errs; err != context.Canceled {
				t.Errorf("who left was told %v", err)
			}
		}
		f.Fill("h", []byte("longer than the limit"))
		if p, err := f.Await(t.Context()); err != nil || !p.Whole || p.Head != "h" || string(p.New) != "longer than the limit" || unlisted == 0 {
			t.Errorf("%+v, %v, unlisted %d times", p, err, unlisted)
		}
		f.Begin("other", true)
		f.Write([]byte("x"))
		f.Fill("other", nil)
		if _, body, _, _ := f.Got(); string(body) != "longer than the limit" {
			t.Errorf("changed after its end to %q", body)
		}

		idle := 0
		g := flight.New[string](10, func() {}, nil)
		g.OnIdle(func() { idle++ })
		g.Enter()
		g.Enter()
		g.Leave()
		if idle != 0 || !g.Followed() {
			t.Error("idle with a reader")
		}
		if g.Leave(); idle != 1 || g.Followed() {
			t.Errorf("idle %d times without readers", idle)
		}
		g.End(true)
		if p, err := g.Await(t.Context()); !p.Lost || err != nil {
			t.Errorf("a flight that never began ended as %+v, %v", p, err)
		}
	})
}

// Without memory for more a flight is as one that has outgrown its limit: nobody joins, and
// nothing is kept for nobody.
func TestNoMemoryForMore(t *testing.T) {
	for name, followed := range map[string]bool{"alone": false, "followed": true} {
		full, unlisted := false, 0
		f := flight.New[string](100, func() { unlisted++ }, func() bool { return full })
		f.Begin("h", true)
		f.Write([]byte("ab"))
		if followed {
			f.Enter()
		}
		if unlisted != 0 {
			t.Errorf("%s: off the list while there is memory", name)
		}
		full = true
		f.Write([]byte("cd"))
		if unlisted == 0 {
			t.Errorf("%s: still on the list", name)
		}
		p, err := f.Read(t.Context(), true, 2)
		if want := map[bool]string{true: "cd", false: ""}[followed]; err != nil || string(p.New) != want && followed || p.Lost == followed {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
}
