package pebble

import (
	"context"
	"encoding/binary"

	"github.com/cockroachdb/pebble/v2"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// snapshotChunk bounds one value, so that a snapshot of a gigabyte neither needs a
// batch of that size nor keeps appends waiting behind it.
const snapshotChunk = 1 << 20

// manifest says which chunks make up the snapshot of a name.
type manifest struct{ position, generation, size uint64 }

func (m manifest) encode() []byte {
	return append(append(number(m.position), number(m.generation)...), number(m.size)...)
}

func decodeManifest(name string, b []byte) (manifest, error) {
	if len(b) != 3*keyNumber {
		return manifest{}, outrigger.Errorf(outrigger.Internal, "snapshot %q is damaged: manifest has %d bytes; delete it or save a new one", name, len(b))
	}
	m := manifest{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
	if m.position == 0 || m.size > eventlog.MaxSnapshotBytes {
		return manifest{}, outrigger.Errorf(outrigger.Internal, "snapshot %q is damaged: manifest says position %d, %d bytes; save a new one", name, m.position, m.size)
	}
	return m, nil
}

func manifestKey(name string) []byte { return append([]byte{prefixManifest}, name...) }

// snapshotKey starts the chunks of one generation of a snapshot.
func snapshotKey(name string, generation uint64) []byte {
	k := append(append([]byte{prefixSnapshot}, name...), 0)
	return binary.BigEndian.AppendUint64(k, generation)
}

// SaveSnapshot implements eventlog.Snapshots. Chunks of a new generation are written
// beside the old ones; the synced manifest switches over and the old ones go. A crash
// in between leaves the old snapshot and chunks that the next save replaces.
func (l *Log) SaveSnapshot(ctx context.Context, name string, position uint64, state []byte) error {
	if err := eventlog.CheckSnapshot(name, position, l.Head(), state); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return eventlog.ErrNotQueued(ctx)
	}
	if err := l.enter(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	defer l.calls.leave()
	select {
	case l.saving <- struct{}{}:
		defer func() { <-l.saving }()
	case <-ctx.Done():
		return eventlog.ErrNotQueued(ctx)
	}
	old, err := l.store.get(manifestKey(name))
	if err != nil {
		return err
	}
	m := manifest{position: position, generation: 1, size: uint64(len(state))}
	if old != nil {
		// A damaged manifest must not prevent saving a sound one.
		if om, err := decodeManifest(name, old); err == nil {
			m.generation = om.generation + 1
		}
	}
	if err := l.writeChunks(ctx, name, m.generation, state); err != nil {
		return err
	}
	return l.switchTo(name, m)
}

// writeChunks writes the state without syncing: the sync of the manifest, later in the
// same write-ahead log, covers it.
func (l *Log) writeChunks(ctx context.Context, name string, generation uint64, state []byte) error {
	prefix := snapshotKey(name, generation)
	if err := l.write(false, func(b *pebble.Batch) error {
		return b.DeleteRange(prefix, snapshotKey(name, generation+1), nil)
	}); err != nil {
		return err
	}
	for i := uint64(0); len(state) > 0; i++ {
		select {
		case <-ctx.Done():
			return eventlog.ErrNotQueued(ctx)
		case <-l.stopping:
			return eventlog.ErrClosed()
		default:
		}
		n := min(len(state), snapshotChunk)
		if err := l.write(false, func(b *pebble.Batch) error {
			return b.Set(binary.BigEndian.AppendUint64(prefix[:len(prefix):len(prefix)], i), state[:n], nil)
		}); err != nil {
			return err
		}
		state = state[n:]
	}
	return nil
}

// switchTo makes a fully written generation the snapshot and drops all others.
func (l *Log) switchTo(name string, m manifest) error {
	return l.write(true, func(b *pebble.Batch) error {
		if err := b.Set(manifestKey(name), m.encode(), nil); err != nil {
			return err
		}
		return b.DeleteRange(snapshotKey(name, 0), snapshotKey(name, m.generation), nil)
	})
}

// write commits one batch outside the committer, with the same rule: a failed write
// stops the log.
func (l *Log) write(sync bool, fill func(*pebble.Batch) error) error {
	if err := l.failed(); err != nil {
		return err
	}
	b := l.store.db.NewBatch()
	err := fill(b)
	if err == nil {
		err = l.store.commit(b, sync)
	}
	if err != nil {
		l.fail(err)
		return outrigger.Wrap(outrigger.Unknown, err, "snapshot was not written for certain; the log has stopped, restart the process")
	}
	return outrigger.Wrap(outrigger.Internal, b.Close(), "snapshot")
}

// LoadSnapshot implements eventlog.Snapshots.
func (l *Log) LoadSnapshot(ctx context.Context, name string) (uint64, []byte, error) {
	if err := l.enter(ctx); err != nil {
		return 0, nil, err
	}
	defer l.calls.leave()
	if err := eventlog.CheckAggregate("snapshot name", name); err != nil {
		return 0, nil, err
	}
	// One view of the store, so that a save at the same time cannot take the chunks away.
	view := l.store.db.NewSnapshot()
	position, state, err := loadSnapshot(view, name)
	if cerr := view.Close(); err == nil {
		err = outrigger.Wrap(outrigger.Internal, cerr, "read event log")
	}
	return position, state, err
}

func loadSnapshot(view pebble.Reader, name string) (uint64, []byte, error) {
	v, err := get(view, manifestKey(name))
	if err != nil || v == nil {
		return 0, nil, err
	}
	m, err := decodeManifest(name, v)
	if err != nil {
		return 0, nil, err
	}
	state := make([]byte, 0, m.size)
	err = scan(view, snapshotKey(name, m.generation), snapshotKey(name, m.generation+1), func(_, chunk []byte) (bool, error) {
		state = append(state, chunk...)
		return uint64(len(state)) <= m.size, nil
	})
	if err == nil && uint64(len(state)) != m.size {
		err = outrigger.Errorf(outrigger.Internal, "snapshot %q is damaged: %d bytes of %d; save a new one", name, len(state), m.size)
	}
	if err != nil {
		return 0, nil, err
	}
	return m.position, state, nil
}
