package adsserver

import (
	"context"
	"errors"
	"io"
	"strings"

	admin "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	csds "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// maxStatusBytes bounds one answer of the client status discovery service.
const maxStatusBytes = 32 << 20

// RegisterStatus adds the client status discovery service (CSDS,
// envoy.service.status.v3): what every client of this replica has in force, from the
// ledger, in the form grpcdebug and Envoy's tools read. Secrets are redacted. It is for
// operators: register it behind whatever decides who may ask.
//
// node_matchers may match ids by exact, prefix, suffix or contains; anything else is
// refused. An answer above 32 MiB is refused with ResourceExhausted.
func (s *Server) RegisterStatus(r grpc.ServiceRegistrar) {
	csds.RegisterClientStatusDiscoveryServiceServer(r, &clientStatus{srv: s})
}

type clientStatus struct {
	csds.UnimplementedClientStatusDiscoveryServiceServer
	srv *Server
}

// FetchClientStatus answers once. Its errors are gRPC statuses.
func (c *clientStatus) FetchClientStatus(_ context.Context, r *csds.ClientStatusRequest) (*csds.ClientStatusResponse, error) {
	out, err := c.answer(r)
	return out, status.ToGRPC(err)
}

// StreamClientStatus answers every request of the stream.
func (c *clientStatus) StreamClientStatus(st csds.ClientStatusDiscoveryService_StreamClientStatusServer) error {
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		out, err := c.answer(r)
		if err != nil {
			return status.ToGRPC(err)
		}
		if err := st.Send(out); err != nil {
			return err
		}
	}
}

func (c *clientStatus) answer(r *csds.ClientStatusRequest) (*csds.ClientStatusResponse, error) {
	for _, m := range r.GetNodeMatchers() {
		if len(m.GetNodeMetadatas()) > 0 || !understood(m.GetNodeId()) {
			return nil, outrigger.Errorf(outrigger.Invalid, "node_matchers: only node_id with exact, prefix, suffix or contains is understood")
		}
	}
	out, size := &csds.ClientStatusResponse{}, 0
	for _, l := range c.srv.lines(func(n NodeState) bool { return wantedNode(r.GetNodeMatchers(), n.Node.ID) }) {
		one, err := c.client(&l, !r.GetExcludeResourceContents())
		if err != nil {
			return nil, err
		}
		if size += proto.Size(one); size > maxStatusBytes {
			return nil, outrigger.Errorf(outrigger.Exhausted, "the answer is larger than %d bytes; give node_matchers, or exclude_resource_contents", maxStatusBytes)
		}
		out.Config = append(out.Config, one)
	}
	return out, nil
}

func understood(m *matcher.StringMatcher) bool {
	switch m.GetMatchPattern().(type) {
	case nil, *matcher.StringMatcher_Exact, *matcher.StringMatcher_Prefix, *matcher.StringMatcher_Suffix, *matcher.StringMatcher_Contains:
		return true
	}
	return false
}

// wantedNode reports whether one matcher fits, or there is none.
func wantedNode(ms []*matcher.NodeMatcher, id string) bool {
	for _, m := range ms {
		id, fits := id, func(s string) string { return s }
		if m.GetNodeId().GetIgnoreCase() {
			id, fits = strings.ToLower(id), strings.ToLower
		}
		switch p := m.GetNodeId().GetMatchPattern().(type) {
		case nil:
			return true
		case *matcher.StringMatcher_Exact:
			if id == fits(p.Exact) {
				return true
			}
		case *matcher.StringMatcher_Prefix:
			if strings.HasPrefix(id, fits(p.Prefix)) {
				return true
			}
		case *matcher.StringMatcher_Suffix:
			if strings.HasSuffix(id, fits(p.Suffix)) {
				return true
			}
		case *matcher.StringMatcher_Contains:
			if strings.Contains(id, fits(p.Contains)) {
				return true
			}
		}
	}
	return len(ms) == 0
}

func (c *clientStatus) client(l *line, bodies bool) (*csds.ClientConfig, error) {
	out := &csds.ClientConfig{Node: translate.Node(l.Node)}
	for _, h := range l.config(c.srv.group(l.Group).wantedBy(l.Decisive())) {
		x := &csds.ClientConfig_GenericXdsConfig{TypeUrl: h.Type, Name: h.Name, VersionInfo: h.Version,
			ConfigStatus: configStatus(h.Verdict), ClientStatus: resourceStatus(&h)}
		if v := l.typeOf(h.Type); v != nil && h.Version != "" {
			x.LastUpdated = wire.TimePB(v.ackedAt)
		}
		if bodies && h.Body != nil {
			shown, err := translate.RedactAny(h.Body)
			if err != nil {
				return nil, err
			}
			x.XdsConfig = shown
		}
		if h.Nack != nil {
			x.ErrorState = &admin.UpdateFailureState{Details: h.Nack.Message, VersionInfo: h.Sent, LastUpdateAttempt: wire.TimePB(h.Nack.At)}
		}
		out.GenericXdsConfigs = append(out.GenericXdsConfigs, x)
	}
	return out, nil
}

func configStatus(verdict string) csds.ConfigStatus {
	switch verdict {
	case VerdictLive:
		return csds.ConfigStatus_SYNCED
	case VerdictWaiting:
		return csds.ConfigStatus_NOT_SENT
	case VerdictPending, VerdictRemoving:
		return csds.ConfigStatus_STALE
	case VerdictRejected:
		return csds.ConfigStatus_ERROR
	}
	return csds.ConfigStatus_UNKNOWN
}

// resourceStatus is the client's side, as far as it said.
func resourceStatus(h *Held) admin.ClientResourceStatus {
	switch {
	case h.Nack != nil:
		return admin.ClientResourceStatus_NACKED
	case h.Version != "":
		return admin.ClientResourceStatus_ACKED
	case h.Verdict == VerdictAbsent:
		return admin.ClientResourceStatus_DOES_NOT_EXIST
	}
	return admin.ClientResourceStatus_REQUESTED
}
