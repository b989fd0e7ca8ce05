package variable

import (
	"context"
	"encoding/binary"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/proxy/http2"
)

// renderedHit is a process tier with one variable in all its encodings.
type renderedHit struct {
	oneHit
	encoders []cache.Encoder
}

func (r *renderedHit) Hit(key string, encoding int) (cache.Hit, bool) {
	h, ok := r.oneHit.Hit(key, encoding)
	if ok {
		h.Encoded = r.encoders[encoding](r.v)
	}
	return h, ok
}

func frameOf(t testing.TB, m proto.Message) []byte {
	t.Helper()
	raw, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(raw))), raw...)
}

func headOf(path string, more ...string) *http2.Head {
	h := &http2.Head{Method: http.MethodPost, Path: path, Fields: []hpack.HeaderField{{Name: "content-type", Value: "application/grpc"}}}
	for i := 0; i < len(more); i += 2 {
		h.Fields = append(h.Fields, hpack.HeaderField{Name: more[i], Value: more[i+1]})
	}
	return h
}

// An unmodified client reads hits over a connection of package http2: the same message and
// the same metadata as from the handlers, and the handlers never see the call.
func TestCallsOverTheWire(t *testing.T) {
	tokens := NewTokens(TokenOptions{})
	hits := &renderedHit{oneHit: *temperature(), encoders: tokens.Encoders()}
	counters := new(Counters)
	var touched []string
	calls := &Calls{Hits: hits, Counters: counters, Touched: func(tenant, session string) { touched = append(touched, tenant+"/"+session) }}
	s, err := http2.New(http2.Options{Inline: calls, Handler: http.NotFoundHandler()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx, l) }()
	defer func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	limited, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	var md metadata.MD
	for range 3 {
		got, err := snakepit.NewBridgeServiceClient(conn).GetVariable(limited, &snakepit.GetVariableRequest{SessionId: "shop", VariableIdentifier: "temperature"}, grpc.Header(&md))
		if err != nil {
			t.Fatal(err)
		}
		if want := (&snakepit.GetVariableResponse{Variable: variableToBridge(hits.v), FromCache: true}); !proto.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
	a := cache.Answer{Found: true, Variable: hits.v, Tier: outrigger.TierProcess, FeedLive: true, Age: 12 * time.Millisecond}
	want := answerHeaders(a)
	want.Set("content-type", "application/grpc")
	want.Set(outrigger.HeaderToken, tokens.sign(hits.v))
	if len(md) != len(want) {
		t.Errorf("metadata %v, the handlers send %v", md, want)
	}
	for k, v := range want {
		if got := md.Get(k); len(got) != 1 || got[0] != v[0] {
			t.Errorf("%s is %q, the handlers say %q", k, got, v)
		}
	}
	v, err := pb.NewVariablesClient(conn).Get(limited, &pb.GetRequest{Session: "shop", Identifier: "temperature"})
	if err != nil || !proto.Equal(v, hits.v) {
		t.Fatalf("%v, %v", v, err)
	}
	if n := s.Counts(); n.Inline != 4 || n.Handled != 0 || counters.Process.Load() != 4 || len(touched) != 4 || touched[0] != "default/shop" {
		t.Errorf("%+v, counted %d, touched %v", n, counters.Process.Load(), touched)
	}
}

// What asks for more than a plain read is left to the handlers.
func TestCallsDecline(t *testing.T) {
	c := &Calls{Hits: &renderedHit{oneHit: *temperature(), encoders: NewTokens(TokenOptions{}).Encoders()}, Counters: new(Counters)}
	bridge, native := snakepit.BridgeService_GetVariable_FullMethodName, pb.Variables_Get_FullMethodName
	if c.Class(headOf(bridge, "te", "trailers", "user-agent", "x", "grpc-timeout", "20S", "grpc-encoding", "identity", "content-length", "25")) != EncodingBridge || c.Class(headOf(native)) != EncodingNative {
		t.Fatal("a plain read was declined")
	}
	for _, h := range []*http2.Head{headOf("/snakepit.bridge.BridgeService/SetVariable"), headOf(bridge, outrigger.HeaderConsistency, "strong"),
		headOf(bridge, outrigger.HeaderToken, "x"), headOf(bridge, "grpc-encoding", "gzip"), headOf(bridge, "grpc-timeout", "soon"),
		headOf(bridge, "grpc-timeout", "S"), headOf(bridge, "trace-bin", "AA"),
		{Method: http.MethodGet, Path: bridge, Fields: headOf(bridge).Fields}, {Method: http.MethodPost, Path: bridge}} {
		if n := c.Class(h); n != 0 {
			t.Errorf("%+v is of class %d", h, n)
		}
	}
	good := &snakepit.GetVariableRequest{SessionId: "shop", VariableIdentifier: "temperature"}
	var a http2.Answer
	if !c.Answer(EncodingBridge, frameOf(t, good), &a) {
		t.Fatal("a plain read was declined")
	}
	if !c.Answer(EncodingNative, frameOf(t, &pb.GetRequest{Tenant: "default", Session: "shop", Identifier: "temperature"}), &a) {
		t.Fatal("a read that names the tenant was declined")
	}
	compressed := frameOf(t, good)
	compressed[0] = 1
	for name, body := range map[string][]byte{
		"bypass":     frameOf(t, &snakepit.GetVariableRequest{SessionId: "shop", VariableIdentifier: "temperature", BypassCache: true}),
		"id":         frameOf(t, &snakepit.GetVariableRequest{SessionId: "shop", VariableIdentifier: "var_temperature_1"}),
		"another":    frameOf(t, &snakepit.GetVariableRequest{SessionId: "shop", VariableIdentifier: "pressure"}),
		"no session": frameOf(t, &snakepit.GetVariableRequest{VariableIdentifier: "temperature"}),
		"slash":      frameOf(t, &snakepit.GetVariableRequest{SessionId: "sh/op", VariableIdentifier: "temperature"}),
		"compressed": compressed, "nothing": nil, "half": frameOf(t, good)[:9], "two": append(frameOf(t, good), frameOf(t, good)...),
		"garbage": append(binary.BigEndian.AppendUint32([]byte{0}, 3), 0x0a, 0x7f, 1),
	} {
		if c.Answer(EncodingBridge, body, &a) {
			t.Errorf("%s: answered", name)
		}
	}
	if c.Answer(EncodingNative, frameOf(t, &pb.GetRequest{Tenant: "other", Session: "shop", Identifier: "temperature"}), &a) {
		t.Error("another tenant got this one's value")
	}
}

// FuzzScanRead: what is taken means to a protobuf decoder what it means here.
func FuzzScanRead(f *testing.F) {
	f.Add(frameOf(f, &snakepit.GetVariableRequest{SessionId: "shop", VariableIdentifier: "temperature"}), true)
	f.Add(frameOf(f, &pb.GetRequest{Tenant: "t", Session: "shop", Identifier: "temperature"}), false)
	f.Add([]byte("\x00\x00\x00\x00\x16\n\x010\x12\x04000\xff\x12\x040000\x1a\x0500000"), false) // a field twice, first in bad UTF-8
	f.Fuzz(func(t *testing.T, b []byte, bridge bool) {
		class := EncodingNative
		if bridge {
			class = EncodingBridge
		}
		r, ok := scanRead(class, b)
		if !ok {
			return
		}
		if bridge {
			var m snakepit.GetVariableRequest
			if err := proto.Unmarshal(b[5:], &m); err != nil || m.BypassCache || m.SessionId != string(r.session) || m.VariableIdentifier != string(r.name) {
				t.Fatalf("%v, %v; took it for %q", &m, err, r)
			}
			return
		}
		var m pb.GetRequest
		if err := proto.Unmarshal(b[5:], &m); err != nil || m.Session != string(r.session) || m.Identifier != string(r.name) || m.Tenant != "" && m.Tenant != string(r.tenant) {
			t.Fatalf("%v, %v; took it for %q", &m, err, r)
		}
	})
}
