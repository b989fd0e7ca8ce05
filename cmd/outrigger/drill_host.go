//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Request fields by which the model's server of a drill knows who asked, and since when.
const (
	drillModelID = "drill"
	hdrDrillFrom = "X-Drill-Sidecar"
	hdrDrillAt   = "X-Drill-Begun" // Unix ns, of the client
)

// drillLine is what a host prints: the policy a sidecar has just put in force, or what its
// clients have seen so far.
type drillLine struct {
	Sidecar  int               `json:"sidecar"`
	Position uint64            `json:"position,omitempty"`
	At       int64             `json:"at,omitempty"` // Unix ns
	Weights  map[string]uint32 `json:"weights,omitempty"`
	Clients  *drillClients     `json:"clients,omitempty"`
}

// drillClients counts calls. One that a candidate failed is explained; every other failed
// call is the mesh's.
type drillClients struct {
	Requests    int    `json:"requests"`
	Failed      int    `json:"failed"`
	Unexplained int    `json:"unexplained"`
	First       string `json:"first,omitempty"`
}

// drillHost is one process with several sidecars and their clients.
type drillHost struct {
	control   string
	first, n  int
	rps       float64 // of one sidecar
	candidate string  // prefix of candidates' names

	out chan drillLine

	mu    sync.Mutex
	calls drillClients // guarded by mu
}

func drillHostCommand(g *globals) *cobra.Command {
	h := &drillHost{out: make(chan drillLine, 4096)}
	cmd := &cobra.Command{Use: "drill-host", Short: "Sidecars and clients of a drill", Hidden: true, Args: exactArgs()}
	f := cmd.Flags()
	f.StringVar(&h.control, "control", "", "control plane")
	f.IntVar(&h.first, "first", 0, "number of the first sidecar")
	f.IntVar(&h.n, "sidecars", 1, "how many")
	f.Float64Var(&h.rps, "rps", 1, "requests per second of each sidecar's client")
	f.StringVar(&h.candidate, "candidate", "candidate-", "what candidates' names begin with")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return h.run(cmd, g) }
	return cmd
}

func (h *drillHost) run(cmd *cobra.Command, g *globals) error {
	if runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs) // see sidecarFlags.run
	}
	name := fmt.Sprintf("drill-%d", h.first)
	p, err := g.start(cmd, "drill-host", name, demoRegion)
	if err != nil {
		return err
	}
	hl, err := p.listen("http", "127.0.0.1:0")
	if err != nil {
		return err
	}
	origin, err := p.dialMesh(h.control)
	if err != nil {
		return err
	}
	defer origin.Close()
	tokens := variable.NewTokens(variable.TokenOptions{Logger: p.log})
	store, err := cache.New(cache.Options{Origin: origin, Encoders: tokens.Encoders(), Private: true, ProcessBytes: 1 << 20, Logger: p.log, Clock: node.Clock(),
		Node: outrigger.Node{ID: name, Kind: "sidecar", Region: demoRegion}})
	if err != nil {
		return err
	}
	p.run("cache", store.Run)
	transport := &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute}
	defer transport.CloseIdleConnections()
	ready := make([]<-chan struct{}, h.n)
	for i := range h.n {
		if ready[i], err = h.sidecar(p, store, tokens, h.first+i, transport); err != nil {
			return err
		}
	}
	all := make(chan struct{})
	p.run("policies", func(ctx context.Context) error {
		for _, r := range ready {
			select {
			case <-r:
			case <-ctx.Done():
				return nil
			}
		}
		close(all)
		return nil
	})
	p.serveHTTP(hl, p.health(nil), time.Second)
	p.becomeReady(all)
	if err := p.announce(); err != nil {
		return err
	}
	p.run("lines", func(ctx context.Context) error { return h.tell(ctx, cmd.OutOrStdout()) })
	return p.wait()
}

