package http1

import "bytes"

// Limits of a request head.
type Limits struct {
	Head   int // bytes of request line and fields with the final empty line; 0 = 65536
	Fields int // number of fields; 0 = MaxFields, which is also the most
}

// MaxFields is the most fields a Request can hold.
const MaxFields = 128

// defaultHead is http.DefaultMaxHeaderBytes / 16: identity tokens and cookies fit, and
// ten thousand half-sent heads stay within a pod's memory.
const defaultHead = 64 << 10

func (l Limits) head() int {
	if l.Head <= 0 {
		return defaultHead
	}
	return l.Head
}

func (l Limits) fields() int {
	if l.Fields <= 0 || l.Fields > MaxFields {
		return MaxFields
	}
	return l.Fields
}

// Form says how the target is written (RFC 9112 §3.2).
type Form uint8

// The four forms.
const (
	Origin    Form = iota // /path?query
	Absolute              // http://host/path?query; Host says the same
	Authority             // host:port, CONNECT only
	Asterisk              // *, OPTIONS only
)

// Upgrade says what a request asks to switch to.
type Upgrade uint8

// What may be asked for.
const (
	UpgradeNone      Upgrade = iota
	UpgradeWebSocket         // RFC 6455 §4.1: GET, exactly websocket, and Connection says upgrade
	UpgradeOther             // anything else, h2c for one: to be ignored and not passed on (RFC 9110 §7.8)
)

type span struct{ start, end uint32 }

func (s span) of(b []byte) []byte { return b[s.start:s.end:s.end] }

type field struct{ name, value span }

// Request is a parsed head. The zero value is ready for Parse.
type Request struct {
	// Date is the value for a Date field, set by whoever serves the request; not parsed.
	Date []byte

	buf                  []byte
	method, target, host span
	query                uint32 // where the ? of the target is; target.end if there is none
	n                    int
	length               int64 // of the body; -1 = chunked
	minor                uint8
	form                 Form
	upgrade              Upgrade
	close, keep          bool // Connection options
	expect               bool
	fields               [MaxFields]field
}

// Parse reads the head at the start of b. It returns the head's length with its final
// empty line, or ErrShort when b ends too early, or a *Refusal. *seen is 0 when b starts a
// new head and is otherwise left alone between calls: it remembers how much of b was
// looked at, so that a head that comes in many pieces costs linear time. After an error r
// holds nothing of use.
func (r *Request) Parse(b []byte, seen *int, lim Limits) (int, error) {
	limit := lim.head()
	if *seen > 0 && !complete(b, seen, limit) {
		return 0, ErrShort
	}
	n, err := r.parse(b, limit, lim.fields())
	if err == ErrShort && *seen == 0 {
		complete(b, seen, limit)
		// At least one byte counts as seen, or the next call would parse from the start.
		*seen = max(*seen, min(1, len(b)))
	}
	return n, err
}

func (r *Request) parse(b []byte, limit, maxFields int) (int, error) {
	length, at, err := line(b, 0, limit)
	if err != nil {
		return 0, err
	}
	r.reset(b)
	if err := r.requestLine(b[:length]); err != nil {
		return 0, err
	}
	var k known
	for {
		start := at
		length, at, err = line(b, start, limit)
		if err != nil {
			return 0, err
		}
		if length == 0 {
			break
		}
		if r.n == maxFields {
			return 0, ErrFieldNumber
		}
		f := &r.fields[r.n]
		if err := parseField(f, b, start, start+length, &k.underscore); err != nil {
			return 0, err
		}
		r.n++
		if err := k.note(r, f); err != nil {
			return 0, err
		}
	}
	r.buf = b[:at:at]
	if err := k.judge(r); err != nil {
		return 0, err
	}
	return at, nil
}

func (r *Request) reset(b []byte) {
	r.buf = b
	r.n, r.length, r.host = 0, 0, span{}
	r.upgrade, r.close, r.keep, r.expect = UpgradeNone, false, false, false
}

// requestLine parses METHOD SP TARGET SP HTTP/1.x (RFC 9112 §3), exactly one space each.
func (r *Request) requestLine(b []byte) error {
	m := bytes.IndexByte(b, ' ')
	if m <= 0 || !all(b[:m], classToken) {
		return ErrRequestLine
	}
	t := bytes.IndexByte(b[m+1:], ' ')
	if t <= 0 {
		return ErrRequestLine
	}
	t += m + 1
	v := b[t+1:]
	const name = "HTTP/1.1"
	if len(v) != len(name) || string(v[:5]) != name[:5] || v[6] != '.' {
		return ErrRequestLine
	}
	if v[5] != '1' || v[7] != '0' && v[7] != '1' {
		if v[5]-'0' <= 9 && v[7]-'0' <= 9 {
			return ErrVersion
		}
		return ErrRequestLine
	}
	r.minor = v[7] - '0'
	r.method = span{0, uint32(m)}
	r.target = span{uint32(m + 1), uint32(t)}
	return r.parseTarget()
}

