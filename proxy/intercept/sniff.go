// Package intercept is the sidecar's front door: it accepts connections, finds out
// which protocol each speaks from its first bytes, and hands it to the server of that
// protocol.
//
// Applications reach the door without a change to their code in one of these ways: an
// environment variable (OPENAI_BASE_URL, a worker's server address) or the same port
// bound in the pod, all on this one listener. The packages below bring them here without
// either: rules and netfilter have the kernel redirect connections, redirect takes them.
//
// Promises: the accept loop never ends because of a failing accept (descriptor
// exhaustion backs off and goes on); a connection that sends nothing recognisable
// within SniffTimeout is closed; at most MaxPending connections are being looked at,
// beyond that new ones wait in the kernel's queue; bytes that were looked at are
// delivered again, exactly once.
package intercept

import "bytes"

// Protocol is what a connection speaks.
type Protocol uint8

// The protocols the door can tell apart.
const (
	Unknown Protocol = iota
	HTTP1            // a request line follows
	HTTP2            // RFC 9113 §3.4 connection preface, in the clear
	TLS              // a TLS record of type handshake
)

// String returns a lower-case word for logs and metrics.
func (p Protocol) String() string {
	switch p {
	case HTTP1:
		return "http/1"
	case HTTP2:
		return "h2c"
	case TLS:
		return "tls"
	}
	return "unknown"
}

// preface is the fixed start of an HTTP/2 connection.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// maxMethod is the longest method token accepted (RFC 9110 names none longer than 7;
// WebDAV's longest is 16).
const maxMethod = 24

// Sniff decides from the first bytes of a connection. decided is false when more bytes
// are needed; it is always true once len(b) > maxMethod.
func Sniff(b []byte) (p Protocol, decided bool) {
	if len(b) == 0 {
		return Unknown, false
	}
	if b[0] == 0x16 { // TLS handshake; the next byte is the major version, always 3
		if len(b) < 2 {
			return Unknown, false
		}
		if b[1] == 3 {
			return TLS, true
		}
		return Unknown, true
	}
	n := min(len(b), len(preface))
	if string(b[:n]) == preface[:n] {
		if n == len(preface) {
			return HTTP2, true
		}
		// "PRI" is reserved for this (RFC 9113 §11.6), so the method is no ambiguity.
		return Unknown, false
	}
	// A method is a token followed by one space; leading empty lines are tolerated as
	// RFC 9112 §2.2 asks.
	s := bytes.TrimLeft(b, "\r\n")
	if len(b)-len(s) > maxMethod { // of empty lines, too, there can be too many
		return Unknown, true
	}
	for i, c := range s {
		if c == ' ' && i > 0 {
			return HTTP1, true
		}
		if !tokenByte(c) || i >= maxMethod {
			return Unknown, true
		}
	}
	return Unknown, false
}

// tokenByte reports whether c may appear in a method (RFC 9110 §5.6.2).
func tokenByte(c byte) bool {
	switch {
	case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		return true
	}
	return bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) >= 0
}
