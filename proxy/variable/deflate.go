package variable

import (
	"compress/zlib"
	"io"

	"google.golang.org/grpc/encoding"
)

// RegisterDeflate lets gRPC calls be compressed with "deflate", which clients over gRPC's C
// core (Python, Ruby) can ask for beside gzip and which grpc-go has not by itself. It changes
// a table of the grpc module that has no lock: call it in main, before there is a server.
func RegisterDeflate() { encoding.RegisterCompressor(deflate{}) }

// deflate is the coding of RFC 9110, section 8.4.1.2: the zlib format, not a bare stream.
type deflate struct{}

// Name implements encoding.Compressor.
func (deflate) Name() string { return "deflate" }

// Compress implements encoding.Compressor.
func (deflate) Compress(w io.Writer) (io.WriteCloser, error) { return zlib.NewWriter(w), nil }

// Decompress implements encoding.Compressor. Its caller bounds what it reads.
func (deflate) Decompress(r io.Reader) (io.Reader, error) { return zlib.NewReader(r) }
