package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// wrkScript is a wrk program that sends the requests in turn and ends with one line of
// figures. wrk's Lua reads the same escapes as Go for the bytes an HTTP request holds.
func wrkScript(requests [][]byte) string {
	var b strings.Builder
	b.WriteString("local requests = {\n")
	for _, r := range requests {
		fmt.Fprintf(&b, "%s,\n", strconv.Quote(string(r)))
	}
	b.WriteString(`}
local turn = 0
request = function()
  turn = turn % #requests + 1
  return requests[turn]
end
done = function(s, latency, _)
  local e = s.errors
  io.write(string.format("figures %d %d %.6f %.3f %.3f %d\n", s.requests, e.connect + e.read + e.write + e.status + e.timeout,
    s.duration / 1e6, latency:percentile(50), latency:percentile(99), s.bytes))
end
`)
	return b.String()
}

// parseWrk reads the line wrkScript prints.
func parseWrk(out []byte) (loadReport, error) {
	_, line, ok := bytes.Cut(out, []byte("\nfigures "))
	if !ok {
		return loadReport{}, fmt.Errorf("wrk printed no figures:\n%s", out)
	}
	var r loadReport
	var failed, total int
	if _, err := fmt.Sscan(string(line), &r.Requests, &failed, &r.Seconds, &r.P50Micros, &r.P99Micros, &total); err != nil {
		return loadReport{}, fmt.Errorf("wrk's figures %q: %w", line, err)
	}
	if failed > 0 || r.Requests == 0 {
		return loadReport{}, fmt.Errorf("wrk counted %d failures in %d requests", failed, r.Requests)
	}
	r.AnswerBytes = total / r.Requests
	return r, nil
}

// wrk runs a load with wrk instead of the generator of this package: a second opinion by
// a tool everybody knows, at the price of Lua for each request.
func (e *env) wrk(ctx context.Context, cpus string, spec loadSpec) (loadReport, error) {
	bin, err := exec.LookPath("wrk")
	if err != nil {
		return loadReport{}, fmt.Errorf("%w; install it or leave -generator out", err)
	}
	script := filepath.Join(e.work, "load.lua")
	if err := os.WriteFile(script, []byte(wrkScript(spec.Requests)), 0o600); err != nil {
		return loadReport{}, err
	}
	seconds := max(1, int(spec.Duration.Round(time.Second)/time.Second)) // wrk knows whole seconds only
	argv := e.pin(cpus, bin, "-t1", "-c"+strconv.Itoa(spec.Connections), "-d"+strconv.Itoa(seconds)+"s",
		"-s", script, "http://"+spec.Address)
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return loadReport{}, fmt.Errorf("wrk: %w\n%s", err, out)
	}
	return parseWrk(out)
}
