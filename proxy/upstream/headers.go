package upstream

import (
	"net/http"
	"net/textproto"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// hopByHop are the fields that never pass a proxy (RFC 9110 §7.6.1 and the obsolete
// Keep-Alive, Proxy-Connection), in canonical form.
var hopByHop = [...]string{
	"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization",
	"Te", "Trailer", "Transfer-Encoding", "Upgrade", "Http2-Settings",
}

// endToEnd are the fields a Connection option may not name, besides every x-outrigger-,
// x-forwarded- and x-snakepit- field. They say who asks, or how the message is framed.
var endToEnd = [...]string{
	"Authorization", "Cookie", "Set-Cookie", "Host", "Content-Length", "Content-Type", "Content-Encoding",
	"X-Session-Id", "X-User-Id", "X-Request-Id", "X-Api-Key", "Api-Key", "X-Real-Ip",
	"Forwarded", "Via", "Traceparent", "Tracestate", "Baggage", "Idempotency-Key",
}

var endToEndPrefix = [...]string{"X-Outrigger-", "X-Forwarded-", "X-Snakepit-"}

func isEndToEnd(canonical string) bool {
	for _, f := range endToEnd {
		if f == canonical {
			return true
		}
	}
	for _, p := range endToEndPrefix {
		if strings.HasPrefix(canonical, p) {
			return true
		}
	}
	return false
}

// CheckConnection returns an error of kind Invalid if a Connection option names an
// end-to-end identity or framing field.
func CheckConnection(h http.Header) error {
	for name := range connectionOptions(h) {
		if isEndToEnd(name) {
			return outrigger.Errorf(outrigger.Invalid, "connection header names %q, an end-to-end field; remove it from Connection", name)
		}
	}
	return nil
}

// StripHopByHop removes hop-by-hop fields and those a Connection option names, except
// end-to-end fields, which stay whatever Connection says. Te: trailers is kept. Upgrade
// is removed; the forwarder puts websocket back.
func StripHopByHop(h http.Header) {
	trailers := hasToken(h["Te"], "trailers")
	if len(h["Connection"]) > 0 {
		for name := range connectionOptions(h) {
			if !isEndToEnd(name) {
				delete(h, name)
			}
		}
	}
	for _, name := range hopByHop {
		delete(h, name)
	}
	if trailers {
		h["Te"] = []string{"trailers"}
	}
}

// connectionOptions yields the canonical names in the Connection fields.
func connectionOptions(h http.Header) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for _, v := range h["Connection"] {
			for option := range strings.SplitSeq(v, ",") {
				if option = textproto.TrimString(option); option != "" && !yield(http.CanonicalHeaderKey(option)) {
					return
				}
			}
		}
	}
}

func hasToken(values []string, token string) bool {
	for _, v := range values {
		for t := range strings.SplitSeq(v, ",") {
			t, _, _ = strings.Cut(t, ";")
			if strings.EqualFold(textproto.TrimString(t), token) {
				return true
			}
		}
	}
	return false
}

// isWebSocket reports whether the request asks for exactly the websocket upgrade
// (RFC 6455 §4.1).
func isWebSocket(r *http.Request) bool {
	up := r.Header["Upgrade"]
	return r.Method == http.MethodGet && len(up) == 1 &&
		strings.EqualFold(textproto.TrimString(up[0]), "websocket") && hasToken(r.Header["Connection"], "upgrade")
}
