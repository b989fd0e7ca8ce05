// Package dashboard serves the status page: one embedded page and one stream of frames.
//
//	d, err := dashboard.New(dashboard.Options{Region: "eu", Status: …, Audit: …})
//	mux.Handle("/", d.Handler())
//	go d.Run(ctx)
//
// The page is at "/", its frames at "/events" (server-sent events, one a second). A frame
// is {"status": StatusResponse, "audit": [entry]} in JSON; when the status cannot be had
// the stream carries an event "problem" with {"error": text} instead and goes on.
//
// Promises: everything is embedded and nothing is fetched from elsewhere; a
// Content-Security-Policy forbids inline script and style and any other origin; the
// script writes text only, never markup. The page changes nothing, it has no form.
//
// Bounds: one frame is made per second however many watch, and none when nobody does. At
// most Options.Viewers streams are open (default 64); more get 503. A viewer that reads
// too slowly skips frames, it is never queued for; one that does not read at all is cut
// off after ten seconds. Streams end when Run's context does.
//
// Who may see it is decided in front of Handler. All methods may be called concurrently.
package dashboard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

//go:embed assets
var assets embed.FS

// Interval is the time between frames.
const Interval = time.Second

// policyHeader lets the page load its own two files and its stream, and nothing else.
// data: is for the empty icon that keeps browsers from asking for /favicon.ico.
const policyHeader = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// Options of a Dashboard. Status and Audit are required.
type Options struct {
	// Region is shown in the title until the first frame.
	Region string
	// Status is asked once a second while anybody watches.
	Status func(context.Context) (*pb.StatusResponse, error)
	// Audit returns the last changes, the newest first; asked together with Status.
	Audit func(context.Context) ([]*pb.Event, error)
	// Viewers bounds the open streams; 0 = 64.
	Viewers int
	Logger  *slog.Logger // nil = discard
}

// Dashboard is the page and its stream.
type Dashboard struct {
	opts  Options
	page  []byte // rendered once: only the region's name varies
	files map[string]file
	hub   *hub
}

type file struct {
	body        []byte
	contentType string
}

// New renders the page; it starts nothing. Errors have kind Invalid.
func New(o Options) (*Dashboard, error) {
	if o.Status == nil || o.Audit == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "dashboard needs Status and Audit; one is nil")
	}
	if o.Viewers == 0 {
		o.Viewers = 64
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Dashboard{opts: o, files: make(map[string]file), hub: newHub(o.Viewers)}
	sum := sha256.New()
	for name, kind := range map[string]string{"dashboard.css": "text/css; charset=utf-8", "dashboard.js": "text/javascript; charset=utf-8"} {
		body, err := fs.ReadFile(assets, "assets/"+name)
		if err != nil {
			return nil, outrigger.Wrap(outrigger.Internal, err, "embedded file "+name)
		}
		d.files[name] = file{body, kind}
	}
	for _, name := range []string{"dashboard.css", "dashboard.js"} {
		sum.Write(d.files[name].body)
	}
	t, err := template.ParseFS(assets, "assets/page.html")
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "embedded page")
	}
	var page bytes.Buffer
	err = t.Execute(&page, map[string]string{"Region": o.Region, "Prefix": "/", "Assets": hex.EncodeToString(sum.Sum(nil))[:12]})
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "render the page")
	}
	d.page = page.Bytes()
	return d, nil
}

// Handler serves "/", "/dashboard.css", "/dashboard.js" and "/events" to GET and HEAD.
func (d *Dashboard) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "text/html; charset=utf-8")
		w.Header().Set("cache-control", "no-store")
		_, _ = w.Write(d.page) // nobody is left to tell
	})
	for name, f := range d.files {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("content-type", f.contentType)
			w.Header().Set("cache-control", "public, max-age=31536000, immutable") // the URL carries a hash
			_, _ = w.Write(f.body)
		})
	}
	mux.HandleFunc("GET /events", d.events)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("content-security-policy", policyHeader)
		h.Set("x-content-type-options", "nosniff")
		h.Set("referrer-policy", "no-referrer")
		h.Set("cross-origin-opener-policy", "same-origin")
		mux.ServeHTTP(w, r)
	})
}

// Run makes frames until ctx ends, then returns nil; open streams end with it.
func (d *Dashboard) Run(ctx context.Context) error {
	defer d.hub.close()
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.hub.arrived: // the first viewer does not wait for the tick
		case <-tick.C:
		}
		if d.hub.viewers() > 0 {
			d.hub.publish(d.frame(ctx))
		}
	}
}

// auditEntry is one line of the audit table.
type auditEntry struct {
	Position  uint64    `json:"position"`
	At        time.Time `json:"at"`
	Kind      string    `json:"kind"`
	Aggregate string    `json:"aggregate"`
	Actor     string    `json:"actor"`
	Detail    string    `json:"detail"`
}

// frame renders one event of the stream.
func (d *Dashboard) frame(ctx context.Context) []byte {
	ctx, cancel := context.WithTimeout(ctx, 5*Interval)
	defer cancel()
	body, err := d.body(ctx)
	if err != nil {
		d.opts.Logger.Warn("status page has no frame", "error", err)
		text, _ := json.Marshal(map[string]string{"error": "the status cannot be had; see the server's log"}) // a map of strings always encodes
		return event("problem", text)
	}
	return event("", body)
}

func (d *Dashboard) body(ctx context.Context) ([]byte, error) {
	status, err := d.opts.Status(ctx)
	if err != nil {
		return nil, err
	}
	events, err := d.opts.Audit(ctx)
	if err != nil {
		return nil, err
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(status)
	if err != nil {
		return nil, err
	}
	entries := make([]auditEntry, len(events))
	for i, e := range events {
		entries[i] = entryOf(e)
	}
	return json.Marshal(map[string]any{"status": json.RawMessage(raw), "audit": entries})
}

// event writes the text/event-stream form; body is one line.
func event(name string, body []byte) []byte {
	var b bytes.Buffer
	if name != "" {
		b.WriteString("event: " + name + "\n")
	}
	b.WriteString("data: ")
	b.Write(body)
	b.WriteString("\n\n")
	return b.Bytes()
}
