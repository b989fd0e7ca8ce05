package mlflow

import (
	"testing"
	"testing/quick"

	"github.com/outrigger-mesh/outrigger"
)

func TestParseFilter(t *testing.T) {
	for text, want := range map[string][]clause{
		"":                                       nil,
		"name = 'a'":                             {{field: "name", op: "=", value: "a"}},
		`NAME like "a%"`:                         {{field: "name", op: "LIKE", value: "a%"}},
		"version_number>=3":                      {{field: "version_number", op: ">=", value: "3"}},
		"tags.`a b`!='x' AND name='AND'":         {{field: "tags", tag: "a b", op: "!=", value: "x"}, {field: "name", op: "=", value: "AND"}},
		"tag.k ILIKE 'v' and version_number < 9": {{field: "tags", tag: "k", op: "ILIKE", value: "v"}, {field: "version_number", op: "<", value: "9"}},
	} {
		got, err := parseFilter(text, []string{"name"}, []string{"version_number"})
		if err != nil || len(got) != len(want) {
			t.Errorf("%q: %v, %v", text, got, err)
			continue
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("%q: clause %d is %+v, want %+v", text, i, got[i], want[i])
			}
		}
	}
	for _, text := range []string{"name", "name = a", "name > 'a'", "colour = 'red'", "version_number LIKE '3'", "version_number = '3.5'", "name = 'a' AND", "name = 'a' OR name = 'b'", "name = 'a' name = 'b'", "tags. = 'x'"} {
		if got, err := parseFilter(text, []string{"name"}, []string{"version_number"}); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%q: %v, %v; want it refused", text, got, err)
		}
	}
}

func TestLike(t *testing.T) {
	for _, c := range []struct {
		text, pattern string
		want          bool
	}{
		{"", "", true}, {"", "%", true}, {"a", "", false}, {"abc", "a%", true}, {"abc", "%c", true}, {"abc", "a_c", true}, {"abc", "a_", false},
		{"abcabd", "%ab_", true}, {"abab", "%aba", false}, {"aaaaab", "%a%a%b", true}, {"straße", "stra_e", true}, {"100%", "100%", true},
	} {
		if got := like(c.text, c.pattern); got != c.want {
			t.Errorf("%q like %q: %v", c.text, c.pattern, got)
		}
	}
	// Any text is like itself with % put anywhere.
	if err := quick.Check(func(a, b string) bool { return like(a+b, a+"%"+b) && like(a+b, "%") }, nil); err != nil {
		t.Error(err)
	}
}

func FuzzParseFilter(f *testing.F) {
	f.Add("name = 'a' AND tags.`x` != \"y\"")
	f.Fuzz(func(t *testing.T, text string) {
		if _, err := parseFilter(text, []string{"name"}, []string{"n"}); err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%q: %v", text, err)
		}
	})
}
