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
