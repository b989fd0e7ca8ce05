package inference

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// Request fields that say how long the caller will wait. The sidecar never waits longer,
// and tells the model server what is left of it in the same field.
const (
	// hdrTimeout holds seconds, "2.5", or a number with its unit, "1500ms".
	hdrTimeout = "X-Request-Timeout"
	// hdrGRPCTimeout is gRPC's: at most eight digits and one of H M S m u n.
	hdrGRPCTimeout = "Grpc-Timeout"
)

// timeoutOf returns how long the caller will wait, 0 if it does not say. Errors have kind
// Invalid.
func timeoutOf(h http.Header) (time.Duration, error) {
	var out time.Duration
	if v := first(h, hdrTimeout); v != "" {
		d, ok := parseTimeout(v)
		if !ok {
			return 0, outrigger.Errorf(outrigger.Invalid, "%s is %q; give seconds above 0, such as 2.5, or a number with its unit, such as 1500ms", hdrTimeout, v)
		}
		out = d
	}
	if v := first(h, hdrGRPCTimeout); v != "" {
		d, ok := parseGRPCTimeout(v)
		if !ok {
			return 0, outrigger.Errorf(outrigger.Invalid, "%s is %q; give up to eight digits and one of H, M, S, m, u, n", hdrGRPCTimeout, v)
		}
		if out == 0 || d < out {
			out = d
		}
	}
	return out, nil
}

func parseTimeout(v string) (time.Duration, bool) {
	if s, err := strconv.ParseFloat(v, 64); err == nil {
		if !(s > 0 && s <= 1e9) { // also not a number
			return 0, false
		}
		return max(time.Duration(s*float64(time.Second)), 1), true
	}
	d, err := time.ParseDuration(v)
	return d, err == nil && d > 0
}

func parseGRPCTimeout(v string) (time.Duration, bool) {
	if len(v) < 2 || len(v) > 9 {
		return 0, false
	}
	n, err := strconv.ParseUint(v[:len(v)-1], 10, 32)
	unit := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': 1}[v[len(v)-1]]
	if err != nil || n == 0 || unit == 0 {
		return 0, false
	}
	if n > uint64(maxTimeout/unit) {
		return maxTimeout, true
	}
	return time.Duration(n) * unit, true
}

const maxTimeout = 1000 * time.Hour

// setDeadline writes what is left of the request's time into the fields the caller used.
func (c *call) setDeadline(ctx context.Context, h http.Header) {
	if c.timeout == 0 {
		return
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		return
	}
	left := max(time.Until(deadline), time.Millisecond)
	if _, ok := h[hdrTimeout]; ok {
		h[hdrTimeout] = []string{strconv.FormatFloat(left.Seconds(), 'f', 3, 64)}
	}
	if _, ok := h[hdrGRPCTimeout]; ok {
		h[hdrGRPCTimeout] = []string{strconv.FormatInt(min(left.Milliseconds(), 99_999_999), 10) + "m"}
	}
}
