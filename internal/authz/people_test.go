package authz

import (
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func TestPeople(t *testing.T) {
	file := "# who\n\n" + Line("vera", Viewer, "token of vera") + "\n  " + Line("otto", Operator, "token of otto") + "\n" +
		Line("otto", Operator, "otto's next") + "\n" + Line("ada", Admin, "token of ada")
	if strings.Contains(file, "token of") {
		t.Fatal("the file holds tokens")
	}
	p, err := Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string]Caller{"token of vera": {"vera", Viewer}, "token of otto": {"otto", Operator}, "otto's next": {"otto", Operator}, "token of ada": {"ada", Admin}} {
		c, err := p.Identify(Request{Mutating: true, Authorization: []string{"Bearer " + token}})
		if err != nil || c != want {
			t.Errorf("%s: %v, %v", token, c, err)
		}
		if !p.Still(c) {
			t.Errorf("%s is not known any more", token)
		}
	}
	c, err := p.Identify(Request{Authorization: basic("ada", "token of ada")})
	if err != nil || c != (Caller{"ada", Viewer}) {
		t.Errorf("Basic is for looking: %v, %v", c, err)
	}
	if _, err := p.Identify(Request{Mutating: true, Authorization: []string{"Bearer token of eve"}}); !outrigger.IsKind(err, outrigger.Unauthorised) {
		t.Errorf("a stranger: %v", err)
	}
	if p.Still(Caller{"vera", Admin}) || p.Still(Caller{"eve", Viewer}) {
		t.Error("a session of somebody else goes on")
	}
	for _, q := range p.People() {
		if q.sum != (Person{}).sum {
			t.Error("the list shows digests")
		}
	}
}

func TestPeopleRefuses(t *testing.T) {
	good := Line("ada", Admin, "x")
	for name, file := range map[string]string{"nothing": "", "a comment": "# ada", "two words": "ada admin", "a role": strings.Replace(good, "admin", "root", 1),
		"nobody": strings.Replace(good, "admin", "nobody", 1), "no digest": "ada admin secret", "a short digest": good[:len(good)-2],
		"a long one": good + "00", "a name": strings.Replace(good, "ada", "a\x00", 1), "two roles": good + "\n" + Line("ada", Viewer, "y"),
		"one token for two": good + "\n" + Line("bob", Admin, "x")} {
		if _, err := Parse(file); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCaller(t *testing.T) {
	otto, nobody := Caller{"otto", Operator}, Caller{Role: Admin}
	for _, c := range []struct {
		caller        Caller
		claimed, want string
		denied        bool
	}{{otto, "", "otto", false}, {otto, "otto", "otto", false}, {otto, "ada", "", true}, {nobody, "ada", "ada", false}, {nobody, "", "", false}} {
		got, err := c.caller.As(c.claimed)
		if got != c.want || outrigger.IsKind(err, outrigger.Denied) != c.denied {
			t.Errorf("%v as %q: %q, %v", c.caller, c.claimed, got, err)
		}
	}
	for _, r := range []Role{Nobody, Viewer, Operator, Admin} {
		if err := otto.Need(r, "this"); (err == nil) != (r <= Operator) {
			t.Errorf("%v: %v", r, err)
		}
		if back, ok := RoleOf(r.String()); ok != (r != Nobody) || back != r {
			t.Errorf("%v reads as %v, %v", r, back, ok)
		}
	}
}
