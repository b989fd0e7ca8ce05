package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/diegoholiveira/jsonlogic/v3"
	"github.com/twmb/murmur3"
)

// flagd evaluates as flagd does. Its own modules cannot be had everywhere, so this is
// what its specification says, on the JSONLogic library that it uses: the rule is kept as
// JSON text and read at every evaluation, the context is written as JSON with $flagd's
// properties, and the operation "fractional" takes murmur3 of flag key and targeting key,
// times the sum of the weights, shifted by 32 bits. What flagd does beside that (store,
// logging, tracing, gRPC) is left out, in its favour.
func flagd(n int) (func(context.Context, int) (assigner, error), error) {
	jsonlogic.AddOperator("fractional", fractional)
	rule, err := json.Marshal(map[string]any{"fractional": pairs()})
	if err != nil {
		return nil, err
	}
	names := make([]string, n)
	for e := range names {
		names[e] = experiment(e)
	}
	return func(_ context.Context, i int) (assigner, error) {
		who := map[string]any{"targetingKey": users[i]}
		return func(_ context.Context, e, _ int) (string, error) {
			with := maps.Clone(who)
			with["$flagd"] = properties{names[e], time.Now().Unix()}
			text, err := json.Marshal(with)
			if err != nil {
				return "", err
			}
			var out bytes.Buffer
			if err := jsonlogic.Apply(bytes.NewReader(rule), bytes.NewReader(text), &out); err != nil {
				return "", err
			}
			v := strings.Trim(strings.TrimSpace(out.String()), `"`)
			if v == "" || v == "null" {
				return "", errors.New("no variation")
			}
			return v, nil
		}, nil
	}, nil
}

type properties struct {
	FlagKey   string `json:"flagKey"`
	Timestamp int64  `json:"timestamp"`
}

func pairs() (out []any) {
	for k, v := range variations {
		out = append(out, []any{v, weights[k]})
	}
	return out
}

func fractional(values, data any) any {
	c, _ := data.(map[string]any)
	flag, _ := c["$flagd"].(map[string]any)
	list, ok := values.([]any)
	if !ok {
		return nil
	}
	var total uint64
	for _, p := range list {
		w, _ := p.([]any)[1].(float64)
		total += uint64(w)
	}
	bucket := uint64(murmur3.StringSum32(fmt.Sprintf("%s%s", flag["flagKey"], c["targetingKey"]))) * total >> 32
	for _, p := range list {
		w, _ := p.([]any)[1].(float64)
		if bucket < uint64(w) {
			return p.([]any)[0]
		}
		bucket -= uint64(w)
	}
	return nil
}
