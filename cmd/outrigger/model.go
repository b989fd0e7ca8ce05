//go:build !dataplane

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

func durationPB(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

func modelCommand(g *globals) *cobra.Command {
	cmd := group("model", "Register model versions and move aliases")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(modelRegister(c), modelAlias(c), modelState(c), modelVersions(c), modelServedAt(c), modelUnalias(c), modelConfigure(c), modelMetrics(c), modelScore(c), modelArtifact(c),
		&cobra.Command{Use: "list", Short: "List models with their versions", Args: exactArgs(),
			RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
				r, err := cl.admin.ListModels(ctx, &pb.ListRequestAll{})
				if err != nil {
					return err
				}
				return cl.out.message(r, func(w io.Writer) { printModels(w, r.Models) })
			})},
		&cobra.Command{Use: "show MODEL", Short: "Print one model", Args: exactArgs("MODEL"),
			RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
				m, err := cl.admin.GetModel(ctx, &pb.NameRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return cl.printModel(m)
			})})
	return cmd
}

func (c *client) printModel(m *pb.Model) error {
	return c.out.message(m, func(w io.Writer) { printModels(w, []*pb.Model{m}) })
}

func printModels(w io.Writer, models []*pb.Model) {
	fmt.Fprintln(w, "MODEL\tVERSION\tSTATE\tSHARE\tREQUESTS\tFAILURES\tP50 MS\tP99 MS\tALIASES")
	for _, m := range models {
		share := map[string]uint32{}
		for _, a := range m.Arms {
			share[a.Version] += a.Weight
		}
		for _, v := range m.Versions {
			var aliases []string
			for _, a := range slices.Sorted(maps.Keys(m.Aliases)) {
				if m.Aliases[a] == v.Version {
					aliases = append(aliases, a)
				}
			}
			s := v.GetStats()
			fmt.Fprintf(w, "%s\t%s\t%s\t%.2f%%\t%d\t%d\t%.1f\t%.1f\t%s\n", m.Name, v.Version, v.State, float64(share[v.Version])/100,
				s.GetRequests(), s.GetFailures(), s.GetP50Ms(), s.GetP99Ms(), strings.Join(aliases, ","))
		}
	}
}

func modelRegister(c *clientFlags) *cobra.Command {
	var endpoints []string
	var upstream, region, artifact, digest string
	var parameters map[string]string
	var pins map[string]string
	var parents []string
	var secure tlsFlags
	cmd := &cobra.Command{Use: "register MODEL VERSION", Short: "Register an immutable model version", Args: exactArgs("MODEL", "VERSION")}
	f := cmd.Flags()
	f.StringSliceVar(&endpoints, "endpoint", nil, "host:port that serves it, optionally host:port@region; repeatable. https://host[:port] is --tls with port 443")
	f.StringVar(&upstream, "upstream-model", "", "model name the endpoint knows (default: MODEL)")
	f.StringVar(&region, "region", "", "region of endpoints that name none")
	f.StringToStringVar(&parameters, "parameter", nil, "NAME=VALUE it is called with; repeatable")
	f.StringToStringVar(&pins, "pin", nil, "SESSION/NAME=VERSION of a variable it uses; repeatable")
	f.StringSliceVar(&parents, "parent", nil, "VERSION or MODEL@VERSION it was made from; repeatable")
	f.StringVar(&artifact, "artifact", "", "sha256:… of its weights or files")
	secure.bind(f)
	f.StringVar(&digest, "digest", "", "refuse unless the content has this digest")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req := &pb.RegisterModelVersionRequest{Model: args[0], Version: args[1], UpstreamModel: upstream, Actor: c.actor,
			Parameters: parameters, Parents: parents, Artifact: artifact, Digest: digest, Pins: map[string]int32{}}
		for name, at := range pins {
			n, err := strconv.ParseInt(at, 10, 32)
			if err != nil {
				return usageError{fmt.Errorf("--pin %s=%s: the version is not a number", name, at)}
			}
			req.Pins[name] = int32(n)
		}
		for _, e := range endpoints {
			addr, reg, ok := strings.Cut(e, "@")
			if !ok {
				reg = region
			}
			if addr, err := secure.address(addr); err != nil {
				return usageError{err}
			} else {
				req.Endpoints = append(req.Endpoints, &pb.Endpoint{Address: addr, Region: reg, Weight: 1})
			}
		}
		var err error
		if req.Tls, err = secure.message(len(endpoints)); err != nil {
			return usageError{err}
		}
		m, err := cl.admin.RegisterModelVersion(ctx, req)
		if err != nil {
			return err
		}
		return cl.printModel(m)
	})
	return cmd
}

func modelAlias(c *clientFlags) *cobra.Command {
	var expected string
	cmd := &cobra.Command{Use: "alias MODEL ALIAS VERSION", Short: "Point an alias (champion, challenger, last_good) at a version",
		Args: exactArgs("MODEL", "ALIAS", "VERSION")}
	cmd.Flags().StringVar(&expected, "expected", "", "refuse unless the alias points here now")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		req := &pb.MoveAliasRequest{Model: args[0], Alias: args[1], To: args[2], Actor: c.actor}
		if expected != "" {
			req.Expected = &expected
		}
		m, err := cl.admin.MoveAlias(ctx, req)
		if err != nil {
			return err
		}
		return cl.printModel(m)
	})
	return cmd
}

func modelState(c *clientFlags) *cobra.Command {
	var reason string
	var mirror float64
	cmd := &cobra.Command{Use: "state MODEL VERSION STATE", Short: "Set a version's state: registered, validated, shadow, production, quarantined, retired",
		Args: exactArgs("MODEL", "VERSION", "STATE")}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit")
	cmd.Flags().Float64Var(&mirror, "mirror", 0, "percent of the units whose requests a shadow gets copies of, in steps of 0.01; only for models whose requests may be made twice")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		if !(mirror >= 0 && mirror <= 100) {
			return usageError{fmt.Errorf("--mirror is %v; give 0 to 100", mirror)}
		}
		m, err := cl.admin.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: args[0], Version: args[1], State: args[2], Reason: reason, Actor: c.actor,
			ShadowWeight: uint32(math.Round(mirror * 100))})
		if err != nil {
			return err
		}
		return cl.printModel(m)
	})
	return cmd
}

// timestamp converts; the zero time becomes unset.
func timestamp(t time.Time) *timestamppb.Timestamp { return wire.TimePB(t) }
