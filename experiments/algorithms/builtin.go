package algorithms

// builtins lists the built-in algorithms: the seed design's five and the four others that the
// sanity task and the budget table need.
func builtins() []builtin {
	all := []Kind{Float, Int, Categorical, Boolean}
	return []builtin{
		{Info{ID: "sgd_basic", Name: "Stochastic Gradient Descent", Family: GradientBased, Kinds: []Kind{Float},
			Gradient: true, Noise: true, Parallel: 4, MinBudget: 50, MaxBudget: 20_000, MaxParams: MaxParams, Rank: 6,
			Tags: []string{"continuous", "differentiable"},
			Settings: append(descent(0.05),
				Setting{"momentum", 0.9, 0, 0.999, "share of the last step carried on"})},
			func(p *problem) engine { return newBatch(p, &gradient{p: p}) }},
		{Info{ID: "adam_optimizer", Name: "Adam Optimizer", Family: GradientBased, Kinds: []Kind{Float},
			Gradient: true, Noise: true, Parallel: 4, MinBudget: 50, MaxBudget: 20_000, MaxParams: MaxParams, Rank: 5,
			Tags: []string{"continuous", "differentiable", "sparse_gradients"},
			Settings: append(descent(0.1),
				Setting{"beta1", 0.9, 0, 0.999, "decay of the gradient's mean"},
				Setting{"beta2", 0.999, 0, 0.99999, "decay of the gradient's square"})},
			func(p *problem) engine { return newBatch(p, &gradient{p: p, adam: true}) }},
		{Info{ID: "genetic_algorithm", Name: "Genetic Algorithm", Family: Evolutionary, Kinds: all, Conditional: true,
			Noise: true, MinBudget: 200, MaxBudget: MaxBudget, MaxParams: MaxParams, Rank: 4,
			Tags: []string{"discrete", "combinatorial", "non_differentiable"},
			Settings: []Setting{
				{"population_size", 0, 0, 10_000, "individuals; 0 means min(40, budget/5)"},
				{"mutation_rate", 0, 0, 1, "chance that a gene mutates; 0 means max(0.1, 1/parameters)"},
				{"blend", 0.5, 0, 2, "α of the crossover BLX-α"}}},
			func(p *problem) engine { return &genetic{p: p} }},
		{Info{ID: "simulated_annealing", Name: "Simulated Annealing", Family: Metaheuristic, Kinds: all, Conditional: true,
			Parallel: 2, MinBudget: 100, MaxBudget: 2_000, MaxParams: MaxParams, Rank: 3,
			Tags: []string{"discrete", "combinatorial", "local_optima_escape"},
			Settings: []Setting{
				{"initial_temp", 0, 0, 1e100, "first temperature in units of the loss; 0 means calibrated"},
				{"cooling_rate", 0, 0, 0.999999, "factor per evaluation; 0 means fitted to the budget, down to 1e-4"},
				{"heat", 0.1, 1e-6, 100, "calibrated temperature as a share of the gap from best to median of the design"},
				{"step", 0.25, 1e-6, 1, "step at the start, in edges of the cube"},
				{"step_end", 0.005, 1e-9, 1, "step at the end"}}},
			func(p *problem) engine { return &annealer{p: p} }},
		{Info{ID: "bayesian_optimization", Name: "Bayesian Optimization", Family: ModelBased, Kinds: all, Conditional: true,
			Noise: true, Parallel: 16, MinBudget: 8, MaxBudget: maxModelled, MaxParams: 20, Rank: 0,
			Tags:     []string{"expensive_evaluation", "few_iterations", "global_optimization", "continuous", "discrete"},
			Settings: []Setting{{"initial", 0, 0, 300, "points of the initial design; 0 means parameters + 3"}}},
			func(p *problem) engine { return &bayes{p: p} }},
		{Info{ID: "nelder_mead", Name: "Nelder-Mead with restarts", Family: DirectSearch, Kinds: []Kind{Float, Int},
			Parallel: 1, MinBudget: 50, MaxBudget: 5_000, MaxParams: 8, Rank: 2,
			Tags: []string{"continuous", "non_differentiable"}},
			func(p *problem) engine { return newBatch(p, &simplex{p: p}) }},
		{Info{ID: "cma_es", Name: "CMA-ES with restarts", Family: Evolutionary, Kinds: []Kind{Float, Int},
			Noise: true, Parallel: 8, MinBudget: 150, MaxBudget: MaxBudget, MaxParams: MaxParams, Rank: 1,
			Tags:     []string{"continuous", "non_differentiable", "global_optimization", "local_optima_escape"},
			Settings: []Setting{{"sigma", 0.2, 1e-6, 1, "first step size, in edges of the cube"}}},
			func(p *problem) engine { return newBatch(p, &cmaes{p: p}) }},
		{Info{ID: "random", Name: "Random search", Family: Sampling, Kinds: all, Conditional: true, Noise: true,
			MinBudget: 1, MaxBudget: MaxBudget, MaxParams: MaxParams, Rank: 9, Baseline: true},
			func(p *problem) engine { return &sampler{p: p} }},
		{Info{ID: "sobol", Name: "Scrambled Sobol search", Family: Sampling, Kinds: all, Conditional: true, Noise: true,
			MinBudget: 1, MaxBudget: MaxBudget, MaxParams: MaxParams, Rank: 8, Baseline: true},
			func(p *problem) engine { return &sampler{p: p, Sobol: true} }},
	}
}

// descent lists the settings both descents share.
func descent(rate float64) []Setting {
	return []Setting{
		{"learning_rate", rate, 1e-6, 1, "length of the first step, in edges of the cube"},
		{"spsa", 2, 0, 2, "gradient by simultaneous perturbation: 0 never, 1 always, 2 when noisy or above 16 parameters"},
	}
}
