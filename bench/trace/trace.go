// Package trace is the real request trace the demonstration and the benchmarks replay:
// 19,366 requests of a conversation service (see README.md for source and licence).
//
// The trace has sizes and arrival times only; users are made from the row number, so
// that every replay sees the same users in the same order.
package trace

import (
	_ "embed" // the trace itself
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

//go:embed azure-llm-inference-2023-conv.csv
var raw string

// Request is one row.
type Request struct {
	Row       int
	At        time.Duration // since the first row
	Context   int           // tokens in the prompt
	Generated int           // tokens in the answer
}

// User is a deterministic user id: Users distinct ones, spread by a multiplicative
// hash of the row so that consecutive rows are different people.
func (r Request) User() string {
	return fmt.Sprintf("user-%04d", (uint32(r.Row)*2654435761)>>8%Users)
}

// Users is how many distinct users the trace is spread over.
const Users = 4096

// Load parses the embedded trace: rows in time order.
func Load() ([]Request, error) { return parse(strings.NewReader(raw)) }

func parse(r io.Reader) ([]Request, error) {
	cr := csv.NewReader(r)
	cr.ReuseRecord = true
	if _, err := cr.Read(); err != nil {
		return nil, fmt.Errorf("trace header: %w", err)
	}
	var out []Request
	var first time.Time
	for row := 0; ; row++ {
		rec, err := cr.Read()
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("trace row %d: %w", row, err)
		}
		if len(rec) != 3 {
			return nil, fmt.Errorf("trace row %d has %d columns, want 3", row, len(rec))
		}
		at, err := time.Parse("2006-01-02 15:04:05.9999999", rec[0])
		if err != nil {
			return nil, fmt.Errorf("trace row %d: %w", row, err)
		}
		in, err := strconv.Atoi(rec[1])
		if err != nil {
			return nil, fmt.Errorf("trace row %d: %w", row, err)
		}
		gen, err := strconv.Atoi(rec[2])
		if err != nil {
			return nil, fmt.Errorf("trace row %d: %w", row, err)
		}
		if row == 0 {
			first = at
		}
		out = append(out, Request{Row: row, At: at.Sub(first), Context: in, Generated: gen})
	}
}
