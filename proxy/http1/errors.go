package http1

import (
	"errors"
	"net/http"
)

// ErrShort says that the bytes end before the message head (or chunk) does.
var ErrShort = errors.New("http1: more bytes are needed")

// Refusal is the error for a message that is not accepted. The values below are the
// whole set, so they can be compared by pointer and counted by Word. The status is part
// of the protocol (RFC 9110 §15) and not an application error, which is why it is here
// and not derived from an outrigger.Kind.
type Refusal struct {
	Status int    // to answer with
	Word   string // snake_case, for metrics
	Text   string // what is wrong and what to send instead
}

// Error returns the text.
func (r *Refusal) Error() string { return "http1: " + r.Text }

func bad(word, text string) *Refusal { return &Refusal{http.StatusBadRequest, word, text} }

// Everything that can be wrong with a request head.
var (
	ErrBareLF       = bad("bare_lf", "line ends in LF without CR; end lines with CRLF")
	ErrRequestLine  = bad("request_line", "request line is not METHOD SP TARGET SP HTTP/1.1")
	ErrTarget       = bad("target", "request target is not a valid origin, absolute, authority (CONNECT) or asterisk (OPTIONS) form")
	ErrFold         = bad("obs_fold", "line begins with white space; field values may not be folded")
	ErrColonSpace   = bad("space_before_colon", "white space between a field name and its colon")
	ErrFieldName    = bad("field_name", "field name is empty or has a byte that is no token character")
	ErrFieldValue   = bad("field_value", "field value has a control byte (CR, NUL or another)")
	ErrHostMissing  = bad("host_missing", "HTTP/1.1 request without a Host field, or with an empty one")
	ErrHostTwice    = bad("host_twice", "more than one Host field")
	ErrHost         = bad("host", "Host is not a name or address with an optional port")
	ErrHostMismatch = bad("host_mismatch", "Host and the authority of the absolute target differ")
	ErrLength       = bad("content_length", "Content-Length is not one number of 1 to 18 digits")
	ErrLengthTwice  = bad("content_length_twice", "more than one Content-Length field")
	ErrLengthAndTE  = bad("content_length_and_transfer_encoding", "Content-Length together with Transfer-Encoding")
	ErrTETwice      = bad("transfer_encoding_twice", "more than one Transfer-Encoding field")
	ErrTEOld        = bad("transfer_encoding_http10", "Transfer-Encoding in an HTTP/1.0 request")
	ErrConnectBody  = bad("connect_body", "CONNECT with a body")
	ErrConnection   = bad("connection", "Connection is not a list of tokens, or names an end-to-end field")
	ErrAlias        = bad("field_alias", "a field name with underscores could be taken for another field")
	ErrTrailerField = bad("trailer_field", "a framing, routing or identity field is announced or sent as a trailer")
	ErrTwice        = bad("field_twice", "Expect, Upgrade or Trailer occurs twice")

	ErrTECoding    = &Refusal{http.StatusNotImplemented, "transfer_encoding", "Transfer-Encoding is not exactly chunked"}
	ErrExpect      = &Refusal{http.StatusExpectationFailed, "expect", "Expect is not exactly 100-continue"}
	ErrVersion     = &Refusal{http.StatusHTTPVersionNotSupported, "version", "version is neither HTTP/1.1 nor HTTP/1.0"}
	ErrHeadSize    = &Refusal{http.StatusRequestHeaderFieldsTooLarge, "head_size", "request line and fields exceed the limit of bytes (64 KiB unless configured)"}
	ErrFieldNumber = &Refusal{http.StatusRequestHeaderFieldsTooLarge, "field_number", "more fields than the limit (128 unless configured lower)"}
)

// Everything that can be wrong with a chunked body.
var (
	ErrChunkSize   = bad("chunk_size", "chunk size is not 1 to 16 hexadecimal digits below 2^62")
	ErrChunkLine   = bad("chunk_line", "chunk line has a control byte or does not end in CRLF")
	ErrChunkExt    = bad("chunk_extension", "chunk extensions exceed 4 KiB")
	ErrChunkEnd    = bad("chunk_end", "chunk data is not followed by CRLF")
	ErrTrailerSize = bad("trailer_size", "trailer section exceeds 8 KiB or 32 fields")
)

// ErrStatusLine is wrong with answers only; nobody is answered with it.
var ErrStatusLine = &Refusal{http.StatusBadGateway, "status_line", "status line is not HTTP/1.x SP three digits SP reason"}

// Refusals lists every value, for exhaustive tables and metrics.
func Refusals() []*Refusal {
	return []*Refusal{ErrBareLF, ErrRequestLine, ErrTarget, ErrFold, ErrColonSpace, ErrFieldName, ErrFieldValue,
		ErrHostMissing, ErrHostTwice, ErrHost, ErrHostMismatch, ErrLength, ErrLengthTwice, ErrLengthAndTE,
		ErrTETwice, ErrTEOld, ErrConnectBody, ErrConnection, ErrAlias, ErrTrailerField, ErrTwice,
		ErrTECoding, ErrExpect, ErrVersion, ErrHeadSize, ErrFieldNumber,
		ErrChunkSize, ErrChunkLine, ErrChunkExt, ErrChunkEnd, ErrTrailerSize, ErrStatusLine}
}
