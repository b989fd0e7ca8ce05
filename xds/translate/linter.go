package translate

import (
	"maps"
	"slices"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Linter is Lint for one policy after the other: it looks again only at models that
// changed. It is not safe for concurrent use.
type Linter struct {
	features []Feature
	models   map[string][][]string // by feature: where the model uses it
	problems map[Kind][]Problem    // as of the last change that mattered
}

// NewLinter returns a Linter of an empty policy.
func NewLinter() *Linter {
	return &Linter{features: Features(), models: make(map[string][][]string), problems: make(map[Kind][]Problem)}
}

// Set adds or replaces a model, which must be valid.
func (l *Linter) Set(m *policy.Model) {
	one := &policy.Policy{Models: []policy.Model{*m}}
	uses := make([][]string, len(l.features))
	for i, f := range l.features {
		uses[i] = f.uses(one)
	}
	if !slices.EqualFunc(uses, l.models[m.Name], slices.Equal) {
		l.models[m.Name] = uses
		clear(l.problems)
	}
}

// Remove takes a model out.
func (l *Linter) Remove(model string) {
	if _, there := l.models[model]; there {
		delete(l.models, model)
		clear(l.problems)
	}
}

// Problems is Lint of the models that are set. The answer must not be modified.
func (l *Linter) Problems(kind Kind) []Problem {
	if known, ok := l.problems[kind]; ok {
		return known
	}
	var out []Problem
	for i, f := range l.features {
		c := f.By[kind]
		if c.Support == Full {
			continue
		}
		var where []string
		for _, model := range slices.Sorted(maps.Keys(l.models)) {
			where = append(where, l.models[model][i]...)
		}
		if len(where) > 0 {
			slices.Sort(where)
			out = append(out, Problem{Kind: kind, Feature: f.Name, Capability: c, Where: slices.Compact(where)})
		}
	}
	l.problems[kind] = out
	return out
}
