//go:build !linux

package shm

import (
	"os"
	"runtime"

	"github.com/outrigger-mesh/outrigger"
)

func errPlatform() error {
	return outrigger.Errorf(outrigger.Unavailable, "shared tables need Linux, this is %s; use Options.Heap for a private table", runtime.GOOS)
}

func createMemory(string, uint64) (*memory, error) { return nil, errPlatform() }

func openMemory(*os.File) (*memory, error) { return nil, errPlatform() }

func (m *memory) readOnly() (*os.File, error) { return nil, errPlatform() }
