package variable

import (
	"encoding/binary"
	"net/http"
	"strconv"
	"strings"
	"unsafe"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/proxy/http2"
)

// The encoders of a sidecar's cache, in the order Encoders returns them; as offsets from
// Options.HitEncoding of package proxy.
const (
	EncodingHTTP   = iota // EncodeHTTP
	EncodingBridge        // answers to the bridge's GetVariable
	EncodingNative        // answers to our own Variables.Get
)

// Encoders returns what renders variables for Fast and Calls, with tokens as EncodeHTTP
// has them.
func (t *Tokens) Encoders() []cache.Encoder {
	return []cache.Encoder{
		t.EncodeHTTP,
		func(v *pb.Variable) []byte { return encodeBridge(v, t.sign(v)) },
		func(v *pb.Variable) []byte { return encodeNative(v, t.sign(v)) },
	}
}

// sign is the token of having seen v.
func (t *Tokens) sign(v *pb.Variable) string {
	return t.keys.Load().Sign(identity.Token{}.With(wire.Dot(v.GetVersion().GetDot())))
}

func encodeBridge(v *pb.Variable, token string) []byte {
	return encodeCall(v, &snakepit.GetVariableResponse{Variable: variableToBridge(v), FromCache: true}, token)
}

func encodeNative(v *pb.Variable, token string) []byte { return encodeCall(v, v, token) }

// encodeCall renders an answer to a unary call, except for what differs from answer to
// answer: four bytes (big endian) with the length of the header block, the block, and the
// message with its gRPC prefix. nil means that it cannot be rendered.
func encodeCall(v *pb.Variable, answer proto.Message, token string) []byte {
	message, err := proto.Marshal(answer)
	if err != nil {
		return nil
	}
	out := http2.AppendStatus(make([]byte, 4, 512+len(message)), http.StatusOK)
	out = http2.AppendField(out, "content-type", grpcType)
	out = http2.AppendField(out, outrigger.HeaderTier, outrigger.TierProcess.String())
	out = http2.AppendField(out, outrigger.HeaderFeed, "live")
	out = http2.AppendField(out, outrigger.HeaderVersion, strconv.Itoa(int(v.GetVersion().GetCounter())))
	out = http2.AppendField(out, outrigger.HeaderDot, wire.Dot(v.GetVersion().GetDot()).String())
	if token != "" {
		out = http2.AppendField(out, outrigger.HeaderToken, token)
	}
	binary.BigEndian.PutUint32(out, uint32(len(out)-4))
	out = append(out, 0) // not compressed
	out = binary.BigEndian.AppendUint32(out, uint32(len(message)))
	return append(out, message...)
}

const grpcType = "application/grpc"

// Calls answers the unary reads of the bridge and of our own service from the process
// tier without an allocation; it is what http2.Options.Inline asks for. It declines
// whatever asks for more than a plain, current read: x-outrigger-* metadata, compression,
// bypass_cache, names in the form of an id, anything unusual in the message.
type Calls struct {
	Hits     Hits
	Encoding int // index of EncodeHTTP among the cache's encoders; the others follow it
	Counters *Counters
	Touched  func(tenant, session string) // may be nil
}

// Class is which read a request makes: EncodingBridge, EncodingNative, or 0 for none.
func (c *Calls) Class(h *http2.Head) int {
	class := 0
	switch h.Path {
	case snakepit.BridgeService_GetVariable_FullMethodName:
		class = EncodingBridge
	case pb.Variables_Get_FullMethodName:
		class = EncodingNative
	}
	if t := h.Get("content-type"); class == 0 || h.Method != http.MethodPost || t != grpcType && t != grpcType+"+proto" {
		return 0
	}
	for _, f := range h.Fields {
		switch {
		case strings.HasPrefix(f.Name, "x-outrigger-"):
			return 0
		case f.Name == "grpc-encoding" && f.Value != "identity", f.Name == "grpc-timeout" && !isTimeout(f.Value):
			return 0
		case strings.HasSuffix(f.Name, "-bin"):
			return 0 // to be looked at, which the slow path does
		}
	}
	return class
}

