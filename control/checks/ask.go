package checks

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// Bounds on answers: what is read of one, and what of it goes into the log.
const (
	maxAnswer = 64 << 10
	maxReason = 200
)

// question is what a check is told, in Flagger's form.
type question struct {
	Name      string            `json:"name"`
	Namespace string            `json:"namespace"`
	Phase     string            `json:"phase"`
	Checksum  string            `json:"checksum"`
	Metadata  map[string]string `json:"metadata"`
}

func questionOf(r *deploy.Rollout, c *pb.RolloutCheck) question {
	p := r.CurrentPhase()
	meta := map[string]string{"rollout": r.ID, "last_good": r.LastGood, "stage": cmp.Or(p.Stage, p.Name), "state": string(r.State),
		"weight": fmt.Sprint(r.CandidateWeight()), "hook": cmp.Or(c.GetHook(), deploy.HookRollout)}
	maps.Copy(meta, c.GetMetadata())
	return question{Name: r.Model, Namespace: cmp.Or(p.Environment, "production"), Phase: flaggerPhase(r.State), Checksum: r.Candidate, Metadata: meta}
}

// flaggerPhase is the state as Flagger calls it.
func flaggerPhase(s deploy.State) string {
	switch s {
	case deploy.Held:
		return "Waiting"
	case deploy.Completed:
		return "Succeeded"
	case deploy.RollingBack, deploy.RolledBack, deploy.Aborted, deploy.Draining:
		return "Failed"
	}
	return "Progressing"
}

// askOne asks one check within its timeout.
func (r *Runner) askOne(ctx context.Context, c *pb.RolloutCheck, q question) (deploy.Outcome, string) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(c.GetTimeout().AsDuration(), deploy.DefaultCheckTimeout))
	defer cancel()
	body, err := json.Marshal(q)
	if err != nil {
		return deploy.Inconclusive, err.Error()
	}
	if len(c.GetCommand()) > 0 {
		if !r.opts.AllowExec {
			return deploy.Inconclusive, "commands are not allowed here"
		}
		return run(ctx, c.GetCommand(), body)
	}
	u, err := url.Parse(c.GetUrl())
	if err != nil {
		return deploy.Inconclusive, err.Error()
	}
	if u.Scheme == "grpc" {
		return health(ctx, u)
	}
	return post(ctx, c.GetUrl(), body)
}

func post(ctx context.Context, target string, body []byte) (deploy.Outcome, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
	if err != nil {
		return deploy.Inconclusive, err.Error()
	}
	req.Header.Set("content-type", "application/json")
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(req)
	if err != nil {
		return deploy.Inconclusive, shorten(err.Error())
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return deploy.Inconclusive, shorten(err.Error())
	}
	why := shorten(strings.TrimSpace(fmt.Sprintf("status %d %s", res.StatusCode, text)))
	if res.StatusCode >= 200 && res.StatusCode <= 202 {
		return deploy.Pass, why
	}
	return deploy.Fail, why
}

func health(ctx context.Context, u *url.URL) (deploy.Outcome, string) {
	conn, err := grpc.NewClient(u.Host, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return deploy.Inconclusive, shorten(err.Error())
	}
	defer conn.Close()
	res, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: strings.TrimPrefix(u.Path, "/")})
	switch code := gstatus.Code(err); {
	case code == codes.Unavailable || code == codes.DeadlineExceeded || code == codes.Canceled:
		return deploy.Inconclusive, shorten(err.Error())
	case err != nil:
		return deploy.Fail, shorten(err.Error())
	case res.GetStatus() == healthpb.HealthCheckResponse_SERVING:
		return deploy.Pass, "SERVING"
	}
	return deploy.Fail, res.GetStatus().String()
}

// limited keeps the first bytes written to it.
type limited struct{ bytes.Buffer }

// Write implements io.Writer; it never fails, so that the program is not disturbed.
func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), maxAnswer-l.Len())])
	return len(p), nil
}

func run(ctx context.Context, command []string, body []byte) (deploy.Outcome, string) {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdin, cmd.Env = bytes.NewReader(body), []string{"PATH=" + os.Getenv("PATH")}
	cmd.WaitDelay = time.Second // a grandchild that keeps the pipe open must not keep us
	var out limited
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	said := strings.TrimSpace(out.String())
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return deploy.Inconclusive, shorten("no end within the timeout: " + said)
	case errors.As(err, &exit):
		return deploy.Fail, shorten(fmt.Sprintf("exit code %d: %s", exit.ExitCode(), said))
	case err != nil:
		return deploy.Inconclusive, shorten(err.Error())
	}
	return deploy.Pass, shorten("exit code 0 " + said)
}

func shorten(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= maxReason {
		return s
	}
	return strings.ToValidUTF8(s[:maxReason], "") + "…"
}
