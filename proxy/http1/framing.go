package http1

import "bytes"

// known collects what the fields that matter to the codec say.
type known struct {
	hosts, lengths, encodings, connections, expects, upgrades, trailers int
	underscore                                                          bool
	websocket                                                           bool // value of Upgrade
	asked                                                               bool // Connection: upgrade
}

// note looks at one field as it comes. Its switch is on the length first: most fields are
// none of these.
func (k *known) note(r *Request, f *field) error {
	name, value := f.name.of(r.buf), f.value.of(r.buf)
	switch len(name) {
	case 4:
		if isName(name, "host") {
			if k.hosts++; k.hosts > 1 {
				return ErrHostTwice
			}
			r.host = f.value
		}
	case 6:
		if isName(name, "expect") {
			if k.expects++; k.expects > 1 {
				return ErrTwice
			}
			if !isName(value, "100-continue") {
				return ErrExpect
			}
			r.expect = true
		}
	case 7:
		switch {
		case isName(name, "upgrade"):
			if k.upgrades++; k.upgrades > 1 {
				return ErrTwice
			}
			k.websocket = isName(value, "websocket")
		case isName(name, "trailer"):
			if k.trailers++; k.trailers > 1 {
				return ErrTwice
			}
			return checkTrailerNames(value)
		}
	case 10:
		if isName(name, "connection") {
			k.connections++
		}
	case 14:
		if isName(name, "content-length") {
			if k.lengths++; k.lengths > 1 {
				return ErrLengthTwice
			}
			return parseLength(value, &r.length)
		}
	case 17:
		if isName(name, "transfer-encoding") {
			if k.encodings++; k.encodings > 1 {
				return ErrTETwice
			}
			if !isName(value, "chunked") {
				return ErrTECoding
			}
		}
	}
	return nil
}

// parseLength accepts 1 to 18 digits, which cannot overflow.
func parseLength(b []byte, out *int64) error {
	if len(b) == 0 || len(b) > 18 {
		return ErrLength
	}
	n := int64(0)
	for _, c := range b {
		if c < '0' || c > '9' {
			return ErrLength
		}
		n = n*10 + int64(c-'0')
	}
	*out = n
	return nil
}

// judge decides what only the whole head can tell.
func (k *known) judge(r *Request) error {
	if err := k.judgeHost(r); err != nil {
		return err
	}
	if k.encodings > 0 {
		switch {
		case k.lengths > 0:
			return ErrLengthAndTE
		case r.minor == 0:
			return ErrTEOld
		}
		r.length = -1
	}
	if r.form == Authority && r.length != 0 {
		return ErrConnectBody
	}
	if k.underscore && r.hasAlias() {
		return ErrAlias
	}
	if k.connections > 0 {
		for i := range r.n {
			f := &r.fields[i]
			if !isName(f.name.of(r.buf), "connection") {
				continue
			}
			if err := k.options(r, f.value.of(r.buf)); err != nil {
				return err
			}
		}
	}
	if k.upgrades > 0 {
		r.upgrade = UpgradeOther
		if k.websocket && k.asked && r.length == 0 && r.minor == 1 && string(r.method.of(r.buf)) == "GET" {
			r.upgrade = UpgradeWebSocket
		}
	}
	return nil
}

func (k *known) judgeHost(r *Request) error {
	host := r.host.of(r.buf)
	if len(host) == 0 {
		if r.minor == 1 {
			return ErrHostMissing
		}
		if k.hosts == 0 {
			return nil
		}
	}
	if !validAuthority(host, false) {
		return ErrHost
	}
	if r.form == Absolute && !sameFold(host, authority(r.target.of(r.buf))) {
		return ErrHostMismatch
	}
	return nil
}

