package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/config"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// clientFlags say which control plane an operator's verb talks to and as whom.
type clientFlags struct {
	g         *globals
	server    string
	tokenFile string
	tenant    string
	actor     string
	timeout   time.Duration
	wait      time.Duration
	via       string // what a verb dials instead of server; "" = server
	tls       dialTLS
}

func (c *clientFlags) target() string { return cmp.Or(c.via, c.server) }

// addClientFlags gives a group of verbs its connection flags; they can also come from
// the "client" section of the file and OUTRIGGER_CLIENT_*.
func addClientFlags(cmd *cobra.Command, g *globals) *clientFlags {
	c := &clientFlags{g: g}
	f := cmd.PersistentFlags()
	f.StringVar(&c.server, "server", "127.0.0.1:7400", "control plane or node agent, host:port or unix:path")
	c.tls.bind(f)
	f.StringVar(&c.tokenFile, "token-file", "", "file holding the operator's bearer token")
	f.StringVar(&c.tenant, "tenant", outrigger.DefaultTenant, "tenant")
	f.StringVar(&c.actor, "actor", actorDefault(g.environ), "who is acting, for the audit; with a token of a person it is that person")
	f.DurationVar(&c.timeout, "timeout", 10*time.Second, "limit for one call")
	f.DurationVar(&c.wait, "wait", 0, "keep trying for this long while the server is not reachable or not ready")
	return c
}

func actorDefault(environ []string) string {
	if u := lookupEnv(environ, "USER"); u != "" {
		return u
	}
	return "operator"
}

// client is one connection to the control plane.
type client struct {
	pb.VariablesClient
	admin pb.AdminClient
	flags *clientFlags
	out   printer
	conn  *grpc.ClientConn
}

// verb turns a function into a cobra RunE: it connects, applies the time limit, maps
// the error and disconnects. Watching verbs pass forever = true.
func (c *clientFlags) verb(forever bool, do func(ctx context.Context, cl *client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		cl, err := c.connect(cmd)
		if err != nil {
			return err
		}
		defer cl.conn.Close()
		ctx := cmd.Context()
		if !forever {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, c.timeout+c.wait)
			defer cancel()
		}
		if ctx, err = c.authorise(ctx); err != nil {
			return err
		}
		return explain(c.patiently(ctx, func() error { return do(ctx, cl, args) }), c.target())
	}
}

// patiently repeats a call that found nobody, for as long as --wait says. Only calls
// that were certainly not carried out are repeated.
func (c *clientFlags) patiently(ctx context.Context, call func() error) error {
	deadline := time.Now().Add(c.wait)
	for {
		err := call()
		if gstatus.Code(err) != codes.Unavailable || time.Now().After(deadline) {
			return err
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

func (c *clientFlags) connect(cmd *cobra.Command) (*client, error) {
	if err := c.g.configureClient(cmd); err != nil {
		return nil, err
	}
	if f := cmd.Flag("actor"); c.tokenFile != "" && f != nil && !f.Changed {
		c.actor = "" // who is acting is who the token says
	}
	creds, err := c.credentials()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(c.target(), grpc.WithTransportCredentials(creds))
	if err != nil {
		return nil, configError{fmt.Errorf("server %q: %w", c.target(), err)}
	}
	return &client{VariablesClient: pb.NewVariablesClient(conn), admin: pb.NewAdminClient(conn), flags: c, conn: conn,
		out: printer{json: c.g.output == "json", w: cmd.OutOrStdout()}}, nil
}

// credentials are TLS's if it is asked for. A sidecar (--via) is on this machine and speaks
// none.
func (c *clientFlags) credentials() (credentials.TransportCredentials, error) {
	tls, err := c.tls.open(identity.CredentialsOptions{})
	if err != nil {
		return nil, err
	}
	if c.via != "" || !secured(tls, c.target()) {
		return insecure.NewCredentials(), nil
	}
	return tls.Client(), nil
}

// configureClient applies the "client" section to the inherited connection flags only.
func (g *globals) configureClient(cmd *cobra.Command) error {
	parent := cmd
	for parent != nil && parent.PersistentFlags().Lookup("server") == nil {
		parent = parent.Parent()
	}
	if parent == nil {
		return nil
	}
	fs := parent.PersistentFlags()
	src := config.Source{Path: g.config, Environ: g.environ, Sections: sections}
	if err := src.Apply(fs, "client"); err != nil {
		return configError{err}
	}
	return nil
}

func (c *clientFlags) authorise(ctx context.Context) (context.Context, error) {
	if c.tokenFile == "" {
		return ctx, nil
	}
	raw, err := os.ReadFile(c.tokenFile)
	if err != nil {
		return nil, configError{fmt.Errorf("--token-file: %w", err)}
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+strings.TrimSpace(string(raw))), nil
}

// explain turns a gRPC error into one a person can act on.
func explain(err error, server string) error {
	err = status.FromGRPC(err, nil)
	switch text := fmt.Sprint(err); {
	case !outrigger.IsKind(err, outrigger.Unavailable):
		return err
	case strings.Contains(text, "remote error: tls:"):
		return outrigger.Errorf(outrigger.Unavailable, "%v (server %s does not accept the certificate in --control-cert: it must be signed by a CA of the server's --tls-client-ca and be valid now)", err, server)
	case strings.Contains(text, "authentication handshake failed"):
		return outrigger.Errorf(outrigger.Unavailable, "%v (server %s)", err, server)
	case strings.Contains(text, "server preface"):
		return outrigger.Errorf(outrigger.Unavailable, "%v (server %s; if it speaks TLS, give --control-ca)", err, server)
	default:
		return outrigger.Errorf(outrigger.Unavailable, "%v (server %s; is it running? choose another with --server)", err, server)
	}
}

func (c *client) options() *pb.WriteOptions {
	return &pb.WriteOptions{Actor: c.flags.actor, Source: "CLI"}
}

// printer writes results: protobuf JSON for programs, a table for people.
type printer struct {
	json bool
	w    io.Writer
}

// message prints m as JSON, or calls text for people.
func (p printer) message(m proto.Message, text func(w io.Writer)) error {
	if !p.json {
		tw := tabwriter.NewWriter(p.w, 0, 8, 2, ' ', 0)
		text(tw)
		return tw.Flush()
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: false}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its white space on purpose; compact it so that scripts can compare.
	var v json.RawMessage = raw
	out, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.w, string(out))
	return err
}

// splitKey reads "session/name" with the tenant from the flags.
func (c *client) splitKey(arg string) (session, name string, err error) {
	session, name, ok := strings.Cut(arg, "/")
	if !ok || session == "" || name == "" {
		return "", "", usageError{fmt.Errorf("%q is not SESSION/NAME", arg)}
	}
	return session, name, nil
}

// exactArgs is cobra.ExactArgs with our usage exit code.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usageError{fmt.Errorf("%s needs %d arguments (%s), got %d", cmd.CommandPath(), len(names), strings.Join(names, ", "), len(args))}
		}
		return nil
	}
}

// group is a command that only holds verbs.
func group(use, short string) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("%s has no verb %q; see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())}
			}
			return cmd.Help()
		}}
}
