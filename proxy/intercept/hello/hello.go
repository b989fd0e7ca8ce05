// Package hello reads the server name (SNI) out of a TLS client hello without ending
// TLS, so that encrypted connections can be routed as they are.
//
// The bytes may arrive in any pieces: ServerName says whether it needs more. It looks at
// no more than MaxBytes, allocates the name only, and never panics; input that is not a
// client hello is an error, not a guess. RFC 8446 §4.1.2 and §5.1, RFC 6066 §3.
package hello

import (
	"encoding/binary"
	"errors"
	"strings"
)

// MaxBytes is how much of a connection is looked at.
const MaxBytes = 16 << 10

// ErrShort says that more bytes are needed.
var ErrShort = errors.New("hello: more bytes are needed")

// ErrMalformed says that this is no client hello that can be read, or a longer one.
var ErrMalformed = errors.New("hello: not a TLS client hello")

// ServerName returns the host name a connection that begins with b asks for, in lower
// case; "" without error if the client hello has none.
func ServerName(b []byte) (string, error) {
	msg, err := handshake(b)
	if err != nil {
		return "", err
	}
	r := reader{b: msg}
	r.skip(2 + 32)                  // version, random
	r.skip(int(r.number(1)))        // session
	r.skip(int(r.number(2)))        // cipher suites
	r.skip(int(r.number(1)))        // compression
	if len(r.b) == 0 && !r.broken { // no extensions at all
		return "", nil
	}
	ext := r.take(int(r.number(2)))
	if r.broken || len(r.b) > 0 {
		return "", ErrMalformed
	}
	for e := (reader{b: ext}); len(e.b) > 0; {
		kind := e.number(2)
		body := e.take(int(e.number(2)))
		if e.broken {
			return "", ErrMalformed
		}
		if kind == 0 {
			return hostName(body)
		}
	}
	return "", nil
}

// handshake joins the records at the start of b into the body of the first handshake
// message.
func handshake(b []byte) ([]byte, error) {
	var msg []byte
	for rest := b[:min(len(b), MaxBytes)]; ; {
		if len(msg) >= 4 {
			if msg[0] != 1 {
				return nil, ErrMalformed
			}
			if n := int(msg[1])<<16 | int(msg[2])<<8 | int(msg[3]); n > MaxBytes {
				return nil, ErrMalformed
			} else if len(msg) >= 4+n {
				return msg[4 : 4+n], nil
			}
		}
		if len(rest) > 0 && rest[0] != 0x16 || len(rest) > 1 && rest[1] != 3 {
			return nil, ErrMalformed
		}
		if len(rest) < 5 {
			return nil, short(b)
		}
		n := int(binary.BigEndian.Uint16(rest[3:]))
		if n == 0 || n > MaxBytes {
			return nil, ErrMalformed
		}
		if msg == nil && len(rest) > 5 && rest[5] != 1 {
			return nil, ErrMalformed
		}
		if len(rest) < 5+n {
			return nil, short(b)
		}
		if msg == nil {
			msg = rest[5 : 5+n : 5+n] // the usual case: one record, nothing copied
		} else {
			msg = append(msg, rest[5:5+n]...)
		}
		rest = rest[5+n:]
	}
}

// short is ErrShort as long as more may be looked at.
func short(b []byte) error {
	if len(b) >= MaxBytes {
		return ErrMalformed
	}
	return ErrShort
}

// hostName reads the extension's list; only names of type host_name are defined.
func hostName(b []byte) (string, error) {
	r := reader{b: b}
	list := reader{b: r.take(int(r.number(2)))}
	if r.broken || len(r.b) > 0 {
		return "", ErrMalformed
	}
	for len(list.b) > 0 {
		kind := list.number(1)
		name := list.take(int(list.number(2)))
		if list.broken {
			return "", ErrMalformed
		}
		if kind == 0 {
			if !plausible(name) {
				return "", ErrMalformed
			}
			return strings.ToLower(string(name)), nil
		}
	}
	return "", nil
}

// plausible accepts what can be a host name: letters, digits, '-', '_' and single dots
// within, at most 255 bytes.
func plausible(name []byte) bool {
	if len(name) == 0 || len(name) > 255 || name[0] == '.' || name[len(name)-1] == '.' {
		return false
	}
	for i, c := range name {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		case c == '.' && name[i-1] != '.':
		default:
			return false
		}
	}
	return true
}

// Matches reports whether a host name in lower case is the pattern, or has exactly one
// label more than the domain behind its "*." (RFC 9525 §6.3).
func Matches(pattern, name string) bool {
	if domain, wild := strings.CutPrefix(pattern, "*."); wild {
		label, rest, ok := strings.Cut(name, ".")
		return ok && label != "" && rest == domain
	}
	return name != "" && name == pattern
}

// reader takes fields off a message; after a field that is not there it is broken.
type reader struct {
	b      []byte
	broken bool
}

func (r *reader) take(n int) []byte {
	if r.broken || n > len(r.b) {
		r.broken, r.b = true, nil
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) skip(n int) { r.take(n) }

func (r *reader) number(bytes int) (v uint32) {
	for _, c := range r.take(bytes) {
		v = v<<8 | uint32(c)
	}
	return v
}
