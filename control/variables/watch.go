package variables

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// hub tells the watchers of a session what changed in it.
type hub struct {
	mu    sync.RWMutex
	watch map[sessionID]map[*watcher]struct{}
	total int
}

func newHub() *hub { return &hub{watch: make(map[sessionID]map[*watcher]struct{})} }

func (h *hub) add(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watch[w.id] == nil {
		h.watch[w.id] = make(map[*watcher]struct{})
	}
	h.watch[w.id][w] = struct{}{}
	h.total++
}

func (h *hub) remove(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.watch[w.id], w)
	if len(h.watch[w.id]) == 0 {
		delete(h.watch, w.id)
	}
	h.total--
}

func (h *hub) count() int {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.total
}

// publish hands the effects of one batch to the watchers concerned. It never waits for
// one of them.
func (h *hub) publish(effects []effect) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.total == 0 {
		return
	}
	for _, eff := range effects {
		if eff.change == nil {
			continue
		}
		for w := range h.watch[eff.session] {
			w.offer(eff)
		}
	}
}

// watcher is one Watch call. Pending changes are kept per variable, latest wins, so
// there are never more than the session has names, and the last value is never lost.
type watcher struct {
	id     sessionID
	wanted map[string]bool // names; nil = all

	mu      sync.Mutex
	pending map[string]pending
	order   []string // names in pending, oldest first
	ended   bool     // the session was deleted
	signal  chan struct{}
}

// pending is what a variable's watcher has to be told.
type pending struct {
	variable *pb.Variable // of a deletion: id, key and version
	position uint64
	deleted  bool
	actor    string
	at       *timestamppb.Timestamp
}

func (w *watcher) offer(eff effect) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := eff.event
	if v := eff.next; v != nil {
		w.put(pending{variable: v.pb, position: v.position, deleted: v.deleted, actor: e.GetActor(), at: e.GetAt()})
	}
	for _, v := range eff.removed {
		gone := &pb.Variable{Id: v.pb.GetId(), Key: v.pb.GetKey(), Version: v.pb.GetVersion()}
		w.put(pending{variable: gone, position: e.GetPosition(), deleted: true, actor: e.GetActor(), at: e.GetAt()})
	}
	if eff.next == nil && eff.change.GetDeleted() {
		w.ended = true
	}
	select {
	case w.signal <- struct{}{}:
	default:
	}
}

func (w *watcher) put(p pending) {
	name := p.variable.GetKey().GetName()
	if w.wanted != nil && !w.wanted[name] {
		return
	}
	if _, queued := w.pending[name]; !queued {
		w.order = append(w.order, name)
	}
	w.pending[name] = p
}

// take returns everything pending, oldest first.
func (w *watcher) take() (out []pending, ended bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range w.order {
		out = append(out, w.pending[name])
	}
	clear(w.pending)
	w.order = w.order[:0]
	return out, w.ended
}

// Watch implements pb.VariablesServer. The watcher is registered before the present
// values are read, so nothing falls between them. A change that leaves the value as the
// watcher last saw it is not sent. At a replica that keeps a copy it begins with what was
// acknowledged anywhere before the call, or fails if that cannot be known. While it is open the session counts as used. The
// stream ends with NotFound when the session is deleted, after a DELETED for each
// variable.
func (s *Service) Watch(req *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.WatchEvent]) error {
	return status.ToGRPC(s.watch(req, stream))
}

func (s *Service) watch(req *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.WatchEvent]) error {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return err
	}
	// A replica that keeps a copy may be behind what the watcher was told elsewhere; from here on
	// it sees no older value than at its leader.
	if err := s.Current(stream.Context()); err != nil {
		return err
	}
	w, err := s.newWatcher(id, req.GetIdentifiers())
	if err != nil {
		return err
	}
	s.hub.add(w)
	defer s.hub.remove(w)
	seen, err := s.initial(w)
	if err != nil {
		return err
	}
	if req.GetIncludeInitial() {
		for _, name := range slices.Sorted(maps.Keys(seen)) {
			v := seen[name].variable
			if err := stream.Send(&pb.WatchEvent{Type: pb.WatchEvent_INITIAL, Variable: v, At: v.GetUpdatedAt()}); err != nil {
				return err
			}
		}
	}
	return s.follower(w, seen, stream)
}

// newWatcher resolves the identifiers; each must name a live variable.
func (s *Service) newWatcher(id sessionID, identifiers []string) (*watcher, error) {
	if n := len(identifiers); n > outrigger.MaxBatch {
		return nil, errBatch("identifiers", n)
	}
	_, vars, err := s.see(id, identifiers...)
	if err != nil {
		return nil, err
	}
	w := &watcher{id: id, pending: make(map[string]pending), signal: make(chan struct{}, 1)}
	for i, v := range vars {
		if v == nil {
			return nil, outrigger.ErrVariableNotFound(identifiers[i])
		}
		if w.wanted == nil {
			w.wanted = make(map[string]bool)
		}
		w.wanted[keyOf(v).Name] = true
	}
	return w, nil
}

// initial reads the present values of what w watches.
func (s *Service) initial(w *watcher) (map[string]pending, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sess := s.state.sessions[w.id]
	if sess == nil {
		return nil, outrigger.ErrSessionNotFound(w.id.name)
	}
	out := make(map[string]pending)
	for name, v := range sess.vars {
		if !v.deleted && (w.wanted == nil || w.wanted[name]) {
			out[name] = pending{variable: v.pb, position: v.position}
		}
	}
	return out, nil
}

// follower sends changes until the stream or the session ends. seen is what the client
// knows of each variable.
func (s *Service) follower(w *watcher, seen map[string]pending, stream grpc.ServerStreamingServer[pb.WatchEvent]) error {
	idle := time.NewTimer(watchHeartbeat)
	defer idle.Stop()
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-s.stopped:
			return s.isReady()
		case <-idle.C:
			if err := stream.Send(&pb.WatchEvent{Type: pb.WatchEvent_HEARTBEAT, At: timestamppb.New(s.opt.Now())}); err != nil {
				return err
			}
		case <-w.signal:
			changes, ended := w.take()
			for _, p := range changes {
				if !news(seen, p) {
					continue
				}
				if err := stream.Send(p.event()); err != nil {
					return err
				}
			}
			if ended {
				return outrigger.ErrSessionNotFound(w.id.name)
			}
		}
		s.touch(w.id, s.opt.Now())
		idle.Reset(watchHeartbeat)
	}
}

// news reports whether p tells the client something, and remembers it in seen.
func news(seen map[string]pending, p pending) bool {
	name := p.variable.GetKey().GetName()
	old, known := seen[name]
	if known && p.position <= old.position {
		return false // already part of the initial values
	}
	if p.deleted {
		delete(seen, name)
		return known
	}
	seen[name] = p
	return !known || old.variable.GetId() != p.variable.GetId() || !sameValue(old.variable, p.variable)
}

func sameValue(a, b *pb.Variable) bool {
	x, y := a.GetValue(), b.GetValue()
	return cmp.Compare(x.GetType(), y.GetType()) == 0 && slices.Equal(x.GetJson(), y.GetJson()) && slices.Equal(x.GetBinary(), y.GetBinary())
}

func (p pending) event() *pb.WatchEvent {
	kind := pb.WatchEvent_CHANGED
	if p.deleted {
		kind = pb.WatchEvent_DELETED
	}
	return &pb.WatchEvent{Type: kind, Variable: p.variable, Actor: p.actor, At: p.at}
}
