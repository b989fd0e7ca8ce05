package main

import (
	"context"
	"fmt"

	"github.com/open-feature/go-sdk/openfeature"
	"github.com/open-feature/go-sdk/openfeature/memprovider"
	"github.com/twmb/murmur3"
)

// inMemory is the OpenFeature Go SDK with its in-memory provider. The provider leaves the
// division to a function of the flag's author; this one is the cheapest that is fair to
// compare with: a hash of flag and user, and integer weights.
func inMemory(ctx context.Context, n int) (func(context.Context, int) (assigner, error), error) {
	flags := map[string]memprovider.InMemoryFlag{}
	names := make([]string, n)
	for e := range n {
		name := experiment(e)
		names[e] = name
		values := map[string]any{}
		for _, v := range variations {
			values[v] = v
		}
		divide := func(f memprovider.InMemoryFlag, c openfeature.FlattenedContext) (any, openfeature.ProviderResolutionDetail) {
			key, _ := c[openfeature.TargetingKey].(string)
			bucket := uint64(murmur3.StringSum32(name+key)) * 100 >> 32
			for k, w := range weights {
				if bucket < uint64(w) {
					return f.Variants[variations[k]], openfeature.ProviderResolutionDetail{Variant: variations[k], Reason: openfeature.SplitReason}
				}
				bucket -= uint64(w)
			}
			return nil, openfeature.ProviderResolutionDetail{Reason: openfeature.ErrorReason}
		}
		flags[name] = memprovider.InMemoryFlag{Key: name, State: memprovider.Enabled, DefaultVariant: variations[0], Variants: values,
			ContextEvaluator: (memprovider.ContextEvaluator)(&divide)}
	}
	if err := openfeature.SetProviderWithContextAndWait(ctx, memprovider.NewInMemoryProvider(flags)); err != nil {
		return nil, err
	}
	client := openfeature.NewDefaultClient()
	return func(_ context.Context, i int) (assigner, error) {
		who := openfeature.NewEvaluationContext(users[i], nil)
		return func(ctx context.Context, e, _ int) (string, error) {
			v, err := client.StringValue(ctx, names[e], "none", who)
			if err == nil && v == "none" {
				err = fmt.Errorf("flag %s gave its default", names[e])
			}
			return v, err
		}, nil
	}, nil
}
