package alerts

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy/alerting"
)

// Kinds of routes.
const (
	Webhook      = "webhook"      // JSON of this package's own, see Notification
	Alertmanager = "alertmanager" // Alertmanager's API v2; URL is its base
	Slack        = "slack"        // an incoming webhook of Slack or of what takes its form
)

// MaxRoutes bounds the routes, maxRouteFile their file.
const (
	MaxRoutes    = 32
	maxRouteFile = 64 << 10
)

// Route is one receiver of notifications. URL and Token are secrets.
type Route struct {
	Name string
	Kind string
	URL  string
	// Token is sent as a bearer token; "" = none.
	Token string
	// AtLeast is the least severity it is told of.
	AtLeast alerting.Severity
	// Contacts are the names of deployment plans' emergency_contacts that it reaches;
	// empty = everybody.
	Contacts []string
}

// String names the route without its secrets.
func (r Route) String() string { return r.Kind + " " + r.Name }

// routeFile is the YAML form of routes.
type routeFile struct {
	Routes []struct {
		Name      string   `yaml:"name"`
		Kind      string   `yaml:"kind"`
		URL       string   `yaml:"url"`
		URLFile   string   `yaml:"url_file"`
		TokenFile string   `yaml:"token_file"`
		Severity  string   `yaml:"severity"`
		Contacts  []string `yaml:"contacts"`
	} `yaml:"routes"`
}

// ReadRoutes reads a file of routes:
//
//	routes:
//	  - name: oncall            # unique
//	    kind: alertmanager      # webhook, alertmanager or slack
//	    url: http://alertmanager:9093
//	    severity: high          # at least; default medium: low alerts are logged only
//	    contacts: [engineering] # default everybody
//	    token_file: token       # bearer token; relative to this file
//	  - {name: chat, kind: slack, url_file: slack.url}
//
// A URL that is a secret belongs into url_file. Errors have kind Invalid and never hold a
// URL or token.
func ReadRoutes(path string) ([]Route, error) {
	text, err := readSmall(path)
	if err != nil {
		return nil, err
	}
	var f routeFile
	d := yaml.NewDecoder(strings.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(&f); err != nil {
		// The decoder quotes values, which may be secrets; the line is enough to find it.
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is not a file of alert routes: %s", path, faultLine(err))
	}
	var out []Route
	for _, x := range f.Routes {
		r := Route{Name: x.Name, Kind: x.Kind, URL: x.URL, Contacts: x.Contacts, AtLeast: alerting.Medium}
		if x.Severity != "" {
			if r.AtLeast, err = alerting.ParseSeverity(x.Severity); err != nil {
				return nil, outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("%s: route %q", path, x.Name))
			}
		}
		for _, secret := range []struct {
			file string
			to   *string
		}{{x.URLFile, &r.URL}, {x.TokenFile, &r.Token}} {
			if secret.file == "" {
				continue
			}
			if !filepath.IsAbs(secret.file) {
				secret.file = filepath.Join(filepath.Dir(path), secret.file)
			}
			if *secret.to, err = readSmall(secret.file); err != nil {
				return nil, outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("%s: route %q", path, x.Name))
			}
			*secret.to = strings.TrimSpace(*secret.to)
		}
		out = append(out, r)
	}
	if err := checkRoutes(out); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, path)
	}
	return out, nil
}

// faultLine keeps "line N" of a YAML error.
func faultLine(err error) string {
	for _, word := range strings.Split(err.Error(), "\n") {
		if _, rest, ok := strings.Cut(word, "line "); ok {
			number, _, _ := strings.Cut(rest, ":")
			return "line " + number + " is not understood"
		}
	}
	return "it is not YAML"
}

func readSmall(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", outrigger.Errorf(outrigger.Invalid, "%v", err)
	}
	if info.Size() > maxRouteFile {
		return "", outrigger.Errorf(outrigger.Invalid, "%s is %d bytes long, the limit is %d", path, info.Size(), maxRouteFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", outrigger.Errorf(outrigger.Invalid, "%v", err)
	}
	return string(text), nil
}

func checkRoutes(routes []Route) error {
	if len(routes) > MaxRoutes {
		return outrigger.Errorf(outrigger.Invalid, "%d alert routes; the limit is %d", len(routes), MaxRoutes)
	}
	for i, r := range routes {
		if err := outrigger.CheckName("name of an alert route", r.Name); err != nil {
			return err
		}
		u, err := url.Parse(r.URL)
		switch {
		case slices.ContainsFunc(routes[:i], func(o Route) bool { return o.Name == r.Name }):
			return outrigger.Errorf(outrigger.Invalid, "two alert routes are called %q", r.Name)
		case !slices.Contains([]string{Webhook, Alertmanager, Slack}, r.Kind):
			return outrigger.Errorf(outrigger.Invalid, "alert route %q: kind %q is not one of %s, %s, %s", r.Name, r.Kind, Webhook, Alertmanager, Slack)
		case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
			return outrigger.Errorf(outrigger.Invalid, "alert route %q: its URL is not one like https://host/path", r.Name)
		case r.AtLeast == alerting.None || r.AtLeast > alerting.Critical:
			return outrigger.Errorf(outrigger.Invalid, "alert route %q: it has no severity", r.Name)
		}
	}
	return nil
}
