package inference

import (
	"encoding/json"
	"io"
)

// parts is the request body with another model name: head, name, tail. The original is
// not copied, so an 8 MiB prompt costs nothing here.
type parts [3][]byte

func (c *call) rewritten() parts {
	return rewrite(c.body, &c.env, c.assign.Version.Upstream)
}

// rewrite replaces the model's string token by the name; an empty or equal name leaves
// the body as it is.
func rewrite(body []byte, e *envelope, name string) parts {
	if name == "" || name == e.model {
		return parts{body, nil, nil}
	}
	quoted, err := json.Marshal(name)
	if err != nil { // a string always marshals
		return parts{body, nil, nil}
	}
	return parts{body[:e.modelStart], quoted, body[e.modelEnd:]}
}

func (p parts) size() int64 { return int64(len(p[0]) + len(p[1]) + len(p[2])) }

func (p parts) open() io.ReadCloser { return &partsReader{rest: p} }

// partsReader reads parts in order. Close is a no-op: the memory is the request's.
type partsReader struct {
	rest parts
	i    int
}

// Read implements io.Reader.
func (r *partsReader) Read(b []byte) (int, error) {
	for r.i < len(r.rest) {
		if n := copy(b, r.rest[r.i]); n > 0 {
			r.rest[r.i] = r.rest[r.i][n:]
			return n, nil
		}
		if len(r.rest[r.i]) > 0 {
			return 0, nil // b is empty
		}
		r.i++
	}
	return 0, io.EOF
}

// WriteTo implements io.WriterTo, sparing the transport its copy buffer.
func (r *partsReader) WriteTo(w io.Writer) (total int64, err error) {
	for ; r.i < len(r.rest); r.i++ {
		n, err := w.Write(r.rest[r.i])
		total += int64(n)
		r.rest[r.i] = r.rest[r.i][n:]
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// Close implements io.Closer.
func (r *partsReader) Close() error { return nil }
