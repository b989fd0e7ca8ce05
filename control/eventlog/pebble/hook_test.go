package pebble

import (
	"errors"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/outrigger-mesh/outrigger"
)

var errDisk = errors.New("input/output error (injected)")

// hookFS asks hook before every "write" and "sync" of a write-ahead log file; an error
// from it becomes the outcome of the operation, and it may block.
type hookFS struct {
	vfs.FS
	hook func(op string) error
}

func (f hookFS) wrap(file vfs.File, name string, err error) (vfs.File, error) {
	if err != nil || !strings.HasSuffix(name, ".log") {
		return file, err
	}
	return &hookFile{file, f.hook}, nil
}

func (f hookFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, c)
	return f.wrap(file, name, err)
}

func (f hookFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.ReuseForWrite(old, name, c)
	return f.wrap(file, name, err)
}

type hookFile struct {
	vfs.File
	hook func(op string) error
}

func (f *hookFile) Write(p []byte) (int, error) {
	if err := f.hook("write"); err != nil {
		return 0, err
	}
	return f.File.Write(p)
}

func (f *hookFile) Sync() error {
	if err := f.hook("sync"); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *hookFile) SyncData() error {
	if err := f.hook("sync"); err != nil {
		return err
	}
	return f.File.SyncData()
}

func (f *hookFile) SyncTo(n int64) (bool, error) {
	if err := f.hook("sync"); err != nil {
		return false, err
	}
	return f.File.SyncTo(n)
}

func wantKind(t *testing.T, err error, kind outrigger.Kind) {
	t.Helper()
	if !outrigger.IsKind(err, kind) {
		t.Fatalf("error %v (kind %v), want kind %v", err, outrigger.KindOf(err), kind)
	}
}
