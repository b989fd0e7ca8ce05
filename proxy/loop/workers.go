package loop

import "sync"

// maxIdleWorkers are kept for reuse: a handler's stack is then grown once and not for
// every request. How many are busy is bounded by MaxConns, one per connection.
const maxIdleWorkers = 256

// workers runs jobs on goroutines, most recently used first.
type workers struct {
	mu   sync.Mutex
	idle []*worker
	shut bool
	wg   sync.WaitGroup // every worker; Run waits for it
}

type worker struct{ jobs chan func() }

// run hands job to an idle worker or a new one; it never blocks.
func (ws *workers) run(job func()) {
	ws.mu.Lock()
	if n := len(ws.idle); n > 0 {
		w := ws.idle[n-1]
		ws.idle = ws.idle[:n-1]
		ws.mu.Unlock()
		w.jobs <- job // buffered, and an idle worker's buffer is empty
		return
	}
	ws.wg.Add(1)
	ws.mu.Unlock()
	go ws.work(&worker{jobs: make(chan func(), 1)}, job)
}

func (ws *workers) work(w *worker, job func()) {
	defer ws.wg.Done()
	for {
		job()
		ws.mu.Lock()
		if ws.shut || len(ws.idle) == maxIdleWorkers {
			ws.mu.Unlock()
			return
		}
		ws.idle = append(ws.idle, w)
		ws.mu.Unlock()
		var ok bool
		if job, ok = <-w.jobs; !ok {
			return
		}
	}
}

// stop ends idle workers now, busy ones after their job, and waits for all of them.
func (ws *workers) stop() {
	ws.mu.Lock()
	ws.shut = true
	for _, w := range ws.idle {
		close(w.jobs)
	}
	ws.idle = nil
	ws.mu.Unlock()
	ws.wg.Wait()
	ws.mu.Lock()
	ws.shut = false
	ws.mu.Unlock()
}
