package loop

import (
	"net"
	"net/http"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// Relay decides which calls the loops carry to a server themselves: the request is sent
// and its answer passed on without a goroutine, with two reads and two writes in all. It
// is for calls whose answer is gathered whole before it goes out, and for streams whose
// reader keeps up. Its methods are called by several loops at once, must not block, and may
// keep nothing of req and body.
type Relay interface {
	// Wants reports, by the head alone, whether Route may take the request once its body,
	// of known length and at most 64 KiB, is there. It is asked only about POST in HTTP/1.1
	// and origin form without expectation and upgrade.
	Wants(req *http1.Request) bool
	// Route returns the call that the request makes, nil to leave it to Slow. It has no
	// effect: what it returned may be forgotten.
	Route(req *http1.Request, body []byte) Call
	// Take gives away an idle connection to an address that a Call named, nil for none;
	// then the request is Slow's, whose connections are expected to end up here.
	Take(address string) *net.TCPConn
}

// Call is one call under way. After Start has taken it, exactly one of Finish, Pass with the
// verdict StreamEnds, Gone and Resume ends it, once. All but Resume run on the loop and must
// not block.
type Call interface {
	// Address is where the request is to go.
	Address() string
	// Start begins the call: it appends to dst the request as the server is to get it, and
	// says how long the whole answer may take. With ok = false nothing has begun, and the
	// request is Slow's.
	Start(req *http1.Request, body, dst []byte) (out []byte, limit time.Duration, ok bool)
	// Fits reports whether Finish takes an answer with this head. It is asked about answers
	// of known length only, and may be asked again.
	Fits(a *http1.Answer) bool
	// Finish ends the call with the whole answer: it appends to dst what the client gets.
	// closing says that the connection closes afterwards, which the head must announce.
	Finish(a *http1.Answer, content, dst, date []byte, closing bool) []byte
	// Streams reports whether an answer with this head, whose content is in chunks, is passed
	// on as it comes, by Pass, and how long that may take from Start on. It may be asked again
	// until Pass has begun the answer.
	Streams(a *http1.Answer) (limit time.Duration, ok bool)
	// Pass passes on content of such a stream: it appends to dst what the client gets now, and
	// says how much of content that was, from its front; the rest comes again with what follows
	// it. ended says that nothing does. The first bytes appended must be a head that announces
	// chunks, and closing as in Finish; until then a is the answer's head, later nil. With the
	// verdict StreamEnds the last chunk is part of out, and the call over; with ended the
	// verdict must not be StreamGoesOn.
	Pass(a *http1.Answer, content []byte, ended bool, dst, date []byte, closing bool) (out []byte, used int, v Verdict)
	// Gone ends the call because the client has left.
	Gone()
	// Resume serves the rest of a call that turned out not to be simple, as a handler: r is
	// the client's request, with its body. If Pass has begun the answer, what w is given
	// follows what is out, in chunks; the first flush sends what the client had no room for.
	Resume(w http.ResponseWriter, r *http.Request, s Progress)
}

// Progress is how far a call has come that is resumed.
type Progress struct {
	// Conn is the connection to the server, the receiver's to close; it may be broken, and
	// the time for the answer may be over. nil: the server closed a kept connection before
	// any byte of an answer came, so the request may be sent again.
	Conn net.Conn
	Read []byte // of the answer, from its first byte
	Sent bool   // the whole request

	// Passed says that Pass has begun the answer. Then Read is the answer's head, and what
	// follows it is read on in the state that Chunks has, after Content, which was decoded and
	// not used up.
	Passed  bool
	Chunks  http1.Chunked
	Content []byte
}

// Verdict is what becomes of a stream after Pass.
type Verdict uint8

// The verdicts.
const (
	StreamGoesOn  Verdict = iota
	StreamEnds            // in order, the call with it
	StreamResumes         // with Resume
)

// Limits of what a loop relays.
const (
	maxRelayBody = 64 << 10
	// maxRelayAnswer bounds head and content of an answer that a loop gathers.
	maxRelayAnswer = 256 << 10
	// maxStreamPart bounds what of a stream waits for the rest of its event.
	maxStreamPart = 64 << 10
	// maxRelayIdle is how many idle connections a loop keeps to one address.
	maxRelayIdle = 256
	// relayIdle is for how long.
	relayIdle = 60 * time.Second
)
