// Package identity holds what parts of the mesh prove to each other with secrets: today
// the session tokens that carry read-your-writes from one pod to another.
//
//	keys, err := identity.LoadOrCreateKeys("data/token.key")
//	text := keys.Sign(identity.Token{}.With(dot))   // goes out as x-outrigger-token
//	token, err := keys.Verify(text)                 // comes back with a later request
//
// A session token says, per region, up to which log position its holder has seen the
// world: {region, incarnation of that region's log, position}. A read that carries it is
// answered from nothing older. It is opaque to applications, signed so that nobody can
// make a node wait for positions that do not exist, and neither secret nor a credential:
// it grants nothing.
//
// # Form
//
// base64url without padding of
//
//	version      1 byte, 1
//	regions      uvarint, 0 to MaxRegions
//	each region  uvarint length, name; incarnation, 8 bytes big endian; position, uvarint
//	mac          16 bytes: HMAC-SHA-256 (RFC 2104) of everything before, truncated
//
// with regions in ascending order, none twice, and every number in its shortest form, so
// that equal tokens are equal texts. Verification compares in constant time and looks at
// nothing else before the signature holds.
//
// # Keys
//
// A key file has one key per line, base64 of 32 to 64 random bytes; the first signs, both
// verify. To rotate without refusing anything: add the new key as the second line
// everywhere, then put it first, then remove the old one. A KeyFile follows the file while
// the process runs, so no step needs a restart; leave a minute and a few seconds between
// them, which is how long a change takes to reach the processes that ask others for keys.
//
// Everything is immutable once built and may be used concurrently.
package identity

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/outrigger-mesh/outrigger"
)

// Limits of tokens and keys.
const (
	MaxRegions    = 32   // in one token
	MaxTokenBytes = 4096 // of text; longer ones are refused unread
	MaxKeys       = 2    // the one in use and the one being rotated in or out

	minKeyBytes, maxKeyBytes = 32, 64
	macBytes                 = 16
	formVersion              = 1
)

// domain keeps a signature from being one of anything else made with the same key.
const domain = "outrigger session token\x00"

// Token is what its holder has seen: at most one dot per region, in ascending order of
// regions. The zero Token has seen nothing. Tokens are values; no method changes its
// receiver.
type Token []outrigger.Dot

// With returns the token that has also seen the dots. In one incarnation the higher
// position counts; a dot of another incarnation replaces what was known of its region,
// because it was seen later. Dots without a region, position or incarnation, and those
// of regions beyond MaxRegions, are left out. It returns t itself when nothing changes.
func (t Token) With(dots ...outrigger.Dot) Token {
	out, copied := t, false
	for _, d := range dots {
		if d.Region == "" || d.Position == 0 || d.Incarnation == 0 || len(d.Region) > outrigger.MaxNameBytes {
			continue
		}
		i, found := out.find(d.Region)
		if found && out[i].Incarnation == d.Incarnation && out[i].Position >= d.Position || !found && len(out) >= MaxRegions {
			continue
		}
		if !copied {
			out, copied = append(make(Token, 0, len(t)+len(dots)), t...), true
		}
		if found {
			out[i] = d
			continue
		}
		out = append(out, outrigger.Dot{})
		copy(out[i+1:], out[i:])
		out[i] = d
	}
	return out
}

func (t Token) find(region string) (int, bool) {
	for i, d := range t {
		if d.Region >= region {
			return i, d.Region == region
		}
	}
	return len(t), false
}

// Keys sign and verify tokens.
type Keys struct {
	lines []string // as in the file
	macs  []*sync.Pool
}

// ParseKeys reads the content of a key file; empty lines and lines that begin with '#'
// do not count. Errors have kind Invalid and never show key material.
func ParseKeys(text string) (*Keys, error) {
	k := &Keys{}
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		raw, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(raw) < minKeyBytes || len(raw) > maxKeyBytes {
			return nil, outrigger.Errorf(outrigger.Invalid, "line %d of the token keys is not base64 of %d to %d bytes; make one with: openssl rand -base64 32", n+1, minKeyBytes, maxKeyBytes)
		}
		k.lines = append(k.lines, line)
		k.macs = append(k.macs, &sync.Pool{New: func() any { return hmac.New(sha256.New, raw) }})
	}
	if n := len(k.lines); n == 0 || n > MaxKeys {
		return nil, outrigger.Errorf(outrigger.Invalid, "there are %d token keys; give 1, or %d while one replaces the other", n, MaxKeys)
	}
	return k, nil
}

// NewKeys makes one random key.
func NewKeys() *Keys {
	raw := make([]byte, minKeyBytes)
	_, _ = rand.Read(raw) // never fails; crypto/rand ends the process instead
	k, err := ParseKeys(base64.StdEncoding.EncodeToString(raw))
	if err != nil {
		panic("identity: a key of our own does not parse: " + err.Error())
	}
	return k
}

