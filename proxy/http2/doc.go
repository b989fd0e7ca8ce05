// Package http2 serves HTTP/2 (RFC 9113) in the clear with prior knowledge: calls that
// can be answered from memory cost no goroutine and no allocation, everything else runs
// as an ordinary http.Handler on a goroutine per stream.
//
//	s, err := http2.New(http2.Options{
//		Inline:  reads,   // a hit: hand over what is ready to send
//		Handler: handler, // everything else, gRPC included (grpc.Server is such a handler)
//	})
//	err = s.Run(ctx, listener)
//
// How it works. A connection has one goroutine that reads. All complete frames of one
// read are handled together, and all they bring about (answers, acknowledgements, credit)
// leaves in one write. Header blocks are remembered by their bytes: a block that does not
// change HPACK's dynamic table (RFC 7541) means the same whenever it comes again until
// one that does, so that a client's usual call is recognised by a comparison. What is sent
// never uses the dynamic table, which is why an answer can be rendered once for everybody.
// Streams that Inline does not take are given to Handler with what has arrived of their
// body; handlers write into the connection's buffer, which is sent once the goroutines that
// are ready have had their turn, one write for all of them.
//
// Promises. Handler sees what net/http would give it for HTTP/2: trailers in both
// directions, Flush, full duplex, deadlines by http.ResponseController, a context that
// ends with the stream; there is no push and no extended CONNECT. Both directions are
// flow-controlled per stream and per connection; a frame is as large as the peer allows.
// Requests that are malformed by RFC 9113 section 8 are refused before a handler sees them.
//
// What a peer can make this package hold is bounded: per connection MaxStreams streams and
// as many handlers, reset ones included while they run; 16 MiB of bodies nobody has read,
// 256 KiB per stream; 64 KiB of one request's fields, on the wire and decoded, in at most
// 64 frames; 256 KiB of output it does not take plus one answer or header block. While
// output waits nothing is read. Frames that move no call forward (PING, SETTINGS, PRIORITY,
// RST_STREAM, WINDOW_UPDATE, empty DATA, frames of unknown types, refused and malformed
// streams) are paid for from a budget of 10,000 that refills by 1,000 a second and by what
// calls do; when it is used up the connection ends with ENHANCE_YOUR_CALM. That covers
// rapid reset (CVE-2023-44487), floods of each of those frames, and floods of CONTINUATION.
// The rest of a frame or header block must come within HeaderTimeout, of DATA within
// HeaderTimeout of the last of it; a body stalls its handler at most BodyTimeout and a
// closed window WriteTimeout, except for gRPC, whose calls carry their own deadlines and
// may be silent for as long as they like.
//
// A panic in Handler costs its stream, one in Inline its connection. When Run's context
// ends every connection is told so in two steps (RFC 9113 section 6.8: first the highest
// stream number there is, after a round trip or a second the last one taken), what has
// begun gets Grace, then contexts are cancelled and sockets closed. Run returns when every
// goroutine it started has ended. No lock is held across I/O.
package http2
