package alerts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/control/facts"
)

// maxAnswer bounds what is read of an answer, so that its connection can be used again.
const maxAnswer = 64 << 10

// Notification is the body of a webhook.
type Notification struct {
	Version  int               `json:"version"` // 1
	Status   string            `json:"status"`  // firing, resolved
	ID       string            `json:"id"`
	Severity string            `json:"severity"` // low, medium, high, critical
	Summary  string            `json:"summary"`
	Numbers  map[string]string `json:"numbers"` // behind it, as text
	Notify   []string          `json:"notify"`  // contacts, those on call first
	Region   string            `json:"region"`
	Since    time.Time         `json:"since"`
	EndsAt   *time.Time        `json:"ends_at,omitempty"` // when it was resolved
}

// send makes one attempt. wait is how long the receiver asks to be left alone, permanent
// says that trying again is pointless. Errors hold neither URL nor token nor answer.
func (s *Service) send(ctx context.Context, m message) (wait time.Duration, permanent bool, err error) {
	var body any
	target := m.URL
	switch m.Kind {
	case Alertmanager:
		body, target = s.alertmanager(m), strings.TrimRight(m.URL, "/")+"/api/v2/alerts"
	case Slack:
		body = s.slack(m)
	default:
		body = s.webhook(m)
	}
	raw, err := json.Marshal(body)
	if err != nil {
		return 0, true, err
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(raw))
	if err != nil {
		return 0, true, errors.New("the route's URL cannot be used")
	}
	req.Header.Set("content-type", "application/json")
	req.Header.Set("idempotency-key", fmt.Sprintf("%s/%d/%s", m.alert, m.since.UnixNano(), m.told))
	if m.Token != "" {
		req.Header.Set("authorization", "Bearer "+m.Token)
	}
	res, err := s.client.Do(req)
	if err != nil {
		var with *url.Error // holds the URL
		if errors.As(err, &with) {
			err = with.Err
		}
		return 0, false, err
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswer)) // only to use the connection again
	switch code := res.StatusCode; {
	case code >= 200 && code < 300:
		return 0, false, nil
	case code == http.StatusRequestTimeout || code == http.StatusTooManyRequests || code >= 500:
		seconds, _ := strconv.Atoi(res.Header.Get("retry-after")) // a date is not worth reading: 0
		return time.Duration(min(max(seconds, 0), 3600)) * time.Second, false, fmt.Errorf("status %d", code)
	default:
		return 0, true, fmt.Errorf("status %d", code)
	}
}

func (m message) status() string {
	if m.told == resolved {
		return resolved
	}
	return "firing"
}

func (s *Service) webhook(m message) Notification {
	n := Notification{Version: 1, Status: m.status(), ID: m.a.ID, Severity: m.a.Severity, Summary: m.a.Summary, Numbers: m.a.Numbers,
		Notify: m.contacts, Region: s.opts.Region, Since: m.a.Since.UTC()}
	if m.told == resolved {
		at := m.a.ResolvedAt.UTC()
		n.EndsAt = &at
	}
	return n
}

// postable is one alert of Alertmanager's API v2 (postableAlert in its OpenAPI document).
type postable struct {
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
	StartsAt    time.Time         `json:"startsAt"`
	EndsAt      time.Time         `json:"endsAt"`
}

// alertmanager is the alert as it is now. An Alertmanager knows alerts by their labels and
// the severity is one, since that is what its routes look at: the alert of the severity told
// before is ended.
func (s *Service) alertmanager(m message) []postable {
	of := func(severity string, ends time.Time) postable {
		labels := map[string]string{"alertname": nameOf(m.a), "alert_id": m.a.ID, "severity": severity, "region": s.opts.Region, "source": "outrigger"}
		for _, k := range []string{"model", "version", "rollout"} {
			if v := m.a.Numbers[k]; v != "" {
				labels[k] = v
			}
		}
		if len(m.contacts) > 0 {
			labels["contact"] = m.contacts[0]
		}
		return postable{Labels: labels, StartsAt: m.a.Since.UTC(), EndsAt: ends.UTC(), Annotations: map[string]string{
			"summary": m.a.Summary, "numbers": numbersText(m.a.Numbers), "notify": strings.Join(m.contacts, ", ")}}
	}
	ends := m.at.Add(repeatFor)
	if m.told == resolved {
		ends = m.a.ResolvedAt
	}
	out := []postable{of(m.a.Severity, ends)}
	if m.before != "" && m.before != m.a.Severity {
		out = append(out, of(m.before, m.at))
	}
	return out
}

// nameOf is what the alert is about: its rule, else its own name.
func nameOf(a *facts.Alert) string {
	if r := a.Numbers["rule"]; r != "" {
		return r
	}
	return a.ID
}

func numbersText(numbers map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(numbers)) {
		out = append(out, k+" = "+numbers[k])
	}
	return strings.Join(out, "\n")
}

// slackText is what Slack's incoming webhooks take; its readers know text and attachments.
type slackText struct {
	Text        string            `json:"text"`
	Attachments []slackAttachment `json:"attachments"`
}

type slackAttachment struct {
	Color    string       `json:"color"`
	Fallback string       `json:"fallback"`
	Text     string       `json:"text"`
	Fields   []slackField `json:"fields"`
	TS       int64        `json:"ts"`
}

type slackField struct {
	Title string `json:"title"`
	Value string `json:"value"`
	Short bool   `json:"short"`
}

// slackFields bounds the numbers in one message; the webhook and the API have all.
const slackFields = 20

var slackEscape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

func (s *Service) slack(m message) slackText {
	head, colour := "["+m.a.Severity+"] ", map[string]string{"critical": "danger", "high": "danger", "medium": "warning"}[m.a.Severity]
	if m.told == resolved {
		head, colour = "[resolved] ", "good"
	}
	text := slackEscape.Replace(head + nameOf(m.a) + " in " + s.opts.Region)
	if len(m.contacts) > 0 {
		text += slackEscape.Replace(", for " + strings.Join(m.contacts, ", "))
	}
	a := slackAttachment{Color: colour, Fallback: text, Text: slackEscape.Replace(m.a.Summary), TS: m.a.Since.Unix(), Fields: []slackField{}}
	for _, k := range slices.Sorted(maps.Keys(m.a.Numbers)) {
		if len(a.Fields) < slackFields {
			a.Fields = append(a.Fields, slackField{slackEscape.Replace(k), slackEscape.Replace(m.a.Numbers[k]), true})
		}
	}
	return slackText{Text: text, Attachments: []slackAttachment{a}}
}
