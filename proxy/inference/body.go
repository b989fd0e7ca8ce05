package inference

import (
	"io"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

// openParts returns a reader of the pieces in order.
func openParts(p shape.Parts) io.ReadCloser { return &partsReader{rest: p} }

// partsReader reads parts in order. Close is a no-op: the memory is the request's.
type partsReader struct {
	rest shape.Parts
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
