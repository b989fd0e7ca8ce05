package pebble

// recent is a bounded map that forgets what was not used for a while: two generations,
// the older dropped when the younger is full. One goroutine at a time.
type recent struct {
	limit      int
	young, old map[string]uint64
}

func (r *recent) get(k string) (uint64, bool) {
	if v, ok := r.young[k]; ok {
		return v, true
	}
	v, ok := r.old[k]
	if ok {
		r.put(k, v)
	}
	return v, ok
}

func (r *recent) put(k string, v uint64) {
	if r.young == nil || len(r.young) >= r.limit {
		r.old, r.young = r.young, make(map[string]uint64)
	}
	r.young[k] = v
}
