//go:build linux && (amd64 || arm64)

package coarse

import (
	"bytes"
	"os"
)

// steady reports whether the kernel keeps time by the counter. It gives that up when it
// finds the counter to differ between cores or to change its rate.
func steady() bool {
	b, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return false // not told: do not rely on it
	}
	switch string(bytes.TrimSpace(b)) {
	case "tsc", "arch_sys_counter":
		return true
	}
	return false
}
