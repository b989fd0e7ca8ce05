//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

func varCommand(g *globals) *cobra.Command {
	cmd := group("var", "Read and write variables")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(varGet(c), varSet(c), varRegister(c), varList(c), varDelete(c), varHistory(c), varRollback(c), varWatch(c),
		varOptimization(c), varDependency(c))
	return cmd
}

func varGet(c *clientFlags) *cobra.Command {
	var via, consistency string
	var explain bool
	cmd := &cobra.Command{Use: "get SESSION/NAME", Short: "Print one variable", Args: exactArgs("SESSION/NAME")}
	cmd.Flags().StringVar(&via, "via", "", "read through a sidecar: http://host:port, host:port or unix:path, instead of --server")
	cmd.Flags().StringVar(&consistency, "consistency", "", "strong, session, bounded(500ms) or eventual; empty = the variable's own")
	cmd.Flags().BoolVar(&explain, "explain", false, "say which tier answered and why; needs --via")
	get := func(ctx context.Context, cl *client, args []string) error {
		session, name, err := cl.splitKey(args[0])
		if err != nil {
			return err
		}
		if consistency != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderConsistency, consistency)
		}
		if explain {
			ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderExplain, "true")
		}
		var head metadata.MD
		v, err := cl.Get(ctx, &pb.GetRequest{Tenant: c.tenant, Session: session, Identifier: name}, grpc.Header(&head))
		switch missing := outrigger.IsKind(status.FromGRPC(err, nil), outrigger.NotFound); {
		case err != nil && !(explain && missing): // that there is none can be explained, too
			return err
		case !explain:
			return cl.printVariable(v)
		}
		why, herr := explained(head.Get(outrigger.HeaderExplain))
		if herr != nil {
			return herr
		}
		if cl.out.json {
			return errors.Join(err, json.NewEncoder(cl.out.w).Encode(map[string]any{"explain": why, "version": v.GetVersion().GetCounter(), "value": json.RawMessage(cmp.Or(string(v.GetValue().GetJson()), "null"))}))
		}
		if err == nil {
			err = cl.printVariable(v)
		}
		fmt.Fprintln(cl.out.w, why)
		return err
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if via != "" {
			target, err := sidecarTarget(via)
			if err != nil {
				return err
			}
			c.via = target
		} else if explain {
			return usageError{errors.New("--explain needs the address of a sidecar; give it with --via")}
		}
		return c.verb(false, get)(cmd, args)
	}
	return cmd
}

func (c *client) printVariable(v *pb.Variable) error {
	return c.out.message(v, func(w io.Writer) {
		fmt.Fprintf(w, "%s\t%s\tversion %d\t%s\n", v.Key.Name, v.Value.Type, v.Version.GetCounter(), v.Value.Json)
	})
}

// jsonOrText lets a person write text without quotes: what is not JSON is a string.
func jsonOrText(s string) []byte {
	if json.Valid([]byte(s)) {
		return []byte(s)
	}
	out, _ := json.Marshal(s) // a string always marshals
	return out
}

func varSet(c *clientFlags) *cobra.Command {
	var expected int32
	var md map[string]string
	var optimization string
	cmd := &cobra.Command{Use: "set SESSION/NAME VALUE", Short: "Set a variable (VALUE is JSON; anything else is taken as text)",
		Args: exactArgs("SESSION/NAME", "VALUE")}
	cmd.Flags().Int32Var(&expected, "expected-version", -1, "refuse unless the variable is at this version")
	cmd.Flags().StringToStringVar(&md, "metadata", nil, "key=value, merged into what the variable has")
	cmd.Flags().StringVar(&optimization, "optimization", "", "id of the optimisation lock that the writer holds")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		session, name, err := cl.splitKey(args[0])
		if err != nil {
			return err
		}
		req := &pb.SetRequest{Tenant: c.tenant, Session: session, Identifier: name, Value: &pb.Value{Json: jsonOrText(args[1])}, Metadata: md, Options: holding(cl.options(), optimization)}
		if expected >= 0 {
			req.ExpectedVersion = &expected
		}
		v, err := cl.Set(ctx, req)
		if err != nil {
			return err
		}
		return cl.printVariable(v)
	})
	return cmd
}

