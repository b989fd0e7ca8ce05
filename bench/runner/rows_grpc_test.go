package main

import (
	"strings"
	"testing"
	"time"
)

const h2loadSummary = `finished in 2.00s, 150000.50 req/s, 40.00MB/s
requests: 300001 total, 300128 started, 300001 done, 300001 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 300128 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 100.00MB (104857600) total, 40.00MB (41943040) headers (space savings 10.00%), 60.00MB (61500205) data
                     min         max         mean         sd        +/- sd
`

// What h2load prints, and that a run with failures has no figures.
func TestParseH2load(t *testing.T) {
	got, err := parseH2load([]byte(h2loadSummary), 2*time.Second)
	if want := (loadReport{Requests: 300001, Seconds: 2, AnswerBytes: 205}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", strings.Replace(h2loadSummary, "0 failed", "1 failed", 1),
		strings.Replace(h2loadSummary, "300128 2xx", "3 2xx", 1), strings.Replace(h2loadSummary, "traffic", "trafic", 1)} {
		if got, err := parseH2load([]byte(bad), time.Second); err == nil {
			t.Errorf("%+v from %.60q", got, bad)
		}
	}
}
