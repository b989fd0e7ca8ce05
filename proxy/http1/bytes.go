package http1

import "bytes"

// Classes of bytes.
const (
	classToken  = 1 << iota // tchar, RFC 9110 §5.6.2
	classValue              // field value: HTAB, SP, visible, obs-text (§5.5)
	classTarget             // visible ASCII without the delimiters RFC 3986 excludes
	classHost               // reg-name without percent signs, IPv4
	classHex
)

// classes is a constant table; Go has no constant arrays.
var classes = makeClasses()

func makeClasses() (t [256]uint8) {
	set := func(chars string, class uint8) {
		for i := range len(chars) {
			t[chars[i]] |= class
		}
	}
	const digits, hex = "0123456789", "0123456789abcdefABCDEF"
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	set("!#$%&'*+-.^_`|~"+digits+letters, classToken)
	set("-._~!$&'()*+,;="+digits+letters, classHost)
	set(hex, classHex)
	set("\t", classValue)
	for c := 0x20; c < 0x100; c++ {
		if c != 0x7f {
			t[c] |= classValue
		}
		// '#' would be a fragment; quotes, brackets and the like must be escaped, but
		// widespread clients leave []{}|^"<>\` alone and no receiver splits on them.
		if c > 0x20 && c < 0x7f && c != '#' {
			t[c] |= classTarget
		}
	}
	return t
}

func all(b []byte, class uint8) bool {
	for _, c := range b {
		if classes[c]&class == 0 {
			return false
		}
	}
	return true
}

// isName reports whether b is s, ASCII case apart; s must be lower-case letters, digits and hyphens.
func isName(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i := range len(b) {
		c := b[i]
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != s[i] {
			return false
		}
	}
	return true
}

// sameFold reports whether a and b are equal, ASCII case apart.
func sameFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}

func isOWS(c byte) bool { return c == ' ' || c == '\t' }

func trimOWS(b []byte) []byte {
	for len(b) > 0 && isOWS(b[0]) {
		b = b[1:]
	}
	for len(b) > 0 && isOWS(b[len(b)-1]) {
		b = b[:len(b)-1]
	}
	return b
}

// EmptyLine returns the length of an empty line at the start of b, where a request should
// begin, 0 if there is none: some clients send one after a body, and a server should ignore it
// (RFC 9112 §2.2). It is for what Parse refused; a bare LF is none.
func EmptyLine(b []byte) int {
	if len(b) >= 2 && b[0] == '\r' && b[1] == '\n' {
		return 2
	}
	return 0
}

// line returns the length of the line that starts at b[at:], without its CRLF, and where
// the next one starts. No line may end beyond limit.
func line(b []byte, at, limit int) (length, next int, err error) {
	i := bytes.IndexByte(b[at:min(len(b), limit)], '\n')
	switch {
	case i < 0 && len(b) >= limit:
		return 0, 0, ErrHeadSize
	case i < 0:
		return 0, 0, ErrShort
	case i == 0 || b[at+i-1] != '\r':
		return 0, 0, ErrBareLF
	}
	return i - 1, at + i + 1, nil
}

// complete reports whether parsing b can come to a decision, given that b[:*seen] could
// not decide; it moves *seen so that no byte is looked at twice.
func complete(b []byte, seen *int, limit int) bool {
	for at := *seen; ; {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			// Everything was looked at; the next byte may be the LF of a CR seen now,
			// which the checks below find by looking back.
			*seen = len(b)
			return len(b) >= limit
		}
		at += i
		if at <= 1 || b[at-1] != '\r' || b[at-2] == '\n' {
			return true // bare LF, or an empty line
		}
		at++
		*seen = at
	}
}
