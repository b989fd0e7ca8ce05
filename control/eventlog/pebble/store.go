package pebble

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"log/slog"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// formatVersion is Pebble's on-disk format, pinned so that a newer module does not
// silently make the directory unreadable for the release before.
const formatVersion = pebble.FormatValueSeparation

// store is the Pebble database with its failure rules. Reads may be called concurrently.
type store struct {
	db   *pebble.DB
	lock *pebble.Lock
	// poisoned is set when Pebble panicked inside a write: it may hold its own locks
	// for ever, so it must not be closed, and the directory stays locked.
	poisoned atomic.Bool
}

func openStore(dir string, opts Options) (*store, error) {
	if err := makeDir(opts.fs, dir); err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, fmt.Sprintf("create event log directory %q", dir))
	}
	lock, err := pebble.LockDirectory(dir, opts.fs)
	if err != nil {
		return nil, lockError(dir, err)
	}
	db, err := pebble.Open(dir, pebbleOptions(opts, lock))
	if err != nil {
		return nil, errors.Join(outrigger.Wrap(outrigger.Unavailable, err, fmt.Sprintf("open event log %q", dir)), lock.Close())
	}
	return &store{db: db, lock: lock}, nil
}

// lockError tells a directory in use from one that cannot be used.
func lockError(dir string, err error) error {
	if errors.Is(err, syscall.EAGAIN) || strings.Contains(err.Error(), "held by current process") {
		return outrigger.Wrap(outrigger.Unavailable, err, fmt.Sprintf("event log directory %q is in use by another process or another log of this one; stop it or choose another directory", dir))
	}
	return outrigger.Wrap(outrigger.Unavailable, err, fmt.Sprintf("lock event log directory %q", dir))
}

func pebbleOptions(opts Options, lock *pebble.Lock) *pebble.Options {
	po := &pebble.Options{
		FS: reportingFS{opts.fs, opts.Logger}, Lock: lock, FormatMajorVersion: formatVersion, Logger: storeLogger{opts.Logger},
		CacheSize: opts.CacheBytes,
		// A flush each 16 MiB keeps the replay at start-up short and the bursts of
		// compaction small on machines with two cores.
		MemTableSize:                16 << 20,
		MemTableStopWritesThreshold: 4,
	}
	// Most look-ups of the committer are for aggregates that do not exist yet; ten bits
	// a key answer 99 % of them without touching a block.
	for i := range po.Levels {
		po.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	// By default Pebble ends the process when it meets a damaged block. The read that
	// met it reports the error, which is enough.
	po.EventListener = &pebble.EventListener{
		DataCorruption:  func(i pebble.DataCorruptionInfo) { opts.Logger.Error("event log block is damaged", "info", i.String()) },
		BackgroundError: func(err error) { opts.Logger.Error("event log background work failed", "error", err) },
		WriteStallBegin: func(i pebble.WriteStallBeginInfo) {
			opts.Logger.Warn("event log writes wait for the disk", "reason", i.Reason)
		},
	}
	return po
}

// makeDir creates dir and syncs the parents of what it created, so that a power loss
// cannot take the directory away from under durable events.
func makeDir(fs vfs.FS, dir string) error {
	var missing []string
	for d := dir; ; d = fs.PathDir(d) {
		if _, err := fs.Stat(d); err == nil {
			break
		} else if !errors.Is(err, iofs.ErrNotExist) { // the file system wraps its errors
			return err
		}
		missing = append(missing, d)
		if fs.PathDir(d) == d {
			break
		}
	}
	if err := fs.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	for _, d := range missing {
		if err := syncDir(fs, fs.PathDir(d)); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(fs vfs.FS, dir string) error {
	f, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// guarded runs a write. Pebble reports some failed writes by Fatalf or panic; both come
// back as an error here and poison the store.
func (s *store) guarded(write func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			s.poisoned.Store(true)
			err = fmt.Errorf("store failed: %v", r)
		}
	}()
	return write()
}

// apply writes a batch without waiting for the sync; batch.SyncWait says how it ended.
func (s *store) apply(b *pebble.Batch) error {
	return s.guarded(func() error { return s.db.ApplyNoSyncWait(b, pebble.Sync) })
}

// commit writes a batch and, if sync is set, waits until it is durable.
func (s *store) commit(b *pebble.Batch, sync bool) error {
	return s.guarded(func() error { return b.Commit(&pebble.WriteOptions{Sync: sync}) })
}

func (s *store) set(key, value []byte) error {
	err := s.guarded(func() error { return s.db.Set(key, value, pebble.Sync) })
	return outrigger.Wrap(outrigger.Unavailable, err, "write event log")
}

// get returns a copy of the value, nil if there is none.
func (s *store) get(key []byte) ([]byte, error) { return get(s.db, key) }

func get(r pebble.Reader, key []byte) ([]byte, error) {
	v, closer, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "read event log")
	}
	out := append(make([]byte, 0, len(v)), v...)
	return out, outrigger.Wrap(outrigger.Internal, closer.Close(), "read event log")
}