// LoadKeys reads a key file. Errors have kind Invalid, or Unavailable when there is no
// reading it.
func LoadKeys(path string) (*Keys, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "token keys")
	}
	k, err := ParseKeys(string(raw))
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, path)
	}
	return k, nil
}

// LoadOrCreateKeys reads a key file, and makes one with a random key, for its owner alone
// to read (0600), when there is none. A file that is there and cannot be used is an error,
// never replaced. Of several processes that create it, all end up with the same key.
func LoadOrCreateKeys(path string) (*Keys, error) {
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return LoadKeys(path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "token keys")
	}
	// Written whole under another name first: a crash leaves no half of a key behind.
	f, err := os.CreateTemp(filepath.Dir(path), ".token-key-*") // 0600
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "token keys")
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(NewKeys().Text())
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Link(f.Name(), path) // unlike rename it replaces nothing
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "token keys")
	}
	return LoadKeys(path)
}

// Text returns the content of a key file with these keys. It is a secret.
func (k *Keys) Text() string { return strings.Join(k.lines, "\n") + "\n" }

// Same reports whether both hold the same keys in the same order.
func (k *Keys) Same(o *Keys) bool {
	return k == o || k != nil && o != nil && hmac.Equal([]byte(k.Text()), []byte(o.Text()))
}

// String hides the keys.
func (k *Keys) String() string { return strconv.Itoa(len(k.lines)) + " token keys" }

// LogValue hides the keys.
func (k *Keys) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Sign returns the text of a token; "" for one that has seen nothing.
func (k *Keys) Sign(t Token) string {
	if len(t) == 0 {
		return ""
	}
	b := encode(make([]byte, 0, 96), t)
	return base64.RawURLEncoding.EncodeToString(k.mac(b, 0, b))
}

// mac appends the truncated signature of b under key i to dst.
func (k *Keys) mac(dst []byte, i int, b []byte) []byte { return k.sign(dst, i, domain, b) }

func (k *Keys) sign(dst []byte, i int, domain string, b []byte) []byte {
	h := k.macs[i].Get().(hash.Hash)
	defer k.macs[i].Put(h)
	h.Reset()
	h.Write([]byte(domain))
	h.Write(b)
	var sum [sha256.Size]byte
	return append(dst, h.Sum(sum[:0])[:macBytes]...)
}

func encode(b []byte, t Token) []byte {
	b = append(b, formVersion)
	b = binary.AppendUvarint(b, uint64(len(t)))
	for _, d := range t {
		b = binary.AppendUvarint(b, uint64(len(d.Region)))
		b = append(b, d.Region...)
		b = binary.BigEndian.AppendUint64(b, d.Incarnation)
		b = binary.AppendUvarint(b, d.Position)
	}
	return b
}

// Verify returns the token a text stands for. Errors have kind Invalid and say nothing
// about what a right one would be.
func (k *Keys) Verify(text string) (Token, error) {
	if len(text) > MaxTokenBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "session token is %d bytes long, the limit is %d", len(text), MaxTokenBytes)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) <= macBytes {
		return nil, errForm()
	}
	body, sum := raw[:len(raw)-macBytes], raw[len(raw)-macBytes:]
	good := false
	for i := range k.macs {
		var want [macBytes]byte
		if hmac.Equal(sum, k.mac(want[:0], i, body)) {
			good = true
		}
	}
	if !good {
		return nil, outrigger.Errorf(outrigger.Invalid, "session token is not signed by this mesh, or by a key that is out of use")
	}
	t, ok := decode(body)
	if !ok {
		return nil, errForm()
	}
	return t, nil
}

func errForm() error {
	return outrigger.Errorf(outrigger.Invalid, "session token is malformed; send back what the last answer's %s said", outrigger.HeaderToken)
}

// decode reads the form encode writes, and only that.
func decode(b []byte) (Token, bool) {
	whole := b
	if len(b) == 0 || b[0] != formVersion {
		return nil, false
	}
	b = b[1:]
	count, b, ok := uvarint(b)
	if !ok || count == 0 || count > MaxRegions {
		return nil, false
	}
	t := make(Token, 0, count)
	for range count {
		var n uint64
		if n, b, ok = uvarint(b); !ok || n == 0 || n > outrigger.MaxNameBytes || uint64(len(b)) < n+8 {
			return nil, false
		}
		d := outrigger.Dot{Region: string(b[:n]), Incarnation: binary.BigEndian.Uint64(b[n:])}
		if d.Position, b, ok = uvarint(b[n+8:]); !ok || d.Position == 0 || d.Incarnation == 0 {
			return nil, false
		}
		if len(t) > 0 && t[len(t)-1].Region >= d.Region {
			return nil, false
		}
		t = append(t, d)
	}
	// Numbers have longer forms too; there is one text per token.
	return t, len(b) == 0 && bytes.Equal(encode(nil, t), whole)
}

func uvarint(b []byte) (uint64, []byte, bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, b, false
	}
	return v, b[n:], true
}
