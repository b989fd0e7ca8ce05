package static

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func load(t *testing.T, text string) (int, error) {
	t.Helper()
	p := filepath.Join(t.TempDir(), "regions.yaml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	rs, err := Load(p)
	return len(rs), err
}

// A good file is read whole; every mistake is refused by name.
func TestLoad(t *testing.T) {
	n, err := load(t, "regions:\n  - {name: eu, gateway: '10.0.0.1:7400', latitude: 53.35, longitude: -6.26}\n  - {name: us, gateway: '[::1]:7400'}\n")
	if err != nil || n != 2 {
		t.Fatalf("got %d regions, %v", n, err)
	}
	f := func(text, want string) {
		t.Helper()
		if _, err := load(t, text); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
	f("regions: []\n", "0 regions")
	f("regions:\n  - {name: eu, gateway: nowhere}\n", `gateway "nowhere"`)
	f("regions:\n  - {name: eu, gateway: 'a:1', latitude: 91}\n", "not on Earth")
	f("regions:\n  - {name: eu, gateway: 'a:1'}\n  - {name: eu, gateway: 'b:1'}\n", "twice")
	f("regions:\n  - {name: eu, gateway: 'a:1', lat: 3}\n", "lat")
	f("regions:\n  - {name: '', gateway: 'a:1'}\n", "region is empty")
	f("{", "regions.yaml")
}

// FuzzParse: any bytes give regions that validate, or an error.
func FuzzParse(f *testing.F) {
	f.Add([]byte("regions:\n  - {name: eu, gateway: 'a:1'}\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		rs, err := parse(raw)
		if err != nil {
			return
		}
		for _, r := range rs {
			if err := r.Validate(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
