package optimizers

import (
	"regexp"
	"slices"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
)

// Info reads a plugin's description. Errors have kind Invalid and name the field.
func Info(p *pb.OptimizerInfo) (algorithms.Info, error) {
	i := algorithms.Info{ID: p.GetId(), Name: p.GetName(), Family: algorithms.Family(p.GetFamily()), Conditional: p.GetConditional(), Gradient: p.GetGradient(),
		Noise: p.GetNoise(), Parallel: int(p.GetParallel()), MinBudget: int(p.GetMinBudget()), MaxBudget: int(p.GetMaxBudget()), MaxParams: int(p.GetMaxParams()),
		Tags: p.GetTags(), Baseline: p.GetBaseline(), Rank: 10}
	if !regexp.MustCompile(`^[a-z][a-z0-9_-]{0,62}$`).MatchString(i.ID) {
		return i, outrigger.Errorf(outrigger.Invalid, "id is %q; give 1 to 63 of a-z, 0-9, _ and -, a letter first", i.ID)
	}
	if slices.ContainsFunc(algorithms.Builtin(), func(b algorithms.Algorithm) bool { return b.ID == i.ID }) {
		return i, outrigger.Errorf(outrigger.Invalid, "id %q is that of a built-in optimiser; choose another", i.ID)
	}
	if len(i.Name) > 256 || len(i.Tags) > 32 || slices.ContainsFunc(i.Tags, func(t string) bool { return t == "" || len(t) > 64 }) {
		return i, outrigger.Errorf(outrigger.Invalid, "name has %d bytes and there are %d tags; allowed are 256, and 32 of 1 to 64", len(i.Name), len(i.Tags))
	}
	families := []algorithms.Family{algorithms.GradientBased, algorithms.Evolutionary, algorithms.Metaheuristic, algorithms.ModelBased, algorithms.DirectSearch, algorithms.Sampling}
	if !slices.Contains(families, i.Family) {
		return i, outrigger.Errorf(outrigger.Invalid, "family is %q; one of %q", i.Family, families)
	}
	all := []algorithms.Kind{algorithms.Float, algorithms.Int, algorithms.Categorical, algorithms.Boolean}
	for _, k := range p.GetKinds() {
		if !slices.Contains(all, algorithms.Kind(k)) || slices.Contains(i.Kinds, algorithms.Kind(k)) {
			return i, outrigger.Errorf(outrigger.Invalid, "kinds has %q; give each of %q at most once", k, all)
		}
		i.Kinds = append(i.Kinds, algorithms.Kind(k))
	}
	if len(i.Kinds) == 0 {
		return i, outrigger.Errorf(outrigger.Invalid, "kinds is empty; give some of %q", all)
	}
	if i.MaxParams == 0 {
		i.MaxParams = algorithms.MaxParams
	}
	if i.MinBudget < 0 || i.MaxBudget < max(1, i.MinBudget) || i.Parallel < 0 || i.MaxParams < 1 {
		return i, outrigger.Errorf(outrigger.Invalid, "min_budget %d, max_budget %d, parallel %d, max_params %d: budgets are 1 or more and in order, the others not negative",
			i.MinBudget, i.MaxBudget, i.Parallel, p.GetMaxParams())
	}
	return i, nil
}

// About writes the description of an algorithm.
func About(i algorithms.Info) *pb.OptimizerInfo {
	p := &pb.OptimizerInfo{Id: i.ID, Name: i.Name, Family: string(i.Family), Conditional: i.Conditional, Gradient: i.Gradient, Noise: i.Noise,
		Parallel: int32(i.Parallel), MinBudget: int32(i.MinBudget), MaxBudget: int32(i.MaxBudget), MaxParams: int32(i.MaxParams), Tags: i.Tags, Baseline: i.Baseline}
	for _, k := range i.Kinds {
		p.Kinds = append(p.Kinds, string(k))
	}
	return p
}

// ParamsPB writes the declarations of a space.
func ParamsPB(s *algorithms.Space) (out []*pb.OptimizerParam, err error) {
	for _, p := range s.Params() {
		q := &pb.OptimizerParam{Name: p.Name, Kind: string(p.Kind), Min: p.Min, Max: p.Max, Log: p.Log, Choices: p.Choices}
		if p.When != nil {
			q.WhenParam = p.When.Param
			for _, v := range p.When.In {
				x, err := structpb.NewValue(v)
				if err != nil {
					return nil, outrigger.Wrap(outrigger.Invalid, err, "condition of "+p.Name)
				}
				q.WhenIn = append(q.WhenIn, x)
			}
		}
		out = append(out, q)
	}
	return out, nil
}

// Space reads declarations. Errors have kind Invalid and name the parameter.
func Space(params []*pb.OptimizerParam) (*algorithms.Space, error) {
	var out []algorithms.Param
	for _, p := range params {
		q := algorithms.Param{Name: p.GetName(), Kind: algorithms.Kind(p.GetKind()), Min: p.GetMin(), Max: p.GetMax(), Log: p.GetLog(), Choices: p.GetChoices()}
		if p.GetWhenParam() != "" {
			q.When = &algorithms.Condition{Param: p.GetWhenParam()}
			for _, v := range p.GetWhenIn() {
				q.When.In = append(q.When.In, v.AsInterface())
			}
		}
		out = append(out, q)
	}
	return algorithms.NewSpace(out...)
}

func startPB(cfg algorithms.Config) (*pb.OptimizerStart, error) {
	params, err := ParamsPB(cfg.Space)
	if err != nil {
		return nil, err
	}
	out := &pb.OptimizerStart{Params: params, Seed: cfg.Seed, Budget: int32(cfg.Budget), Noisy: cfg.Noisy}
	if cfg.Start != nil {
		if err := cfg.Space.Check(cfg.Start); err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, "config: start")
		}
		if out.Start, err = settingPB(cfg.Start); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func settingPB(p algorithms.Params) (*structpb.Struct, error) {
	m := map[string]any{}
	for k, v := range p {
		m[k] = v
	}
	out, err := structpb.NewStruct(m)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "setting")
	}
	return out, nil
}
