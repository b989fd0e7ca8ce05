package cache_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// ask is one read with everything it may say; took is how long it took.
func ask(t *testing.T, s *cache.Store, r cache.Request) (a cache.Answer, took time.Duration, err error) {
	t.Helper()
	r.Encoding = -1
	start := time.Now()
	a, err = s.Get(t.Context(), r)
	return a, time.Since(start), err
}

func json(a cache.Answer) string { return string(a.Variable.GetValue().GetJson()) }

func dotOf(v *pb.Variable) outrigger.Dot { return wire.Dot(v.GetVersion().GetDot()) }

// With the feed late, a read that brings the position of another node's write waits a
// little, then gets that write from the origin; one that brings nothing may see the old
// value. What the origin answered is good for the next read, at memory speed.
func TestAfterWaitsThenAsks(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		w.origin.Put("y", "1")
		reads(t, s, "x", session, "1 origin")
		reads(t, s, "y", session, "1 origin")
		reads(t, s, "x", session, "1 process")
		// Only what the origin sends to the agent is late, feed and answers alike; this
		// process reaches the origin as before, and the agent is not its only way.
		w.net.SetDelay("origin", "node", 150*time.Millisecond)
		v := w.origin.Put("x", "2")
		a, _, err := ask(t, s, cache.Request{Key: key("x")})
		if err != nil || json(a) != "1" {
			t.Fatalf("without a position: %s, %v", json(a), err)
		}
		a, took, err := ask(t, s, cache.Request{Key: key("x"), After: []outrigger.Dot{dotOf(v)}, Explain: true})
		if err != nil || json(a) != "2" || a.Stale || a.Seen != dotOf(v) {
			t.Fatalf("with the position: %+v, %v", a, err)
		}
		if took < 50*time.Millisecond || took > 400*time.Millisecond {
			t.Errorf("it took %v, want 50 ms of waiting and one answer", took)
		}
		if !strings.Contains(a.Why, "behind the session token") {
			t.Errorf("why: %s", a.Why)
		}
		a, took, err = ask(t, s, cache.Request{Key: key("x"), After: []outrigger.Dot{dotOf(v)}})
		if err != nil || json(a) != "2" || took > time.Millisecond {
			t.Errorf("again: %s from %v in %v, %v", json(a), a.Tier, took, err)
		}
		// The position is one of the log, not of the variable: y is held to it, too, and
		// everything is local again once the feed has caught up.
		time.Sleep(400 * time.Millisecond)
		synctest.Wait()
		a, took, err = ask(t, s, cache.Request{Key: key("y"), After: []outrigger.Dot{dotOf(v)}})
		if err != nil || a.Tier != outrigger.TierProcess || took != 0 {
			t.Errorf("after the feed caught up: %v in %v, %v", a.Tier, took, err)
		}
	})
}

// The wait ends as soon as the feed delivers: a few milliseconds of lag cost no call.
func TestAfterIsOftenOnlyAWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.repairEvery = -1 // the monitor's reads come at any time, and calls are counted
		w.startAgent()
		s := w.pod()
		w.origin.Put("x", "1")
		reads(t, s, "x", session, "1 origin")
		w.net.SetDelay("origin", "node", 10*time.Millisecond)
		calls, _ := w.origin.Reads()
		v := w.origin.Put("x", "2")
		a, took, err := ask(t, s, cache.Request{Key: key("x"), After: []outrigger.Dot{dotOf(v)}})
		if err != nil || json(a) != "2" || a.Tier != outrigger.TierNode || took < 10*time.Millisecond || took > 20*time.Millisecond {
			t.Errorf("%s from %v in %v, %v", json(a), a.Tier, took, err)
		}
		if again, _ := w.origin.Reads(); again != calls {
			t.Errorf("%d calls to the origin, want none", again-calls)
		}
	})
}

