package node_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// An agent with an Access has a table for each tenant that uses it, of an equal part of
// the memory, and none for others, who are answered all the same. One feed keeps all
// tables, and each is forgotten when its tenant has gone.
func TestTablePerTenant(t *testing.T) {
	o := node.Options{RepairEvery: -1, TableIdle: time.Minute, TTL: time.Hour, Access: access(t, map[uint32]string{4001: "acme", 4002: "umbra"})}
	bubble(t, o, func(t *testing.T, w *world) {
		admin := w.admin(t)
		state := func(tenant string) string {
			e, err := admin.GetEntry(t.Context(), &pb.GetEntryRequest{Key: &pb.Key{Tenant: tenant, Session: "s", Name: "x"}})
			must(t, err)
			return e.GetState() + " " + string(e.GetVariable().GetValue().GetJson())
		}
		reads := func(tenant, want string) {
			t.Helper()
			if got, err := get1(t, w.vars, tenant); got != want || err != nil {
				t.Fatalf("%s reads %q, %v; want %q", tenant, got, err, want)
			}
		}
		if w.agent.Table() != nil || w.agent.Stats().Tables != 0 {
			t.Fatal("there is a table before anybody has asked for one")
		}
		put(t, w.origin, "acme", "1")
		put(t, w.origin, "umbra", "2")
		put(t, w.origin, "zeta", "3")
		reads("acme", "1")
		if s := w.agent.Stats(); s.Tables != 1 || s.Table.ArenaBytes != 512<<10 || s.Table.Entries != 1 {
			t.Fatalf("%d tables of %d bytes with %d entries after one tenant's read", s.Tables, s.Table.ArenaBytes, s.Table.Entries)
		}
		reads("umbra", "2")
		reads("zeta", "3") // served, not kept
		reads("zeta", "3")
		if s := w.agent.Stats(); s.Tables != 2 || s.Table.ArenaBytes != 1<<20 || s.Table.Entries != 2 || s.Streams != 1 {
			t.Fatalf("%d tables of %d bytes with %d entries, %d streams", s.Tables, s.Table.ArenaBytes, s.Table.Entries, s.Streams)
		}
		for tenant, want := range map[string]string{"acme": "present 1", "umbra": "present 2", "zeta": "absent "} {
			if got := state(tenant); got != want {
				t.Errorf("%s/s/x is %s, want %s", tenant, got, want)
			}
		}
		if got := dump(t, admin, &pb.DumpRequest{}); strings.Join(got, ", ") != "acme/s/x present, umbra/s/x present" {
			t.Errorf("everybody's entries: %v", got)
		}
		// A change arrives in its table, through the one feed.
		put(t, w.origin, "umbra", "20")
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		if got := state("umbra"); got != "present 20" {
			t.Errorf("after the change umbra/s/x is %s", got)
		}
		// acme stays away; umbra reads on.
		for range 10 {
			time.Sleep(7 * time.Second)
			reads("umbra", "20")
		}
		if s := w.agent.Stats(); s.Tables != 1 || s.Table.Entries != 1 {
			t.Fatalf("%d tables with %d entries after acme was away for a minute", s.Tables, s.Table.Entries)
		}
		put(t, w.origin, "acme", "10")
		reads("acme", "10")
		if got := state("acme"); got != "present 10" {
			t.Errorf("in its new table acme/s/x is %s", got)
		}
		// Replaced by larger ones: both are made anew when they are used.
		must(t, w.agent.Rotate(shm.Options{Heap: true, Bytes: 4 << 20}))
		reads("umbra", "20")
		if s := w.agent.Stats(); s.Tables != 1 || s.Table.ArenaBytes != 2<<20 {
			t.Errorf("after Rotate: %d tables of %d bytes", s.Tables, s.Table.ArenaBytes)
		}
		if err := w.agent.Rotate(shm.Options{Heap: true, Bytes: 1}); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("got %v", err)
		}
	})
}
