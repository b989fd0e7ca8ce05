package variable

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// oneHit is a process tier with one variable.
type oneHit struct {
	key     string
	v       *pb.Variable
	encoded []byte
}

func (o *oneHit) Hit(key string, _ int) (cache.Hit, bool) {
	if key != o.key {
		return cache.Hit{}, false
	}
	return cache.Hit{Variable: o.v, Encoded: o.encoded, Age: 12 * time.Millisecond}, true
}

func temperature() *oneHit {
	v := &pb.Variable{Id: "var_temperature_1", Key: &pb.Key{Tenant: "default", Session: "shop", Name: "temperature"},
		Value: &pb.Value{Type: "float", Json: []byte("0.7")}, Version: &pb.Version{Counter: 3, Dot: &pb.Dot{Region: "eu", Incarnation: 5, Position: 9}}}
	return &oneHit{key: "default/shop/temperature", v: v, encoded: EncodeHTTP(v)}
}

func parse(t testing.TB, raw string) *http1.Request {
	t.Helper()
	var req http1.Request
	var seen int
	if _, err := req.Parse([]byte(raw), &seen, http1.Limits{}); err != nil {
		t.Fatalf("%q: %v", raw, err)
	}
	req.Date = []byte("Sun, 06 Nov 1994 08:49:37 GMT")
	return &req
}

// The fast answer is what net/http reads as a whole answer, and says the same as the
// slow one: status, body, type, ETag, and where it came from.
func TestFastAnswer(t *testing.T) {
	hits := temperature()
	var touched []string
	f := &Fast{Hits: hits, Counters: new(Counters), Touched: func(tenant, session string) { touched = append(touched, tenant+"/"+session) }}
	req := parse(t, "GET /v1/variables/shop/temperature HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n")
	raw, ok := f.Serve(req, nil)
	if !ok {
		t.Fatal("declined")
	}
	got, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(raw)), nil)
	if err != nil {
		t.Fatalf("%v in %q", err, raw)
	}
	body, err := io.ReadAll(got.Body)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	rest.Register(mux, rest.VariableRoutes(NewNative(Options{Reader: fixed{hits.v}})), nil)
	slow := httptest.NewRecorder()
	mux.ServeHTTP(slow, httptest.NewRequest("GET", "/v1/variables/shop/temperature", nil))
	if got.StatusCode != slow.Code || string(body) != slow.Body.String() {
		t.Errorf("fast %d %q\nslow %d %q", got.StatusCode, body, slow.Code, slow.Body)
	}
	for _, h := range []string{"content-type", "etag", "cache-control", outrigger.HeaderTier, outrigger.HeaderVersion, outrigger.HeaderDot, outrigger.HeaderFeed} {
		if got.Header.Get(h) != slow.Header().Get(h) || got.Header.Get(h) == "" {
			t.Errorf("%s: fast %q, slow %q", h, got.Header.Get(h), slow.Header().Get(h))
		}
	}
	if got.Header.Get(outrigger.HeaderAge) != "12" || got.Header.Get("date") == "" {
		t.Errorf("age %q, date %q", got.Header.Get(outrigger.HeaderAge), got.Header.Get("date"))
	}
	if f.Counters.Process.Load() != 1 || len(touched) != 1 || touched[0] != "default/shop" {
		t.Errorf("counted %d, touched %v", f.Counters.Process.Load(), touched)
	}
}

// fixed is a Reader that always answers with one variable from the process tier.
type fixed struct{ v *pb.Variable }

func (f fixed) Get(context.Context, cache.Request) (cache.Answer, error) {
	return cache.Answer{Found: true, SessionExists: true, Variable: f.v, Tier: outrigger.TierProcess, FeedLive: true}, nil
}

// Everything that is not a plain read of a variable is left to the slow path.
func TestFastDeclines(t *testing.T) {
	f := &Fast{Hits: temperature(), Counters: new(Counters)}
	decline := func(target, method, fields string) {
		t.Helper()
		raw, ok := f.Serve(parse(t, method+" "+target+" HTTP/1.1\r\nHost: x\r\n"+fields+"\r\n"), []byte("kept"))
		if ok || string(raw) != "kept" {
			t.Errorf("%s %s %q: answered %q", method, target, fields, raw)
		}
	}
	const ours = "/v1/variables/shop/temperature"
	decline(ours, "HEAD", "")
	decline(ours, "DELETE", "")
	decline(ours+"?tenant=other", "GET", "")
	decline(ours+"/history", "GET", "")
	decline("/v1/variables/shop", "GET", "")
	decline("/v1/variables/shop/", "GET", "")
	decline("/v1/variables//temperature", "GET", "")
	decline("/v1/variables/shop/temp%65rature", "GET", "")
	decline("/v1/variables/shop/var_temperature_1", "GET", "")
	decline("/v1/variables/shop/other", "GET", "")
	decline("/v1/variables/shop/"+strings.Repeat("n", 600), "GET", "")
	decline("/v1/models", "GET", "")
	decline(ours, "GET", "X-Outrigger-Consistency: strong\r\n")
	decline(ours, "GET", "x-OUTRIGGER-tenant: other\r\n")
	decline(ours, "GET", "If-None-Match: \"3\"\r\n")
}

// A hit allocates nothing.
func TestFastAllocations(t *testing.T) {
	f := &Fast{Hits: temperature(), Counters: new(Counters)}
	req := parse(t, "GET /v1/variables/shop/temperature HTTP/1.1\r\nHost: localhost:50051\r\nUser-Agent: app\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(1000, func() {
		if _, ok := f.Serve(req, buf); !ok {
			t.Fatal("declined")
		}
	}); n != 0 {
		t.Errorf("%v allocations per hit", n)
	}
}

// BenchmarkFast is a hit without the socket: look-up stub, head and body.
func BenchmarkFast(b *testing.B) {
	f := &Fast{Hits: temperature(), Counters: new(Counters)}
	req := parse(b, "GET /v1/variables/shop/temperature HTTP/1.1\r\nHost: localhost:50051\r\nUser-Agent: app\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := f.Serve(req, buf); !ok {
			b.Fatal("declined")
		}
	}
}
