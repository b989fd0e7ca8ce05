//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

func experimentCommand(g *globals) *cobra.Command {
	cmd := group("experiment", "Split a model's traffic between versions")
	c := addClientFlags(cmd, g)
	var arms []string
	var start bool
	var from string
	create := &cobra.Command{Use: "create NAME MODEL", Short: "Create an experiment", Args: exactArgs("NAME", "MODEL")}
	create.Flags().StringVar(&from, "from", "", "deployment plan whose experiment NAME is created: weights, configuration, metrics, duration and sample size come from there, --arm name=version says what serves a group")
	create.Flags().StringSliceVar(&arms, "arm", nil, "name=version:weight with weights in parts of 10000 that sum to 10000; repeatable")
	create.Flags().BoolVar(&start, "start", false, "start it at once")
	var who pb.ExperimentEnrolment
	create.Flags().StringVar(&who.Target, "target", "", "who takes part: CEL over unit, model, region and attributes (a call's header fields, members of an OpenFeature context), such as 'attributes.plan == \"pro\"'")
	create.Flags().Uint32Var(&who.Coverage, "coverage", 0, "parts of 10000 of the units that take part (default all)")
	var namespace string
	create.Flags().StringVar(&namespace, "namespace", "", "NAME or NAME:START-END: experiments of one namespace share no unit; its buckets, of 10000, that this one claims (default all)")
	create.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req := &pb.CreateExperimentRequest{Name: args[0], Model: args[1], Actor: c.actor, Start: start}
		if from != "" {
			if err := readExperiment(req, from, arms); err != nil {
				return err
			}
			arms = nil
		}
		for _, a := range arms {
			arm, err := parseArm(a)
			if err != nil {
				return err
			}
			req.Arms = append(req.Arms, arm)
		}
		if namespace != "" {
			if err := parseNamespace(&who, namespace); err != nil {
				return err
			}
		}
		if who.Target != "" || who.Coverage != 0 || who.Namespace != "" {
			req.Enrolment = &who
		}
		e, err := cl.admin.CreateExperiment(ctx, req)
		if err != nil {
			return err
		}
		return cl.printExperiments(&pb.ListExperimentsResponse{Experiments: []*pb.Experiment{e}})
	})
	cmd.AddCommand(create, experimentState(c, "start", "running"), experimentState(c, "stop", "stopped"), experimentState(c, "archive", "archived"),
		experimentPlan(c), experimentResults(c), experimentRecord(c), experimentForce(),
		&cobra.Command{Use: "list", Short: "List experiments", Args: exactArgs(),
			RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
				r, err := cl.admin.ListExperiments(ctx, &pb.ListRequestAll{})
				if err != nil {
					return err
				}
				return cl.printExperiments(r)
			})})
	return cmd
}

func parseNamespace(e *pb.ExperimentEnrolment, s string) error {
	name, buckets, given := strings.Cut(s, ":")
	e.Namespace = name
	if !given {
		return nil
	}
	start, end, ok := strings.Cut(buckets, "-")
	from, err1 := strconv.ParseUint(start, 10, 32)
	to, err2 := strconv.ParseUint(end, 10, 32)
	if !ok || err1 != nil || err2 != nil || to == 0 {
		return usageError{fmt.Errorf("--namespace %q is not NAME or NAME:START-END", s)}
	}
	e.NamespaceStart, e.NamespaceEnd = uint32(from), uint32(to)
	return nil
}

func parseArm(s string) (*pb.ExperimentArm, error) {
	name, rest, ok := strings.Cut(s, "=")
	version, weight, ok2 := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(weight, 10, 32)
	if !ok || !ok2 || err != nil {
		return nil, usageError{fmt.Errorf("--arm %q is not name=version:weight", s)}
	}
	return &pb.ExperimentArm{Name: name, Version: version, Weight: uint32(n)}, nil
}

func experimentState(c *clientFlags, verb, state string) *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: verb + " NAME", Short: "Set the experiment " + state, Args: exactArgs("NAME")}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		e, err := cl.admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: args[0], State: state, Reason: reason, Actor: c.actor})
		if err != nil {
			return err
		}
		return cl.printExperiments(&pb.ListExperimentsResponse{Experiments: []*pb.Experiment{e}})
	})
	return cmd
}

