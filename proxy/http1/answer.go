package http1

import "bytes"

// Unframed is the content length of an answer that ends with its connection.
const Unframed = -2

// Answer is the head of a response, as a client must read it (RFC 9112 §6.3). The zero
// value is ready for Parse. Like Request it keeps offsets into the buffer it parsed.
type Answer struct {
	buf         []byte
	status      int
	minor       uint8
	n           int
	length      int64
	close, keep bool
	fields      [MaxFields]field
}

// Parse reads the head at the start of b: method is that of the request answered. The
// result and seen are as with Request.Parse. Answers are refused where receivers differ in
// what they would take for the content: Content-Length with Transfer-Encoding, two lengths
// that differ, a coding other than chunked, a coding in HTTP/1.0, folded lines, bare LF and
// control bytes. After any *Refusal the connection must be closed.
func (r *Answer) Parse(b []byte, seen *int, method string, lim Limits) (int, error) {
	limit := lim.head()
	if *seen > 0 && !complete(b, seen, limit) {
		return 0, ErrShort
	}
	n, err := r.parse(b, method, limit, lim.fields())
	if err == ErrShort && *seen == 0 {
		complete(b, seen, limit)
		*seen = max(*seen, min(1, len(b))) // as in Request.Parse
	}
	return n, err
}

func (r *Answer) parse(b []byte, method string, limit, maxFields int) (int, error) {
	length, at, err := line(b, 0, limit)
	if err != nil {
		return 0, err
	}
	r.buf, r.n, r.close, r.keep = b, 0, false, false
	if err := r.statusLine(b[:length]); err != nil {
		return 0, err
	}
	claimed, coded := int64(-1), false
	for {
		start := at
		if length, at, err = line(b, start, limit); err != nil {
			return 0, err
		}
		if length == 0 {
			break
		}
		if r.n == maxFields {
			return 0, ErrFieldNumber
		}
		f := &r.fields[r.n]
		var underscore bool // anybody may use one in an answer: nobody routes by it
		if err := parseField(f, b, start, start+length, &underscore); err != nil {
			return 0, err
		}
		r.n++
		if err := r.note(f, &claimed, &coded); err != nil {
			return 0, err
		}
	}
	r.buf = b[:at:at]
	return at, r.frame(method, claimed, coded)
}

// statusLine parses HTTP/1.x SP 3DIGIT [SP reason] (RFC 9112 §4); the space before an
// absent reason is often left out.
func (r *Answer) statusLine(b []byte) error {
	const name = "HTTP/1.1 200"
	if len(b) < len(name) || string(b[:5]) != name[:5] || b[6] != '.' || b[8] != ' ' {
		return ErrStatusLine
	}
	if b[5] != '1' || b[7] != '0' && b[7] != '1' {
		return ErrStatusLine
	}
	status := 0
	for _, c := range b[9:12] {
		if c < '0' || c > '9' {
			return ErrStatusLine
		}
		status = status*10 + int(c-'0')
	}
	if status < 100 || len(b) > len(name) && (b[12] != ' ' || !all(b[13:], classValue)) {
		return ErrStatusLine
	}
	r.minor, r.status = b[7]-'0', status
	return nil
}

// note looks at the fields that frame the content.
func (r *Answer) note(f *field, claimed *int64, coded *bool) error {
	name, value := f.name.of(r.buf), f.value.of(r.buf)
	switch len(name) {
	case 10:
		if isName(name, "connection") {
			for rest := value; rest != nil; {
				var o []byte
				if i := bytes.IndexByte(rest, ','); i >= 0 {
					o, rest = rest[:i], rest[i+1:]
				} else {
					o, rest = rest, nil
				}
				o = trimOWS(o)
				r.close = r.close || isName(o, "close")
				r.keep = r.keep || isName(o, "keep-alive")
			}
		}
	case 14:
		if isName(name, "content-length") {
			was := *claimed
			if err := parseLength(value, claimed); err != nil {
				return err
			}
			if was >= 0 && was != *claimed { // the same twice is allowed (RFC 9110 §8.6)
				return ErrLengthTwice
			}
		}
	case 17:
		if isName(name, "transfer-encoding") {
			if *coded {
				return ErrTETwice
			}
			if *coded = true; !isName(value, "chunked") {
				return ErrTECoding
			}
		}
	}
	return nil
}

// frame decides where the content ends.
func (r *Answer) frame(method string, claimed int64, coded bool) error {
	switch {
	case coded && claimed >= 0:
		return ErrLengthAndTE
	case coded && r.minor == 0:
		return ErrTEOld
	}
	switch {
	case r.status < 200 || r.status == 204:
		r.length = 0
		// There must be none (RFC 9110 §8.6, RFC 9112 §6.1): somebody may think that
		// content follows.
		r.close = r.close || coded || claimed > 0
	case method == "HEAD" || r.status == 304:
		r.length = 0
	case coded:
		r.length = -1
	case claimed >= 0:
		r.length = claimed
	default:
		r.length, r.close = Unframed, true
	}
	return nil
}

// Status is the status code, 100 to 999.
func (r *Answer) Status() int { return r.status }

// Minor is the minor version, 0 or 1.
func (r *Answer) Minor() int { return int(r.minor) }

// Length is the length of the content that follows in bytes, -1 for chunked, Unframed for
// content that ends with the connection. It is 0 for answers that never have content,
// whatever their Content-Length says.
func (r *Answer) Length() int64 { return r.length }

// KeepAlive reports whether the connection can be used again after the content.
func (r *Answer) KeepAlive() bool { return !r.close && (r.minor == 1 || r.keep) }

// Len is the number of fields.
func (r *Answer) Len() int { return r.n }

// Head is the bytes Parse accepted.
func (r *Answer) Head() []byte { return r.buf }

// Field returns the name as sent and the trimmed value of field i, 0 ≤ i < Len.
func (r *Answer) Field(i int) (name, value []byte) {
	f := &r.fields[:r.n][i]
	return f.name.of(r.buf), f.value.of(r.buf)
}

// FieldIn returns the name as sent and the trimmed value of field i, 0 ≤ i < Len, cut out
// of head, a copy of Head.
func (r *Answer) FieldIn(head string, i int) (name, value string) {
	f := &r.fields[:r.n][i]
	return f.name.in(head), f.value.in(head)
}
