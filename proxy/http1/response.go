package http1

import (
	"net/http"
	"strconv"
	"time"
)

// DateLen is the length of a Date value (RFC 9110 §5.6.7), IMF-fixdate.
const DateLen = len(http.TimeFormat)

// DateCache renders a Date value once a second.
type DateCache struct {
	second int64
	text   [DateLen]byte
}

// At returns the value for now; it is valid until the next call in another second.
func (d *DateCache) At(now time.Time) []byte {
	if s := now.Unix(); s != d.second || d.text[0] == 0 {
		d.second = s
		now.UTC().AppendFormat(d.text[:0], http.TimeFormat)
	}
	return d.text[:]
}

// AppendStatus appends the status line. Codes outside 100..999 become 500, since a line
// that cannot be parsed would desynchronise the connection.
func AppendStatus(dst []byte, code int) []byte {
	if code == http.StatusOK {
		return append(dst, "HTTP/1.1 200 OK\r\n"...)
	}
	if code < 100 || code > 999 {
		code = http.StatusInternalServerError
	}
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(code), 10)
	dst = append(dst, ' ')
	dst = append(dst, http.StatusText(code)...) // may be empty; the space stays (RFC 9112 §4)
	return append(dst, "\r\n"...)
}

// AppendField appends one field line. Bytes a value may not have become spaces, so that
// no value can start a line of its own; a name that is no token is left out with its value.
func AppendField[N, V string | []byte](dst []byte, name N, value V) []byte {
	if len(name) == 0 {
		return dst
	}
	start := len(dst)
	for i := range len(name) {
		if classes[name[i]]&classToken == 0 {
			return dst[:start]
		}
		dst = append(dst, name[i])
	}
	dst = append(dst, ": "...)
	at := len(dst)
	dst = append(dst, value...)
	for i, c := range dst[at:] {
		if classes[c]&classValue == 0 {
			dst[at+i] = ' '
		}
	}
	return append(dst, "\r\n"...)
}

// AppendLength appends a Content-Length field.
func AppendLength(dst []byte, n int64) []byte {
	dst = append(dst, "Content-Length: "...)
	dst = strconv.AppendInt(dst, n, 10)
	return append(dst, "\r\n"...)
}

// AppendDate appends a Date field; date is what DateCache.At or Request.Date gives.
func AppendDate(dst, date []byte) []byte {
	dst = append(dst, "Date: "...)
	dst = append(dst, date...)
	return append(dst, "\r\n"...)
}

// AppendHead appends a whole head for a body of known length: status, Content-Type (left
// out when empty), Content-Length, Date (left out when nil), and the empty line.
func AppendHead(dst []byte, code int, contentType string, length int64, date []byte) []byte {
	dst = AppendStatus(dst, code)
	if contentType != "" {
		dst = AppendField(dst, "Content-Type", contentType)
	}
	dst = AppendLength(dst, length)
	if date != nil {
		dst = AppendDate(dst, date)
	}
	return append(dst, "\r\n"...)
}

// AppendChunkSize appends the line before n bytes of chunk data, n > 0; a CRLF must follow
// the data.
func AppendChunkSize(dst []byte, n int) []byte {
	dst = strconv.AppendUint(dst, uint64(n), 16)
	return append(dst, "\r\n"...)
}

// AppendRefusal appends the complete answer to a request that was refused with err, as
// JSON with the refusal's word, and announces that the connection closes. An err that is
// no *Refusal is answered as a plain 400 that does not quote it.
func AppendRefusal(dst []byte, err error, date []byte) []byte {
	if r, ok := err.(*Refusal); ok { // never wrapped: this package returns the values as they are
		return appendError(dst, r.Status, r.Word, r.Text, date)
	}
	return appendError(dst, http.StatusBadRequest, "request", "malformed request", date)
}

func appendError(dst []byte, status int, word, text string, date []byte) []byte {
	const prefix, middle, suffix = `{"error":{"kind":"invalid","reason":"`, `","message":"`, "\"}}\n"
	dst = AppendStatus(dst, status)
	dst = append(dst, "Connection: close\r\nContent-Type: application/json\r\n"...)
	dst = AppendLength(dst, int64(len(prefix)+len(word)+len(middle)+len(text)+len(suffix)))
	if date != nil {
		dst = AppendDate(dst, date)
	}
	dst = append(dst, "\r\n"...)
	// Words and texts are constants of this package without characters JSON escapes.
	dst = append(append(dst, prefix...), word...)
	dst = append(append(dst, middle...), text...)
	return append(dst, suffix...)
}
