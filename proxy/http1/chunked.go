package http1

// Limits of the chunked coding.
const (
	maxExtensions    = 4 << 10 // bytes per message; no known client sends any
	maxTrailer       = 8 << 10
	maxTrailerFields = 32
	maxChunk         = 1 << 62
)

type chunkState uint8

const (
	atSize      chunkState = iota // before or within the digits
	atExtension                   // after the ;
	atSizeLF                      // CR seen
	atData
	atDataCR
	atDataLF
	atTrailer // collecting lines
	atEnd
)

// Chunked decodes a chunked body (RFC 9112 §7.1) piece by piece. The zero value is at the
// start of a body; Reset makes a used one so. It allocates only when trailers come.
type Chunked struct {
	state   chunkState
	digits  uint8
	size    uint64 // of the chunk being read: what is left of it
	ext     int
	trailer []byte // bytes of the trailer section so far
	start   int    // of the line of trailer that is not complete
	fields  []field
	err     error
}

// Reset prepares for another body and keeps the memory.
func (d *Chunked) Reset() { *d = Chunked{trailer: d.trailer[:0], fields: d.fields[:0]} }

// Done reports whether the body, with its trailers, is complete.
func (d *Chunked) Done() bool { return d.state == atEnd }

// Next takes bytes from the front of b: n are used up, and data, a part of b, is the next
// piece of the body (often empty, when only framing was used up). It returns after one
// piece of data; call it again while n > 0 and Done is false. Bytes after the end of the
// body are never used. An error is a *Refusal and final.
func (d *Chunked) Next(b []byte) (data []byte, n int, err error) {
	if d.err != nil {
		return nil, 0, d.err
	}
	for n < len(b) && d.state != atEnd {
		if d.state == atData {
			take := int(min(uint64(len(b)-n), d.size))
			data = b[n : n+take : n+take]
			if d.size -= uint64(take); d.size == 0 {
				d.state = atDataCR
			}
			return data, n + take, nil
		}
		if err := d.step(b[n]); err != nil {
			d.err = err
			return nil, n, err
		}
		n++
	}
	return nil, n, nil
}

// step takes one byte of framing.
func (d *Chunked) step(c byte) error {
	switch d.state {
	case atSize:
		return d.sizeByte(c)
	case atExtension:
		if c == '\r' {
			d.state = atSizeLF
			return nil
		}
		if classes[c]&classValue == 0 {
			return ErrChunkLine
		}
		if d.ext++; d.ext > maxExtensions {
			return ErrChunkExt
		}
	case atSizeLF:
		if c != '\n' {
			return ErrChunkLine
		}
		d.digits = 0
		if d.state = atData; d.size == 0 {
			d.state = atTrailer
		}
	case atDataCR:
		if c != '\r' {
			return ErrChunkEnd
		}
		d.state = atDataLF
	case atDataLF:
		if c != '\n' {
			return ErrChunkEnd
		}
		d.state = atSize
	case atTrailer:
		return d.trailerByte(c)
	}
	return nil
}

func (d *Chunked) sizeByte(c byte) error {
	switch {
	case classes[c]&classHex != 0:
		if d.digits++; d.digits > 16 || d.size >= maxChunk>>4 {
			return ErrChunkSize
		}
		v := c - '0'
		if c > '9' {
			v = lower(c) - 'a' + 10
		}
		d.size = d.size<<4 | uint64(v)
	case d.digits == 0:
		return ErrChunkSize
	case c == ';':
		if d.ext++; d.ext > maxExtensions {
			return ErrChunkExt
		}
		d.state = atExtension
	case c == '\r':
		d.state = atSizeLF
	case c == '\n':
		return ErrChunkLine
	default:
		return ErrChunkSize
	}
	return nil
}

// trailerByte collects the trailer section and checks each line when it is complete.
func (d *Chunked) trailerByte(c byte) error {
	if len(d.trailer) == maxTrailer {
		return ErrTrailerSize
	}
	d.trailer = append(d.trailer, c)
	if c != '\n' {
		return nil
	}
	end := len(d.trailer) - 2
	if end < d.start || d.trailer[end] != '\r' {
		return ErrBareLF
	}
	if end == d.start {
		d.state = atEnd
		return nil
	}
	if len(d.fields) == maxTrailerFields {
		return ErrTrailerSize
	}
	var f field
	var underscore bool
	if err := parseField(&f, d.trailer, d.start, end, &underscore); err != nil {
		return err
	}
	if underscore || !trailerAllowed(f.name.of(d.trailer)) {
		return ErrTrailerField
	}
	d.fields = append(d.fields, f)
	d.start = len(d.trailer)
	return nil
}

// Trailers is the number of trailer fields; final once Done.
func (d *Chunked) Trailers() int { return len(d.fields) }

// Trailer returns the name as sent and the trimmed value of trailer i, valid until Reset.
func (d *Chunked) Trailer(i int) (name, value []byte) {
	f := d.fields[i]
	return f.name.of(d.trailer), f.value.of(d.trailer)
}
