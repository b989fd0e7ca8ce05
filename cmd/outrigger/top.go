//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/spf13/cobra"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
)

func topCommand(g *globals) *cobra.Command {
	var every time.Duration
	var count int
	var admins []string
	cmd := &cobra.Command{Use: "top", Short: "Watch versions and sidecars: requests, errors, latency, hit rates, lag", Args: exactArgs(),
		Long: `Top shows, once every --every, what the control plane hears from the whole mesh: requests,
errors and latency of every model version, how far every sidecar is behind, the caches, the
rollouts. Each --admin adds what one sidecar counts itself. On a terminal it fills the
screen (q ends it, p pauses); elsewhere it prints --count tables, one unless told
otherwise, and with --output json one object a line. Rates are over the last interval.`}
	c := addClientFlags(cmd, g)
	f := cmd.Flags()
	f.DurationVar(&every, "every", time.Second, "how often to look, 100ms to 1h")
	f.IntVar(&count, "count", 0, "end after that many; 0 = never on a terminal, one elsewhere")
	f.StringSliceVar(&admins, "admin", nil, adminFlagUsage+"; repeatable")
	cmd.RunE = c.verb(true, func(ctx context.Context, cl *client, _ []string) error {
		if every < 100*time.Millisecond || every > time.Hour || count < 0 {
			return usageError{fmt.Errorf("--every is %v and --count %d; give 100ms to 1h, and 0 or more", every, count)}
		}
		t := &top{cl: cl, admins: admins, every: every, count: count}
		stdout, ok := cmd.OutOrStdout().(*os.File)
		if !cl.out.json && ok && isTerminal(stdout) {
			return t.screen(ctx, stdout)
		}
		t.count = max(count, 1)
		return t.run(ctx, func(v *topView) error {
			if cl.out.json {
				return json.NewEncoder(cl.out.w).Encode(v)
			}
			return v.table(cl.out.w)
		})
	})
	return cmd
}

// top looks again and again.
type top struct {
	cl     *client
	admins []string
	every  time.Duration
	count  int // 0 = until the context ends

	last *topLook
}

// topLook is one reading of everything, from which rates come by difference.
type topLook struct {
	at       time.Time
	status   *pb.StatusResponse
	xds      *pb.XdsStatusResponse
	sidecars []sidecarStats
}

// sidecarStats is what a sidecar's own page says.
type sidecarStats struct {
	Node      string            `json:"node"`
	Inference inference.Stats   `json:"inference"`
	Variables map[string]uint64 `json:"variables"`
}

// topView is one picture; the JSON form is part of the product's contract. Rates are per
// second over the interval before; ratios are 0 to 1, and 0 where nothing happened.
type topView struct {
	At       time.Time    `json:"at"`
	Region   string       `json:"region"`
	Position uint64       `json:"policy_position"`
	Head     uint64       `json:"head"`
	Versions []topVersion `json:"versions"`
	Nodes    []topNode    `json:"nodes"`
	Sidecars []topSidecar `json:"sidecars"`
	Cache    topCache     `json:"cache"`
	Rollouts []topRollout `json:"rollouts"`
	Alerts   []string     `json:"alerts"`
}

// topVersion is one version of a model over the whole mesh.
type topVersion struct {
	Model      string  `json:"model"`
	Version    string  `json:"version"`
	State      string  `json:"state"`
	Share      float64 `json:"share"`
	Rate       float64 `json:"requests_per_second"`
	ErrorRatio float64 `json:"error_ratio"`
	P50        float64 `json:"p50_ms"`
	P99        float64 `json:"p99_ms"`
	Requests   uint64  `json:"requests"`
	Failures   uint64  `json:"failures"`
}

// topNode is one client of the control plane, and how far it is behind.
type topNode struct {
	Node      string  `json:"node"`
	Kind      string  `json:"kind"`
	Connected bool    `json:"connected"`
	Acked     uint64  `json:"acked_position"`
	Behind    float64 `json:"behind_seconds"`
	FeedLag   uint64  `json:"feed_lag"` // events of the log its feed has not got; 0 without a feed
	Rejects   string  `json:"rejects,omitempty"`
}

// topSidecar is what one sidecar counts itself.
type topSidecar struct {
	Node       string  `json:"node"`
	Rate       float64 `json:"requests_per_second"`
	ErrorRatio float64 `json:"error_ratio"`
	MeanMs     float64 `json:"mean_ms"`
	InFlight   int64   `json:"in_flight"`
	Open       int     `json:"open_breakers"`
	Reads      float64 `json:"reads_per_second"`
	Process    float64 `json:"process_ratio"`
	NodeTier   float64 `json:"node_ratio"`
	Origin     float64 `json:"origin_ratio"`
}

