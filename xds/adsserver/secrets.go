package adsserver

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Private keys go over streams that nobody on the way can read: of this machine (loopback, a
// Unix socket, a pipe in the process), or encrypted. Other streams are given the other secrets,
// and what needs a key fails there; the ledger says why (NodeState.InClear, VerdictWithheld).

// confidential reports whether a stream is one of these.
func confidential(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	if info, ok := p.AuthInfo.(interface {
		GetCommonAuthInfo() credentials.CommonAuthInfo
	}); ok && info.GetCommonAuthInfo().SecurityLevel == credentials.PrivacyAndIntegrity {
		return true
	}
	return onThisMachine(p.Addr)
}

// onThisMachine: whatever it does not recognise is elsewhere.
func onThisMachine(a net.Addr) bool {
	if a == nil {
		return false
	}
	switch a.Network() {
	case "unix", "unixpacket", "pipe", "bufconn":
		return true
	}
	at, err := netip.ParseAddrPort(a.String())
	return err == nil && at.Addr().Unmap().IsLoopback()
}

// stateOf is what of a type in a generation the stream may have.
func (s *session) stateOf(g *generation, typeURL string) *typeState {
	if typeURL == xds.TypeSecret && !s.confidential {
		return g.open
	}
	return g.types[typeURL]
}

// withoutKeys is the secrets without those that hold private keys: the same state if there
// are none, and that of before if these have not changed.
func withoutKeys(ids *atomic.Uint64, prev *generation, all *typeState) *typeState {
	out := &typeState{typeURL: xds.TypeSecret, entries: make(map[string]*entry)}
	for _, name := range all.names {
		if !translate.Confidential(xds.TypeSecret, name) {
			e := all.entries[name]
			out.names, out.entries[name] = append(out.names, name), e
			out.list(e)
			out.sum.add(name, e.version)
		}
	}
	if len(out.names) == len(all.names) {
		return all
	}
	b := builder{ids: ids, typeURL: xds.TypeSecret}
	if prev != nil {
		b.before = prev.open
	}
	if b.before != nil && b.before.sum == out.sum {
		return b.before
	}
	b.finish(out)
	if b.before != nil {
		out.changed, out.removed = compare(b.before, out)
	}
	return out
}
