//go:build !dataplane

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
)

const adminFlagUsage = "the sidecar's admin socket (its --admin), unix:path"

// adminPage asks a sidecar over its admin socket and returns the answer's body, which the
// caller closes. Errors have kind Unavailable if nobody answers, Invalid if the answer is no.
func adminPage(ctx context.Context, admin, method, page string, body []byte) (io.ReadCloser, error) {
	path, ok := strings.CutPrefix(admin, "unix:")
	if !ok || path == "" {
		return nil, usageError{fmt.Errorf("--admin is %q; give the sidecar's, unix:path", admin)}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://sidecar"+page, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "no sidecar answers at "+path)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return nil, err
	}
	var said struct{ Error struct{ Message string } }
	if json.Unmarshal(raw, &said) != nil || said.Error.Message == "" {
		said.Error.Message = strings.TrimSpace(string(raw)) // an older sidecar, or not one
	}
	return nil, outrigger.Errorf(outrigger.Invalid, "the sidecar at %s answers %s: %s", path, resp.Status, said.Error.Message)
}

func tapCommand(g *globals) *cobra.Command {
	var admin string
	var limit int
	var atLeast time.Duration
	filter := map[string]*string{}
	cmd := &cobra.Command{Use: "tap", Short: "Watch the model calls of a sidecar as they end", Args: exactArgs(),
		Long: `Tap prints one line for every model call that ends at the sidecar, as long as it runs:
where it went, by which arm, and what came of it. It never shows what was said, header
fields or who asked (the unit is a salted hash; --user finds one user's calls). Calls never
wait for a tap: one that does not keep up misses some and is told how many, on standard
error. While nobody taps, a call pays one atomic load.`}
	f := cmd.Flags()
	f.StringVar(&admin, "admin", "", adminFlagUsage)
	f.IntVar(&limit, "limit", 0, "end after that many calls; 0 = never")
	f.DurationVar(&atLeast, "at-least", 0, "only calls that took this long")
	for name, usage := range map[string]string{"model": "only this model", "version": "only this version", "arm": "only this arm", "region": "only calls answered in this region",
		"user": "only calls of this unit (user, or what the model's rule says)", "outcome": "only these: ok, failed, cancelled or refused"} {
		filter[name] = f.String(name, "", usage)
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		q := url.Values{}
		for name, v := range filter {
			if *v != "" {
				q.Set(name, *v)
			}
		}
		if atLeast > 0 {
			q.Set("at_least", atLeast.String())
		}
		body, err := adminPage(cmd.Context(), admin, http.MethodGet, "/tap?"+q.Encode(), nil)
		if err != nil {
			return err
		}
		defer body.Close()
		return printTap(cmd, g.output == "json", body, limit)
	}
	return cmd
}

// printTap prints lines until there are limit, the sidecar ends, or the person does.
func printTap(cmd *cobra.Command, asJSON bool, body io.Reader, limit int) error {
	sc := bufio.NewScanner(body)
	w := cmd.OutOrStdout()
	if !asJSON {
		fmt.Fprintln(w, tapColumns)
	}
	for n := 0; sc.Scan(); {
		var l proxy.TapLine
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return outrigger.Wrap(outrigger.Internal, err, "a line of the sidecar's tap")
		}
		if l.Tapped == nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "outrigger: %d calls were missed\n", l.Missed)
			continue
		}
		if asJSON {
			fmt.Fprintf(w, "%s\n", sc.Bytes())
		} else {
			fmt.Fprintln(w, tapText(l.Tapped))
		}
		if n++; n == limit {
			return nil
		}
	}
	if err := sc.Err(); err != nil && cmd.Context().Err() == nil {
		return outrigger.Wrap(outrigger.Unavailable, err, "the sidecar's tap")
	}
	return nil
}

const tapColumns = "TIME          OUTCOME    MODEL@VERSION        ARM            REGION    BUCKET       MS  TRIES  TOKENS      UNIT      NOTE"

func tapText(c *inference.Tapped) string {
	bucket, unit := "-", "-"
	if c.Bucket >= 0 {
		bucket, unit = fmt.Sprint(c.Bucket), fmt.Sprintf("%08x", c.Unit)
	}
	var notes []string
	for _, n := range []string{c.Tag, c.Cache} {
		if n != "" {
			notes = append(notes, n)
		}
	}
	if c.Stream {
		notes = append(notes, fmt.Sprintf("stream, first content after %.0f ms", c.TTFTMS))
	}
	if c.Policy != "live" {
		notes = append(notes, "policy "+c.Policy)
	}
	return fmt.Sprintf("%s  %-9s  %-19s  %-13s  %-8s  %6s  %7.1f  %5d  %-10s  %-8s  %s", c.At.Local().Format("15:04:05.000"), c.Outcome, cmp.Or(c.Model, "-")+"@"+cmp.Or(c.Version, "-"),
		cmp.Or(c.Arm, "-"), cmp.Or(c.Region, "-"), bucket, c.LatencyMS, c.Attempts, fmt.Sprintf("%d+%d", c.TokensIn, c.TokensOut), unit, strings.Join(notes, ", "))
}

