package inference

import (
	"bytes"
	"net/http"
	"strconv"
	"unsafe"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// Heads as bytes: what outgoing and relayHead do with header maps.

// fieldKind is what becomes of a field of a head.
type fieldKind uint8

const (
	fieldOther      fieldKind = iota // passed on
	fieldHop                         // hop by hop, or written anew
	fieldOurs                        // forged, see stripOurs
	fieldType                        // Content-Type
	fieldConnection                  // tells more of them
	fieldHops                        // the forwarders so far
	fieldRetry                       // the client's own retries
	fieldEncoding                    // Accept-Encoding: the answer must stay readable
	fieldSpecial                     // the handler knows what to do
)

// fieldOf sorts the name of a field.
func fieldOf(name []byte) fieldKind {
	switch len(name) {
	case 2:
		if same(name, "te") {
			return fieldSpecial
		}
	case 4:
		if same(name, "host") {
			return fieldHop
		}
	case 6:
		if same(name, "expect") {
			return fieldSpecial
		}
	case 7:
		if same(name, "upgrade") || same(name, "trailer") {
			return fieldSpecial
		}
	case 10:
		if same(name, "connection") {
			return fieldConnection
		}
		if same(name, "keep-alive") {
			return fieldHop
		}
	case 12:
		if same(name, "content-type") {
			return fieldType
		}
		if same(name, "grpc-timeout") {
			return fieldSpecial
		}
	case 14:
		if same(name, "content-length") {
			return fieldHop
		}
		if same(name, "http2-settings") {
			return fieldSpecial
		}
	case 15:
		if same(name, "accept-encoding") {
			return fieldEncoding
		}
	case 16:
		if same(name, "content-encoding") || same(name, "proxy-connection") {
			return fieldSpecial
		}
	case 17:
		if same(name, "transfer-encoding") || same(name, "x-request-timeout") {
			return fieldSpecial
		}
	case 18:
		if same(name, "proxy-authenticate") {
			return fieldHop
		}
	case 19:
		if same(name, "proxy-authorization") {
			return fieldHop
		}
	case 23:
		if same(name, "x-stainless-retry-count") {
			return fieldRetry
		}
	case 31:
		if same(name, "inference-header-content-length") {
			return fieldSpecial
		}
	}
	if len(name) > len(hdrOurs) && (name[0] == 'x' || name[0] == 'X') && same(name[:len(hdrOurs)], "x-outrigger-") {
		if same(name, "x-outrigger-hops") {
			return fieldHops
		}
		return fieldOurs
	}
	return fieldOther
}

// same reports whether name is s, ASCII case apart; s is in lower case.
func same(name []byte, s string) bool {
	if len(name) != len(s) {
		return false
	}
	for i := range len(s) {
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != s[i] {
			return false
		}
	}
	return true
}

// plainConnection: options that name no fields.
func plainConnection(v []byte) bool { return same(v, "keep-alive") || same(v, "close") }

// textOf is b as a string, for as long as b is not changed.
func textOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// isStreamType reports whether a Content-Type is that of a stream in any protocol.
func isStreamType(v []byte) bool {
	return isMedia(v, "text/event-stream") || isMedia(v, "application/x-ndjson")
}

// isMedia reports whether a Content-Type is media, parameters apart.
func isMedia(v []byte, media string) bool {
	if i := bytes.IndexByte(v, ';'); i >= 0 {
		v = v[:i]
	}
	return same(bytes.TrimSpace(v), media)
}

// fieldSource is where request fields are looked up, by canonical name.
type fieldSource interface{ first(canonical string) string }

// headerFields is a fieldSource of a header map.
type headerFields http.Header

func (h headerFields) first(canonical string) string { return first(http.Header(h), canonical) }

// requestFields is a fieldSource of a head.
type requestFields struct{ q *http1.Request }

func (f requestFields) first(canonical string) string {
	for i := range f.q.Len() {
		name, value := f.q.Field(i)
		if len(name) == len(canonical) && sameFold(name, canonical) {
			return string(value)
		}
	}
	return ""
}

func sameFold(name []byte, s string) bool {
	for i := range len(s) {
		a, b := name[i], s[i]
		if a != b && (a|0x20 != b|0x20 || a|0x20 < 'a' || a|0x20 > 'z') {
			return false
		}
	}
	return true
}

// fields reads from a request's head what the call needs, and reports whether the loop
// can pass the head on.
func (c *inlineCall) fields(q *http1.Request) bool {
	for i := range q.Len() {
		name, value := q.Field(i)
		switch fieldOf(name) {
		case fieldSpecial:
			return false
		case fieldConnection:
			if !plainConnection(value) {
				return false
			}
		case fieldHops:
			n, err := strconv.Atoi(textOf(value))
			if err != nil || n < 0 || n >= upstream.MaxHops || c.hops > 0 {
				return false
			}
			c.hops = n
		case fieldRetry:
			c.again = c.again || len(value) > 0 && string(value) != "0"
		}
	}
	return true
}

// appendRequest renders the request as outgoing does.
func (c *inlineCall) appendRequest(b []byte, q *http1.Request, body []byte) []byte {
	b = append(b, "POST "...)
	if path := c.path.Rewrite(c.assign.Version.Upstream); path != "" {
		b = append(b, path...)
	} else {
		b = append(b, q.Path()...)
	}
	if query := q.Query(); len(query) > 0 {
		b = append(append(b, '?'), query...)
	}
	b = append(append(b, " HTTP/1.1\r\nHost: "...), c.t.endpoint.Address...)
	b = append(b, "\r\n"...)
	for i := range q.Len() {
		name, value := q.Field(i)
		switch fieldOf(name) {
		case fieldOther, fieldType, fieldRetry:
			b = appendField(b, name, value)
		}
	}
	if c.assign.HasUnit {
		b = append(b, hdrBucket+": "...)
		b = strconv.AppendUint(b, uint64(c.assign.Bucket), 10)
		b = append(b, "\r\n"...)
	}
	b = append(b, upstream.HeaderHops+": "...)
	b = strconv.AppendInt(b, int64(c.hops)+1, 10)
	b = append(b, "\r\n"...)
	parts := c.path.RewriteBody(body, &c.env, c.assign.Version.Upstream)
	b = http1.AppendLength(b, parts.Size())
	b = append(b, "\r\n"...)
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// appendField appends a field that was parsed, so its bytes are valid.
func appendField(b, name, value []byte) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

// appendAnswer renders the head of the answer as relayHead does; size -1 stands for chunks.
func (c *inlineCall) appendAnswer(b []byte, a *http1.Answer, size int, date []byte, closing bool) []byte {
	b = http1.AppendStatus(b, a.Status())
	dated := false
	for i := range a.Len() {
		name, value := a.Field(i)
		switch fieldOf(name) {
		case fieldOther:
			dated = dated || same(name, "date")
			b = appendField(b, name, value)
		case fieldType, fieldEncoding, fieldRetry, fieldHops:
			b = appendField(b, name, value)
		case fieldSpecial: // of requests, most of them
			if !hopByHopAnswer(name) {
				b = appendField(b, name, value)
			}
		case fieldHop:
			if same(name, "host") { // means nothing in an answer
				b = appendField(b, name, value)
			}
		}
	}
	c.eachHeader(func(key, value string) {
		b = append(append(b, key...), ": "...)
		b = append(append(b, value...), "\r\n"...)
	})
	if size >= 0 {
		b = http1.AppendLength(b, int64(size))
	} else {
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	if closing {
		b = append(b, "Connection: close\r\n"...)
	}
	if !dated {
		b = http1.AppendDate(b, date)
	}
	return append(b, "\r\n"...)
}

func hopByHopAnswer(name []byte) bool {
	for _, s := range [...]string{"te", "trailer", "transfer-encoding", "upgrade", "proxy-connection", "http2-settings"} {
		if same(name, s) {
			return true
		}
	}
	return false
}
