package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"
)

// us is the name of our contender in every comparison.
const us = "outrigger"

// contender is one side of a comparison.
type contender struct {
	name string
	// sample measures once. It must take about as long for every contender.
	sample func(context.Context) (map[string]float64, error)
	// missing says why it cannot be measured here; nil when it can.
	missing error
}

// comparison is what was measured of one row.
type comparison struct {
	Rounds  []round           `json:"rounds"`
	Missing map[string]string `json:"missing,omitempty"`
}

// compare measures all contenders round by round: in one round each is measured once,
// forwards in even rounds and backwards in odd ones, so that neither a slow minute nor
// the heat of the one before favours anybody. Ours must succeed. A peer that fails or
// is missing is left out and named, but under CI that is an error.
func (e *env) compare(ctx context.Context, label string, rounds int, contenders []contender) (comparison, error) {
	out := comparison{Missing: map[string]string{}}
	miss := func(c contender, err error) error {
		if c.name == us || e.ci || ctx.Err() != nil {
			return fmt.Errorf("%s: %s: %w", label, c.name, err)
		}
		e.log("%s: %s left out: %v", label, c.name, err)
		out.Missing[c.name] = err.Error()
		return nil
	}
	for _, c := range contenders {
		if c.missing != nil {
			if err := miss(c, c.missing); err != nil {
				return out, err
			}
		}
	}
	for n := range rounds {
		order := slices.Clone(contenders)
		if n%2 == 1 {
			slices.Reverse(order)
		}
		r := round{}
		for _, c := range order {
			if _, gone := out.Missing[c.name]; gone {
				continue
			}
			s, err := watched(ctx, c.sample)
			if err != nil {
				if err := miss(c, err); err != nil {
					return out, err
				}
				continue
			}
			r[c.name] = s
			e.log("%s %d/%d %-20s %s", label, n+1, rounds, c.name, describe(s))
		}
		out.Rounds = append(out.Rounds, r)
	}
	return out, nil
}

// watched takes one sample and what else went on meanwhile.
func watched(ctx context.Context, take func(context.Context) (map[string]float64, error)) (sample, error) {
	var s sample
	var err error
	if s.Load, err = loadAverage(); err != nil {
		return s, err
	}
	before, err := observe()
	if err != nil {
		return s, err
	}
	if s.Values, err = take(ctx); err != nil {
		return s, err
	}
	after, err := observe()
	if err != nil {
		return s, err
	}
	s.Foreign = foreign(before, after, os.Getpid(), runtime.NumCPU())
	s.Seconds = time.Since(before.at).Seconds()
	return s, nil
}

func describe(s sample) string {
	text := ""
	for _, k := range sortedKeys(s.Values) {
		text += fmt.Sprintf("%s=%.4g ", k, s.Values[k])
	}
	return fmt.Sprintf("%s(foreign %.0f %%, load %.1f)", text, 100*s.Foreign, s.Load)
}

// keep writes every sample of a row beside the results.
func (e *env) keep(id string, v any) error {
	return writeJSON(filepath.Join(e.rawDir, id+".raw"), v)
}

// rows makes one result for each peer, in the order given. what describes the row for a
// peer whose samples exist; a missing peer's row says why instead.
func (c comparison) rows(r row, metric string, peers []string, what func(peer string) string) ([]result, error) {
	var out []result
	for _, p := range peers {
		if s, ok := summarise(c.Rounds, us, p, metric); ok {
			out = append(out, newResult(r, what(p), p, s))
			continue
		}
		s, ok := summarise(c.Rounds, us, "", metric)
		if !ok {
			return nil, fmt.Errorf("%s: nothing was measured", r.id)
		}
		out = append(out, newResult(r, fmt.Sprintf("%s; %s was not measured: %s", what(""), p, c.Missing[p]), p, s))
	}
	withBars(out, r.bars, c.Rounds)
	return out, nil
}

// peerNames lists the contenders but ours.
func peerNames(cs []contender) (names []string) {
	for _, c := range cs {
		if c.name != us {
			names = append(names, c.name)
		}
	}
	return names
}
