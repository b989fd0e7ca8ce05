package alerts_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/control/alerts"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// The routes file is followed:
//
//  1. as it was at the start: pager is told
//  2. its token's file changes: the next message carries the new one
//  3. it is broken, and pager, which stays, is told so with the line; once, however long it is
//  4. it names desk instead: the alert is over, desk is told what stands, pager no more
func TestRoutesAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		write := func(name, text string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, "routes.yaml")
		pager := "routes:\n  - {name: pager, kind: webhook, url: 'https://pager/" + secret + "', token_file: token}\n"
		write("routes.yaml", pager)
		write("token", "first")
		again := func() ([]alerts.Route, error) { return alerts.ReadRoutes(path) }
		routes, err := again()
		if err != nil {
			t.Fatal(err)
		}
		r := &receiver{}
		m := runWith(t, memory.New(), time.Second, r, again, routes...)
		last := func() received {
			r.mu.Lock()
			defer r.mu.Unlock()
			if len(r.got) == 0 {
				return received{}
			}
			return r.got[len(r.got)-1]
		}
		m.raise("a", "high")
		time.Sleep(5 * time.Second)
		if x := last(); x.host != "pager" || x.auth != "Bearer first" {
			t.Fatalf("at the start %+v", x)
		}
		write("token", "second")
		time.Sleep(5 * time.Second)
		m.raise("b", "high")
		time.Sleep(5 * time.Second)
		if x := last(); x.host != "pager" || x.auth != "Bearer second" || len(r.hosts()) != 2 {
			t.Fatalf("with another token %+v of %v", x, r.hosts())
		}
		write("routes.yaml", pager+"  - {name: desk, kind: webhook, uri: 'https://desk/"+secret+"'}\n")
		time.Sleep(time.Minute)
		if a := m.alert("alert-routes"); a == nil || a.Severity != "high" || !a.ResolvedAt.IsZero() || !strings.Contains(a.Summary, "line 3 is not understood") {
			t.Fatalf("%+v", a)
		}
		if got := m.events("alert-routes"); !slices.Equal(got, []string{"raised high", "pager told high true after 1"}) {
			t.Errorf("%q", got)
		}
		before := len(r.hosts())
		write("routes.yaml", "routes: [{name: desk, kind: webhook, url: 'https://desk/"+secret+"'}]")
		time.Sleep(10 * time.Second)
		m.raise("c", "high")
		time.Sleep(10 * time.Second)
		if got := m.events("alert-routes"); m.alert("alert-routes").ResolvedAt.IsZero() || strings.Contains(strings.Join(got, ";"), "desk") {
			t.Errorf("%q", got)
		}
		var told []string
		for _, x := range r.got[before:] {
			if id, _, _ := strings.Cut(x.key, "/"); id != "alert-routes" { // which pager may hear is over
				told = append(told, x.host+" "+id)
			}
		}
		if slices.Sort(told); !slices.Equal(told, []string{"desk a", "desk b", "desk c"}) {
			t.Errorf("told %v", told)
		}
		if _, told := m.service.Deliveries(m.facts.Facts(), m.alert("c")); len(told) != 1 || told[0].GetRoute() != "desk" || !told[0].GetDelivered() {
			t.Errorf("%v", told)
		}
		m.stop()
		m.checkNoSecret()

		// An alert of the life before ends with the first file that can be used.
		write("routes.yaml", "routes: [")
		m = runWith(t, m.log, time.Second, r, again, routes...)
		time.Sleep(5 * time.Second)
		if a := m.alert("alert-routes"); !a.ResolvedAt.IsZero() {
			t.Fatalf("%+v", a)
		}
		m.stop()
		write("routes.yaml", pager)
		m = runWith(t, m.log, time.Second, r, again, routes...)
		time.Sleep(5 * time.Second)
		if a := m.alert("alert-routes"); a.ResolvedAt.IsZero() {
			t.Fatalf("%+v", a)
		}
		m.stop()
	})
}