// topCache is the variables' caches of the whole mesh.
type topCache struct {
	Reads   float64 `json:"reads_per_second"`
	Process float64 `json:"process_ratio"`
	Node    float64 `json:"node_ratio"`
	Origin  float64 `json:"origin_ratio"`
	LagP50  float64 `json:"invalidation_p50_ms"`
	LagP99  float64 `json:"invalidation_p99_ms"`
}

// topRollout is one rollout that is not over.
type topRollout struct {
	ID       string  `json:"id"`
	State    string  `json:"state"`
	Phase    string  `json:"phase"`
	Weight   float64 `json:"weight"`
	Evidence float64 `json:"evidence"` // of the worst stratum, as part of what rolls back
}

// look reads everything once.
func (t *top) look(ctx context.Context) (*topLook, error) {
	ctx, cancel := context.WithTimeout(ctx, t.cl.flags.timeout)
	defer cancel()
	l := &topLook{at: time.Now()}
	var err error
	if l.status, err = t.cl.admin.Status(ctx, &pb.ListRequestAll{}); err != nil {
		return nil, err
	}
	if l.xds, err = t.cl.delivery().XdsStatus(ctx, &pb.XdsStatusRequest{}, largeAnswer()); err != nil {
		return nil, err
	}
	for _, a := range t.admins {
		body, err := adminPage(ctx, a, http.MethodGet, "/stats", nil)
		if err != nil {
			return nil, err
		}
		var s sidecarStats
		err = json.NewDecoder(body).Decode(&s)
		body.Close()
		if err != nil {
			return nil, fmt.Errorf("the statistics of %s: %w", a, err)
		}
		l.sidecars = append(l.sidecars, s)
	}
	return l, nil
}

// run shows a picture after every interval.
func (t *top) run(ctx context.Context, show func(*topView) error) (err error) {
	if t.last, err = t.look(ctx); err != nil {
		return err
	}
	tick := time.NewTicker(t.every)
	defer tick.Stop()
	for n := 0; t.count == 0 || n < t.count; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		l, err := t.look(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		if err := show(compare(t.last, l)); err != nil {
			return err
		}
		t.last = l
	}
	return nil
}

func ratio(n, of uint64) float64 {
	if of == 0 {
		return 0
	}
	return float64(n) / float64(of)
}

// grown is how much a counter has grown; one that fell has begun anew with its process.
func grown(was, is uint64) uint64 {
	if is < was {
		return is
	}
	return is - was
}

// compare makes a picture of two looks.
func compare(was, is *topLook) *topView {
	s, secs := is.status, is.at.Sub(was.at).Seconds()
	v := &topView{At: is.at, Region: s.Region, Position: s.PolicyPosition, Head: s.Head,
		Versions: []topVersion{}, Nodes: []topNode{}, Sidecars: []topSidecar{}, Rollouts: []topRollout{}, Alerts: []string{}}
	before := map[string]*pb.VersionStats{}
	for _, m := range was.status.Models {
		for _, x := range m.Versions {
			before[m.Name+"@"+x.Version] = x.Stats
		}
	}
	for _, m := range s.Models {
		share := map[string]float64{}
		for _, a := range m.Arms {
			share[a.Version] += float64(a.Weight) / 10_000
		}
		for _, x := range m.Versions {
			old, n := before[m.Name+"@"+x.Version], x.Stats
			requests := grown(old.GetRequests(), n.GetRequests())
			v.Versions = append(v.Versions, topVersion{Model: m.Name, Version: x.Version, State: x.State, Share: share[x.Version],
				Rate: float64(requests) / secs, ErrorRatio: ratio(grown(old.GetFailures(), n.GetFailures()), requests), P50: n.GetP50Ms(), P99: n.GetP99Ms(),
				Requests: n.GetRequests(), Failures: n.GetFailures()})
		}
	}
	v.nodes(is)
	for i := range is.sidecars {
		old := sidecarStats{}
		for _, o := range was.sidecars {
			if o.Node == is.sidecars[i].Node {
				old = o
			}
		}
		v.Sidecars = append(v.Sidecars, compareSidecar(&old, &is.sidecars[i], secs))
	}
	a, b := was.status.Cache, s.Cache
	p, n, o := grown(a.GetHitsProcess(), b.GetHitsProcess()), grown(a.GetHitsNode(), b.GetHitsNode()), grown(a.GetHitsOrigin(), b.GetHitsOrigin())
	v.Cache = topCache{Reads: float64(p+n+o) / secs, Process: ratio(p, p+n+o), Node: ratio(n, p+n+o), Origin: ratio(o, p+n+o),
		LagP50: b.GetInvalidationLagP50Ms(), LagP99: b.GetInvalidationLagP99Ms()}
	v.story(s)
	return v
}