func varRegister(c *clientFlags) *cobra.Command {
	var constraints string
	var md map[string]string
	cmd := &cobra.Command{Use: "register SESSION/NAME TYPE VALUE", Short: "Declare a variable with its type, first value and constraints",
		Args: exactArgs("SESSION/NAME", "TYPE", "VALUE")}
	cmd.Flags().StringVar(&constraints, "constraints", "", `JSON, e.g. {"min":0,"max":2}`)
	cmd.Flags().StringToStringVar(&md, "metadata", nil, "key=value; consistency=strong, session, bounded(500ms) or eventual says how it is read by default")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		session, name, err := cl.splitKey(args[0])
		if err != nil {
			return err
		}
		opts := cl.options()
		opts.AutoCreateSession = true
		v, err := cl.Register(ctx, &pb.RegisterRequest{
			Key:   &pb.Key{Tenant: c.tenant, Session: session, Name: name},
			Value: &pb.Value{Type: args[1], Json: jsonOrText(args[2])}, ConstraintsJson: constraints, Metadata: md, Options: opts})
		if err != nil {
			return err
		}
		return cl.printVariable(v)
	})
	return cmd
}

func varList(c *clientFlags) *cobra.Command {
	var pattern string
	cmd := &cobra.Command{Use: "list SESSION", Short: "List a session's variables", Args: exactArgs("SESSION")}
	cmd.Flags().StringVar(&pattern, "match", "", `names to list; "*" matches any run of characters`)
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		r, err := cl.List(ctx, &pb.ListRequest{Tenant: c.tenant, Session: args[0], Pattern: pattern})
		if err != nil {
			return err
		}
		return cl.out.message(r, func(w io.Writer) {
			fmt.Fprintln(w, "NAME\tTYPE\tVERSION\tVALUE")
			for _, v := range r.Variables {
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", v.Key.Name, v.Value.Type, v.Version.GetCounter(), v.Value.Json)
			}
		})
	})
	return cmd
}

func varDelete(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "delete SESSION/NAME", Short: "Delete a variable", Args: exactArgs("SESSION/NAME"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			session, name, err := cl.splitKey(args[0])
			if err != nil {
				return err
			}
			r, err := cl.Delete(ctx, &pb.GetRequest{Tenant: c.tenant, Session: session, Identifier: name, Options: cl.options()})
			if err != nil {
				return err
			}
			return cl.out.message(r, func(w io.Writer) { fmt.Fprintf(w, "deleted %s\n", name) })
		})}
}

func varHistory(c *clientFlags) *cobra.Command {
	var limit int32
	cmd := &cobra.Command{Use: "history SESSION/NAME", Short: "Print earlier versions, newest first", Args: exactArgs("SESSION/NAME")}
	cmd.Flags().Int32Var(&limit, "limit", 50, "how many, 1 to 1000")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		session, name, err := cl.splitKey(args[0])
		if err != nil {
			return err
		}
		r, err := cl.History(ctx, &pb.HistoryRequest{Tenant: c.tenant, Session: session, Identifier: name, Limit: limit})
		if err != nil {
			return err
		}
		return cl.out.message(r, func(w io.Writer) {
			fmt.Fprintln(w, "VERSION\tAT\tACTOR\tVALUE")
			for _, e := range r.Entries {
				value := string(e.Value.GetJson())
				if e.Deleted {
					value = "(deleted)"
				}
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", e.Version.GetCounter(), e.At.AsTime().Format(time.RFC3339), e.Actor, value)
			}
		})
	})
	return cmd
}

func varRollback(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "rollback SESSION/NAME VERSION", Short: "Write an earlier version's value as a new version",
		Args: exactArgs("SESSION/NAME", "VERSION"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			session, name, err := cl.splitKey(args[0])
			if err != nil {
				return err
			}
			n, err := strconv.ParseInt(args[1], 10, 32)
			if err != nil {
				return usageError{fmt.Errorf("VERSION is %q; give a number", args[1])}
			}
			v, err := cl.Rollback(ctx, &pb.RollbackRequest{Tenant: c.tenant, Session: session, Identifier: name, TargetVersion: int32(n), Options: cl.options()})
			if err != nil {
				return err
			}
			return cl.printVariable(v)
		})}
}

