package compile

import (
	"fmt"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Compiler compiles facts again and again into the resources of every kind of client,
// and does only what changed: the rest of a set is the messages of the set before, which
// is how the ADS server knows them again without looking at them.
//
// Promise: the sets equal, byte for byte, what EncodeFor makes of CompileWith of the same
// facts, whatever came before. Facts given must be of one history, which is that they
// share what did not change (facts.Apply). A call costs what changed, about 50 ns for each
// model that did not, and for Envoys all models' part of the bucket rule and of the kill
// switches if one model's part changed. After an error the next call starts afresh.
//
// A Compiler is not safe for concurrent use.
type Compiler struct {
	opt      translate.Options
	encoders map[translate.Kind]*translate.Encoder
	deadMan  time.Duration // of the last call; another one changes every model
	models   map[string]*compiled
	names    []string // keys of models, in order of being seen
}

// compiled is one model as it was compiled last, and from what.
type compiled struct {
	model   *facts.Model
	rollout *facts.Rollout
	kills   []Kill
	out     *policy.Model // nil = left out
}

// Sets is the outcome of one compilation.
type Sets struct {
	Position uint64
	// ByKind has a set for each of translate.Kinds.
	ByKind map[translate.Kind]*translate.Resources
	// Models is the number of models of the policy, of which Changed are new or changed
	// and Removed are not there any more. Their order means nothing. Whole says that
	// Changed is all of them, because the Compiler started afresh.
	Models  int
	Whole   bool
	Changed []*policy.Model
	Removed []string
}

// NewCompiler returns a Compiler that knows nothing yet. ChangedAt of opt is not read:
// the facts say it.
func NewCompiler(opt translate.Options) *Compiler { return &Compiler{opt: opt} }

// Compile is CompileWith and EncodeFor of every kind in one.
func (c *Compiler) Compile(f *facts.Facts, position uint64, o Options) (*Sets, error) {
	whole := c.encoders == nil || c.deadMan != o.DeadMan
	if whole {
		c.reset(o)
	}
	out, err := c.compile(f, position, o)
	if err != nil {
		c.encoders = nil
		return nil, err
	}
	out.Whole = whole
	return out, nil
}

func (c *Compiler) reset(o Options) {
	c.encoders, c.models, c.names, c.deadMan = make(map[translate.Kind]*translate.Encoder), make(map[string]*compiled), nil, o.DeadMan
	for _, kind := range translate.Kinds() {
		c.encoders[kind] = translate.NewEncoder(kind, c.opt)
	}
}

func (c *Compiler) compile(f *facts.Facts, position uint64, o Options) (*Sets, error) {
	kills := make(map[string][]Kill, len(o.Kills))
	for _, k := range o.Kills {
		kills[k.Model] = append(kills[k.Model], k)
	}
	out := &Sets{Position: position, ByKind: make(map[translate.Kind]*translate.Resources)}
	change := translate.Change{Position: position, Regions: regions(f), Secrets: o.Secrets}
	for _, name := range c.current(f) {
		was := c.models[name]
		now := &compiled{model: f.Model(name), kills: kills[name]}
		if now.model != nil {
			now.rollout = f.Rollout(now.model.Rollout)
		}
		if was.model == now.model && was.rollout == now.rollout && slices.Equal(was.kills, now.kills) {
			now = was
		} else {
			if now.model != nil {
				now.out, _ = model(f, now.model, o) // why one is left out: Problems
			}
			c.models[name] = now
			switch {
			case now.out != nil:
				change.Models = append(change.Models, translate.ModelChange{Model: now.out, ChangedAt: now.model.ChangedAt})
				out.Changed = append(out.Changed, now.out)
			case was.out != nil:
				change.Removed = append(change.Removed, name)
			}
		}
		if now.out != nil {
			out.Models++
		}
	}
	out.Removed = change.Removed
	if err := checkShared(out.Models, change.Regions); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, fmt.Sprintf("policy compiled at position %d is not valid", position))
	}
	for _, kind := range translate.Kinds() {
		set, err := c.encoders[kind].Encode(change)
		if err != nil {
			return nil, err
		}
		out.ByKind[kind] = set
	}
	return out, nil
}

// current lists the models that are or were there. Models that are gone stay listed until
// the next start, which is seldom: nothing removes a model from the facts today.
func (c *Compiler) current(f *facts.Facts) []string {
	present := 0
	for _, name := range c.names {
		if f.Model(name) != nil {
			present++
		}
	}
	if present == f.ModelCount() {
		return c.names
	}
	for _, m := range f.Models() {
		if c.models[m.Name] == nil {
			c.models[m.Name] = new(compiled)
			c.names = append(c.names, m.Name)
		}
	}
	return c.names
}

// checkShared is what policy.Validate checks beyond single models, which have passed
// theirs and are distinct.
func checkShared(models int, regions []policy.Region) error {
	if models > policy.MaxModels {
		return outrigger.Errorf(outrigger.Invalid, "%d models, the limit is %d", models, policy.MaxModels)
	}
	return (&policy.Policy{Regions: regions}).Validate()
}
