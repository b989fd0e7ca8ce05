// Package authz decides who may operate a control plane. It is small and pure: it is
// told what a caller presented and answers yes or an error, so the whole policy can be
// read here and tested as one table.
//
// The rules, default deny:
//
//   - With an admin token configured every mutating call must present it as
//     "authorization: Bearer <token>", wherever it comes from. Reads need it too,
//     except from this machine; a read may also present it as the password of Basic
//     authentication, because that is the only thing a browser can be asked for.
//   - Without a token only callers on this machine are served.
//   - A request that a proxy forwarded is never "on this machine", whatever address the
//     proxy itself has.
//
// CheckHost is the other half for HTTP: it refuses a Host header that names neither
// this machine nor a configured name, which is what stops DNS rebinding (a web page
// whose name is re-pointed at 127.0.0.1 keeps sending its own name as Host).
//
// Errors have kind Unauthorised (present a token) or Denied (no token would help), and
// never repeat what was presented. All functions are safe for concurrent use.
package authz

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net"
	"net/netip"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// MinTokenBytes is the shortest admin token New accepts. It is a guard against an
// accidental one-word token, not a measure of strength: generate 32 random bytes.
const MinTokenBytes = 16

// Policy is the configured rule set. The zero Policy has no token: this machine only.
type Policy struct {
	sum   [sha256.Size]byte
	token bool
}

// New returns the rules for an admin token; "" means none. Only a digest is kept, so
// that comparing takes the same time whatever was presented and a core dump does not
// hold the secret here. A token shorter than MinTokenBytes has kind Invalid.
func New(token string) (Policy, error) {
	if token == "" {
		return Policy{}, nil
	}
	if len(token) < MinTokenBytes {
		return Policy{}, outrigger.Errorf(outrigger.Invalid,
			"the admin token is %d bytes long, at least %d are needed; generate one with 32 random bytes", len(token), MinTokenBytes)
	}
	return Policy{sum: sha256.Sum256([]byte(token)), token: true}, nil
}

// Request is what one call presented.
type Request struct {
	// Mutating is true unless the call is known to change nothing.
	Mutating bool
	// Local is true when the peer is this machine: see LocalPeer.
	Local bool
	// Forwarded is true when a proxy says it relayed the call (Forwarded or
	// X-Forwarded-For is present).
	Forwarded bool
	// Authorization holds the values of the authorization header or metadata key.
	Authorization []string
}

// Decide returns nil when the call is allowed.
func (p Policy) Decide(r Request) error {
	local := r.Local && !r.Forwarded
	if !p.token {
		if local {
			return nil
		}
		return outrigger.Errorf(outrigger.Denied,
			"only callers on the control plane's own machine are served while no admin token is configured; configure one and present it as a bearer token")
	}
	if local && !r.Mutating {
		return nil
	}
	switch len(r.Authorization) {
	case 0:
		return outrigger.Errorf(outrigger.Unauthorised, `missing "authorization: Bearer <admin token>"`)
	case 1:
		if p.matches(r.Authorization[0], !r.Mutating) {
			return nil
		}
		return outrigger.Errorf(outrigger.Unauthorised, "the presented admin token is wrong or not a bearer token")
	}
	// Two headers are two identities: picking either would let a proxy and a server
	// behind it disagree about who is calling.
	return outrigger.Errorf(outrigger.Unauthorised, "authorization is given %d times; give it once", len(r.Authorization))
}

// matches compares in constant time. Basic is for reads only: browsers send it again by
// themselves, which must never be enough to change something.
func (p Policy) matches(header string, read bool) bool {
	scheme, credential, ok := strings.Cut(header, " ")
	if !ok {
		return false
	}
	switch {
	case strings.EqualFold(scheme, "bearer"):
	case strings.EqualFold(scheme, "basic") && read:
		raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(credential))
		if err != nil {
			return false
		}
		_, credential, _ = strings.Cut(string(raw), ":")
	default:
		return false
	}
	sum := sha256.Sum256([]byte(strings.TrimSpace(credential)))
	return subtle.ConstantTimeCompare(sum[:], p.sum[:]) == 1
}

// LocalPeer reports whether a peer address is this machine: a loopback IP, a Unix
// socket, or a pipe inside the process. Anything it does not recognise is remote.
func LocalPeer(a net.Addr) bool {
	if a == nil {
		return false
	}
	switch a.Network() {
	case "unix", "unixpacket", "pipe", "bufconn", "mem":
		return true
	}
	return LocalHostPort(a.String())
}

// LocalHostPort is LocalPeer for the text form "ip:port" (http.Request.RemoteAddr).
// "@" and "" are what net/http reports for a Unix socket and for nothing known; only
// the first is local.
func LocalHostPort(s string) bool {
	if s == "@" {
		return true
	}
	ap, err := netip.ParseAddrPort(s)
	return err == nil && ap.Addr().Unmap().IsLoopback()
}

// CheckHost refuses a Host header (with or without port) that is neither localhost, a
// loopback IP address, nor one of the allowed names. Names compare without case and
// without a trailing dot. Errors have kind Denied.
func CheckHost(host string, allowed []string) error {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.ToLower(strings.TrimSuffix(strings.Trim(name, "[]"), "."))
	if name == "localhost" {
		return nil
	}
	if ip, err := netip.ParseAddr(name); err == nil && ip.Unmap().IsLoopback() {
		return nil
	}
	for _, a := range allowed {
		if name != "" && strings.EqualFold(name, strings.TrimSuffix(a, ".")) {
			return nil
		}
	}
	return outrigger.Errorf(outrigger.Denied,
		"host %q is not one this server answers to; use localhost or add the name to the allowed hosts", clip(host))
}

func clip(s string) string {
	const limit = 80
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
