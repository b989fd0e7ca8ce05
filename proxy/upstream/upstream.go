// Package upstream is how the sidecar reaches the rest of the world: pooled HTTP
// connections with limits, pass-through forwarding of any HTTP request to an explicit
// destination, and raw TCP tunnels. A Guard decides what may be dialled at all.
//
// Usage:
//
//	guard := upstream.NewGuard(upstream.GuardOptions{Own: listeners})
//	rt := upstream.NewTransport(upstream.TransportOptions{Guard: guard})
//	fwd := upstream.NewForwarder(upstream.ForwarderOptions{Transport: rt})
//	fwd.ServeHTTP(w, r.WithContext(upstream.WithDestination(ctx, origDst)))
//	models := upstream.NewDirect(upstream.TransportOptions{Guard: guard}, rt) // calls of models, at less cost
//	stats, err := upstream.Tunnel(ctx, clientConn, serverConn, upstream.TunnelOptions{})
//
// Promises.
//
//   - The destination of a forwarded request is what the listener recovered or the
//     configuration says, never the Host header: a client cannot make the sidecar,
//     whose traffic bypasses interception, dial on its behalf.
//   - Link-local, cloud metadata, loopback and the sidecar's own listeners are refused
//     unless a rule allows them; own listeners cannot be allowed. The address really
//     dialled is checked, after name resolution, so a name cannot be rebound.
//   - Hop-by-hop header fields end here (RFC 9110 §7.6.1). A Connection field that names
//     an end-to-end identity field (Authorization, x-user-id, …) is refused with 400:
//     honouring it would let a client delete what a previous hop added. Upgrade is
//     dropped unless it asks for websocket, which closes h2c smuggling.
//   - Streams are flushed on every read. Trailers pass in both directions.
//   - Endpoints that a policy has reached over TLS are reached so or not at all (Secure, and
//     GRPCPool for gRPC); what a Direct sends itself, and lends to event loops, is in the clear.
//   - A Direct lends its idle connections and places to event loops, which carry simple
//     calls themselves, and goes on with a call that a loop has begun (Take, Reserve, Resume).
//   - A tunnel on two bare *net.TCPConn is copied in the kernel (splice on Linux), and
//     the end of one direction is passed on without ending the other.
//
// Overload and failure: dials, handshakes, response heads and idle connections have
// time limits; connections per destination have a count limit (a request waits for one
// until its context ends). A failed dial is 502, a refused destination 403, too many
// sidecars in a row 508, all with the mesh's JSON error body. If the upstream is lost
// after the response head was sent, the client's connection is broken off, so a
// truncated body is never mistaken for a whole one.
//
// Nothing here starts a goroutine that outlives the request, tunnel or pooled
// connection it serves. All types are safe for concurrent use.
package upstream
