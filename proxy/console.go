package proxy

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
)

// Bounds of the console's pages.
const (
	tapWrite     = 5 * time.Second // for one line, then the reader is given up
	tapBeat      = time.Second     // between looks at what was missed
	maxQuestion  = 8 << 20
	maxFields    = 64
	maxFieldSize = 8 << 10
)

// TapLine is one line of GET /tap: a call, or how many the reader has missed since the
// line before.
type TapLine struct {
	*inference.Tapped
	Missed uint64 `json:"missed,omitempty"`
}

// Tap serves GET /tap: model calls as they end, one JSON object a line, until the reader
// leaves or the sidecar drains. The query filters: model, version, arm, region, outcome,
// user, at_least (a duration). A reader that does not keep up misses calls and is told how
// many; calls never wait for it. More than inference.MaxTaps readers are refused.
func (s *Sidecar) Tap() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f, err := tapFilter(r.URL.Query())
		if err != nil {
			status.WriteHTTP(w, err)
			return
		}
		t, err := s.inference.Tap(f)
		if err != nil {
			status.WriteHTTP(w, err)
			return
		}
		defer t.Close()
		w.Header().Set("content-type", "application/x-ndjson")
		w.WriteHeader(http.StatusOK)
		s.relayTap(w, r, t)
	})
}

func (s *Sidecar) relayTap(w http.ResponseWriter, r *http.Request, t *inference.TapStream) {
	out, enc := http.NewResponseController(w), json.NewEncoder(w)
	send := func(l TapLine) bool {
		// Recorders of tests have no deadline; every real connection has.
		if err := out.SetWriteDeadline(time.Now().Add(tapWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return false
		}
		return enc.Encode(l) == nil
	}
	beat := time.NewTicker(tapBeat)
	defer beat.Stop()
	if out.Flush() != nil {
		return
	}
	for {
		ok := true
		select {
		case c := <-t.Calls():
			ok = send(TapLine{Tapped: &c})
		case <-beat.C:
			if n := t.Dropped(); n > 0 {
				ok = send(TapLine{Missed: n})
			}
		case <-r.Context().Done():
			return
		case <-s.draining:
			return
		}
		if !ok || len(t.Calls()) == 0 && out.Flush() != nil {
			return
		}
	}
}

// tapFilter reads a filter. Errors have kind Invalid.
func tapFilter(q url.Values) (f inference.TapFilter, err error) {
	for name, v := range q {
		switch name {
		case "model":
			f.Model = v[0]
		case "version":
			f.Version = v[0]
		case "arm":
			f.Arm = v[0]
		case "region":
			f.Region = v[0]
		case "user":
			f.User = v[0]
		case "outcome":
			switch f.Outcome = v[0]; f.Outcome {
			case inference.OutcomeOK, inference.OutcomeFailed, inference.OutcomeCancelled, inference.OutcomeRefused:
			default:
				return f, outrigger.Errorf(outrigger.Invalid, "outcome is %q; one of ok, failed, cancelled, refused", f.Outcome)
			}
		case "at_least":
			if f.AtLeast, err = time.ParseDuration(v[0]); err != nil || f.AtLeast < 0 {
				return f, outrigger.Errorf(outrigger.Invalid, "at_least is %q; give a duration like 250ms", v[0])
			}
		default:
			return f, outrigger.Errorf(outrigger.Invalid, "filter %q is unknown; there are model, version, arm, region, user, outcome and at_least", name)
		}
	}
	return f, nil
}

// Question is the body of POST /explain: a request as an application would send it.
type Question struct {
	Method  string            `json:"method,omitempty"` // [POST]
	Path    string            `json:"path"`
	Headers map[string]string `json:"headers,omitempty"`
	Body    json.RawMessage   `json:"body,omitempty"`
}

// Explain serves POST /explain: where a request would go now and why, decided by the code
// that serves it, with nothing sent.
func (s *Sidecar) Explain() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q, body, err := readQuestion(r)
		if err != nil {
			status.WriteHTTP(w, err)
			return
		}
		w.Header().Set("content-type", "application/json")
		if err := json.NewEncoder(w).Encode(s.inference.Explain(q, body)); err != nil {
			s.opts.Logger.Debug("explain answer", "error", err)
		}
	})
}

// readQuestion builds the request asked about. Errors have kind Invalid.
func readQuestion(r *http.Request) (*http.Request, []byte, error) {
	var q Question
	d := json.NewDecoder(io.LimitReader(r.Body, maxQuestion))
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "the question is not JSON of the form {path, headers, body}, of at most %d bytes: %v", maxQuestion, err)
	}
	if q.Method == "" {
		q.Method = http.MethodPost
	}
	if !strings.HasPrefix(q.Path, "/") {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "path is %q; begin it with /", q.Path)
	}
	out, err := http.NewRequestWithContext(r.Context(), q.Method, "http://sidecar"+q.Path, http.NoBody)
	if err != nil {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "method %q or path %q is malformed", q.Method, q.Path)
	}
	if len(q.Headers) > maxFields {
		return nil, nil, outrigger.Errorf(outrigger.Invalid, "%d headers; give at most %d", len(q.Headers), maxFields)
	}
	for k, v := range q.Headers {
		if len(k)+len(v) > maxFieldSize {
			return nil, nil, outrigger.Errorf(outrigger.Invalid, "header %.40q has more than %d bytes", k, maxFieldSize)
		}
		out.Header.Set(k, v)
	}
	return out, q.Body, nil
}
