package http2

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// Limits of one request's fields: octets of the block on the wire, and decoded as RFC
// 9113 section 6.5.2 counts.
const (
	maxBlock         = 64 << 10
	maxFields        = 64 << 10
	maxContinuations = 64
)

// Head is the head of a request. It is immutable and may be shared by equal requests.
type Head struct {
	Method, Scheme, Authority, Path string
	// Fields are the others, in order; names are in lower case.
	Fields []hpack.HeaderField

	length int64 // content-length, -1 for none
	class  int   // what Inline said
	grpc   bool
}

// Get returns the first value of a field, "" for none.
func (h *Head) Get(name string) string {
	for i := range h.Fields {
		if h.Fields[i].Name == name {
			return h.Fields[i].Value
		}
	}
	return ""
}

// newHead checks the fields of a request (RFC 9113 section 8); the text says what is
// wrong with them, "" if nothing.
func newHead(fields []hpack.HeaderField) (h *Head, wrong string) {
	h = &Head{length: -1}
	seen := 0
	for len(fields) > 0 && strings.HasPrefix(fields[0].Name, ":") {
		f := fields[0]
		fields = fields[1:]
		var to *string
		bit := 0
		switch f.Name {
		case ":method":
			to, bit = &h.Method, 1
		case ":scheme":
			to, bit = &h.Scheme, 2
		case ":path":
			to, bit = &h.Path, 4
		case ":authority":
			to, bit = &h.Authority, 8
		default:
			return nil, "unknown pseudo-field"
		}
		if seen&bit != 0 || !validValue(f.Value) {
			return nil, "repeated or malformed pseudo-field"
		}
		seen |= bit
		*to = f.Value
	}
	switch {
	case !isToken(h.Method):
		return nil, "malformed or missing :method"
	case h.Method == http.MethodConnect:
		if seen != 1|8 || h.Authority == "" {
			return nil, "CONNECT has :method and :authority only"
		}
	case h.Scheme == "" || h.Path == "" || h.Path[0] != '/' && !(h.Path == "*" && h.Method == http.MethodOptions):
		return nil, "malformed or missing :scheme or :path"
	}
	if !validAuthority(h.Authority) {
		return nil, "malformed :authority"
	}
	h.Fields = append([]hpack.HeaderField(nil), fields...)
	return h, h.check()
}

// check looks at the fields that are no pseudo-fields.
func (h *Head) check() string {
	hosts := 0
	for _, f := range h.Fields {
		if wrong := checkField(f); wrong != "" {
			return wrong
		}
		switch f.Name {
		case "te":
			if f.Value != "trailers" {
				return "te other than trailers"
			}
		case "content-length":
			n, err := strconv.ParseUint(f.Value, 10, 62)
			if err != nil || f.Value[0] == '+' || h.length >= 0 && h.length != int64(n) {
				return "malformed content-length"
			}
			h.length = int64(n)
		case "content-type":
			h.grpc = h.Method == http.MethodPost && grpcType(f.Value)
		case "host":
			if hosts++; hosts > 1 || !validAuthority(f.Value) || h.Authority != "" && !strings.EqualFold(h.Authority, f.Value) {
				return "host that is repeated, malformed or contradicts :authority"
			}
		}
	}
	return ""
}

func grpcType(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// IsGRPC reports whether a request is a gRPC call, as this package sees it.
func IsGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && r.Method == http.MethodPost && grpcType(r.Header.Get("Content-Type"))
}

// checkField checks a field of a request or of its trailer.
func checkField(f hpack.HeaderField) string {
	if f.Name == "" || !validValue(f.Value) {
		return "malformed field"
	}
	for _, c := range []byte(f.Name) {
		if !tokenByte(c) || c >= 'A' && c <= 'Z' {
			return "malformed field name" // a second pseudo-field after others is one too
		}
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return "field of a connection"
	}
	return ""
}

// validValue is RFC 9113 section 8.2.1.
func validValue(v string) bool {
	for _, c := range []byte(v) {
		if c < 0x20 && c != '\t' || c == 0x7f {
			return false
		}
	}
	return v == "" || v[0] != ' ' && v[0] != '\t' && v[len(v)-1] != ' ' && v[len(v)-1] != '\t'
}

func validAuthority(a string) bool { return !strings.ContainsAny(a, " \t\"<>\\^`{|}/?#@") }

func isToken(s string) bool {
	for _, c := range []byte(s) {
		if !tokenByte(c) {
			return false
		}
	}
	return s != ""
}

func tokenByte(c byte) bool {
	switch {
	case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		return true
	}
	return c != 0 && strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// request makes the http.Request, without context, body and addresses.
func (h *Head) request() (*http.Request, error) {
	r := &http.Request{Method: h.Method, Proto: "HTTP/2.0", ProtoMajor: 2, Host: h.Authority, RequestURI: h.Path,
		ContentLength: h.length, Header: make(http.Header, len(h.Fields))}
	if h.Method == http.MethodConnect {
		r.URL, r.RequestURI = &url.URL{Host: h.Authority}, h.Authority
	} else {
		u, err := url.ParseRequestURI(h.Path)
		if err != nil {
			return nil, err
		}
		r.URL = u
	}
	var cookies []string
	for _, f := range h.Fields {
		switch f.Name {
		case "host":
			r.Host = f.Value
			continue
		case "cookie": // may come in pieces, RFC 9113 section 8.2.3
			cookies = append(cookies, f.Value)
			continue
		case "trailer":
			for name := range strings.SplitSeq(f.Value, ",") {
				if name = http.CanonicalHeaderKey(strings.TrimSpace(name)); name != "" && !forbiddenTrailer(name) {
					if r.Trailer == nil {
						r.Trailer = http.Header{}
					}
					r.Trailer[name] = nil
				}
			}
			continue
		}
		k := http.CanonicalHeaderKey(f.Name)
		r.Header[k] = append(r.Header[k], f.Value)
	}
	if cookies != nil {
		r.Header["Cookie"] = []string{strings.Join(cookies, "; ")}
	}
	return r, nil
}

// forbiddenTrailer are fields that frame or route a message (RFC 9110 section 6.5.1).
func forbiddenTrailer(canonical string) bool {
	switch canonical {
	case "Transfer-Encoding", "Trailer", "Content-Length", "Host", "Te", "Connection":
		return true
	}
	return false
}
