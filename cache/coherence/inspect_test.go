package coherence

import (
	"fmt"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func dropped(t *testing.T, s *State, nowMs int64, tenant, session string) string {
	t.Helper()
	outs, n := s.Drop(tenant, session, nowMs*1_000_000)
	var parts []string
	for _, o := range outs {
		if r, ok := o.(Remove); ok {
			parts = append(parts, "remove "+r.Key.Name)
			continue
		}
		f, ok := o.(Fetch)
		if !ok {
			t.Fatalf("Drop caused %T", o)
		}
		parts = append(parts, fmt.Sprintf("fetch %s #%d ≥%d", f.Key.Name, f.Flight, f.MinPosition))
	}
	return fmt.Sprintf("%d: %s", n, strings.Join(parts, "; "))
}

// What is dropped cannot come back from before: neither by a fetch that is under way nor
// by an answer of an origin that is behind.
func TestDropNeverResurrects(t *testing.T) {
	s := live(t, Options{})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{22, get("y", 2), "fetch y #2 ≥100"},
		{23, frame(100, 104), "head a:104"},
	})
	if got, want := dropped(t, s, 24, "default", "s"), "1: remove x; fetch y #3 ≥104"; got != want {
		t.Errorf("dropped %s, want %s", got, want)
	}
	play(t, s, []step{
		{25, filled("y", 2, "1", 30, 100), ""}, // the fetch from before
		{26, get("x", 3), "fetch x #4 ≥104"},
		{27, filled("x", 4, "5", 40, 103), "fetch x #5 ≥104 after 32ms"},
		{33, filled("x", 5, "5", 40, 104), "install x 5; answer x 5@104 →[3]"},
		{34, filled("y", 3, "1", 30, 104), "install y 1; answer y 1@104 →[2]"},
	})
	// Untracked keys of the session carry the floor too, those of another one do not.
	if k := s.Known(key("new")); k.Floor != 104 || k.Held || k.Fetching {
		t.Errorf("a new key of the session: %+v", k)
	}
	if k := s.Known(outrigger.Key{Tenant: "default", Session: "u", Name: "x"}); k.Floor >= 104 {
		t.Errorf("a key of another session: %+v", k)
	}
	if got := dropped(t, s, 35, "other", ""); got != "0: " {
		t.Errorf("another tenant's flush dropped %s", got)
	}
	if got, want := dropped(t, s, 36, "", ""), "2: remove x; remove y"; got != want {
		t.Errorf("dropped %s, want %s", got, want)
	}
	if k := s.Known(key("x")); k.Floor != 104 || k.Held || k.AsOf != 0 {
		t.Errorf("after a full flush: %+v", k)
	}
	if f := s.Feed(); f.Applied != 104 || f.Head != 104 || f.Lease == 0 {
		t.Errorf("a flush touched the feed: %+v", f)
	}
}

// An answer from after the applied position still convicts an entry, if the change it
// shows should have been applied already; one that shows a newer change does not.
func TestComparisonUnderWrites(t *testing.T) {
	s := live(t, Options{RepairEvery: 50_000_000})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{60, Tick{}, "fetch x #2 ≥100"},
		{61, filled("x", 2, "7", 105, 105), "install x 7"}, // the feed is at 100
		{62, frame(100, 106), "head a:106"},
		{111, Tick{}, "fetch x #3 ≥100"},
		{112, filled("x", 3, "8", 106, 110), "stale x 105, is 106; install x 8"},
	})
	if st := s.Stats(); st.Checked != 1 || st.Repaired != 1 {
		t.Errorf("checked %d, repaired %d, want 1 and 1", st.Checked, st.Repaired)
	}
}
