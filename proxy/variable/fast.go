package variable

import (
	"encoding/binary"
	"net/http"
	"strconv"
	"unsafe"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// Hits is the allocation-free part of the cache; *cache.Store has it.
type Hits interface {
	Hit(key string, encoding int) (cache.Hit, bool)
}

// EncodeHTTP renders a variable as the REST answer to a GET, except for what differs
// from answer to answer: four bytes (big endian) with the length of the head fields,
// then the fields, then the body. It is an encoder of package cache; nil means that the
// variable cannot be rendered, which the slow path will report.
func EncodeHTTP(v *pb.Variable) []byte { return encodeHTTP(v, "") }

// encodeHTTP adds a session token, if there is one.
func encodeHTTP(v *pb.Variable, token string) []byte {
	body, err := rest.VariableJSON(v)
	if err != nil {
		return nil
	}
	head := make([]byte, 4, 512+len(body))
	field := func(name, value string) {
		head = http1.AppendField(head, http.CanonicalHeaderKey(name), value)
	}
	counter := strconv.Itoa(int(v.GetVersion().GetCounter()))
	field("content-type", "application/json")
	field("cache-control", "no-store")
	field("etag", strconv.Quote(counter))
	field(outrigger.HeaderVersion, counter)
	field(outrigger.HeaderDot, wire.Dot(v.GetVersion().GetDot()).String())
	if token != "" {
		field(outrigger.HeaderToken, token)
	}
	field(outrigger.HeaderTier, outrigger.TierProcess.String())
	field(outrigger.HeaderFeed, "live")
	head = http1.AppendLength(head, int64(len(body)))
	binary.BigEndian.PutUint32(head, uint32(len(head)-4))
	return append(head, body...)
}

// Fast answers GET /v1/variables/{session}/{name} from the process tier without an
// allocation. It declines whatever asks for more than a plain, current read of the
// default tenant: other methods, queries, escapes, names in the form of an id, any
// x-outrigger-* or conditional field. Encoding is the index EncodeHTTP has among the
// cache's encoders.
type Fast struct {
	Hits     Hits
	Encoding int
	Counters *Counters
	Touched  func(tenant, session string) // may be nil
}

const (
	variablesPath = "/v1/variables/"
	maxFastPath   = 2*outrigger.MaxNameBytes + 1
)

// Serve has the form package loop asks for.
func (f *Fast) Serve(req *http1.Request, dst []byte) ([]byte, bool) {
	path := req.Path()
	if string(req.Method()) != http.MethodGet || len(path) <= len(variablesPath) ||
		string(path[:len(variablesPath)]) != variablesPath || req.Query() != nil {
		return dst, false
	}
	// The key is built behind the answers that wait in dst, because a buffer of this frame
	// would escape through the interface; what follows overwrites it.
	scratch, ok := appendKey(dst, path[len(variablesPath):])
	if !ok || special(req) {
		return dst, false
	}
	key := scratch[len(dst):]
	h, ok := f.Hits.Hit(unsafe.String(unsafe.SliceData(key), len(key)), f.Encoding)
	if !ok || len(h.Encoded) < 4 {
		return dst, false
	}
	f.Counters.Process.Add(1)
	if f.Touched != nil {
		k := h.Variable.GetKey() // its strings outlive this call, those of key do not
		f.Touched(k.GetTenant(), k.GetSession())
	}
	head, body := h.Encoded[4:4+binary.BigEndian.Uint32(h.Encoded)], h.Encoded[4+binary.BigEndian.Uint32(h.Encoded):]
	dst = http1.AppendStatus(dst, http.StatusOK)
	dst = append(dst, head...)
	dst = append(dst, "X-Outrigger-Age: "...)
	dst = strconv.AppendInt(dst, max(0, h.Age.Milliseconds()), 10)
	dst = append(dst, "\r\n"...)
	if req.Date != nil {
		dst = http1.AppendDate(dst, req.Date)
	}
	dst = append(dst, "\r\n"...)
	return append(dst, body...), true
}

// appendKey turns "session/name" into the cache's key in the default tenant.
func appendKey(dst, rest []byte) ([]byte, bool) {
	if len(rest) > maxFastPath {
		return nil, false
	}
	slash := -1
	for i, c := range rest {
		switch {
		case c == '%' || c == '+' || c < 0x21 || c > 0x7e:
			return nil, false
		case c == '/' && slash >= 0:
			return nil, false // a route below the variable, such as its history
		case c == '/':
			slash = i
		}
	}
	if slash <= 0 || slash == len(rest)-1 || looksLikeID(rest[slash+1:]) {
		return nil, false
	}
	dst = append(dst, outrigger.DefaultTenant...)
	dst = append(dst, '/')
	return append(dst, rest...), true
}

// looksLikeID reports whether a name may be an id (var_<name>_<n>), which takes two
// look-ups to decide.
func looksLikeID(name []byte) bool {
	return len(name) > 4 && string(name[:4]) == "var_"
}

// special reports whether a field asks for more than a plain read.
func special(req *http1.Request) bool {
	for i := range req.Len() {
		name, _ := req.Field(i)
		if len(name) < 3 {
			continue
		}
		switch name[0] | 0x20 {
		case 'x':
			if hasPrefixFold(name, "x-outrigger-") {
				return true
			}
		case 'i':
			if hasPrefixFold(name, "if-") {
				return true
			}
		}
	}
	return false
}

// hasPrefixFold is strings.HasPrefix for ASCII without regard to case; prefix is lower
// case.
func hasPrefixFold(b []byte, prefix string) bool {
	if len(b) < len(prefix) {
		return false
	}
	for i := range len(prefix) {
		c := b[i]
		if c >= 'A' && c <= 'Z' {
			c |= 0x20
		}
		if c != prefix[i] {
			return false
		}
	}
	return true
}
