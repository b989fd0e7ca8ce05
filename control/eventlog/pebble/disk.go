package pebble

import (
	"log/slog"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// reportingFS logs every failed operation on a write-ahead log file with its cause.
// Pebble answers some of them by ending the process (see the package comment) without
// saying why, and a full disk must be recognisable in the last lines of the log.
type reportingFS struct {
	vfs.FS
	logger *slog.Logger
}

// Unwrap lets Pebble find the real file system.
func (f reportingFS) Unwrap() vfs.FS { return f.FS }

// Create implements vfs.FS.
func (f reportingFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, c)
	return f.file(file, "create", name, err)
}

// ReuseForWrite implements vfs.FS.
func (f reportingFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.ReuseForWrite(old, name, c)
	return f.file(file, "reuse", name, err)
}

func (f reportingFS) file(file vfs.File, op, name string, err error) (vfs.File, error) {
	if !strings.HasSuffix(name, ".log") {
		return file, err
	}
	if err != nil {
		f.report(op, name, err)
		return nil, err
	}
	return &reportingFile{file, f, name}, nil
}

func (f reportingFS) report(op, name string, err error) {
	if err != nil {
		f.logger.Error("event log disk error", "operation", op, "file", name, "error", err)
	}
}

// reportingFile passes everything on and reports what failed.
type reportingFile struct {
	vfs.File
	fs   reportingFS
	name string
}

func (f *reportingFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	f.fs.report("write", f.name, err)
	return n, err
}

func (f *reportingFile) Sync() error {
	err := f.File.Sync()
	f.fs.report("sync", f.name, err)
	return err
}

func (f *reportingFile) SyncData() error {
	err := f.File.SyncData()
	f.fs.report("sync", f.name, err)
	return err
}

func (f *reportingFile) SyncTo(n int64) (bool, error) {
	full, err := f.File.SyncTo(n)
	f.fs.report("sync", f.name, err)
	return full, err
}

func (f *reportingFile) Close() error {
	err := f.File.Close()
	f.fs.report("close", f.name, err)
	return err
}
