// Package authz decides who may operate a control plane, and as whom. It is small and
// pure: it is told what a caller presented and answers a Caller or an error, so the whole
// policy can be read here and tested as one table.
//
// A credential is a bearer token that belongs to a named person with a role:
//
//	viewer    sees everything operators see, changes nothing
//	operator  rollouts, approvals, experiments, alerts, break-glass
//	admin     models' settings, deployment plans, and whatever passes over a gate
//
// The rules, default deny:
//
//   - With credentials configured every mutating call must present one as
//     "authorization: Bearer <token>", wherever it comes from. Reads need one too,
//     except from this machine; a read may also present it as the password of Basic
//     authentication, because that is the only thing a browser can be asked for.
//   - A credential that is presented and wrong is refused, also where none is needed.
//   - Without any configured, callers on this machine are served, as nobody in particular:
//     they cannot approve anything, because an approval is worth what its name is.
//   - A request that a proxy forwarded is never "on this machine", whatever address the
//     proxy itself has.
//
// Who somebody is comes from the credential alone: As refuses a request that names
// another actor.
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
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// MinTokenBytes is the shortest admin token New accepts. It is a guard against an
// accidental one-word token, not a measure of strength: generate 32 random bytes.
const MinTokenBytes = 16

// Policy is the configured rule set. The zero Policy has no credential: this machine only.
type Policy struct{ people []Person }

// New returns the rules for one unnamed admin token; "" means none. Only a digest is kept, so
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
	return Policy{people: []Person{{Role: Admin, sum: sha256.Sum256([]byte(token))}}}, nil
}

// Join returns the rules under which the credentials of both count.
func Join(a, b Policy) Policy { return Policy{people: slices.Concat(a.people, b.people)} }

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

// Identify returns who is calling, or why nobody is let in. Whether the caller's role
// suffices for what is asked is Caller.Need's to say.
func (p Policy) Identify(r Request) (Caller, error) {
	local := r.Local && !r.Forwarded
	switch {
	case len(p.people) == 0 && local:
		return Caller{Role: Admin}, nil
	case len(p.people) == 0:
		return Caller{}, outrigger.Errorf(outrigger.Denied,
			"only callers on the control plane's own machine are served while no admin token is configured; configure one and present it as a bearer token")
	case len(r.Authorization) == 0 && local && !r.Mutating:
		return Caller{Role: Viewer}, nil
	case len(r.Authorization) == 0:
		return Caller{}, outrigger.Errorf(outrigger.Unauthorised, `missing "authorization: Bearer <token>"`)
	case len(r.Authorization) > 1:
		// Two headers are two identities: picking either would let a proxy and a server
		// behind it disagree about who is calling.
		return Caller{}, outrigger.Errorf(outrigger.Unauthorised, "authorization is given %d times; give it once", len(r.Authorization))
	}
	scheme, credential, ok := strings.Cut(r.Authorization[0], " ")
	basic := strings.EqualFold(scheme, "basic")
	if basic && !r.Mutating {
		raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(credential))
		ok = ok && err == nil
		_, credential, _ = strings.Cut(string(raw), ":")
	} else {
		ok = ok && strings.EqualFold(scheme, "bearer")
	}
	c, known := p.Token(strings.TrimSpace(credential))
	if !ok || !known {
		return Caller{}, outrigger.Errorf(outrigger.Unauthorised, "the presented token is wrong or not a bearer token")
	}
	if basic {
		// Browsers send it again by themselves, which must never be enough to change something.
		c.Role = Viewer
	}
	return c, nil
}

// Token returns whose token it is. Every credential is compared, in constant time.
func (p Policy) Token(token string) (Caller, bool) {
	sum := sha256.Sum256([]byte(token))
	found := Caller{}
	for _, q := range p.people {
		if subtle.ConstantTimeCompare(sum[:], q.sum[:]) == 1 {
			found = Caller{Name: q.Name, Role: q.Role}
		}
	}
	return found, found.Role != Nobody
}

// Still reports whether somebody identified before is in the rules with the same role:
// what a session has to ask at every request, so that taking a person out ends it.
func (p Policy) Still(c Caller) bool {
	return slices.ContainsFunc(p.people, func(q Person) bool { return q.Name == c.Name && q.Role == c.Role })
}

// Open reports whether no credential is configured.
func (p Policy) Open() bool { return len(p.people) == 0 }

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
