package heap

import (
	"errors"
	"math"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// Allowed returns the memory in bytes that the process's cgroup may have (memory.max, or
// memory.limit_in_bytes of version 1), the least on the way to the root; 0 = there is no limit. An
// error says that it could not be found out.
func Allowed() (int64, error) {
	limit, err := memlimit.FromCgroup()
	switch {
	case errors.Is(err, memlimit.ErrNoLimit), errors.Is(err, memlimit.ErrNoCgroup), errors.Is(err, memlimit.ErrCgroupsNotSupported):
		return 0, nil
	case err != nil:
		return 0, err
	}
	return int64(min(limit, math.MaxInt64)), nil
}
