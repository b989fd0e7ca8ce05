package http1

import (
	"bytes"
	"net/netip"
	"unsafe"
)

// parseTarget checks the target and finds its form and query.
func (r *Request) parseTarget() error {
	t := r.target.of(r.buf)
	r.query = r.target.end
	if !all(t, classTarget) {
		return ErrTarget
	}
	method := r.method.of(r.buf)
	switch {
	case string(method) == "CONNECT":
		r.form = Authority
		if !validAuthority(t, true) {
			return ErrTarget
		}
		return nil
	case len(t) == 1 && t[0] == '*':
		r.form = Asterisk
		if string(method) != "OPTIONS" {
			return ErrTarget
		}
		return nil
	case t[0] == '/':
		r.form = Origin
	default:
		r.form = Absolute
		if authority(t) == nil {
			return ErrTarget
		}
	}
	path := t
	if q := bytes.IndexByte(t, '?'); q >= 0 {
		r.query = r.target.start + uint32(q)
		path = t[:q]
	}
	if !validEscapes(path) {
		return ErrTarget
	}
	return nil
}

// validEscapes reports whether every percent sign starts an escape; the receivers of this
// path would otherwise disagree about it.
func validEscapes(b []byte) bool {
	for {
		i := bytes.IndexByte(b, '%')
		if i < 0 {
			return true
		}
		if len(b) < i+3 || classes[b[i+1]]&classes[b[i+2]]&classHex == 0 {
			return false
		}
		b = b[i+3:]
	}
}

// authority returns the authority of an absolute target with scheme http or https, or nil
// if there is no valid one. User information is refused (RFC 9110 §4.2.4).
func authority(t []byte) []byte {
	i := bytes.Index(t, []byte("://"))
	if i < 0 || !isName(t[:i], "http") && !isName(t[:i], "https") {
		return nil
	}
	t = t[i+3:]
	if end := bytes.IndexAny(t, "/?"); end >= 0 {
		t = t[:end]
	}
	if !validAuthority(t, false) {
		return nil
	}
	return t
}

// validAuthority reports whether b is host [":" port] with a host that is not empty.
func validAuthority(b []byte, needPort bool) bool {
	var port []byte
	if len(b) > 0 && b[0] == '[' {
		end := bytes.IndexByte(b, ']')
		if end < 2 {
			return false
		}
		// The string lives only during the call; b is not changed meanwhile.
		a, err := netip.ParseAddr(unsafe.String(&b[1], end-1))
		if err != nil || !a.Is6() || a.Zone() != "" {
			return false
		}
		if port = b[end+1:]; len(port) > 0 && port[0] != ':' {
			return false
		}
	} else {
		host := b
		if i := bytes.IndexByte(b, ':'); i >= 0 {
			host, port = b[:i], b[i:]
		}
		if len(host) == 0 || !all(host, classHost) {
			return false
		}
	}
	if len(port) == 0 {
		return !needPort
	}
	if port = port[1:]; len(port) > 5 || needPort && len(port) == 0 {
		return false
	}
	for _, c := range port {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}