// isTimeout is the grammar of grpc-timeout.
func isTimeout(v string) bool {
	n := len(v) - 1
	if n < 1 || n > 8 || strings.IndexByte("HMSmun", v[n]) < 0 {
		return false
	}
	for i := range n {
		if v[i] < '0' || v[i] > '9' {
			return false
		}
	}
	return true
}

// trailerOK is the header block of the trailer that says OK: grpc-status (a literal with a
// literal name of 11 bytes) is 0.
const trailerOK = "\x00\x0bgrpc-status\x010"

// Answer has the form package http2 asks for.
func (c *Calls) Answer(class int, body []byte, a *http2.Answer) bool {
	r, ok := scanRead(class, body)
	if !ok {
		return false
	}
	// The key is built behind what is in the block, because a buffer of this frame would
	// escape through the interface; what follows overwrites it.
	n := len(a.Block)
	key := append(a.Block, r.tenant...)
	key = append(append(key, '/'), r.session...)
	key = append(append(key, '/'), r.name...)
	a.Block = key[:n]
	key = key[n:]
	h, ok := c.Hits.Hit(unsafe.String(unsafe.SliceData(key), len(key)), c.Encoding+class)
	if !ok || len(h.Encoded) < 4 {
		return false
	}
	c.Counters.Process.Add(1)
	if c.Touched != nil {
		k := h.Variable.GetKey() // its strings outlive this call, those of key do not
		c.Touched(k.GetTenant(), k.GetSession())
	}
	size := binary.BigEndian.Uint32(h.Encoded)
	a.Block = append(a.Block, h.Encoded[4:4+size]...)
	a.Block = append(a.Block, 0, byte(len(outrigger.HeaderAge)))
	a.Block = append(a.Block, outrigger.HeaderAge...)
	at := len(a.Block)
	a.Block = strconv.AppendInt(append(a.Block, 0), max(0, milliseconds(h.Age)), 10)
	a.Block[at] = byte(len(a.Block) - at - 1)
	a.Body = h.Encoded[4+size:]
	a.Trailer = unsafe.Slice(unsafe.StringData(trailerOK), len(trailerOK)) // is not changed
	return true
}

// readCall is what a read asks for; its slices are of the message.
type readCall struct{ tenant, session, name []byte }

// scanRead reads the message of a read with its gRPC prefix. It declines what a plain
// read does not have, also what is malformed: the slow path has the error for it.
func scanRead(class int, b []byte) (r readCall, ok bool) {
	if len(b) < 5 || b[0] != 0 || binary.BigEndian.Uint32(b[1:]) != uint32(len(b)-5) {
		return r, false
	}
	fields := [4]*[]byte{1: &r.tenant, 2: &r.session, 3: &r.name}
	if class == EncodingBridge {
		fields = [4]*[]byte{1: &r.session, 2: &r.name}
	}
	for b = b[5:]; len(b) > 0; {
		number := b[0] >> 3
		if b[0]&7 != 2 || number == 0 || number > 3 || fields[number] == nil || len(b) < 2 {
			return r, false
		}
		n := int(b[1])
		b = b[2:]
		if n >= 0x80 || n > len(b) { // longer names are rare
			return r, false
		}
		if *fields[number] != nil { // twice: nothing below would look at the first
			return r, false
		}
		*fields[number], b = b[:n], b[n:]
	}
	if len(r.tenant) == 0 {
		r.tenant = unsafe.Slice(unsafe.StringData(outrigger.DefaultTenant), len(outrigger.DefaultTenant))
	}
	return r, plainName(r.tenant) && plainName(r.session) && plainName(r.name) && !looksLikeID(r.name)
}

// plainName reports whether a name needs no check but this.
func plainName(name []byte) bool {
	for _, c := range name {
		if c <= 0x20 || c > 0x7e || c == '/' {
			return false
		}
	}
	return len(name) > 0
}