func (c *client) printExperiments(r *pb.ListExperimentsResponse) error {
	return c.out.message(r, func(w io.Writer) {
		fmt.Fprintln(w, "EXPERIMENT\tMODEL\tSTATE\tARMS\tREASON")
		for _, e := range r.Experiments {
			var arms []string
			for _, a := range e.Arms {
				arms = append(arms, fmt.Sprintf("%s=%s:%d", a.Name, a.Version, a.Weight))
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", e.Name, e.Model, e.State, strings.Join(arms, " "), e.Reason)
		}
	})
}

func experimentPlan(c *clientFlags) *cobra.Command {
	var p pb.ExperimentPlan
	var metrics, guardrails []string
	var minDuration, maxDuration time.Duration
	var reason string
	cmd := &cobra.Command{Use: "plan NAME", Short: "Freeze the rule the experiment will be judged by", Args: exactArgs("NAME")}
	f := cmd.Flags()
	f.StringSliceVar(&metrics, "metric", nil, "error_rate, success_rate, response_time or failed_units, or name:kind for one that outcomes bring, kind ratio, mean or proportion, :lower after it if less is better; the first decides; repeatable")
	f.StringSliceVar(&guardrails, "guardrail", nil, "metric=margin: stop if an arm is proved worse by more than margin (0.02 is 2 %); repeatable")
	f.StringVar(&p.Control, "control", "", "arm that is compared with (default \"control\", else the first)")
	f.StringVar(&p.Method, "method", "", "cs: look at any time; obf: group sequential; fixed: one look (default cs)")
	f.Float64Var(&p.Baseline, "baseline", 0, "the control's rate, for rates")
	f.Float64Var(&p.Sd, "sd", 0, "standard deviation of a unit's outcome, for response_time")
	f.Float64Var(&p.Mde, "mde", 0, "least difference worth finding, treatment minus control")
	f.Float64Var(&p.Alpha, "alpha", 0, "accepted probability of a false winner (default 0.05)")
	f.Float64Var(&p.Power, "power", 0, "probability of finding the mde (default 0.8)")
	f.Uint32Var(&p.Looks, "looks", 0, "looks of obf (default 5)")
	f.Uint64Var(&p.MinUnits, "min-units", 0, "least units per arm (default 150)")
	f.DurationVar(&minDuration, "min-duration", 0, "no conclusion before (default 24h)")
	f.DurationVar(&maxDuration, "max-duration", 0, "give up then and keep the control (default 28 days)")
	f.BoolVar(&p.KeepChampion, "keep-champion", false, "conclude without promoting the winner")
	f.StringVar(&reason, "reason", "", "why, for the audit")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		p.Metrics, p.Guardrails = nil, nil
		for _, m := range metrics {
			metric, err := parseMetric(m)
			if err != nil {
				return err
			}
			p.Metrics = append(p.Metrics, metric)
		}
		for _, g := range guardrails {
			name, margin, ok := strings.Cut(g, "=")
			v, err := strconv.ParseFloat(margin, 64)
			if !ok || err != nil {
				return usageError{fmt.Errorf("--guardrail %q is not metric=margin", g)}
			}
			metric, err := parseMetric(name)
			if err != nil {
				return err
			}
			metric.Margin = v
			p.Guardrails = append(p.Guardrails, metric)
		}
		if minDuration != 0 {
			p.MinDuration = durationPB(minDuration)
		}
		if maxDuration != 0 {
			p.MaxDuration = durationPB(maxDuration)
		}
		e, err := cl.admin.PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: args[0], Plan: &p, Reason: reason, Actor: c.actor})
		if err != nil {
			return err
		}
		return cl.out.message(e, func(w io.Writer) {
			fmt.Fprintf(w, "%s %s: %s decides by %s, mde %v, alpha %v, power %v, %d units per arm, %v to %v\n", e.Name, e.State, e.Plan.Metrics[0].Name,
				e.Plan.Method, e.Plan.Mde, e.Plan.Alpha, e.Plan.Power, e.Plan.UnitsPerArm, e.Plan.MinDuration.AsDuration(), e.Plan.MaxDuration.AsDuration())
		})
	})
	return cmd
}

func experimentResults(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "results NAME", Short: "Print what has been proved, with every number in --output json", Args: exactArgs("NAME"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			r, err := cl.admin.ExperimentResults(ctx, &pb.NameRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return cl.out.message(r, func(w io.Writer) {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.Experiment.Name, r.Experiment.State, r.Experiment.Outcome, r.Experiment.Reason)
				f := r.GetResults().GetFields()
				for _, a := range f["arms"].GetListValue().GetValues() {
					arm := a.GetStructValue().GetFields()
					fmt.Fprintf(w, "arm %s\t%.0f units\t%.6g\t\n", arm["name"].GetStringValue(), arm["units"].GetNumberValue(), arm["value"].GetNumberValue())
				}
				for _, reason := range f["decision"].GetStructValue().GetFields()["reasons"].GetListValue().GetValues() {
					fmt.Fprintf(w, "%s\n", reason.GetStringValue())
				}
			})
		})}
}

