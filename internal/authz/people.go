package authz

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// Role is what a credential is good for; each includes those before it.
type Role uint8

// The roles.
const (
	Nobody Role = iota
	Viewer
	Operator
	Admin
)

var roles = [...]string{"nobody", "viewer", "operator", "admin"}

// String is the role's name in the access file.
func (r Role) String() string { return roles[min(int(r), len(roles)-1)] }

// RoleOf reads a role's name; false for nobody and for anything else.
func RoleOf(name string) (Role, bool) {
	i := slices.Index(roles[:], name)
	return Role(max(i, 0)), i > 0
}

// Person is one credential: whose it is, what it is good for, and the digest of its token.
type Person struct {
	Name string
	Role Role
	sum  [sha256.Size]byte
}

// MaxPeople bounds an access file: every credential is compared at every call.
const MaxPeople = 1_000

// Parse reads an access file: one credential a line, "NAME ROLE sha256:HEX", where HEX is
// the SHA-256 of the token. Tokens are 32 random bytes (see Line), so that a plain digest is as
// hard to reverse as they are to guess. Empty lines and those that begin with # are
// skipped. A name may have several tokens, all of one role. Errors have kind Invalid and
// name the line.
func Parse(text string) (Policy, error) {
	var p Policy
	bad := func(line int, format string, args ...any) (Policy, error) {
		return Policy{}, outrigger.Errorf(outrigger.Invalid, "line %d: "+format, append([]any{line}, args...)...)
	}
	in := bufio.NewScanner(strings.NewReader(text))
	for n := 1; in.Scan(); n++ {
		line := strings.TrimSpace(in.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 {
			return bad(n, "%d words; write NAME ROLE sha256:HEX", len(f))
		}
		if err := outrigger.CheckName("name", f[0]); err != nil {
			return bad(n, "%v", err)
		}
		role, ok := RoleOf(f[1])
		if !ok {
			return bad(n, "role %q is not viewer, operator or admin", f[1])
		}
		q := Person{Name: f[0], Role: role}
		digest, ok := strings.CutPrefix(f[2], "sha256:")
		raw, err := hex.DecodeString(digest)
		if !ok || err != nil || copy(q.sum[:], raw) != len(q.sum) || len(raw) != len(q.sum) {
			return bad(n, "the third word is not sha256: and 64 hexadecimal digits")
		}
		for _, o := range p.people {
			if o.Name == q.Name && o.Role != q.Role || o.sum == q.sum {
				return bad(n, "%s is there before with another role, or the token is; one role per name, one name per token", q.Name)
			}
		}
		if p.people = append(p.people, q); len(p.people) > MaxPeople {
			return bad(n, "more than %d credentials", MaxPeople)
		}
	}
	if err := in.Err(); err != nil {
		return Policy{}, outrigger.Wrap(outrigger.Invalid, err, "access file")
	}
	if len(p.people) == 0 {
		return Policy{}, outrigger.Errorf(outrigger.Invalid, "the access file holds no credential; add one, or leave the file out to serve this machine only")
	}
	return p, nil
}

// People lists the credentials, without their digests.
func (p Policy) People() []Person {
	out := slices.Clone(p.people)
	for i := range out {
		out[i].sum = [sha256.Size]byte{}
	}
	return out
}

// Line is the access file's line for a token.
func Line(name string, role Role, token string) string {
	sum := sha256.Sum256([]byte(token))
	return name + " " + role.String() + " sha256:" + hex.EncodeToString(sum[:])
}

// Caller is who is calling. Name is "" for a credential that names nobody and for callers
// on this machine that presented none.
type Caller struct {
	Name string
	Role Role
}

// Need returns nil if the caller's role includes the one given, else an error of kind Denied.
func (c Caller) Need(r Role, what string) error {
	if c.Role >= r {
		return nil
	}
	return outrigger.Errorf(outrigger.Denied, "%s needs the role %s; %s has the role %s", what, r, c.who(), c.Role)
}

func (c Caller) who() string {
	if c.Name == "" {
		return "the caller"
	}
	return c.Name
}

// As returns the name a change is recorded under: the credential's. A request may repeat
// it; one that names somebody else is forged and refused (kind Denied). Only a caller
// without a name may say who is acting.
func (c Caller) As(claimed string) (string, error) {
	if c.Name == "" || claimed == "" || claimed == c.Name {
		if c.Name != "" {
			return c.Name, nil
		}
		return claimed, nil
	}
	return "", outrigger.Errorf(outrigger.Denied, "the request says that %q is acting, and the credential is that of %s; leave the actor out", clip(claimed), c.Name)
}

type callerKey struct{}

// WithCaller returns a context that says who is calling.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom returns who is calling; false inside the process, where nobody was asked.
func CallerFrom(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(callerKey{}).(Caller)
	return c, ok
}
