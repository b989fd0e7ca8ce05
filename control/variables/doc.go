// Package variables is the authority for sessions and variables of one region. It
// serves outriggerv1.VariablesServer (what clients call) and
// outriggerv1.CoherenceServer (what caches call) from one projection of the event log.
//
// # Use
//
//	svc, err := variables.New(log, variables.Options{Region: "us"})
//	server := grpc.NewServer(append(variables.TransportOptions(), others...)...)
//	pb.RegisterVariablesServer(server, svc)
//	pb.RegisterCoherenceServer(server, svc)
//	go svc.Run(ctx) // owns every goroutine of the service
//	<-svc.Ready()   // until then every call fails with Unavailable
//
// # How it works
//
// The state is a pure fold over the log (apply.go). A write is decided on the
// projection, appended with the aggregate sequences it was decided on, and decided again
// if somebody was faster; it is acknowledged once the log has made it durable and this
// projection has applied it, so a read at the origin that starts after an acknowledgement
// sees the write. A write to a variable also checks the session's sequence in the same
// append: it cannot land in a session that was deleted meanwhile.
//
// Aggregates are "var/<tenant>/<session>/<name>" and "session/<tenant>/<id>". Deleting
// or expiring a session is one event that removes its variables with it.
//
// # Versions
//
// Counters start at 0 at registration and grow by one with every set, rollback and
// delete; a name registered again continues after its tombstone, also when the session
// was deleted in between, because the sequence of the aggregate in the log is never
// reused. The dot of a version is {region, incarnation, position of the event}, filled
// in by the reader; its context is what the variable had, plus the dot.
//
// # Sessions
//
// Expiry slides with every call that names the session, with open watches and with
// Touch; uses are soft state and are lost in a restart, therefore a session counts as
// used when the service starts. An expired session is readable until the sweep removes
// it. A write that reaches the log before the sweep's event wins: an expiry younger than
// the TTL after the session's last event changes nothing, on every replica.
//
// # Optimisations and dependencies
//
// StartOptimization locks one variable for one optimiser, as an event of the variable. While
// the lock stands, a set, batch item, rollback or delete must name the lock's id among
// WriteOptions.optimization_ids or fails with Locked ("variable_locked_for_optimization"),
// whichever way it came; decision and lock are of one sequence, so nothing slips between. A
// start by the same optimiser renews the lock and keeps its id; one by another fails the same
// way, unless it asks to preempt and has a higher priority. An id is never used again, so a
// holder that was taken over is refused (Locked, "has ended") even when nobody holds the lock.
// A lock is stale StaleAfter after its holder's last sign, in the time of the log: it refuses
// nobody then, the next write by others ends it, and so does the sweep. Readers see the lock in
// Variable.optimization; taking and releasing one moves the dot and invalidates as a set does,
// and leaves the counter alone. Deleting the session ends its locks.
//
// AddDependency adds an edge to the session's graph, as an event of the session. An edge that
// would close a cycle is refused (Locked, "would_create_cycle: a → b → a"); a variable's
// deletion removes its edges. A session has at most 4,096. Nothing is recomputed here:
// ListDependencies gives whoever does the order in which to.
//
// # Feed
//
// Changes are kept in a ring of Options.FeedRing changes and FeedBytes bytes. A feed
// stream is a cursor into the ring, so a slow node costs no queue; when its cursor has
// left the ring it is told to flush (Reset). Frames are encoded once and shared by all
// streams. Heartbeats are answered before any frame that is waiting; a frame holds at
// most 256 KiB unless one change alone is larger (it cannot be: values above 4 KiB
// travel as invalidations only).
//
// A stream with more than 16 frames waiting gets them coalesced, as many as fit one
// frame: of each key (and each region that writes it) the newest change only, in the
// order of positions. That leaves every floor where the frames would have put it, so
// positions in between need not have been seen, and a node that lags catches up at the
// cost of the keys that changed, not of the changes. Where key_previous would
// name a change that was left out, it names the last position that was not. Streams that lag alike share the result.
//
// A stream whose Subscribe has a select is selective: it carries the changes of the shards
// selected only, is not woken for others, and is brought up to the head before each answer
// to a heartbeat by a frame that may be empty (unless it lags). A change wakes the streams
// of its shard; it is encoded at most once for all of them, and a stream's frame is put
// together from the encoded changes it needs. What waits for a selective stream is sent in
// one frame, of more than 16 changes the newest of each key as above. A select is answered
// with the position from which on its shards are in the stream. One that names a shard
// there is none of, or does not raise its number, ends the stream with kind Invalid.
//
// The first frame after Subscribe answers it: a Reset, the Selected of a selective stream
// (after a Reset, too), or Changes (possibly none) that continue at Subscribe.from. A subscriber that knows no
// incarnation (0) is always reset.
//
// A created session is a change of scope SESSION with deleted unset: it turns "no such
// session" into "no such variable". key_previous of a key without an earlier change of
// its own is the position where its session was created, or of the youngest tombstone the
// session has forgotten, whichever is later: never lower than the truth. key_previous of
// a SESSION change is the highest earlier position inside that session, 0 at creation.
// A batch that was atomic in the log may be spread over several frames.
//
// A feed comes as a gRPC stream or, on the port of a server made with Service.Credentials,
// as frames on a connection of its own (package cache/feed), with the same messages and
// rules. Of such a connection 64 KiB and a frame are buffered at most: a few goroutines for
// all of them write what it takes without waiting, and one that is full is left to a
// goroutine of its own, while its cursor stays. Its heartbeats are answered then, of those
// that waited the newest only. A client silent for feed.MaxSilence is let go of. These
// connections end with Run.
//
// # Failure
//
// Bad input fails with kind Invalid or Exhausted and changes nothing. Overload is the
// log's back-pressure. When the caller's context ends while a commit is in flight the
// outcome is Unknown, and repeating the call with the same request_id tells it. A crash
// loses nothing acknowledged: the state is rebuilt from a log snapshot (taken every
// Options.SnapshotEvery events) and the tail. If the log fails, Run returns its error and
// every later call fails with Unavailable.
//
// # Concurrency
//
// All methods may be called concurrently; Run may be called once. One goroutine applies
// events; readers share an RWMutex that is held for map look-ups only, never across I/O.
// Messages in answers are shared with the state and are read-only.
package variables
