package alerts

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadRoutes(t *testing.T) {
	path := file(t, "routes.yaml", `routes:
  - {name: oncall, kind: alertmanager, url: "http://am:9093", severity: high, contacts: [engineering]}
  - {name: chat, kind: slack, url_file: slack.url, token_file: token}
`)
	for name, text := range map[string]string{"slack.url": "https://hooks.example/services/T/B/X\n", "token": " abc \n"} {
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ReadRoutes(path)
	if err != nil || len(got) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	if r := got[0]; r.Name != "oncall" || r.Kind != Alertmanager || r.AtLeast != alerting.High || !slices.Equal(r.Contacts, []string{"engineering"}) || r.URL != "http://am:9093" {
		t.Errorf("%+v", r)
	}
	if r := got[1]; r.URL != "https://hooks.example/services/T/B/X" || r.Token != "abc" || r.AtLeast != alerting.Medium || strings.Contains(r.String(), "hooks") {
		t.Errorf("%+v", r)
	}
}

// Faults are named, secrets are not.
func TestRoutesRefused(t *testing.T) {
	for text, want := range map[string]string{
		"routes: [{name: a, kind: pigeon, url: 'https://h/s3cret'}]":                                                 `kind "pigeon" is not one of`,
		"routes: [{name: a, kind: slack, url: 'ftp://h/s3cret'}]":                                                    "its URL is not one like",
		"routes: [{name: a, kind: slack, url: 's3cret'}]":                                                            "its URL is not one like",
		"routes: [{name: a, kind: slack, url: 'https://%zz/s3cret'}]":                                                "its URL is not one like",
		"routes: [{name: a, kind: slack, url: 'https://h/s3cret', severity: dire}]":                                  `severity "dire"`,
		"routes: [{name: a, kind: slack, url: 'https://h/s3cret'}, {name: a, kind: slack, url: 'https://h/s3cret'}]": `two alert routes are called "a"`,
		"routes: [{name: '', kind: slack, url: 'https://h/s3cret'}]":                                                 "name of an alert route is empty",
		"routes: [{name: a, kind: slack, token: s3cret}]":                                                            "line 1 is not understood",
		"routes: [{name: a, kind: slack, url: [s3cret]}]":                                                            "line 1 is not understood",
		"routes: [s3cret": "is not understood",
		"routes: [{name: a, kind: slack, url_file: nowhere}]":                                               "no such file",
		"routes: [" + strings.Repeat("{name: a, kind: slack, url: 'https://h/s3cret'},", MaxRoutes+1) + "]": "33 alert routes",
		strings.Repeat("#", maxRouteFile+1):                                                                 "the limit is 65536",
	} {
		_, err := ReadRoutes(file(t, "routes.yaml", text))
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%.60s: %v, want %s", text, err, want)
		}
	}
	if _, err := ReadRoutes("nowhere.yaml"); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("%v", err)
	}
}
