package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"strings"

	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
)

const adminPaths = "/ready, /healthz, /metrics, /stats, /config_dump, /clusters, /tap, POST /explain, POST /upgrade"

// listenAdmin binds the admin socket, readable by this user only; nil if there is none.
func (s *sidecarFlags) listenAdmin(p *process) (net.Listener, error) {
	if s.admin == "" {
		return nil, nil
	}
	l, err := p.listen("admin", s.admin)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(strings.TrimPrefix(s.admin, "unix:"), 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("sidecar: --admin: %w", err)
	}
	return l, nil
}

// admin serves the admin socket: what the --http page has, and what only this user may
// see or do.
func (u *upgrader) admin(sc *proxy.Sidecar, ads *adsclient.Client) http.Handler {
	pages := map[string]http.Handler{
		"GET /stats":       sc.Handler(),
		"GET /config_dump": showJSON(func() any { return configDump(ads) }),
		"GET /clusters":    showJSON(func() any { return sc.Clusters() }),
		"GET /tap":         sc.Tap(),
		"POST /explain":    sc.Explain(),
		"POST /upgrade":    http.HandlerFunc(u.serveUpgrade),
	}
	if u.pprof {
		pages["GET /debug/pprof/"] = http.HandlerFunc(pprof.Index)
		pages["GET /debug/pprof/profile"] = http.HandlerFunc(pprof.Profile)
		pages["GET /debug/pprof/symbol"] = http.HandlerFunc(pprof.Symbol)
		pages["GET /debug/pprof/trace"] = http.HandlerFunc(pprof.Trace)
	}
	return u.p.health(pages)
}

func showJSON(what func() any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(what()) // it fails only if the client has left
	})
}

// configDump is the policy in force. The salts of the bucket rule are left out: whoever
// knows one can choose a user name that lands in an arm of their liking.
func configDump(ads *adsclient.Client) any {
	out := map[string]any{"build": buildVersion(), "status": ads.Status()}
	p := ads.Policy()
	if p == nil {
		return out
	}
	shown := *p
	shown.Models = append(shown.Models[:0:0], p.Models...)
	for i := range shown.Models {
		if shown.Models[i].Salt != "" {
			shown.Models[i].Salt = "redacted"
		}
	}
	out["policy"] = shown
	return out
}