// sidecar starts one, complete but for the cache, which it shares, and its client.
func (h *drillHost) sidecar(p *process, store *cache.Store, tokens *variable.Tokens, i int, transport http.RoundTripper) (ready <-chan struct{}, err error) {
	s := &sidecarFlags{control: h.control}
	self := outrigger.Node{ID: fmt.Sprintf("drill/pod-%d", i), Kind: "sidecar", Region: demoRegion}
	ads, err := s.policyFollower(p, self, func(pol *policy.Policy) { h.inForce(i, pol, time.Now()) })
	if err != nil {
		return nil, err
	}
	reports, err := p.dialMesh(h.control)
	if err != nil {
		return nil, err
	}
	l, err := p.listen(fmt.Sprintf("sidecar-%d", i), "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	sc, err := proxy.New(proxy.Options{Node: self, Reader: store, Authority: store.Variables(), Policy: policySource(ads), Material: ads.Material, Reports: reports, Tokens: tokens,
		Grace: time.Second, Start: time.Now(), Logger: p.log})
	if err != nil {
		return nil, err
	}
	p.run("policy", ads.Run)
	p.run("sidecar", func(ctx context.Context) error {
		defer reports.Close()
		return sc.Run(ctx, l)
	})
	p.run("client", func(ctx context.Context) error {
		select {
		case <-ads.Ready():
			h.traffic(ctx, "http://"+l.Addr().String()+"/v1/chat/completions", i, transport)
		case <-ctx.Done():
		}
		return nil
	})
	return ads.Ready(), nil
}

// inForce notes a policy the moment it serves. The acknowledgement waits for this, so it
// does not wait for anybody; a line that finds no room would be missed by the drill, which
// then does not end well.
func (h *drillHost) inForce(i int, p *policy.Policy, now time.Time) {
	m := p.Model(drillModelID)
	if m == nil {
		return
	}
	weights := map[string]uint32{}
	for _, a := range m.Arms {
		for _, r := range a.Ranges {
			weights[a.Version] += r.End - r.Start
		}
	}
	select {
	case h.out <- drillLine{Sidecar: i, Position: p.Position, At: now.UnixNano(), Weights: weights}:
	default:
	}
}

// tell prints lines until ctx ends.
func (h *drillHost) tell(ctx context.Context, w io.Writer) error {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	enc := json.NewEncoder(w)
	for {
		var line drillLine
		select {
		case line = <-h.out:
		case <-tick.C:
			h.mu.Lock()
			calls := h.calls
			h.mu.Unlock()
			line = drillLine{Sidecar: h.first, Clients: &calls}
		case <-ctx.Done():
			return nil
		}
		if err := enc.Encode(line); err != nil {
			return err
		}
	}
}

// traffic sends calls at an even pace, each for another user.
func (h *drillHost) traffic(ctx context.Context, url string, i int, transport http.RoundTripper) {
	pace := time.Duration(float64(time.Second) / h.rps)
	if !pause.For(ctx, time.Duration(rand.Int64N(int64(pace)))) { // not all at once
		return
	}
	tick := time.NewTicker(pace)
	defer tick.Stop()
	c := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	for {
		h.call(ctx, c, url, i)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (h *drillHost) call(ctx context.Context, c *http.Client, url string, i int) {
	body := fmt.Sprintf(`{"model":%q,"user":"u%x","messages":[{"role":"user","content":"hi"}],"max_tokens":1}`, drillModelID, rand.Uint64())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		h.count("", err.Error())
		return
	}
	req.Header.Set("content-type", "application/json")
	req.Header.Set(hdrDrillFrom, strconv.Itoa(i))
	req.Header.Set(hdrDrillAt, strconv.FormatInt(time.Now().UnixNano(), 10))
	resp, err := c.Do(req)
	if err != nil {
		if ctx.Err() == nil {
			h.count("", err.Error())
		}
		return
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	version, failure := resp.Header.Get("x-outrigger-version"), ""
	switch {
	case err != nil && ctx.Err() != nil:
		return
	case err != nil:
		failure = err.Error()
	case resp.StatusCode != http.StatusOK:
		failure = fmt.Sprintf("sidecar %d, version %q: %s: %.200s", i, version, resp.Status, answer)
	}
	h.count(version, failure)
}

func (h *drillHost) count(version, failure string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls.Requests++
	if failure == "" {
		return
	}
	h.calls.Failed++
	if !strings.HasPrefix(version, h.candidate) {
		h.calls.Unexplained++
		if h.calls.First == "" {
			h.calls.First = failure
		}
	}
}
