package main

import (
	"context"
	"errors"

	growthbook "github.com/growthbook/growthbook-golang"
)

// growthBook is GrowthBook's Go SDK. It binds attributes to a child client; a server does
// that once for each request.
func growthBook(ctx context.Context, n int) (func(context.Context, int) (assigner, error), error) {
	base, err := growthbook.NewClient(ctx)
	if err != nil {
		return nil, err
	}
	attributes := make([]growthbook.Attributes, len(users))
	for i, u := range users {
		attributes[i] = growthbook.Attributes{"id": u}
	}
	exps := make([]*growthbook.Experiment, n)
	for e := range exps {
		exps[e] = growthbook.NewExperiment(experiment(e))
		exps[e].HashAttribute = "id"
		for k, v := range variations {
			exps[e].Variations = append(exps[e].Variations, v)
			exps[e].Weights = append(exps[e].Weights, float64(weights[k])/100)
		}
	}
	return func(_ context.Context, i int) (assigner, error) {
		c, err := base.WithAttributes(attributes[i])
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, e, _ int) (string, error) {
			r := c.RunExperiment(ctx, exps[e])
			if !r.InExperiment {
				return "", errors.New("not in the experiment")
			}
			return variations[r.VariationId], nil
		}, nil
	}, nil
}