// parseField splits b[start:end] into name and value.
func parseField(f *field, b []byte, start, end int, underscore *bool) error {
	l := b[start:end]
	if isOWS(l[0]) {
		return ErrFold
	}
	i := 0
	for i < len(l) && classes[l[i]]&classToken != 0 {
		if l[i] == '_' {
			*underscore = true
		}
		i++
	}
	switch {
	case i < len(l) && isOWS(l[i]):
		return ErrColonSpace
	case i == 0 || i == len(l) || l[i] != ':':
		return ErrFieldName
	}
	f.name = span{uint32(start), uint32(start + i)}
	v, e := start+i+1, end
	for v < e && isOWS(b[v]) {
		v++
	}
	for e > v && isOWS(b[e-1]) {
		e--
	}
	if !all(b[v:e], classValue) {
		return ErrFieldValue
	}
	f.value = span{uint32(v), uint32(e)}
	return nil
}

// Method is the method as sent; methods are case-sensitive.
func (r *Request) Method() []byte { return r.method.of(r.buf) }

// Target is the request target as sent.
func (r *Request) Target() []byte { return r.target.of(r.buf) }

// Path is the target up to its query, undecoded. Only an Origin target has one.
func (r *Request) Path() []byte { return r.buf[r.target.start:r.query:r.query] }

// Query is what follows the first question mark of the target, undecoded; nil without one.
func (r *Request) Query() []byte {
	if r.query >= r.target.end {
		return nil
	}
	return r.buf[r.query+1 : r.target.end : r.target.end]
}

// Host is the value of the Host field; empty only for HTTP/1.0.
func (r *Request) Host() []byte { return r.host.of(r.buf) }

// Form says how the target is written.
func (r *Request) Form() Form { return r.form }

// Minor is the minor version, 0 or 1.
func (r *Request) Minor() int { return int(r.minor) }

// Len is the number of fields.
func (r *Request) Len() int { return r.n }

// Field returns the name as sent and the trimmed value of field i, 0 ≤ i < Len.
func (r *Request) Field(i int) (name, value []byte) {
	f := &r.fields[:r.n][i]
	return f.name.of(r.buf), f.value.of(r.buf)
}

// Get returns the value of the first field of that name, given in lower case; nil if
// there is none. more reports whether there are others of the same name.
func (r *Request) Get(name string) (value []byte, more bool) {
	for i := range r.n {
		f := &r.fields[i]
		if int(f.name.end-f.name.start) != len(name) || !isName(f.name.of(r.buf), name) {
			continue
		}
		if value != nil {
			return value, true
		}
		value = f.value.of(r.buf)
		if value == nil {
			value = []byte{}
		}
	}
	return value, false
}

// ContentLength is the length of the body in bytes: 0 for none, -1 for chunked.
func (r *Request) ContentLength() int64 { return r.length }

// KeepAlive reports whether the client wants to go on using the connection (RFC 9112 §9.3).
func (r *Request) KeepAlive() bool { return !r.close && (r.minor == 1 || r.keep) }

// ExpectContinue reports whether the client waits for a 100 before it sends the body; an
// HTTP/1.0 client never does (RFC 9110 §10.1.1).
func (r *Request) ExpectContinue() bool { return r.expect && r.minor == 1 && r.length != 0 }

// Upgrade says what the request asks to switch to.
func (r *Request) Upgrade() Upgrade { return r.upgrade }

// Simple reports whether the request can be answered from its head alone: HTTP/1.1,
// origin form, no body, no expectation, no upgrade.
func (r *Request) Simple() bool {
	return r.minor == 1 && r.form == Origin && r.length == 0 && !r.expect && r.upgrade == UpgradeNone
}

// Head is the bytes Parse accepted.
func (r *Request) Head() []byte { return r.buf }

// CopyTo makes dst the same request over buf, which must start with the same head.
func (r *Request) CopyTo(dst *Request, buf []byte) {
	n := len(r.buf)
	dst.Date = nil
	dst.buf = buf[:n:n]
	dst.method, dst.target, dst.host, dst.query = r.method, r.target, r.host, r.query
	dst.n, dst.length, dst.minor, dst.form, dst.upgrade = r.n, r.length, r.minor, r.form, r.upgrade
	dst.close, dst.keep, dst.expect = r.close, r.keep, r.expect
	copy(dst.fields[:r.n], r.fields[:r.n])
}

// The In methods cut strings out of head, which must be string(r.Head()), so that a
// server that needs strings copies the head once and not field by field.

// MethodIn is Method out of head.
func (r *Request) MethodIn(head string) string { return r.method.in(head) }

// TargetIn is Target out of head.
func (r *Request) TargetIn(head string) string { return r.target.in(head) }

// HostIn is Host out of head.
func (r *Request) HostIn(head string) string { return r.host.in(head) }

// FieldIn is Field out of head.
func (r *Request) FieldIn(head string, i int) (name, value string) {
	f := &r.fields[:r.n][i]
	return f.name.in(head), f.value.in(head)
}

func (s span) in(head string) string { return head[s.start:s.end] }
