// Command logstore is the peer of the event log: bbolt with a group-committing writer,
// and the floor below every engine, one file with a group-committed fdatasync.
//
//	logstore -mode append -engine bbolt -dir D -writers 128 -slice 2s   prints {"rate":…}
//	logstore -mode fill -dir D -events 100000                           then kills itself
//	logstore -mode open -dir D -events 100000                           prints {"ready_ms":…,"replay_ms":…}
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	recordBytes = 300 // an event with a 200-byte value, encoded
	aggregates  = 1000
	maxCommit   = 1000 // records in one commit
)

// engine makes a batch of records durable before it returns.
type engine interface {
	commit(records []record) error
	close() error
}

// record is one event of one aggregate.
type record struct {
	aggregate string
	value     []byte
	done      chan error
}

func main() {
	mode := flag.String("mode", "append", "append, fill or open")
	name := flag.String("engine", "bbolt", "bbolt or wal")
	dir := flag.String("dir", "", "an empty directory on the disk to measure")
	writers := flag.Int("writers", 128, "concurrent writers, one event each at a time")
	slice := flag.Duration("slice", 2*time.Second, "how long to append")
	events := flag.Int("events", 100_000, "events to fill in or to find")
	flag.Parse()
	var err error
	switch *mode {
	case "append":
		err = appendMode(*name, *dir, *writers, *slice)
	case "fill":
		err = fillMode(*dir, *events)
	case "open":
		err = openMode(*dir, *events)
	default:
		err = fmt.Errorf("-mode is %q; give append, fill or open", *mode)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func open(name, dir string) (engine, error) {
	switch name {
	case "bbolt":
		return openBolt(dir)
	case "wal":
		return openWAL(dir)
	}
	return nil, fmt.Errorf("-engine is %q; give bbolt or wal", name)
}

// group commits whatever waits, up to maxCommit records at a time, until ctx ends.
func group(ctx context.Context, e engine, queue <-chan record) {
	batch := make([]record, 0, maxCommit)
	for {
		batch = batch[:0]
		select {
		case <-ctx.Done():
			return
		case r := <-queue:
			batch = append(batch, r)
		}
	more:
		for len(batch) < maxCommit {
			select {
			case r := <-queue:
				batch = append(batch, r)
			default:
				break more
			}
		}
		err := e.commit(batch)
		for _, r := range batch {
			r.done <- err
		}
	}
}

func appendMode(name, dir string, writers int, slice time.Duration) error {
	e, err := open(name, dir)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	queue := make(chan record, 2*writers)
	committed := make(chan struct{})
	go func() { defer close(committed); group(ctx, e, queue) }()
	var n, turn atomic.Int64
	var failure atomic.Pointer[error]
	var wg sync.WaitGroup
	start := time.Now()
	for range writers {
		wg.Go(func() {
			done, value := make(chan error, 1), make([]byte, recordBytes)
			for time.Since(start) < slice {
				queue <- record{aggregate: fmt.Sprintf("var/default/s/%d", turn.Add(1)%aggregates), value: value, done: done}
				if err := <-done; err != nil {
					failure.Store(&err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	wall := time.Since(start)
	cancel()
	<-committed
	if p := failure.Load(); p != nil {
		return *p
	}
	if err := e.close(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"rate": float64(n.Load()) / wall.Seconds()})
}

// fillMode leaves a store behind the way a killed process does.
func fillMode(dir string, events int) error {
	e, err := openBolt(dir)
	if err != nil {
		return err
	}
	value := make([]byte, recordBytes)
	for i := 0; i < events; i += maxCommit {
		batch := make([]record, min(maxCommit, events-i))
		for j := range batch {
			batch[j] = record{aggregate: fmt.Sprintf("var/default/s/%d", (i+j)%aggregates), value: value}
		}
		if err := e.commit(batch); err != nil {
			return err
		}
	}
	return syscall.Kill(os.Getpid(), syscall.SIGKILL)
}

func openMode(dir string, events int) error {
	start := time.Now()
	b, err := openBolt(dir)
	if err != nil {
		return err
	}
	if err := b.commit([]record{{aggregate: "var/default/s/0", value: make([]byte, recordBytes)}}); err != nil {
		return err
	}
	ready := time.Since(start)
	n, err := b.replay()
	if err != nil {
		return err
	}
	replay := time.Since(start)
	if n != events+1 {
		return errors.Join(fmt.Errorf("found %d events, want %d", n, events+1), b.close())
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"ready_ms": ms(ready), "replay_ms": ms(replay)})
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