// A position of a log that is no more compares with nothing: the origin is asked, nothing
// is flushed, and reads without it go on from memory.
func TestAfterOfAnotherIncarnation(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		reads(t, s, "x", session, "1 origin")
		old := outrigger.Dot{Region: origintest.Region, Incarnation: 0xdead, Position: 1 << 40}
		flushes := w.agent.Load().Stats().Flushes
		a, took, err := ask(t, s, cache.Request{Key: key("x"), After: []outrigger.Dot{old}, Explain: true})
		if err != nil || json(a) != "1" || a.Tier != outrigger.TierOrigin || took >= 50*time.Millisecond || !strings.Contains(a.Why, "another log incarnation") {
			t.Errorf("%+v in %v, %v", a, took, err)
		}
		if a.Seen.Incarnation == old.Incarnation {
			t.Errorf("seen %v: the old log goes on living", a.Seen)
		}
		reads(t, s, "x", session, "1 process")
		if n := w.agent.Load().Stats().Flushes; n != flushes {
			t.Errorf("%d flushes", n-flushes)
		}
	})
}

// Nobody to ask: a last known value that may be older than the position is no answer to
// a session read, unless the position is only this process's own memory.
func TestAfterWithNobodyToAsk(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		x := w.origin.Put("x", "1")
		reads(t, s, "x", session, "1 origin")
		w.net.Cut("origin", "node")
		w.net.Cut("origin", "pod")
		time.Sleep(time.Second)
		later := dotOf(x)
		later.Position += 5
		for _, tt := range []struct {
			name string
			r    cache.Request
			want string
		}{
			{"nothing asked", cache.Request{}, "1"},
			{"the value itself", cache.Request{After: []outrigger.Dot{dotOf(x)}}, "1"},
			{"a later position", cache.Request{After: []outrigger.Dot{later}}, "stale"},
			{"a later one, kept", cache.Request{After: []outrigger.Dot{later}, Kept: true}, "1"},
			{"a later one, eventual", cache.Request{After: []outrigger.Dot{later}, Consistency: eventual}, "1"},
		} {
			tt.r.Key = key("x")
			a, _, err := ask(t, s, tt.r)
			got := json(a)
			if err != nil {
				got = outrigger.KindOf(err).String()
			}
			if got != tt.want || err == nil && !a.Stale {
				t.Errorf("%s: %s (stale %v), want %s", tt.name, got, a.Stale, tt.want)
			}
		}
	})
}

// A negative answer has a position as well, so that a deletion once seen stays seen.
func TestNegativeAnswersHaveAPosition(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		v := w.origin.Put("x", "1")
		for _, tier := range []outrigger.Tier{outrigger.TierOrigin, outrigger.TierProcess} {
			a, _, err := ask(t, s, cache.Request{Key: key("none")})
			if err != nil || a.Found || a.Tier != tier || a.Seen.Region != origintest.Region || a.Seen.Position < dotOf(v).Position || a.Seen.Incarnation != dotOf(v).Incarnation {
				t.Errorf("%+v, %v", a, err)
			}
		}
	})
}