func explainCommand(g *globals) *cobra.Command {
	cmd := group("explain", "Ask a sidecar what it would do, and why")
	cmd.AddCommand(explainRequest(g))
	return cmd
}

func explainRequest(g *globals) *cobra.Command {
	var admin, user, body string
	q := proxy.Question{Path: "/v1/chat/completions"}
	cmd := &cobra.Command{Use: "request [MODEL]", Short: "Where a model call would go: route, arm, version, region, breakers, and why", Args: optionalArg("MODEL"),
		Long: `Request makes the sidecar decide about a call by the code that serves calls, up to the
point where it would send it. Nothing is sent, counted or changed. The call is a chat
completion for MODEL by --user, or whatever --path, --header and --body say (@FILE reads a
file, @- standard input).
Exit code 1 if the call would be refused.`}
	f := cmd.Flags()
	f.StringVar(&admin, "admin", "", adminFlagUsage)
	f.StringVar(&user, "user", "", "who calls: what is randomised")
	f.StringVar(&q.Path, "path", q.Path, "path of the call")
	f.StringVar(&q.Method, "method", "POST", "method of the call")
	f.StringToStringVar(&q.Headers, "header", nil, "name=value, repeatable")
	f.StringVar(&body, "body", "", "body of the call, JSON or @FILE (default made of MODEL and --user)")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		switch {
		case body == "" && len(args) == 0:
			return usageError{errors.New("explain request needs a MODEL or a --body")}
		case body != "" && (len(args) > 0 || user != ""):
			return usageError{errors.New("a --body names its model and user itself; leave out MODEL and --user")}
		case body == "":
			q.Body, err = json.Marshal(map[string]any{"model": args[0], "user": user, "messages": []any{}})
		default:
			q.Body, err = questionBody(cmd, body)
		}
		if err != nil {
			return err
		}
		raw, err := json.Marshal(q)
		if err != nil {
			return usageError{fmt.Errorf("--body is not JSON: %w", err)}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
		defer cancel()
		answer, err := adminPage(ctx, admin, http.MethodPost, "/explain", raw)
		if err != nil {
			return err
		}
		defer answer.Close()
		var e inference.Explanation
		if err := json.NewDecoder(answer).Decode(&e); err != nil {
			return outrigger.Wrap(outrigger.Internal, err, "the sidecar's explanation")
		}
		if err := printExplanation(cmd.OutOrStdout(), g.output == "json", &e); err != nil {
			return err
		}
		if e.Refused != "" {
			return answerError{}
		}
		return nil
	}
	return cmd
}

func questionBody(cmd *cobra.Command, body string) ([]byte, error) {
	file, ok := strings.CutPrefix(body, "@")
	if !ok {
		return []byte(body), nil
	}
	if file == "-" {
		return io.ReadAll(cmd.InOrStdin())
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, usageError{fmt.Errorf("--body: %w", err)}
	}
	return raw, nil
}

func printExplanation(w io.Writer, asJSON bool, e *inference.Explanation) error {
	if asJSON {
		return json.NewEncoder(w).Encode(e)
	}
	switch {
	case e.Refused != "":
		fmt.Fprintf(w, "refused: %d %s\n", e.Status, e.Refused)
	case e.Passed:
		fmt.Fprintln(w, "passed on")
	default:
		fmt.Fprintf(w, "%s@%s, arm %s, %s in %s\n", e.Model, e.Version, e.Arm, e.Endpoint, e.Region)
	}
	for _, why := range e.Why {
		fmt.Fprintf(w, "  %s\n", why)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if len(e.Arms) > 0 {
		fmt.Fprintln(tw, "\nARM\tVERSION\tSHARE\t")
		for _, a := range e.Arms {
			out := ""
			if a.Out {
				out = "may not serve"
			}
			fmt.Fprintf(tw, "%s\t%s\t%.2f%%\t%s\n", a.Name, a.Version, float64(a.Buckets)/100, out)
		}
	}
	if len(e.Endpoints) > 0 {
		fmt.Fprintln(tw, "\nENDPOINT\tREGION\tBREAKER\tIN FLIGHT\tLATENCY\tEJECTED")
		for _, x := range e.Endpoints {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%.1f ms\t%v\n", x.Address, x.Region, x.Breaker, x.InFlight, x.LatencyMS, x.Ejected)
		}
	}
	return tw.Flush()
}
