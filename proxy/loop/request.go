package loop

import (
	"context"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// request builds what the handler gets; all strings are cut from one copy of the head.
func (x *exchange) request(ctx context.Context, b *body, remote net.Addr) (*http.Request, error) {
	q := &x.req
	head := string(q.Head())
	target := q.TargetIn(head)
	r := &http.Request{Method: q.MethodIn(head), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: q.Minor(), Host: q.HostIn(head),
		RequestURI: target, ContentLength: q.ContentLength(), Close: !q.KeepAlive(), Body: http.NoBody}
	if r.ProtoMinor == 0 {
		r.Proto = "HTTP/1.0"
	}
	if remote != nil {
		r.RemoteAddr = remote.String()
	}
	var err error
	if q.Form() == http1.Authority { // as net/http has it: only a host
		r.URL, r.Host = &url.URL{Host: target}, target
	} else if r.URL, err = url.ParseRequestURI(target); err != nil {
		return nil, http1.ErrTarget
	}
	if q.Form() == http1.Absolute {
		r.Host = r.URL.Host
	}
	r.Header = fields(q, head)
	if q.ContentLength() < 0 {
		r.TransferEncoding = []string{"chunked"}
		r.Trailer = announced(r.Header)
	}
	r.Header.Del("Trailer")
	if q.Upgrade() == http1.UpgradeOther {
		dropUpgrade(r.Header)
	}
	if b != nil {
		r.Body = b
	}
	r = r.WithContext(ctx)
	if b != nil {
		b.req = r
	}
	return r, nil
}

// fields makes the header map, without Host and Transfer-Encoding, which net/http keeps
// elsewhere too. One slice backs all single values.
func fields(q *http1.Request, head string) http.Header {
	h := make(http.Header, q.Len())
	values := make([]string, q.Len())
	for i := range q.Len() {
		name, value := q.FieldIn(head, i)
		key := textproto.CanonicalMIMEHeaderKey(name)
		if key == "Host" || key == "Transfer-Encoding" {
			continue
		}
		if old, ok := h[key]; ok {
			h[key] = append(old, value)
			continue
		}
		values[i] = value
		h[key] = values[i : i+1 : i+1]
	}
	return h
}

// announced returns a map with the trailers the client says it will send.
func announced(h http.Header) http.Header {
	if len(h["Trailer"]) == 0 {
		return nil
	}
	t := http.Header{}
	for name := range strings.SplitSeq(h["Trailer"][0], ",") {
		if name = textproto.TrimString(name); name != "" {
			t[http.CanonicalHeaderKey(name)] = nil
		}
	}
	return t
}

// dropUpgrade removes the request to switch protocols (RFC 9110 §7.8 lets a server ignore
// it), so that no handler passes an h2c upgrade on.
func dropUpgrade(h http.Header) {
	delete(h, "Upgrade")
	delete(h, "Http2-Settings")
	var kept []string
	for _, v := range h["Connection"] {
		for o := range strings.SplitSeq(v, ",") {
			o = textproto.TrimString(o)
			if o != "" && !strings.EqualFold(o, "upgrade") && !strings.EqualFold(o, "http2-settings") {
				kept = append(kept, o)
			}
		}
	}
	delete(h, "Connection")
	if len(kept) > 0 {
		h["Connection"] = []string{strings.Join(kept, ", ")}
	}
}
