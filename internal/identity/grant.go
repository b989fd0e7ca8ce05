package identity

import (
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// Bounds of grants.
const (
	MaxGrantBytes = 2048           // of text; longer ones are refused unread
	MaxGrantLife  = 24 * time.Hour // from signing to the end
)

// grantDomain: see domain.
const grantDomain = "outrigger arm grant\x00"

// Grant lets a tester see one arm of one experiment, whatever the unit: it comes with a
// request as x-outrigger-force. Its form is base64url without padding of a version byte
// (1), experiment and arm (uvarint length, bytes), the end (uvarint, Unix seconds) and
// 16 bytes of HMAC-SHA-256. Unlike a session token it is a credential until its end.
type Grant struct {
	Experiment, Arm string
	Until           time.Time
}

// SignGrant returns the text of a grant. The error has kind Invalid: a name is empty or
// too long, or the end is not within MaxGrantLife from now on.
func (k *Keys) SignGrant(g Grant, now time.Time) (string, error) {
	for field, v := range map[string]string{"experiment": g.Experiment, "arm": g.Arm} {
		if err := outrigger.CheckName(field, v); err != nil {
			return "", err
		}
	}
	if d := g.Until.Sub(now); d <= 0 || d > MaxGrantLife {
		return "", outrigger.Errorf(outrigger.Invalid, "the grant would last %v; allowed is up to %v", d, MaxGrantLife)
	}
	b := []byte{formVersion}
	for _, s := range []string{g.Experiment, g.Arm} {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	b = binary.AppendUvarint(b, uint64(g.Until.Unix()))
	return base64.RawURLEncoding.EncodeToString(k.sign(b, 0, grantDomain, b)), nil
}

// VerifyGrant reads a grant. The error has kind Unauthorised for one that is not signed by
// these keys, is malformed or has ended; it never says which, beyond what the holder knows.
func (k *Keys) VerifyGrant(text string, now time.Time) (Grant, error) {
	refused := outrigger.Errorf(outrigger.Unauthorised, "the grant is not valid here or has ended; ask for a new one")
	if len(text) > MaxGrantBytes {
		return Grant{}, refused
	}
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(b) <= macBytes {
		return Grant{}, refused
	}
	body, sum := b[:len(b)-macBytes], b[len(b)-macBytes:]
	if !k.signed(body, sum, grantDomain) || body[0] != formVersion {
		return Grant{}, refused
	}
	var g Grant
	rest := body[1:]
	for _, s := range []*string{&g.Experiment, &g.Arm} {
		n, used := binary.Uvarint(rest)
		if used <= 0 || n > uint64(len(rest)-used) {
			return Grant{}, refused
		}
		*s, rest = string(rest[used:used+int(n)]), rest[used+int(n):]
	}
	until, used := binary.Uvarint(rest)
	if used != len(rest) || used <= 0 {
		return Grant{}, refused
	}
	if g.Until = time.Unix(int64(until), 0); !now.Before(g.Until) {
		return Grant{}, refused
	}
	return g, nil
}

// signed reports whether sum is the signature of b under any of the keys.
func (k *Keys) signed(b, sum []byte, domain string) bool {
	for i := range k.macs {
		var room [macBytes]byte
		if hmac.Equal(k.sign(room[:0], i, domain, b), sum) {
			return true
		}
	}
	return false
}