func varWatch(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "watch SESSION [NAME...]", Short: "Print present values, then every change, until interrupted",
		Args: cobra.MinimumNArgs(1),
		RunE: c.verb(true, func(ctx context.Context, cl *client, args []string) error {
			stream, err := cl.Watch(ctx, &pb.WatchRequest{Tenant: c.tenant, Session: args[0], Identifiers: args[1:], IncludeInitial: true})
			if err != nil {
				return err
			}
			for {
				ev, err := stream.Recv()
				if err == io.EOF || ctx.Err() != nil {
					return nil // interrupted: the normal end of a watch
				}
				if err != nil {
					return err
				}
				if ev.Type == pb.WatchEvent_HEARTBEAT && !cl.out.json {
					continue
				}
				err = cl.out.message(ev, func(w io.Writer) {
					fmt.Fprintf(w, "%s\t%s\tversion %d\t%s\n", ev.Type, ev.Variable.GetKey().GetName(), ev.Variable.GetVersion().GetCounter(), ev.Variable.GetValue().GetJson())
				})
				if err != nil {
					return err
				}
			}
		})}
}

func sessionCommand(g *globals) *cobra.Command {
	cmd := group("session", "Create, inspect and end sessions")
	c := addClientFlags(cmd, g)
	cmd.AddCommand(
		sessionCreate(c),
		&cobra.Command{Use: "get SESSION", Short: "Print one session", Args: exactArgs("SESSION"),
			RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
				s, err := cl.GetSession(ctx, &pb.GetSessionRequest{Tenant: c.tenant, Id: args[0]})
				if err != nil {
					return err
				}
				return cl.printSession(s)
			})},
		&cobra.Command{Use: "list", Short: "List sessions", Args: exactArgs(),
			RunE: c.verb(false, func(ctx context.Context, cl *client, _ []string) error {
				r, err := cl.ListSessions(ctx, &pb.ListSessionsRequest{Tenant: c.tenant})
				if err != nil {
					return err
				}
				return cl.printSessions(r)
			})},
		&cobra.Command{Use: "delete SESSION", Short: "End a session and remove its variables", Args: exactArgs("SESSION"),
			RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
				r, err := cl.DeleteSession(ctx, &pb.GetSessionRequest{Tenant: c.tenant, Id: args[0]})
				if err != nil {
					return err
				}
				return cl.out.message(r, func(w io.Writer) { fmt.Fprintf(w, "removed %d variables\n", r.VariablesRemoved) })
			})})
	return cmd
}

func sessionCreate(c *clientFlags) *cobra.Command {
	var ttl time.Duration
	cmd := &cobra.Command{Use: "create SESSION", Short: "Create a session", Args: exactArgs("SESSION")}
	cmd.Flags().DurationVar(&ttl, "ttl", outrigger.DefaultSessionTTL, "how long it lives unused")
	cmd.RunE = c.verb(false, func(ctx context.Context, cl *client, args []string) error {
		s, err := cl.CreateSession(ctx, &pb.CreateSessionRequest{Tenant: c.tenant, Id: args[0], Ttl: durationPB(ttl)})
		if err != nil {
			return err
		}
		return cl.printSession(s)
	})
	return cmd
}

func (c *client) printSessions(r *pb.ListSessionsResponse) error {
	return c.out.message(r, func(w io.Writer) { sessionTable(w, r.Sessions...) })
}

func (c *client) printSession(s *pb.Session) error {
	return c.out.message(s, func(w io.Writer) { sessionTable(w, s) })
}

func sessionTable(w io.Writer, sessions ...*pb.Session) {
	fmt.Fprintln(w, "SESSION\tVARIABLES\tTTL\tLAST USED")
	for _, s := range sessions {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", s.Id, s.VariableCount, s.Ttl.AsDuration(), s.LastUsedAt.AsTime().Format(time.RFC3339))
	}
}
