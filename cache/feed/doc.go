// Package feed is the wire of a node's change feed without gRPC: the messages of
// Coherence.Feed (coherence.proto), length-prefixed on a connection of their own that
// begins as an HTTP/1.1 request on the port of the gRPC services. It exists because a
// feed is many small frames, each of which somebody waits for: a frame is one write of
// the sender and one read of the receiver, in the goroutine that has it, where gRPC
// hands it through two goroutines at each end.
//
// # Protocol
//
//	GET /outrigger.v1.Coherence/Feed HTTP/1.1
//	Connection: Upgrade
//	Upgrade: outrigger-feed/1
//
// The server answers 101 and from there on both sides send frames: one byte of kind, three
// of length (big-endian), and that many bytes. Kind 'm' is a message: FeedRequest from the
// client, FeedFrame from the server, with the meaning and order they have in
// Coherence.Feed. Kind 'e' is the sender's last frame and says why it ends: the name of an
// outrigger.Kind, ": " and a text. Any other answer than 101 is a refusal, and so is what
// a server that knows only HTTP/2 sends; IsRefused tells it, and the client uses gRPC. A later version of the protocol is
// another name after Upgrade; a server that does not know it answers 426 and names its own.
//
// # Who may call
//
// Credentials puts the protocol behind the credentials of a gRPC server: the handshake of
// those (mutual TLS, say) is made first and decides, for both protocols alike, and the
// request is read from what it returns. A request with an Origin header is refused with
// 403: it comes from a browser, which could not have spoken gRPC here.
//
// # Bad input and limits
//
// A request head is at most MaxHead bytes and must come within HeadTime. A message of a
// client is at most MaxRequest bytes, one of a server MaxFrame; a longer one, an unknown
// kind or bytes that are no such message end the connection with kind Invalid. Memory of a
// receiver is that of the largest frame, and is let go of after it. A client must send
// something every MaxSilence, else the server may take it for gone; heartbeats do.
//
// # Concurrency
//
// One goroutine may receive and one may send at the same time; Close and Until may be called
// by any. Heartbeats, their answers and changes of the usual form allocate nothing at either
// end, and where the connection is a socket itself, the scheduler is not told of the
// system calls, which do not wait (Socket).
package feed

import "time"

// What is agreed between the two sides; see the package comment.
const (
	Path     = "/outrigger.v1.Coherence/Feed"
	Protocol = "outrigger-feed/1"

	MaxHead    = 8 << 10  // bytes of a request's or an answer's head
	MaxRequest = 64 << 10 // bytes of a FeedRequest
	MaxFrame   = 1 << 20  // bytes of a FeedFrame

	HeadTime   = 5 * time.Second
	MaxSilence = 30 * time.Second
)

// headerBytes precede every frame.
const headerBytes = 4

// The kinds of frames.
const (
	kindMessage = 'm'
	kindEnd     = 'e'
)

// maxReason bounds the text of an end.
const maxReason = 1 << 10
