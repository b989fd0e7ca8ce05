package artifacts

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Names of the calls, for whoever decides who may make them.
const (
	VerbPut  = "PutArtifact"
	VerbGet  = "GetArtifact"
	VerbList = "ListArtifacts"
)

// Handler serves
//
//	PUT  /v1/artifacts/{digest}  stores the body; 201 with the artifact as JSON
//	GET  /v1/artifacts/{digest}  the bytes, ETag the digest; a bad copy breaks the connection off, or is 503 when it is small
//	HEAD /v1/artifacts/{digest}  size and time
//	GET  /v1/artifacts?limit=N   {"artifacts": […]}, N up to MaxListed, default 100
//
// Errors are those of the REST interface. gate is asked about every call, nil lets all pass.
func (s *Store) Handler(gate rest.Gate) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("PUT /v1/artifacts/{digest}", s.gated(VerbPut, gate, s.put))
	mux.Handle("GET /v1/artifacts/{digest}", s.gated(VerbGet, gate, s.get))
	mux.Handle("GET /v1/artifacts", s.gated(VerbList, gate, s.list))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("allow", "GET, HEAD, PUT")
		status.WriteHTTP(w, outrigger.Errorf(outrigger.NotFound, "%s %s not found; artifacts take PUT, GET and HEAD of /v1/artifacts/sha256:…", r.Method, r.URL.Path))
	})
	return mux
}

// gated asks the gate and writes what the call returns as its error.
func (s *Store) gated(verb string, gate rest.Gate, call func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := func() (err error) {
			if gate != nil {
				var check func(proto.Message) error
				var done func(error)
				check, done, err = gate(r.Context(), verb)
				_ = check // there is no message
				if done != nil {
					defer func() { done(err) }()
				}
				if err != nil {
					return err
				}
			}
			return call(w, r)
		}()
		if err != nil {
			status.WriteHTTP(w, err)
		}
	})
}

func (s *Store) put(w http.ResponseWriter, r *http.Request) error {
	if r.ContentLength > s.o.MaxBytes {
		return outrigger.Errorf(outrigger.Exhausted, "artifact has %d bytes, the limit is %d", r.ContentLength, s.o.MaxBytes)
	}
	ctl := http.NewResponseController(w)
	a, err := s.Put(r.Context(), r.PathValue("digest"), lively{r.Body, func() { _ = ctl.SetReadDeadline(time.Now().Add(s.o.StallTime)) }})
	if err != nil {
		return err
	}
	_ = ctl.SetReadDeadline(time.Time{})
	s.o.Logger.Info("artifact stored", "digest", a.Digest, "bytes", a.Bytes)
	return writeJSON(w, http.StatusCreated, a)
}

// lively moves a deadline before every read, so that a slow body may take its time and a
// silent one may not. Servers without deadlines have none.
type lively struct {
	io.Reader
	before func()
}

// Read implements io.Reader.
func (l lively) Read(b []byte) (int, error) {
	l.before()
	return l.Reader.Read(b)
}

func (s *Store) get(w http.ResponseWriter, r *http.Request) error {
	digest := r.PathValue("digest")
	if r.Method == http.MethodHead {
		a, err := s.Stat(r.Context(), digest)
		if err == nil {
			head(w, a)
		}
		return err
	}
	if r.Header.Get("If-None-Match") == strconv.Quote(digest) {
		if _, err := s.Stat(r.Context(), digest); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	a, body, err := s.Get(r.Context(), digest)
	if err != nil {
		return err
	}
	defer body.Close()
	// The first buffer before the head: what is small and bad still gets an answer.
	first := make([]byte, HoldBack)
	n, err := body.Read(first)
	if err != nil && !errors.Is(err, io.EOF) {
		s.o.Logger.Error("artifact is bad", "digest", digest, "error", err)
		return err
	}
	head(w, a)
	ctl := http.NewResponseController(w)
	write := lifeline{w, func() { _ = ctl.SetWriteDeadline(time.Now().Add(s.o.StallTime)) }}
	if _, err = write.Write(first[:n]); err == nil {
		_, err = copyTo(write, body)
	}
	_ = ctl.SetWriteDeadline(time.Time{})
	if err != nil {
		s.o.Logger.Warn("artifact not sent to its end", "digest", digest, "error", err)
		panic(http.ErrAbortHandler) // a shorter body than was announced: nobody takes it for whole
	}
	return nil
}

// lifeline is lively for writes.
type lifeline struct {
	io.Writer
	before func()
}

// Write implements io.Writer.
func (l lifeline) Write(b []byte) (int, error) {
	l.before()
	return l.Writer.Write(b)
}

func head(w http.ResponseWriter, a Artifact) {
	h := w.Header()
	h.Set("content-type", "application/octet-stream")
	h.Set("content-length", strconv.FormatInt(a.Bytes, 10))
	h.Set("etag", strconv.Quote(a.Digest))
	h.Set("last-modified", a.StoredAt.UTC().Format(http.TimeFormat))
	h.Set("accept-ranges", "none") // a part cannot be verified
}

func (s *Store) list(w http.ResponseWriter, r *http.Request) error {
	limit := 100
	if text := r.URL.Query().Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			return outrigger.Errorf(outrigger.Invalid, "limit is %q, allowed is 1..%d", text, MaxListed)
		}
		limit = n
	}
	all, err := s.List(r.Context(), limit)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string][]Artifact{"artifacts": all})
}

func writeJSON(w http.ResponseWriter, code int, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return outrigger.Wrap(outrigger.Internal, err, "encode the answer")
	}
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(raw, '\n')) // nobody is left to tell
	return nil
}
