package adsserver

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/xds"
)

// player is a delta stream whose stock loop is played by hand.
type player struct {
	t  *testing.T
	s  *session
	ch chan cache.DeltaResponse
}

func play(t *testing.T, srv *Server, id string) *player {
	s, err := srv.open(context.Background(), true)
	if err != nil {
		t.Fatal(err)
	}
	p := &player{t, s, make(chan cache.DeltaResponse, 20)}
	for _, typeURL := range []string{xds.TypeCluster, xds.TypeMeshPolicy} {
		p.request(typeURL, id, "")
	}
	return p
}

func (p *player) request(typeURL, id, nonce string) {
	p.t.Helper()
	sub := stream.NewDeltaSubscription([]string{"*"}, nil, nil, true)
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, Node: &core.Node{Id: id}, ResponseNonce: nonce}
	if _, err := (&watcher{p.s}).CreateDeltaWatch(req, sub, p.ch); err != nil {
		p.t.Fatal(err)
	}
}

// accept sends and acknowledges everything that is due, and lists what was sent.
func (p *player) accept() (lines []string) {
	p.t.Helper()
	for len(p.ch) > 0 {
		msg, err := (<-p.ch).GetDeltaDiscoveryResponse()
		if err != nil {
			p.t.Fatal(err)
		}
		msg.Nonce = fmt.Sprint("n", msg.GetSystemVersionInfo(), len(lines))
		p.s.sent(msg.GetTypeUrl(), msg.GetNonce())
		line := xds.ShortType(msg.GetTypeUrl())
		for _, r := range msg.GetResources() {
			line += " +" + r.GetName()
		}
		for _, name := range msg.GetRemovedResources() {
			line += " -" + name
		}
		lines = append(lines, line)
		p.request(msg.GetTypeUrl(), p.s.node.ID, msg.GetNonce())
	}
	return lines
}

// With many streams Publish returns before they are told. Each is told of the newest set
// all the same, and what a push removed is dropped when the last of them has accepted it.
func TestManyStreamsAreToldAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := New(Options{})
		srv.tellNow = -1
		publishVersions(t, srv, 1, "v1", "v2")
		var players []*player
		for i := range 3 {
			p := play(t, srv, fmt.Sprint("n", i))
			defer srv.done(p.s)
			p.accept()
			players = append(players, p)
		}
		publishVersions(t, srv, 2, "v1", "v2", "v3")
		publishVersions(t, srv, 3, "v1")
		synctest.Wait()
		for i, p := range players {
			sent := p.accept()
			synctest.Wait()
			if len(sent) == 0 || sent[len(sent)-1] != "MeshPolicy +mesh" {
				t.Errorf("stream %d was sent %q, want the push to end with MeshPolicy", i, sent)
			}
			served := srv.group(DefaultGroup).current.Load().types[xds.TypeCluster].names
			if last := i == len(players)-1; (len(served) == 1) != last {
				t.Errorf("after stream %d of %d accepted, clusters served are %q", i+1, len(players), served)
			}
		}
		for i, p := range players {
			p.accept() // the second step
			if n := srv.Ledger()[i]; n.Acked != 3 || n.Nack != nil {
				t.Errorf("ledger %+v, want position 3 accepted", n)
			}
		}
	})
}

// What streams share decodes to what each would have sent by itself.
func TestSharedBytes(t *testing.T) {
	srv := New(Options{})
	publishVersions(t, srv, 1, "v1", "v2")
	a, b := play(t, srv, "a"), play(t, srv, "b")
	defer srv.done(a.s)
	defer srv.done(b.s)
	c := codec{encoding.GetCodecV2("proto")}
	var first []byte
	for i, p := range []*player{a, b} {
		msg, err := (<-p.ch).GetDeltaDiscoveryResponse()
		if err != nil {
			t.Fatal(err)
		}
		if p.s.wire == nil || len(msg.GetResources()) != 2 {
			t.Fatalf("stream %d shares nothing of %v", i, msg)
		}
		if i == 0 {
			first = p.s.wire
		} else if &first[0] != &p.s.wire[0] {
			t.Error("both streams have bytes of their own")
		}
		before := bytes.Clone(p.s.wire)
		msg.Nonce = fmt.Sprint("nonce ", i)
		for _, v := range []any{&packed{msg, p.s.wire}, msg} {
			data, err := c.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			var got discovery.DeltaDiscoveryResponse
			if err := proto.Unmarshal(data.Materialize(), &got); err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(&got, msg) {
				t.Errorf("%T decodes to %v, want %v", v, &got, msg)
			}
			data.Free()
		}
		if !bytes.Equal(before, p.s.wire) {
			t.Error("the shared bytes were written to")
		}
	}
}
