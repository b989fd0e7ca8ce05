// Package variable serves an application's variable calls inside its sidecar: the
// snakepit v0.4.3 bridge protocol over gRPC, and REST/JSON.
//
// Reads are answered by the nearest tier of the cache that can prove its copy is
// current; writes go to the authority and are visible on this node before the reply.
// Every answer says which tier gave it, at which version, how old it may be at most and
// whether the change feed is live, in response headers (gRPC: response metadata). What
// the authority answered says tier origin and, of one variable, its version. A batch is
// described by the weakest statement that holds for all of it; its misses wait for the
// origin side by side, sixteen at a time.
//
// What unmodified bridge clients rely on is kept: paths and field numbers, error codes,
// and texts ("Session not found: x" and "Variable not found: x" contain the words the
// Python client looks for before it registers a variable by itself). Binary parts
// (pickle, ETF) are carried and never decoded. Calls this package does not know are
// forwarded byte for byte to the tool server when one is configured.
//
// An identifier is a variable id or a name; ids are tried first, as the protocol says.
// A session that does not exist is created on first use when AutoCreateSessions is set,
// because the published client never creates one; asking about the session itself is no
// use of it.
//
// With the control plane away, known variables are still answered, marked stale; writes
// fail at once with UNAVAILABLE and change nothing, or with UNKNOWN when it cannot be
// told whether they did. All methods may be called concurrently. One watch holds one
// stream to the authority and one goroutine; one forwarded call two.
package variable