// A variable's own consistency counts when the request leaves it to the variable, from
// the first read on, and not otherwise; changing it takes effect with the change.
func TestDeclaredConsistency(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		put := func(c string) {
			w.origin.PutWith("x", "1", map[string]string{"consistency": c})
			time.Sleep(10 * time.Millisecond) // the feed
		}
		want := func(what string, r cache.Request, tier outrigger.Tier, c outrigger.Consistency, byVariable bool) {
			t.Helper()
			r.Key = key("x")
			a, _, err := ask(t, s, r)
			if err != nil || a.Tier != tier || a.Consistency != c || a.ByVariable != byVariable {
				t.Errorf("%s: from %v under %v (by variable %v), %v; want %v under %v (%v)", what, a.Tier, a.Consistency, a.ByVariable, err, tier, c, byVariable)
			}
		}
		left := cache.Request{Declared: true}
		put("strong")
		calls, _ := w.origin.Reads()
		want("first read", left, outrigger.TierOrigin, strong, true)
		if n, _ := w.origin.Reads(); n-calls != 2 {
			t.Errorf("%d calls: the first read finds out, the second is the strong one", n-calls)
		}
		want("second read", left, outrigger.TierOrigin, strong, true)
		want("asked for", cache.Request{}, outrigger.TierProcess, session, false)
		if _, ok := s.Hit("default/s/x", -1); ok {
			t.Error("Hit answers for a variable that wants strong reads")
		}
		put("bounded(50ms)")
		time.Sleep(300 * time.Millisecond) // between heartbeats
		a, _, err := ask(t, s, cache.Request{Key: key("x"), Declared: true})
		if err != nil || a.Age > 50*time.Millisecond || a.Consistency != bounded(50*time.Millisecond) || !a.ByVariable {
			t.Errorf("bounded: %+v, %v", a, err)
		}
		put("")
		want("taken back", left, outrigger.TierProcess, session, false)
		if _, ok := s.Hit("default/s/x", -1); !ok {
			t.Error("no hit for a variable that declares nothing")
		}
		put("eventual")
		w.net.Cut("origin", "node")
		w.net.Cut("origin", "pod")
		want("nobody to ask", left, outrigger.TierProcess, eventual, true)
	})
}

func TestExplain(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		time.Sleep(10 * time.Millisecond) // the feed
		reads(t, s, "x", session, "1 origin")
		a, _, err := ask(t, s, cache.Request{Key: key("x"), Explain: true})
		if err != nil || a.Why != "process copy current by stamp" || a.Explain == nil || !a.Explain.Table ||
			a.Explain.Lease <= 0 || a.Explain.Lease > 300*time.Millisecond || a.Explain.Applied == 0 || a.Explain.Incarnation == 0 {
			t.Errorf("a hit: %+v, %+v, %v", a, a.Explain, err)
		}
		if a.Explain.Agent {
			t.Error("this agent serves no NodeAdmin and cannot have answered")
		}
		a, _, err = ask(t, s, cache.Request{Key: key("x"), Consistency: strong, Explain: true})
		if err != nil || a.Why != "strong: asked the node agent" {
			t.Errorf("strong: %q, %v", a.Why, err)
		}
		a, _, err = ask(t, s, cache.Request{Key: key("y"), Explain: true})
		if err != nil || a.Why != "not in the node table: asked the node agent" {
			t.Errorf("absent: %q, %v", a.Why, err)
		}
		w.net.Cut("origin", "node")
		time.Sleep(2 * time.Second)
		a, _, err = ask(t, s, cache.Request{Key: key("x"), Explain: true})
		if err != nil || !strings.HasPrefix(a.Why, "lease lapsed 1.") || !strings.HasSuffix(a.Why, "ago: asked the control plane") || a.Explain.Lease > -time.Second {
			t.Errorf("the agent cut off: %q, %+v, %v", a.Why, a.Explain, err)
		}
		if a, _, _ := ask(t, s, cache.Request{Key: key("x")}); a.Explain != nil {
			t.Error("explained without being asked")
		}
	})
}

// With an agent that can be asked, an explanation has its head and the key's floor; and a
// value that does not ride along with its change says why the table could not answer.
func TestExplainByTheAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.admin = true
		w.startAgent()
		s := w.pod()
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		a, _, err := ask(t, s, cache.Request{Key: key("x"), Explain: true})
		if err != nil || !a.Explain.Agent || a.Explain.Head == 0 || a.Explain.Head != a.Explain.Applied {
			t.Errorf("a hit: %+v, %v", a.Explain, err)
		}
		v := w.origin.Put("x", `"`+strings.Repeat("v", 8<<10)+`"`)
		synctest.Wait()
		a, _, err = ask(t, s, cache.Request{Key: key("x"), Explain: true})
		if err != nil || a.Why != "changed since it was stored: asked the node agent" || a.Explain.Floor != dotOf(v).Position {
			t.Errorf("a large value: %q, %+v, floor of %v, %v", a.Why, a.Explain, dotOf(v), err)
		}
	})
}
