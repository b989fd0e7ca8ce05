package pebble

import (
	"testing"

	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/eventlogtest"
)

func mustOpen(t testing.TB, dir string, opts Options) *Log {
	t.Helper()
	l, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestConformance(t *testing.T) {
	eventlogtest.Run(t, func(t *testing.T) eventlog.Log { return mustOpen(t, t.TempDir(), Options{}) })
}

func TestDurable(t *testing.T) {
	eventlogtest.RunDurable(t, func(dir string) (eventlog.Log, error) {
		l, err := Open(dir, Options{})
		if err != nil {
			return nil, err // not l: a nil *Log is a non-nil interface
		}
		return l, nil
	})
}
