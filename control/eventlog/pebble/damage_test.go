package pebble

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Damage is reported with its position by every way of reading, and nothing is skipped.
func TestDamageIsReported(t *testing.T) {
	for name, damage := range map[string]func(*Log) error{
		"record lost":    func(l *Log) error { return l.store.db.Delete(eventKey(3), pebble.Sync) },
		"record garbled": func(l *Log) error { return l.store.db.Set(eventKey(3), []byte{1, 255}, pebble.Sync) },
		"record moved": func(l *Log) error {
			v, err := l.store.get(eventKey(2))
			if err != nil {
				return err
			}
			return l.store.db.Set(eventKey(3), v, pebble.Sync)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := mustOpen(t, "log", Options{fs: vfs.NewMem()})
			defer l.Close()
			for i := range 5 {
				if _, err := l.Append(t.Context(), "", one("a", int64(i))); err != nil {
					t.Fatal(err)
				}
			}
			if err := damage(l); err != nil {
				t.Fatal(err)
			}
			for way, seq := range map[string]func(func(*outriggerv1.Event, error) bool){
				"read": l.Read(t.Context(), "a", 1), "read all": l.ReadAll(t.Context(), 1), "subscribe": l.Subscribe(t.Context(), 1),
			} {
				var failed error
				for e, err := range seq {
					if failed = err; err == nil && e.Position >= 3 {
						t.Fatalf("%s went past the damage to %d", way, e.Position)
					}
				}
				wantKind(t, failed, outrigger.Internal)
				if !strings.Contains(failed.Error(), "position 3") {
					t.Errorf("%s: %v does not name the position", way, failed)
				}
			}
		})
	}
}

// Directories that hold something else, or that cannot be used, are refused untouched.
func TestOpenRefuses(t *testing.T) {
	disk := vfs.NewMem()
	db, err := pebble.Open("other", &pebble.Options{FS: disk, Logger: storeLogger{Options{}.withDefaults().Logger}})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Set([]byte("k"), []byte("v"), pebble.Sync); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open("other", Options{fs: disk})
	wantKind(t, err, outrigger.Invalid)

	l := mustOpen(t, "new/er", Options{fs: disk})
	if err := l.store.set(metaKey, []byte{layoutVersion + 1, 1, 2, 3, 4, 5, 6, 7, 8}); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open("new/er", Options{fs: disk})
	wantKind(t, err, outrigger.Invalid)

	_, err = Open("/proc/self/no/such", Options{})
	wantKind(t, err, outrigger.Unavailable)
}

// The committer's cache of sequences against the truth, with a limit small enough that
// it forgets all the time.
func TestRecentNeverLies(t *testing.T) {
	r := recent{limit: 3}
	truth := map[string]uint64{}
	for i := range 200 {
		k := fmt.Sprint(i * i % 11)
		if v, ok := r.get(k); ok && v != truth[k] {
			t.Fatalf("step %d: %s is %d, want %d", i, k, v, truth[k])
		}
		truth[k] = uint64(i)
		r.put(k, uint64(i))
		if v, ok := r.get(k); !ok || v != uint64(i) {
			t.Fatalf("step %d: what was put last is %d, %v", i, v, ok)
		}
		if n := len(r.young) + len(r.old); n > 2*3 {
			t.Fatalf("step %d: %d entries, the bound is 6", i, n)
		}
	}
}