// scan calls f for every key in [lower, upper) in order until f returns false. key and
// value are only valid during the call.
func scan(r pebble.Reader, lower, upper []byte, f func(key, value []byte) (bool, error)) (err error) {
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return outrigger.Wrap(outrigger.Internal, err, "read event log")
	}
	defer func() {
		if cerr := it.Close(); err == nil {
			err = outrigger.Wrap(outrigger.Internal, cerr, "read event log")
		}
	}()
	for ok := it.First(); ok; ok = it.Next() {
		v, verr := it.ValueAndErr()
		if verr != nil {
			return outrigger.Wrap(outrigger.Internal, verr, "read event log")
		}
		if more, ferr := f(it.Key(), v); ferr != nil || !more {
			return ferr
		}
	}
	return outrigger.Wrap(outrigger.Internal, it.Error(), "read event log")
}

// empty reports whether the store has no key at all.
func (s *store) empty() (bool, error) {
	empty := true
	err := scan(s.db, nil, nil, func(_, _ []byte) (bool, error) {
		empty = false
		return false, nil
	})
	return empty, err
}

// lastEvent returns the event with the highest position, nil for an empty log.
func (s *store) lastEvent() (*outriggerv1.Event, error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{prefixEvent}, UpperBound: []byte{prefixEvent + 1}})
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "read event log")
	}
	var last *outriggerv1.Event
	var derr error
	if it.Last() {
		var position uint64
		if position, derr = parseNumber("event key", it.Key()[1:]); derr == nil {
			var v []byte
			if v, derr = it.ValueAndErr(); derr == nil {
				last, derr = decodeRecord(position, v)
			}
		}
	}
	return last, errors.Join(derr, outrigger.Wrap(outrigger.Internal, it.Close(), "read event log"))
}

// close ends the store. A poisoned one is left as it is: everything acknowledged is on
// disk, and the process is expected to end.
func (s *store) close() error {
	if s.poisoned.Load() {
		return outrigger.Errorf(outrigger.Unavailable, "event log store failed and keeps its directory locked; restart the process")
	}
	err := s.guarded(s.db.Close)
	return outrigger.Wrap(outrigger.Unavailable, errors.Join(err, s.lock.Close()), "close event log")
}

func closeAfter(s *store, err error) error { return errors.Join(err, s.close()) }

// storeLogger passes Pebble's messages on. Pebble expects Fatalf not to return.
type storeLogger struct{ log *slog.Logger }

func (l storeLogger) Infof(format string, args ...any) {
	if l.log.Enabled(context.Background(), slog.LevelDebug) {
		l.log.Debug(fmt.Sprintf(format, args...))
	}
}
func (l storeLogger) Errorf(format string, args ...any) { l.log.Error(fmt.Sprintf(format, args...)) }
func (l storeLogger) Fatalf(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	l.log.Error(msg)
	panic("event log store: " + msg)
}
