package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// bolt keeps each event under its position and the latest event of each aggregate.
type bolt struct {
	db   *bbolt.DB
	next uint64
}

var events, current = []byte("events"), []byte("current")

func openBolt(dir string) (*bolt, error) {
	db, err := bbolt.Open(filepath.Join(dir, "log.db"), 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType, InitialMmapSize: 256 << 20})
	if err != nil {
		return nil, err
	}
	b := &bolt{db: db, next: 1}
	return b, db.Update(func(tx *bbolt.Tx) error {
		e, err := tx.CreateBucketIfNotExists(events)
		if err != nil {
			return err
		}
		e.FillPercent = 1
		if k, _ := e.Cursor().Last(); k != nil {
			b.next = binary.BigEndian.Uint64(k) + 1
		}
		_, err = tx.CreateBucketIfNotExists(current)
		return err
	})
}

func (b *bolt) commit(records []record) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		e, c := tx.Bucket(events), tx.Bucket(current)
		e.FillPercent = 1 // positions only grow
		for _, r := range records {
			if err := e.Put(binary.BigEndian.AppendUint64(nil, b.next), r.value); err != nil {
				return err
			}
			if err := c.Put([]byte(r.aggregate), r.value); err != nil {
				return err
			}
			b.next++
		}
		return nil
	})
}

// replay reads every event in order.
func (b *bolt) replay() (n int, err error) {
	sum := 0
	err = b.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(events).ForEach(func(_, v []byte) error {
			n++
			for _, x := range v {
				sum += int(x)
			}
			return nil
		})
	})
	if sum != 0 {
		return n, fmt.Errorf("the events hold something else than what was put")
	}
	return n, err
}

func (b *bolt) close() error { return b.db.Close() }

// wal is no store: it is what the disk allows. Records go to a file written beforehand,
// round and round, with one fdatasync for each commit.
type wal struct {
	f   *os.File
	at  int64
	buf []byte
}

const walBytes = 16 << 20

func openWAL(dir string) (*wal, error) {
	f, err := os.Create(filepath.Join(dir, "wal"))
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(make([]byte, walBytes)); err != nil {
		return nil, err
	}
	return &wal{f: f}, f.Sync()
}

func (w *wal) commit(records []record) error {
	w.buf = w.buf[:0]
	for _, r := range records {
		w.buf = append(w.buf, r.value...)
	}
	if w.at+int64(len(w.buf)) > walBytes {
		w.at = 0
	}
	if _, err := w.f.WriteAt(w.buf, w.at); err != nil {
		return err
	}
	w.at += int64(len(w.buf))
	return unix.Fdatasync(int(w.f.Fd()))
}

func (w *wal) close() error { return w.f.Close() }
