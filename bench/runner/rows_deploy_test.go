package main

import (
	"maps"
	"testing"
)

func TestDrillFigures(t *testing.T) {
	got, err := drillFigures([]byte(`{"sidecars":100,"stages":{"decided_ms":{"median":1,"worst":2},"zero_ms":{"median":3,"worst":4},"push_ack_ms":{"median":5,"worst":6},"total_ms":{"median":7,"worst":8}}}`))
	want := map[string]float64{"decided_ms": 2, "zero_ms": 4, "push_ack_ms": 6, "total_ms": 8, "median_ms": 7}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{``, `{}`, `{"stages":{"decided_ms":{},"zero_ms":{},"total_ms":{}}}`} {
		if _, err := drillFigures([]byte(bad)); err == nil {
			t.Errorf("%q was taken for a report", bad)
		}
	}
}
