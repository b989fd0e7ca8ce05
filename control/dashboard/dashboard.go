// Package dashboard serves the pages of a control plane to people.
//
//	d, err := dashboard.New(dashboard.Options{Region: "eu", View: …, Act: …, Who: …})
//	mux.Handle("/", d.Handler())
//	go d.Run(ctx)
//
// The pages are overview (/), rollouts (/rollouts, one at /rollouts/{id}), experiments,
// models, optimisers, regions, cache, alerts, audit and dashboards (the published strategy's
// four, whose figures are JSON under /data and /data/{name}: see Groups). They are rendered by the server
// from one View; ?at= with a log position or a time shows the past on each of them. A small
// script keeps a page that shows the present current: "/events" (server-sent events) says
// once a second that there is something newer, and the parts that differ are replaced.
// Without the script pages work and have to be loaded again.
//
// Promises: every number is from a View, and what it does not have reads "no data";
// everything is embedded and nothing is fetched from elsewhere; a Content-Security-Policy
// forbids inline script and style and any other origin. Forms (POST /act) carry the
// sequence of what the person saw and a token of their session: a decision on something that
// has moved on, or from another page, is refused and shown as such.
//
// Bounds: one frame is made per second however many watch, and none when nobody does. At
// most Options.Viewers streams are open (default 64); more get 503. A viewer that reads
// too slowly skips frames, it is never queued for; one that does not read at all is cut
// off after ten seconds. Streams end when Run's context does.
//
// Who may see it is decided in front of Handler, who may act by Options.Act. All methods
// may be called concurrently.
package dashboard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

//go:embed assets
var assets embed.FS

// Interval is the time between frames.
const Interval = time.Second

// viewTimeout bounds the making of one View, maxForm one form.
const (
	viewTimeout = 10 * time.Second
	maxForm     = 64 << 10
)

// policyHeader lets the page load its own two files and its stream, send its own forms, and
// nothing else. data: is for the empty icon that keeps browsers from asking for /favicon.ico.
const policyHeader = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// Moment is when a View is of: a log position, a time, or, zero, now.
type Moment struct {
	Position uint64
	Time     time.Time
}

// Who is looking, as far as pages show it.
type Who struct {
	Name, Role string
	CanAct     bool
	SignIn     bool   // signing in would give more
	SignedIn   bool   // there is a session to end
	CSRF       string // what forms must bring back
}

// Action is one decision of a person: approve, promote, hold, resume, abort (of a rollout),
// silence (of an alert). Sequence is the last event of the rollout that they saw.
type Action struct {
	Verb, ID, Gate, Reason string
	Sequence               uint64
}

// Options of a Dashboard. View, Who and Act are required.
type Options struct {
	Region string
	// View is asked for every page, and once a second while anybody watches.
	View func(context.Context, Moment) (*View, error)
	Who  func(*http.Request) Who
	// Act carries out a decision in the name of whoever the context says is asking.
	Act func(context.Context, Action) error
	// Viewers bounds the open streams; 0 = 64.
	Viewers int
	Logger  *slog.Logger // nil = discard
}

// Dashboard is the pages and their stream.
type Dashboard struct {
	opts      Options
	templates *template.Template
	assets    string // hash of the files, in their address
	files     map[string]file
	hub       *hub
	ticks     uint64 // frames made; of Run alone
}

type file struct {
	body        []byte
	contentType string
}

// New reads the embedded files; it starts nothing. Errors have kind Invalid.
func New(o Options) (*Dashboard, error) {
	if o.View == nil || o.Who == nil || o.Act == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "dashboard needs View, Who and Act; one is nil")
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
	d.assets = hex.EncodeToString(sum.Sum(nil))[:12]
	var err error
	d.templates, err = template.New("").Funcs(funcs).ParseFS(assets, "assets/*.html")
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "embedded pages")
	}
	return d, nil
}

// Handler serves the pages, "/dashboard.css", "/dashboard.js" and "/events" to GET and HEAD,
// and takes POST /act.
func (d *Dashboard) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, x := range sheets {
		pattern := "GET " + x.path
		if x.path == "/" {
			pattern = "GET /{$}"
		}
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { d.show(w, r, x, "", nil) })
	}
	mux.HandleFunc("GET /rollouts/{id}", func(w http.ResponseWriter, r *http.Request) { d.show(w, r, sheets[1], r.PathValue("id"), nil) })
	mux.HandleFunc("GET /data", d.data)
	mux.HandleFunc("GET /data/{name}", d.data)
	mux.HandleFunc("POST /act", d.act)
	for name, f := range d.files {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("content-type", f.contentType)
			w.Header().Set("cache-control", "public, max-age=31536000, immutable") // the URL carries a hash
			_, _ = w.Write(f.body)
		})
	}
	mux.HandleFunc("GET /events", d.events)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protect(w.Header())
		mux.ServeHTTP(w, r)
	})
}

// Login writes the form that asks for a token; problem is why the last one did not do.
func (d *Dashboard) Login(w http.ResponseWriter, problem string) {
	protect(w.Header())
	var out bytes.Buffer
	if err := d.templates.ExecuteTemplate(&out, "login", page{Region: d.opts.Region, Assets: d.assets, Problem: problem}); err != nil {
		status.WriteHTTP(w, outrigger.Wrap(outrigger.Internal, err, "render the page"))
		return
	}
	w.Header().Set("content-type", "text/html; charset=utf-8")
	w.Header().Set("cache-control", "no-store")
	if problem != "" {
		w.WriteHeader(http.StatusUnauthorized)
	}
	_, _ = w.Write(out.Bytes()) // nobody is left to tell
}

func protect(h http.Header) {
	h.Set("content-security-policy", policyHeader)
	h.Set("x-content-type-options", "nosniff")
	h.Set("referrer-policy", "same-origin")
	h.Set("cross-origin-opener-policy", "same-origin")
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
			d.hub.publish(d.frame())
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

// frame tells pages that there may be something newer. Pages ask for
// what they show themselves, so a frame costs nothing but its bytes.
func (d *Dashboard) frame() []byte {
	d.ticks++
	return event("", strconv.AppendUint(nil, d.ticks, 10))
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