// options reads one Connection value (RFC 9110 §7.6.1).
func (k *known) options(r *Request, v []byte) error {
	for rest := v; rest != nil; {
		var o []byte
		if i := bytes.IndexByte(rest, ','); i >= 0 {
			o, rest = rest[:i], rest[i+1:]
		} else {
			o, rest = rest, nil
		}
		o = trimOWS(o)
		switch {
		case len(o) == 0: // an empty list element is to be ignored (§5.6.1.2)
		case isName(o, "close"):
			r.close = true
		case isName(o, "keep-alive"):
			r.keep = true
		case isName(o, "upgrade"):
			k.asked = true
		case !all(o, classToken) || isProtected(o) || r.hasForeign(o):
			return ErrConnection
		}
	}
	return nil
}

// hopByHop are the fields that a Connection option may name.
var hopByHop = [...]string{"te", "trailer", "upgrade", "keep-alive", "proxy-connection", "http2-settings"}

// hasForeign reports whether the request has a field of that name that is not known to be
// hop-by-hop: naming it would make the next hop lose it.
func (r *Request) hasForeign(name []byte) bool {
	for _, h := range hopByHop {
		if isName(name, h) {
			return false
		}
	}
	for i := range r.n {
		if sameFold(r.fields[i].name.of(r.buf), name) {
			return true
		}
	}
	return false
}

// protected are the fields that say who asks, where to, or how a message is framed. They
// may be neither named by Connection, nor sent as trailers, nor imitated with underscores.
var protected = [...]string{
	"host", "content-length", "transfer-encoding", "content-type", "content-encoding", "content-range", "connection", "expect",
	"authorization", "proxy-authorization", "cookie", "set-cookie", "forwarded", "via", "x-real-ip",
	"x-session", "x-session-id", "x-user-id", "x-request-id", "x-api-key", "api-key",
	"traceparent", "tracestate", "baggage", "idempotency-key", "cache-control", "max-forwards", "range",
}

var protectedPrefixes = [...]string{"x-outrigger-", "x-forwarded-", "x-snakepit-"}

func isProtected(name []byte) bool {
	for _, p := range protected {
		if isName(name, p) {
			return true
		}
	}
	for _, p := range protectedPrefixes {
		if len(name) > len(p) && isName(name[:len(p)], p) {
			return true
		}
	}
	return false
}

// hasAlias reports whether a name with underscores equals, hyphens for underscores, a
// protected field or another field of the request: CGI-like receivers cannot tell them
// apart.
func (r *Request) hasAlias() bool {
	for i := range r.n {
		a := r.fields[i].name.of(r.buf)
		if bytes.IndexByte(a, '_') < 0 {
			continue
		}
		for _, p := range protected {
			if aliasOf(a, p) {
				return true
			}
		}
		for _, p := range protectedPrefixes {
			if len(a) > len(p) && aliasOf(a[:len(p)], p) {
				return true
			}
		}
		for j := range r.n {
			if b := r.fields[j].name.of(r.buf); aliasOf(a, b) && !sameFold(a, b) {
				return true
			}
		}
	}
	return false
}

func aliasOf[S string | []byte](a []byte, b S) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		x, y := lower(a[i]), lower(b[i])
		if x == '_' {
			x = '-'
		}
		if y == '_' {
			y = '-'
		}
		if x != y {
			return false
		}
	}
	return true
}

// checkTrailerNames checks the value of a Trailer field.
func checkTrailerNames(v []byte) error {
	for rest := v; rest != nil; {
		var o []byte
		if i := bytes.IndexByte(rest, ','); i >= 0 {
			o, rest = rest[:i], rest[i+1:]
		} else {
			o, rest = rest, nil
		}
		o = trimOWS(o)
		if len(o) > 0 && (!all(o, classToken) || !trailerAllowed(o)) {
			return ErrTrailerField
		}
	}
	return nil
}

// trailerAllowed follows RFC 9110 §6.5.1: nothing that frames, routes, authenticates or
// modifies the request may come after its content.
func trailerAllowed(name []byte) bool {
	return !isProtected(name) && !isName(name, "trailer") && !isName(name, "te") && !isName(name, "upgrade")
}
