package algorithms

import (
	"encoding/json"
	"maps"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// Limits of a History.
const (
	MaxRecords     = 1_000  // records kept per task type and algorithm, the latest
	MaxHistoryKeys = 10_000 // pairs of task type and algorithm
)

// Record is how well one optimisation went.
type Record struct {
	Task  string  `json:"task,omitempty"` // id of the optimisation
	Score float64 `json:"score"`          // 0 (as random search or worse) to 1 (perfect); see Score
}

// History keeps the scores of algorithms by task type: the key by which they are
// written is the key by which they are read. The zero value is empty and ready. It
// belongs to one goroutine at a time; JSON is its serial form.
type History struct {
	types map[string]map[string][]Record
	pairs int // of task type and algorithm
}

// Add appends a record, forgetting the oldest of its task type and algorithm beyond
// MaxRecords. A score outside [0,1] is Invalid; a new pair beyond MaxHistoryKeys is
// Exhausted. With an error nothing changes.
func (h *History) Add(taskType, algorithm string, r Record) error {
	if !(r.Score >= 0 && r.Score <= 1) {
		return outrigger.Errorf(outrigger.Invalid, "score %v of %s on %q is outside [0,1]; build it with Score", r.Score, algorithm, taskType)
	}
	fresh := len(h.types[taskType][algorithm]) == 0
	if fresh && h.pairs >= MaxHistoryKeys {
		return outrigger.Errorf(outrigger.Exhausted, "history holds %d pairs of task type and algorithm, the limit; use fewer task types", MaxHistoryKeys)
	}
	if h.types == nil {
		h.types = map[string]map[string][]Record{}
	}
	if h.types[taskType] == nil {
		h.types[taskType] = map[string][]Record{}
	}
	if fresh {
		h.pairs++
	}
	rs := append(h.types[taskType][algorithm], r)
	if len(rs) > MaxRecords {
		rs = slices.Delete(rs, 0, len(rs)-MaxRecords)
	}
	h.types[taskType][algorithm] = rs
	return nil
}

// Records returns a copy of what is kept, oldest first.
func (h *History) Records(taskType, algorithm string) []Record {
	return slices.Clone(h.types[taskType][algorithm])
}

// TaskTypes lists the task types with records, sorted.
func (h *History) TaskTypes() []string { return slices.Sorted(maps.Keys(h.types)) }

// MarshalJSON writes {task type: {algorithm: [records, oldest first]}}.
func (h *History) MarshalJSON() ([]byte, error) {
	if h.types == nil {
		return []byte("{}"), nil
	}
	return json.Marshal(h.types)
}

// UnmarshalJSON replaces the history by what MarshalJSON wrote, within the limits of
// Add. With an error nothing changes.
func (h *History) UnmarshalJSON(b []byte) error {
	var raw map[string]map[string][]Record
	if err := json.Unmarshal(b, &raw); err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "history")
	}
	var n History
	for _, t := range slices.Sorted(maps.Keys(raw)) {
		for _, a := range slices.Sorted(maps.Keys(raw[t])) {
			for _, r := range raw[t][a] {
				if err := n.Add(t, a, r); err != nil {
					return err
				}
			}
		}
	}
	*h = n
	return nil
}

// Score turns the loss an optimisation reached into a score: the share of the way from
// the baseline (what random search reaches in the same budget, or the loss before) to
// the best loss known for the task, clamped to [0,1]. Seconds and megabytes do not
// enter: they are not comparable with quality. Without a gap between baseline and best
// the score is 1 if the best is reached, else 0; NaN scores 0.
func Score(reached, best, baseline float64) float64 {
	switch {
	case reached <= best:
		return 1
	case !(baseline > best):
		return 0
	}
	s := (baseline - reached) / (baseline - best)
	if !(s > 0) {
		return 0
	}
	return min(s, 1)
}
