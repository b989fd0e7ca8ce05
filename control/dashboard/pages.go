package dashboard

import (
	"bytes"
	"context"
	"html/template"
	"net/http"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// page is what the templates get.
type page struct {
	Title, Region, Assets, Path, Query, At string
	Problem, Done                          string
	Live                                   bool
	Nav                                    []tab
	Who                                    Who
	View                                   *View
	Body                                   template.HTML

	Rollout       *pb.Rollout
	Gates         []gateLine
	ApprovalGates []string
	Events        []auditEntry
}

type tab struct {
	Name, Path string
	Count      int
	Here       bool
}

// sheet is one page: where it is, what it is called and its template.
type sheet struct{ path, title, body string }

var sheets = []sheet{{"/", "Overview", "overview"}, {"/rollouts", "Rollouts", "rollouts"}, {"/experiments", "Experiments", "experiments"},
	{"/models", "Models", "models"}, {"/optimisers", "Optimisers", "optimisers"}, {"/regions", "Regions", "regions"}, {"/cache", "Cache", "cache"},
	{"/alerts", "Alerts", "alertpage"}, {"/audit", "Audit", "audit"}, {"/dashboards", "Dashboards", "dashboards"}}

// moment reads ?at=: a log position or a time. "" is now.
func moment(at string) (Moment, error) {
	if at == "" {
		return Moment{}, nil
	}
	if n, err := strconv.ParseUint(at, 10, 64); err == nil && n > 0 {
		return Moment{Position: n}, nil
	}
	t, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		return Moment{}, outrigger.Errorf(outrigger.Invalid, "at is %q; give a log position or a time like 2026-01-31T12:00:00Z", clip(at))
	}
	return Moment{Time: t}, nil
}

// show renders a sheet. A problem is shown on it, with the status that it has.
func (d *Dashboard) show(w http.ResponseWriter, r *http.Request, s sheet, rolloutID string, problem error) {
	at := r.URL.Query().Get("at")
	m, err := moment(at)
	if err != nil {
		problem, m, at = err, Moment{}, ""
	}
	ctx, cancel := context.WithTimeout(r.Context(), viewTimeout)
	defer cancel()
	v, err := d.opts.View(ctx, m)
	if err != nil && (m != Moment{}) {
		problem, m, at = err, Moment{}, ""
		v, err = d.opts.View(ctx, m)
	}
	if err != nil {
		status.WriteHTTP(w, err)
		return
	}
	p := page{Title: s.title, Region: d.opts.Region, Assets: d.assets, Path: s.path, At: at, Live: m == Moment{}, Who: d.opts.Who(r), View: v}
	if at != "" {
		p.Query = "?at=" + template.URLQueryEscaper(at)
	}
	if id := r.URL.Query().Get("done"); id != "" && p.Live {
		p.Done = done(id)
	}
	for _, t := range sheets {
		x := tab{Name: t.title, Path: t.path, Here: t.path == s.path}
		if t.path == "/alerts" {
			x.Count = len(v.Firing())
		}
		p.Nav = append(p.Nav, x)
	}
	body := s.body
	if rolloutID != "" {
		if p.Rollout = v.rollout(rolloutID); p.Rollout == nil {
			problem = outrigger.Errorf(outrigger.NotFound, "rollout %q not found at this time", clip(rolloutID))
		} else {
			body, p.Title, p.Path = "rollout", p.Rollout.GetId(), "/rollouts/"+rolloutID
			p.Gates, p.ApprovalGates = v.gates(p.Rollout), approvalGates(p.Rollout)
		}
	}
	for _, e := range v.Events {
		if body != "rollout" || e.GetAggregate() == "rollout/"+rolloutID {
			p.Events = append(p.Events, entryOf(e))
		}
	}
	code := http.StatusOK
	if problem != nil {
		p.Problem, code = problem.Error(), status.HTTP(outrigger.KindOf(problem))
	}
	d.write(w, code, body, &p)
}

func (d *Dashboard) write(w http.ResponseWriter, code int, body string, p *page) {
	var inner, out bytes.Buffer
	err := d.templates.ExecuteTemplate(&inner, body, p)
	if err == nil {
		p.Body = template.HTML(inner.String()) // escaped where it was rendered
		err = d.templates.ExecuteTemplate(&out, "base", p)
	}
	if err != nil {
		d.opts.Logger.Error("page not rendered", "page", body, "error", err)
		status.WriteHTTP(w, outrigger.Wrap(outrigger.Internal, err, "render the page"))
		return
	}
	w.Header().Set("content-type", "text/html; charset=utf-8")
	w.Header().Set("cache-control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(out.Bytes()) // nobody is left to tell
}

// done says what an action that has succeeded did; only known words come from the address.
func done(verb string) string {
	switch verb {
	case "approve":
		return "Approved."
	case "promote":
		return "Promoted to the next phase."
	case "hold":
		return "Held: the weight stays until somebody resumes it."
	case "resume":
		return "Resumed."
	case "abort":
		return "Aborted: all traffic returns to the last good version."
	case "silence":
		return "Silenced for an hour."
	}
	return ""
}

// act carries out one form and shows the page it came from.
func (d *Dashboard) act(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		status.WriteHTTP(w, outrigger.Errorf(outrigger.Invalid, "the form cannot be read: %v", err))
		return
	}
	a := Action{Verb: r.PostForm.Get("verb"), ID: r.PostForm.Get("id"), Gate: r.PostForm.Get("gate"), Reason: r.PostForm.Get("reason")}
	back, id := "/rollouts/"+template.URLQueryEscaper(a.ID), a.ID
	if a.Verb == "silence" {
		back, id = "/alerts", ""
	}
	var err error
	if text := r.PostForm.Get("sequence"); text != "" {
		a.Sequence, err = strconv.ParseUint(text, 10, 64)
	}
	switch {
	case err != nil:
		err = outrigger.Errorf(outrigger.Invalid, "sequence %q is not a number", clip(r.PostForm.Get("sequence")))
	case r.PostForm.Get("csrf") != d.opts.Who(r).CSRF:
		err = outrigger.Errorf(outrigger.Denied, "this form was made for another session; load the page again")
	default:
		err = d.opts.Act(r.Context(), a)
	}
	if err == nil {
		http.Redirect(w, r, back+"?done="+template.URLQueryEscaper(a.Verb), http.StatusSeeOther)
		return
	}
	s := sheets[1]
	if id == "" {
		s = sheets[7]
	}
	d.show(w, r, s, id, err)
}