// parseMetric reads name, name:kind or name:kind:lower.
func parseMetric(s string) (*pb.ExperimentMetric, error) {
	parts := strings.Split(s, ":")
	if len(parts) > 3 || len(parts) == 3 && parts[2] != "lower" {
		return nil, usageError{fmt.Errorf("metric %q is not name, name:kind or name:kind:lower", s)}
	}
	m := &pb.ExperimentMetric{Name: parts[0], LowerIsBetter: len(parts) == 3}
	if len(parts) > 1 {
		m.Kind = parts[1]
	}
	return m, nil
}

func experimentRecord(c *clientFlags) *cobra.Command {
	var id string
	cmd := &cobra.Command{Use: "record NAME UNIT METRIC VALUE", Short: "Record an outcome of a unit that was exposed", Args: exactArgs("NAME", "UNIT", "METRIC", "VALUE")}
	cmd.Flags().StringVar(&id, "id", "", "a second outcome of the unit and metric with the same id does not count")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		v, err := strconv.ParseFloat(args[3], 64)
		if err != nil {
			return usageError{fmt.Errorf("VALUE %q is no number", args[3])}
		}
		return cl.record(ctx, &pb.OutcomeRecord{Experiment: args[0], Unit: args[1], Metric: args[2], Value: v, Id: id})
	})
	return cmd
}

// record sends one outcome and prints what became of it.
func (c *client) record(ctx context.Context, o *pb.OutcomeRecord) error {
	r, err := pb.NewOutcomesClient(c.conn).Record(ctx, &pb.RecordOutcomesRequest{Outcomes: []*pb.OutcomeRecord{o}})
	if err != nil {
		return err
	}
	for _, e := range r.Errors {
		return fmt.Errorf("%s (%s)", e.Message, e.Kind)
	}
	return c.out.message(r, func(w io.Writer) { fmt.Fprintf(w, "counted %d, known before %d\n", r.Counted, r.Repeated) })
}

// readExperiment fills a request from the experiment of that name in a deployment plan.
// The plan knows groups; which version serves one is said on the command line.
func readExperiment(req *pb.CreateExperimentRequest, file string, arms []string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return configError{err}
	}
	plan, err := seedconfig.Parse(file, text)
	if err != nil {
		return configError{err}
	}
	i := slices.IndexFunc(plan.Experiments, func(e seedconfig.Experiment) bool { return e.Name == req.Name })
	if i < 0 {
		return configError{outrigger.Errorf(outrigger.NotFound, "experiment %q not found in %s, which has %d", req.Name, file, len(plan.Experiments))}
	}
	e := plan.Experiments[i]
	if !e.Enabled {
		return configError{outrigger.Errorf(outrigger.Locked, "experiment %q in %s has enabled: false", e.Name, file)}
	}
	versions := map[string]string{}
	for _, a := range arms {
		name, version, ok := strings.Cut(a, "=")
		if !ok || !slices.ContainsFunc(e.Groups, func(g seedconfig.Group) bool { return g.Name == name }) {
			return usageError{fmt.Errorf("--arm %q is not group=version with a group of %s", a, file)}
		}
		versions[name] = version
	}
	weights := groupWeights(e.Groups)
	for i, g := range e.Groups {
		if versions[g.Name] == "" {
			return usageError{fmt.Errorf("group %q of %s has no version; give --arm %s=VERSION", g.Name, file, g.Name)}
		}
		req.Arms = append(req.Arms, &pb.ExperimentArm{Name: g.Name, Version: versions[g.Name], Weight: weights[i], Configuration: g.Configuration})
	}
	groups := uint64(len(e.Groups))
	req.Plan = &pb.ExperimentPlan{MinUnits: (e.MinimumSampleSize + groups - 1) / groups}
	if e.Duration > 0 {
		req.Plan.MaxDuration = durationPB(e.Duration)
	}
	for _, m := range e.SuccessMetrics {
		req.Plan.Metrics = append(req.Plan.Metrics, &pb.ExperimentMetric{Name: m})
	}
	return nil
}

// groupWeights scales weights to parts of 10 000; what rounding leaves goes to the last
// group that has any.
func groupWeights(groups []seedconfig.Group) []uint32 {
	var sum uint64
	last := 0
	for i, g := range groups {
		sum += uint64(g.Weight)
		if g.Weight > 0 {
			last = i
		}
	}
	out, left := make([]uint32, len(groups)), uint32(experiments.Buckets)
	for i, g := range groups {
		out[i] = uint32(uint64(g.Weight) * experiments.Buckets / sum)
		left -= out[i]
	}
	out[last] += left
	return out
}