// nodes joins who follows policy with who follows the feed.
func (v *topView) nodes(is *topLook) {
	behind := map[string]float64{}
	for _, n := range is.xds.Nodes {
		behind[n.Node.GetId()] = n.BehindSeconds
	}
	for _, n := range is.status.Nodes {
		t := topNode{Node: n.Node.GetId(), Kind: n.Node.GetKind(), Connected: n.Connected, Acked: n.AckedPosition, Behind: behind[n.Node.GetId()], Rejects: n.Nack}
		if n.FeedApplied > 0 {
			t.FeedLag = grown(n.FeedApplied, max(is.status.Head, n.FeedApplied))
		}
		v.Nodes = append(v.Nodes, t)
	}
}

// story is what is under way and what is wrong.
func (v *topView) story(s *pb.StatusResponse) {
	for _, r := range s.Rollouts {
		if r.State == "completed" || r.State == "rolled_back" || r.State == "aborted" {
			continue
		}
		t := topRollout{ID: r.Id, State: r.State, Weight: float64(r.Weight) / 10_000}
		if int(r.Phase) < len(r.Phases) {
			t.Phase = r.Phases[r.Phase].Name
		}
		for _, e := range r.Evidence {
			if e.Threshold > 0 {
				t.Evidence = max(t.Evidence, e.EValue/e.Threshold)
			}
		}
		v.Rollouts = append(v.Rollouts, t)
	}
	for _, a := range s.Alerts {
		if a.ResolvedAt == nil {
			v.Alerts = append(v.Alerts, a.Severity+": "+a.Summary)
		}
	}
}

func compareSidecar(was, is *sidecarStats, secs float64) topSidecar {
	sum := func(s *sidecarStats) (requests, failures, ms uint64) {
		for _, a := range s.Inference.Arms {
			requests, failures, ms = requests+a.Requests, failures+a.Failures, ms+uint64(max(a.LatencySumMS, 0))
		}
		return requests, failures, ms
	}
	r0, f0, m0 := sum(was)
	r1, f1, m1 := sum(is)
	requests := grown(r0, r1)
	out := topSidecar{Node: is.Node, Rate: float64(requests) / secs, ErrorRatio: ratio(grown(f0, f1), requests), MeanMs: ratio(grown(m0, m1), requests), InFlight: is.Inference.InFlight}
	for _, e := range is.Inference.Endpoints {
		if e.Breaker == "open" {
			out.Open++
		}
	}
	d := func(tier string) uint64 { return grown(was.Variables[tier], is.Variables[tier]) }
	all := d("process") + d("node") + d("origin")
	out.Reads, out.Process, out.NodeTier, out.Origin = float64(all)/secs, ratio(d("process"), all), ratio(d("node"), all), ratio(d("origin"), all)
	return out
}

// topScreen is the full-screen picture.
type topScreen struct {
	view   *topView
	paused bool
}

// Init starts nothing: pictures are sent from outside.
func (s topScreen) Init() tea.Cmd { return nil }

// Update takes a new picture or a key.
func (s topScreen) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case *topView:
		if !s.paused {
			s.view = msg
		}
	case tea.KeyMsg:
		switch msg.String() {
		case "q", "ctrl+c", "esc":
			return s, tea.Quit
		case "p", " ":
			s.paused = !s.paused
		}
	}
	return s, nil
}

// View draws the picture.
func (s topScreen) View() string {
	var b strings.Builder
	if s.view == nil {
		b.WriteString("looking…\n")
	} else if err := s.view.table(&b); err != nil {
		return err.Error() // a builder takes everything
	}
	keys := "q: end   p: pause"
	if s.paused {
		keys = "q: end   p: go on (paused)"
	}
	return b.String() + "\n" + keys + "\n"
}

// screen shows pictures on a terminal until its person, ctx or count ends it.
func (t *top) screen(ctx context.Context, stdout *os.File) error {
	looking, cancel := context.WithCancel(ctx)
	defer cancel()
	p := tea.NewProgram(topScreen{}, tea.WithOutput(stdout), tea.WithContext(ctx), tea.WithoutSignalHandler(), tea.WithAltScreen())
	ended := make(chan error, 1)
	go func() {
		ended <- t.run(looking, func(v *topView) error { p.Send(v); return nil })
		p.Quit()
	}()
	_, err := p.Run()
	cancel()
	if rerr := <-ended; rerr != nil {
		return rerr
	}
	if ctx.Err() != nil {
		return nil // asked to end, which the program calls being killed
	}
	return err
}
