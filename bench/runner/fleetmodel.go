package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"text/tabwriter"
)

// streamCost is what one stream of one kind of client costs the ADS server.
type streamCost struct {
	ConnectUS float64 `json:"connect_us"` // processor time from nothing to all answers
	PushUS    float64 `json:"push_us"`    // of one push that concerns the client, its ACK included
	StormUS   float64 `json:"storm_us"`   // of being cut off and coming back with what it holds
	ChurnUS   float64 `json:"churn_us"`   // of one client that leaves and one that comes with nothing
	// What the server has in memory beyond what it has without clients: right after a
	// collection, and as it happened to be at the end of the pushes. The collector lets the
	// heap grow to twice what is in use before it runs.
	MemoryKiB   float64 `json:"memory_kib"`
	ResidentKiB float64 `json:"resident_kib"`

	// Bytes of HTTP/2 in both directions; TCP, IP and TLS add theirs.
	ConnectBytes float64 `json:"connect_bytes"`
	PushBytes    float64 `json:"push_bytes"`
	StormBytes   float64 `json:"storm_bytes"`

	// ClientUS is the processor time of the simulated client for a push. It matters where
	// clients and server share cores, as here; a real sidecar spends its own node's.
	ClientUS float64 `json:"client_us"`
}

// serverCost are the coefficients of the cost model on one machine: everything is a sum
// over streams, plus what a push costs with nobody there.
type serverCost struct {
	Machine string     `json:"machine,omitempty"`
	Commit  string     `json:"commit,omitempty"`
	BaseUS  float64    `json:"base_us"` // processor time to compile and publish one change
	Delta   streamCost `json:"delta"`   // follows everything, as a sidecar does
	State   streamCost `json:"state"`   // state of the world, follows one model, as gRPC does
}

// fleetShape is a fleet: its clients and how they behave during a push.
type fleetShape struct {
	Delta, State int
	SlowOf       int     // every so many-th client reads and answers nothing; 0 = none
	Churn        float64 // share of the clients replaced by new ones between two pushes
}

func (f fleetShape) count() int { return f.Delta + f.State }

// slow is how many clients do not answer.
func (f fleetShape) slow() (n int) {
	for i := range f.count() {
		if f.SlowOf > 0 && i%f.SlowOf == slowPhase {
			n++
		}
	}
	return n
}

// replaced is how many clients are replaced between two pushes.
func (f fleetShape) replaced() int { return int(f.Churn * float64(f.count())) }

// fleetFigures is what a fleet costs one server.
type fleetFigures struct {
	ConnectS    float64 // processor seconds to take the whole fleet in
	PushS       float64 // processor seconds per push, churn until the next one included
	StormS      float64 // processor seconds when all are cut off at once and come back
	MemoryMiB   float64 // right after a collection
	ResidentMiB float64 // as it happens to be
	ConnectMB   float64 // 10^6 bytes on the wire, both directions
	PushMB      float64
	StormMB     float64
	// ConvergeMS is from the push to the last acknowledgement of those who answer, where
	// clients and server share the cores and nothing else uses them.
	ConvergeMS float64
}

// predict is the cost model. A client that rejects costs what one that accepts does; a slow
// reader costs a push nothing more until it reads again, because it is owed one response at
// a time; nothing else is more than the sum of its streams.
func (c serverCost) predict(f fleetShape, cores int) fleetFigures {
	d, s := float64(f.Delta), float64(f.State)
	sum := func(of func(streamCost) float64) float64 { return d*of(c.Delta) + s*of(c.State) }
	awake, replaced := 1.0, 0.0
	if n := float64(f.count()); n > 0 {
		awake, replaced = 1-float64(f.slow())/n, float64(f.replaced())/n
	}
	push := awake * sum(func(k streamCost) float64 { return k.PushUS })
	return fleetFigures{
		ConnectS:    sum(func(k streamCost) float64 { return k.ConnectUS }) / 1e6,
		PushS:       (c.BaseUS + push + replaced*sum(func(k streamCost) float64 { return k.ChurnUS })) / 1e6,
		StormS:      sum(func(k streamCost) float64 { return k.StormUS }) / 1e6,
		MemoryMiB:   sum(func(k streamCost) float64 { return k.MemoryKiB }) / 1024,
		ResidentMiB: sum(func(k streamCost) float64 { return k.ResidentKiB }) / 1024,
		ConnectMB:   sum(func(k streamCost) float64 { return k.ConnectBytes }) / 1e6,
		PushMB: (awake*sum(func(k streamCost) float64 { return k.PushBytes }) +
			replaced*sum(func(k streamCost) float64 { return k.ConnectBytes })) / 1e6,
		StormMB:    sum(func(k streamCost) float64 { return k.StormBytes }) / 1e6,
		ConvergeMS: (c.BaseUS + push + awake*sum(func(k streamCost) float64 { return k.ClientUS })) / 1e3 / float64(cores),
	}
}

