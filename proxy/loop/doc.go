// Package loop serves HTTP/1 from an event loop: requests that can be answered from
// memory cost one read and one write, simple calls to a server two of each, and everything
// else runs as an ordinary http.Handler on a goroutine.
//
//	s, err := loop.New(loop.Options{
//		Fast: func(req *http1.Request, dst []byte) ([]byte, bool) { … }, // hit: append the whole answer
//		Relay: relay,                                                  // simple calls to servers
//		Slow: handler,                                                 // everything else
//		Other: func(c net.Conn, first []byte) { … },                   // h2c, TLS, unknown
//	})
//	err = s.Run(ctx, listener)
//
// How it works (Linux). Each loop is one goroutine with one epoll instance, one read
// buffer and one write buffer; an idle connection owns neither. Sockets are registered
// edge-triggered once and never again, so a hit is read, parse, Fast, write, with no
// other system call; pipelined hits share one write. The loop polls without telling the
// Go scheduler and blocks in epoll_wait only when nothing is ready. A request Fast
// declines goes with the bytes already read to a worker goroutine, which reads and
// writes the same descriptor directly; while it does, the loop turns readiness into
// wake-ups and cancels the request's context when the client goes away. Afterwards the
// connection belongs to the loop again, without a system call. On other systems, and for
// listeners that are neither TCP nor Unix sockets, every connection has a goroutine that
// does the same with the same code.
//
// With a Relay, a request whose whole body is there, or comes within 200 ms, may be carried
// to a server and its answer back by the loop itself, on connections of its own that are
// registered beside the clients'. An answer goes out when it is whole; until then a worker
// may take the call over, with its connection and the bytes that came. An answer that the
// Relay calls a stream goes out as it comes, one write for each read; a worker takes it over,
// in the middle, when its client does not take all that came, when something other than its
// end in order comes, or when the Relay says so. A client that
// leaves, or half-closes, ends its call. An idle connection to a server is closed by
// whatever comes on it, and after 60 to 120 s; what comes between the loop's last look at
// its sockets and the next request cannot be told from that request's answer. A call in
// flight holds a copy of its request (a head and 64 KiB at most) and what came of its
// answer (256 KiB), twice where that is in chunks; of a stream under way the answer's head
// and an incomplete event (64 KiB).
//
// Promises. Answers leave in the order of the requests. A message that cannot be framed
// safely (see proxy/http1) is answered with 400, 417, 431, 501 or 505 and the connection
// closed in a way that lets the answer arrive. The accept loop never ends because of a
// failing accept: without descriptors it backs off from 5 ms to 1 s, and above MaxConns
// new connections wait in the kernel. Heads, idle time, stalls of request bodies and
// stalls of readers each have a time limit, checked by a timer wheel to within an eighth
// of the shortest of them (at most 62 ms). Bytes waiting for a slow reader are at most
// one Fast answer plus 256 KiB, and no more of its requests are read meanwhile. A panic in
// Fast, Relay or Slow costs its connection, not the process. No lock is held across I/O, except
// that a request body and a response each serialise their own callers. Run ends with its
// context: idle connections close at once, requests in flight get Grace, then their
// contexts are cancelled and their sockets shut; it returns when every goroutine it
// started has ended, so a handler that ignores its context delays it.
//
// Slow sees what net/http would give it, with these differences: reading the body and
// writing the response are always independent (EnableFullDuplex is a no-op); an upgrade
// to anything but websocket is removed from the request; the context is cancelled by a
// half-close as soon as the body is read, as with net/http; there is no ReadFrom, so a
// copy into the ResponseWriter is never spliced. A hijacked connection is a bare
// *net.TCPConn or *net.UnixConn.
//
// Processors. A loop blocked in epoll_wait gives up its scheduler slot (P); on wake-up it
// must get one back, and with GOMAXPROCS equal to the number of loops it queues behind
// other goroutines (measured: 0.75 of the requests at 1.4 times the CPU). Set GOMAXPROCS to
// at least Loops + 2, in the program, before Run: this package does not change it. The
// default is one loop up to two processors and otherwise half as many loops as
// processors, since the kernel's share of the work needs the rest.
package loop
