// Package http1 reads and writes HTTP/1 messages (RFC 9112) for the sidecar's hot path:
// pure functions over byte slices that allocate nothing and never read from a
// connection.
//
//	var req http1.Request // one per event loop; 2 KiB, reused
//	seen := 0             // one per connection
//	n, err := req.Parse(buf, &seen, http1.Limits{})
//	switch {
//	case err == http1.ErrShort:           // read more into buf, call again
//	case err != nil:                      // answer AppendRefusal(dst, err), close
//	default:                              // buf[:n] is the head, buf[n:] what follows
//	}
//
// Promises. A request is accepted only if every receiver of RFC 9112 must frame it in the
// same way: exactly CRLF ends a line; a field name touches its colon; there is one
// Content-Length of plain digits or one Transfer-Encoding that says chunked, never both;
// HTTP/1.1 has one Host that agrees with an absolute target; no field hides behind a
// folded line, a control byte or an underscore; no Connection option names an end-to-end
// field. Whatever net/http refuses is refused here too (fuzzed). The answer does not depend
// on how the bytes were cut into reads (fuzzed; a head that is wrong but not complete may be
// refused sooner when its bytes come together), and the work is linear in the bytes even
// when they come one at a time. Bad input yields one of the preallocated *Refusal errors,
// which carry the status to answer; after any of them the connection must be closed,
// because what follows cannot be framed.
//
// Request keeps offsets into the buffer it parsed and is valid only as long as the buffer
// is unchanged. Nothing here is safe for concurrent use of one value; distinct values are
// independent.
package http1