// fleetFigure is one figure of a fleet: its name, and how far a prediction may be off.
type fleetFigure struct {
	key, unit string
	tolerance float64 // per cent of the prediction
	of        func(fleetFigures) float64
}

// Tolerances: bytes are counted, so they must agree but for the nonces' lengths and which
// kind of client the churn hits; processor time varies with the caches of the machine and with
// who else runs, resident memory with when the collector ran last.
func fleetFigureList() []fleetFigure {
	return []fleetFigure{
		{"connect_cpu", "s", 35, func(f fleetFigures) float64 { return f.ConnectS }},
		{"push_cpu", "s", 35, func(f fleetFigures) float64 { return f.PushS }},
		{"storm_cpu", "s", 35, func(f fleetFigures) float64 { return f.StormS }},
		{"memory", "MiB", 20, func(f fleetFigures) float64 { return f.MemoryMiB }},
		{"resident", "MiB", 50, func(f fleetFigures) float64 { return f.ResidentMiB }},
		{"connect_bytes", "MB", 2, func(f fleetFigures) float64 { return f.ConnectMB }},
		{"push_bytes", "MB", 5, func(f fleetFigures) float64 { return f.PushMB }},
		{"storm_bytes", "MB", 2, func(f fleetFigures) float64 { return f.StormMB }},
		{"converge", "ms", 50, func(f fleetFigures) float64 { return f.ConvergeMS }},
	}
}

// off is how far a measurement is from its prediction, in per cent of the prediction.
func off(predicted, measured float64) float64 {
	return 100 * math.Abs(measured-predicted) / predicted
}

// parsePlan reads "delta" or "delta,state": how many clients of each kind.
func parsePlan(text string) (f fleetShape, err error) {
	delta, state, both := strings.Cut(text, ",")
	if f.Delta, err = strconv.Atoi(delta); err == nil && both {
		f.State, err = strconv.Atoi(state)
	}
	if err != nil || f.Delta < 0 || f.State < 0 || f.count() == 0 {
		return f, fmt.Errorf("-plan %q: give the number of sidecars and Envoys, a comma and that of gRPC clients, as in 100000,5000", text)
	}
	return f, nil
}

// printPlan shows what a fleet costs, divided over one replica and over more of them. Every
// replica has all resources and its share of the streams, so the replicas of one control
// plane and cells with a control plane each cost the same per stream.
func printPlan(w io.Writer, c serverCost, f fleetShape) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(t, "REPLICAS OR CELLS\tCLIENTS EACH\tMEMORY GiB, AT MOST\tCPU s PER PUSH\tMB PER PUSH\tCPU s TO TAKE ALL IN\tMB\tCPU s IN A STORM\tMB\n")
	for _, n := range []int{1, 2, 4, 8, 16} {
		each := fleetShape{Delta: (f.Delta + n - 1) / n, State: (f.State + n - 1) / n}
		g := c.predict(each, 1)
		fmt.Fprintf(t, "%d\t%d\t%.2f\t%.2f\t%.1f\t%.1f\t%.0f\t%.1f\t%.0f\n", n, each.count(), 2*g.MemoryMiB/1024, g.PushS, g.PushMB, g.ConnectS, g.ConnectMB, g.StormS, g.StormMB)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nper sidecar or Envoy: %.0f KiB, %.0f us and %.1f KB a push, %.0f us and %.0f KB to connect, %.0f us and %.1f KB to come back\nper gRPC client: %.0f KiB, %.0f us and %.1f KB a push, %.0f us and %.1f KB to connect, %.0f us and %.1f KB to come back\nmeasured on %s at %s; divide CPU seconds by the cores a replica has for the least time it needs\n",
		c.Delta.MemoryKiB, c.Delta.PushUS, c.Delta.PushBytes/1e3, c.Delta.ConnectUS, c.Delta.ConnectBytes/1e3, c.Delta.StormUS, c.Delta.StormBytes/1e3,
		c.State.MemoryKiB, c.State.PushUS, c.State.PushBytes/1e3, c.State.ConnectUS, c.State.ConnectBytes/1e3, c.State.StormUS, c.State.StormBytes/1e3,
		c.Machine, c.Commit)
	return err
}
