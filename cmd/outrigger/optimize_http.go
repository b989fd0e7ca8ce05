//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strings"

	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
)

// isURL reports whether an objective is a server to ask rather than a command.
func isURL(objective []string) bool {
	return len(objective) == 1 && (strings.HasPrefix(objective[0], "http://") || strings.HasPrefix(objective[0], "https://"))
}

// post asks a server for the loss of a setting. Nothing is tried twice: the trial fails,
// and the search goes on without it. Redirects are not followed, since a setting may be
// secret and was meant for that server.
func (o *tuner) post(ctx context.Context, url string, p algorithms.Params) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, o.trialTimeout)
	defer cancel()
	in, err := json.Marshal(p)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(in))
	if err != nil {
		return 0, err
	}
	req.Header.Set("content-type", "application/json")
	c := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := c.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxObjectiveOutput+1))
	if err != nil || resp.StatusCode != http.StatusOK || len(raw) > maxObjectiveOutput {
		return 0, fmt.Errorf("objective answered %d with %d bytes: %w", resp.StatusCode, len(raw), err)
	}
	return lossOf(raw)
}

// lossOf reads a number, or an object with one called loss.
func lossOf(raw []byte) (float64, error) {
	var loss *float64
	if err := json.Unmarshal(raw, &loss); err != nil || loss == nil {
		var o struct{ Loss *float64 }
		if err := json.Unmarshal(raw, &o); err != nil || o.Loss == nil {
			return 0, fmt.Errorf("objective answered %.100q, neither a number nor {\"loss\": number}", raw)
		}
		loss = o.Loss
	}
	if !(math.Abs(*loss) <= 1e100) {
		return 0, fmt.Errorf("loss %v is out of range", *loss)
	}
	return *loss, nil
}
